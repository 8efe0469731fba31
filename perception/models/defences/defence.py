"""What every defence offers: something that is done to the features of one scene before they leave a vehicle.

    features of the encoder ── send ── what is uploaded ── codec ── … ── restore ── features for the decoder
                └───────────── compute ──────────────────────────────────────────────────────┘

`send` runs on the vehicle, `restore` on the server. `compute` is what the network itself sees where nothing is uploaded: a vehicle that
detects objects for its own use neither drops cells nor adds noise. A defence is a layer of the encoder (`encoders/defended.py`), so its
settings and weights are part of the encoder file and of the encoder fingerprint, and labeled scans on the server pass the same defence.

No defence makes an upload harmless. `upcycle3d audit` measures what each of them leaves.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor, nn

from ....core.cut import CutSpec
from ....core.features import CutFeatures, Keypoints


class DefenceFactory(Protocol):
    """The configuration of a defence: a frozen dataclass of plain values that can build it."""

    def build(self, spec: CutSpec) -> Defence:
        """Make the defence with fresh weights.

        Args:
            spec: The cut whose features it is given.

        Returns:
            The defence.
        """
        ...


class Defence(nn.Module, ABC):
    """Changes the features of one scene on the vehicle, and makes features for the decoder of them on the server."""

    sends_everywhere: bool = True
    """False where whole places are left out, so that an empty cell does not mean that nothing is there."""

    def __init__(self, spec: CutSpec) -> None:
        """Keep the cut.

        Args:
            spec: The cut whose features are given to `send`.
        """
        super().__init__()
        self.spec = spec

    @property
    def upload_spec(self) -> CutSpec:
        """The shape of what `send` returns."""
        return self.spec

    @abstractmethod
    def send(self, features: CutFeatures, rng: np.random.Generator) -> CutFeatures:
        """Compute what leaves the vehicle.

        Args:
            features: One scene with the shape `spec`.
            rng: Where random numbers are drawn from.

        Returns:
            One scene with the shape `upload_spec`.
        """

    def restore(self, uploaded: CutFeatures) -> CutFeatures:
        """Turn what was sent into features for the decoder.

        Args:
            uploaded: A batch with the shape `upload_spec`.

        Returns:
            A batch with the shape `spec`.
        """
        return uploaded

    def compute(self, features: CutFeatures) -> CutFeatures:
        """Compute what the network sees where nothing is uploaded.

        Args:
            features: A batch with the shape `spec`.

        Returns:
            A batch of the same shape, without random numbers and with every cell.
        """
        return features


def keep_cells(features: CutFeatures, cells: Tensor, keypoints: Tensor | None) -> CutFeatures:
    """Select cells and keypoints of one scene.

    Args:
        features: One scene.
        cells: (M,) bool of the cells, or their rows.
        keypoints: (K,) bool of the keypoints, or their rows; None where the cut has none.

    Returns:
        The scene with these cells and keypoints.
    """
    voxels = replace(features.voxels, features=features.voxels.features[cells], coords=features.voxels.coords[cells])
    chosen = features.keypoints
    if chosen is not None and keypoints is not None:
        chosen = chosen.select(keypoints)
    return replace(features, voxels=voxels, keypoints=chosen)


def bev_cells(keypoints: Keypoints, spec: CutSpec) -> Tensor:
    """Find the BEV cell of the cut that each keypoint lies in.

    Args:
        keypoints: Keypoints of one scene.
        spec: The cut.

    Returns:
        (K, 2) int64 row and column, clamped to the map.
    """
    x, y = spec.cell_size()
    start = keypoints.xyz.new_tensor(spec.grid.range[:2])
    column_row = ((keypoints.xyz[:, :2] - start) / keypoints.xyz.new_tensor([x, y])).floor().long()
    limits = column_row.new_tensor([spec.shape[2] - 1, spec.shape[1] - 1])
    return column_row.clamp(column_row.new_zeros(2), limits).flip(1)


def uniform(rng: np.random.Generator, shape: int | tuple[int, ...], like: Tensor) -> Tensor:
    """Draw numbers in 0..1.

    Args:
        rng: Where they are drawn from.
        shape: Their shape.
        like: Gives the device.

    Returns:
        Float32 numbers.
    """
    return torch.from_numpy(rng.random(shape, dtype=np.float32)).to(like.device)


def normal(rng: np.random.Generator, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """Draw standard normal numbers.

    Args:
        rng: Where they are drawn from.
        shape: Their shape.
        like: Gives the device.

    Returns:
        Float32 numbers.
    """
    return torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)).to(like.device)
