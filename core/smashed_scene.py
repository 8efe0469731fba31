"""Features at rest."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cut import CutSpec, cell_index
from .errors import require
from .structures import TensorValue, shape_of

SMASHED_SCHEMA_VERSION = 2  # 2: keypoints


@dataclass(frozen=True, kw_only=True, repr=False)
class SmashedScene(TensorValue):
    """One scene's features at rest: what a vehicle hands over.

    There is no field for a raw point, a time, a pose or a vehicle, on purpose. ``scene_id`` is random.
    coords: (M, 3) int32 z, y, x, ascending and unique. features: (M, C) float32, after the codec's round trip if it was read.
    keypoint_cells: (K, 3) int32 z, y, x of the *input* grid, unique, in the encoder's order; a keypoint is the centre of its cell.
    keypoint_features: (K, C'). Both empty where the cut has no keypoints.
    codec: how features are stored ("fp16", "int8"). encoder_fingerprint: SHA-256 of the encoder that made it.
    """

    spec: CutSpec
    coords: Tensor
    features: Tensor
    codec: str
    encoder_fingerprint: str
    scene_id: str
    keypoint_cells: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int32))
    keypoint_features: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    schema_version: int = SMASHED_SCHEMA_VERSION

    def __post_init__(self) -> None:
        limit = self.spec.keypoints
        require(
            limit is None or limit.source == "voxel_centers",
            "the keypoints of this cut are raw points of the scan; a smashed scene holds none. Encode with keypoint_source "
            "'voxel_centers'",
        )
        self._check_cells("", self.coords, self.features, self.spec.shape, self.spec.channels)
        index = cell_index(self.coords, self.spec.shape)
        require(bool((index[1:] > index[:-1]).all()), "SmashedScene.coords must be unique and ascending in (z, y, x)")
        self._check_cells(
            "keypoint_", self.keypoint_cells, self.keypoint_features, self.spec.grid.shape, limit.channels if limit else 0
        )
        require(
            len(self.keypoint_cells) <= (limit.count if limit else 0),
            f"the cut allows {limit.count if limit else 0} keypoints a scene, found {len(self.keypoint_cells)}",
        )
        index = cell_index(self.keypoint_cells, self.spec.grid.shape)
        require(len(index.unique()) == len(index), "SmashedScene.keypoint_cells must be unique")

    @staticmethod
    def _check_cells(prefix: str, cells: Tensor, features: Tensor, shape: tuple[int, int, int], channels: int) -> None:
        name, m = f"SmashedScene.{prefix}", features.shape[0]
        require(
            features.shape == (m, channels) and features.is_floating_point(),
            f"{name}features must be (M, {channels}) float, found {shape_of(features)}",
        )
        require(
            cells.shape == (m, 3) and cells.dtype == torch.int32,
            f"{name}{'cells' if prefix else 'coords'} must be ({m}, 3) int32 cells (z, y, x), found {shape_of(cells)}; raw points "
            "cannot be stored",
        )
        if m:
            require(
                bool((cells >= 0).all() and (cells < torch.tensor(shape, dtype=torch.int32)).all()),
                f"{name}{'cells' if prefix else 'coords'} leave the grid {shape}: found {cells.amin(0).tolist()} to {cells.amax(0).tolist()}",
            )
            require(
                bool(torch.isfinite(features).all()),
                f"{name}features hold NaN or inf; the encoder or its input is broken",
            )
