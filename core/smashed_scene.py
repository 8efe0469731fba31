"""A smashed scene: the features of one frame at rest, as they leave a vehicle.

It has no field for a raw point, a time, a pose or a vehicle, on purpose, and it refuses coordinates that are not whole cells of a
grid: a raw point cannot be stored in it. Read next: `perception/wire/codec.py`, its bytes.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .cut import CutSpec, cell_index
from .errors import InvalidInput, require
from .tensor_value import TensorValue, shape_of

SMASHED_SCHEMA_VERSION = 2
"""Version of the fields of `SmashedScene`, stored with every scene. Version 2 added keypoints."""


@dataclass(frozen=True, kw_only=True, repr=False)
class SmashedScene(TensorValue):
    """The features of one frame, checked completely when they are made."""

    spec: CutSpec
    """The cut they belong to."""

    coords: Tensor
    """(M, 3) int32 cells z, y, x of the cut, ascending and unique."""

    features: Tensor
    """(M, C) float32 features of the cells; of a scene that was read, they are rounded by the codec."""

    codec: str
    """How features are stored: "fp16" or "int8"."""

    encoder_fingerprint: str
    """SHA-256 of encoder and rig, 64 hexadecimal digits."""

    scene_id: str
    """Random name, 32 hexadecimal digits."""

    keypoint_cells: Tensor = field(default_factory=lambda: torch.zeros(0, 3, dtype=torch.int32))
    """(K, 3) int32 voxels z, y, x of the *input* grid, unique, in the encoder's order; a keypoint is the center of its voxel.
    Empty where the cut has no keypoints."""

    keypoint_features: Tensor = field(default_factory=lambda: torch.zeros(0, 0))
    """(K, C') float32 features of the keypoints. Empty where the cut has no keypoints."""

    schema_version: int = SMASHED_SCHEMA_VERSION
    """Version of these fields."""

    def __post_init__(self) -> None:
        keypoints = self.spec.keypoints
        limit, channels = (keypoints.count, keypoints.channels) if keypoints else (0, 0)
        require(
            keypoints is None or keypoints.source == "voxel_centers",
            "the keypoints of this cut are raw points of the scan; a smashed scene holds none. Encode with keypoint_source "
            "'voxel_centers'",
        )
        _check_cells("coords", self.coords, "features", self.features, self.spec.shape, self.spec.channels)
        index = cell_index(self.coords, self.spec.shape)
        require(bool((index[1:] > index[:-1]).all()), "SmashedScene.coords must be unique and ascending in (z, y, x)")
        grid = self.spec.grid.shape
        _check_cells("keypoint_cells", self.keypoint_cells, "keypoint_features", self.keypoint_features, grid, channels)
        require(
            len(self.keypoint_cells) <= limit,
            f"the cut allows {limit} keypoints per scene, found {len(self.keypoint_cells)}",
        )
        index = cell_index(self.keypoint_cells, grid)
        require(len(index.unique()) == len(index), "SmashedScene.keypoint_cells must be unique")


def _check_cells(
    cells_name: str, cells: Tensor, features_name: str, features: Tensor, shape: tuple[int, int, int], channels: int
) -> None:
    """Refuse cells outside a grid of `shape`, and features that are not `channels` finite numbers per cell."""
    cells_name, features_name, m = f"SmashedScene.{cells_name}", f"SmashedScene.{features_name}", len(features)
    require(
        isinstance(features, Tensor) and features.shape == (m, channels) and features.is_floating_point(),
        f"{features_name} must be (M, {channels}) float, found {shape_of(features)}",
    )
    require(
        isinstance(cells, Tensor) and cells.shape == (m, 3) and cells.dtype == torch.int32,
        f"{cells_name} must be ({m}, 3) int32 cells (z, y, x), found {shape_of(cells)}; raw points cannot be stored",
    )
    if m == 0:
        return
    if not (cells >= 0).all() or not (cells < torch.tensor(shape, dtype=torch.int32)).all():
        low, high = cells.amin(0).tolist(), cells.amax(0).tolist()
        raise InvalidInput(f"{cells_name} leave the grid {shape}: found {low} to {high}")
    require(bool(torch.isfinite(features).all()), f"{features_name} hold NaN or inf; the encoder or its input is broken")
