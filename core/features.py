"""Features at the cut: live in a network, and at rest in a smashed scene; see ``structures.py`` for what surrounds them.

    PointCloud ── encoder ── CutFeatures ─┬─ decoder ── Predictions
                                            └─ SmashedScene: the same at rest, on disk and on the wire

Two kinds of features: sparse voxels of every detector and, of PV-RCNN, keypoints. Sparse coordinates are (batch, z, y, x). Only ``vehicle/`` makes a smashed scene from live features, only ``server/`` turns it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cut import CutSpec, cell_index
from .errors import require
from .structures import TensorValue, shape_of


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseVoxels(TensorValue):
    """A sparse 3D tensor of a batch.

    features: (M, C) float. coords: (M, 4) int32 batch, z, y, x. shape: (z, y, x). batch_size is explicit, because the last
    scene may be empty.
    """

    features: Tensor
    coords: Tensor
    shape: tuple[int, int, int]
    batch_size: int

    def __post_init__(self) -> None:
        m = self.features.shape[0]
        require(self.features.ndim == 2, f"SparseVoxels.features must be (M, C), found {shape_of(self.features)}")
        require(
            self.coords.shape == (m, 4) and self.coords.dtype == torch.int32,
            f"SparseVoxels.coords must be ({m}, 4) int32 (batch, z, y, x), found {shape_of(self.coords)}",
        )

    def check_range(self) -> SparseVoxels:
        """Itself, after checking that every coordinate lies in the grid. Called once where coordinates come from outside."""
        if len(self.coords):
            low, high = self.coords.amin(0).tolist(), self.coords.amax(0).tolist()
            limit = (self.batch_size, *self.shape)
            require(
                min(low) >= 0 and all(h < s for h, s in zip(high, limit, strict=True)),
                f"voxel coordinates out of range: expected (batch, z, y, x) in 0..{limit}, found {low} to {high}; is the order z y x?",
            )
        return self

    def sorted(self) -> SparseVoxels:
        """The same voxels, ascending in (batch, z, y, x)."""
        order = (self.coords[:, 0].long() * math.prod(self.shape) + cell_index(self.coords[:, 1:], self.shape)).argsort()
        return replace(self, features=self.features[order], coords=self.coords[order])

    def starts(self) -> tuple[int, ...]:
        """B + 1 bounds of the scenes in the rows, for voxels whose scenes lie one after the other."""
        ends = torch.bincount(self.coords[:, 0], minlength=self.batch_size).cumsum(0)
        return (0, *ends.tolist())

    def scene(self, index: int) -> SparseVoxels:
        """Scene ``index`` alone, as a batch of one."""
        mask = self.coords[:, 0] == index
        coords = self.coords[mask].clone()
        coords[:, 0] = 0
        return replace(self, features=self.features[mask], coords=coords, batch_size=1)

    def dense(self) -> Tensor:
        """(B, C, Z, Y, X): zeros where no voxel is. Differentiable; duplicates are not allowed."""
        z, y, x = self.shape
        c = self.coords.long()
        index = ((c[:, 0] * z + c[:, 1]) * y + c[:, 2]) * x + c[:, 3]
        flat = self.features.new_zeros(self.batch_size * z * y * x, self.features.shape[1])
        flat = flat.index_put((index,), self.features)
        return flat.view(self.batch_size, z, y, x, -1).permute(0, 4, 1, 2, 3).contiguous()

    @staticmethod
    def collate(parts: Sequence[SparseVoxels]) -> SparseVoxels:
        """One batch of several, scenes in order; at least one part, all of one grid."""
        coords, start = [], 0
        for part in parts:
            shifted = part.coords.clone()
            shifted[:, 0] += start
            coords.append(shifted)
            start += part.batch_size
        features = torch.cat([p.features for p in parts])
        return replace(parts[0], features=features, coords=torch.cat(coords), batch_size=start)


@dataclass(frozen=True, kw_only=True, repr=False)
class Keypoints(TensorValue):
    """A few points that stand for each scene of a batch, with what a network knows about their surroundings.

    xyz: (K, 3) float32 m, the scenes one after the other. features: (K, C) float. starts: B + 1 bounds of the scenes in the rows; a
    scene with fewer points than keypoints asked for has fewer keypoints.
    """

    xyz: Tensor
    features: Tensor
    starts: tuple[int, ...]

    def __post_init__(self) -> None:
        k = self.features.shape[0]
        require(
            self.features.ndim == 2 and self.xyz.shape == (k, 3),
            f"Keypoints must be xyz (K, 3) and features (K, C), found {shape_of(self.xyz)} and {shape_of(self.features)}",
        )
        require(
            len(self.starts) > 1 and self.starts[0] == 0 and self.starts[-1] == k and sorted(self.starts) == list(self.starts),
            f"Keypoints.starts must rise from 0 to {k}, found {self.starts}",
        )

    @property
    def batch_size(self) -> int:
        return len(self.starts) - 1

    def scene(self, index: int) -> Keypoints:
        """Scene ``index`` alone, as a batch of one."""
        rows = slice(self.starts[index], self.starts[index + 1])
        return Keypoints(xyz=self.xyz[rows], features=self.features[rows], starts=(0, rows.stop - rows.start))

    def select(self, mask_or_index: Tensor) -> Keypoints:
        """The keypoints of a boolean mask or an index of a batch of one, in that order."""
        require(self.batch_size == 1, f"keypoints are selected from one scene at a time, found a batch of {self.batch_size}")
        features = self.features[mask_or_index]
        return Keypoints(xyz=self.xyz[mask_or_index], features=features, starts=(0, features.shape[0]))

    @staticmethod
    def collate(parts: Sequence[Keypoints]) -> Keypoints:
        """One batch of several, scenes in order; at least one part."""
        starts = [0]
        for part in parts:
            starts += [starts[-1] + s for s in part.starts[1:]]
        return Keypoints(
            xyz=torch.cat([p.xyz for p in parts]), features=torch.cat([p.features for p in parts]), starts=tuple(starts)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class CutFeatures(TensorValue):
    """Live, batched, differentiable features at the cut: what ``encode`` returns and ``decode`` takes."""

    voxels: SparseVoxels
    spec: CutSpec
    keypoints: Keypoints | None = None

    def __post_init__(self) -> None:
        found = (self.voxels.features.shape[1], self.voxels.shape)
        require(
            found == (self.spec.channels, self.spec.shape),
            f"features do not fit the cut {self.spec.layer!r}: expected (channels, shape) {(self.spec.channels, self.spec.shape)}, found {found}",
        )
        require(
            (self.keypoints is None) == (self.spec.keypoints is None),
            f"the cut {self.spec.layer!r} has {self.spec.keypoints}, the features have {self.keypoints}",
        )
        if self.keypoints is not None and self.spec.keypoints is not None:
            size = (self.keypoints.features.shape[1], self.keypoints.batch_size)
            require(
                size == (self.spec.keypoints.channels, self.voxels.batch_size),
                f"keypoints do not fit: expected (channels, scenes) {(self.spec.keypoints.channels, self.voxels.batch_size)}, found {size}",
            )

    @property
    def batch_size(self) -> int:
        return self.voxels.batch_size

    def scene(self, index: int) -> CutFeatures:
        """Scene ``index`` alone, as a batch of one."""
        keypoints = None if self.keypoints is None else self.keypoints.scene(index)
        return replace(self, voxels=self.voxels.scene(index), keypoints=keypoints)

    @staticmethod
    def collate(scenes: Sequence[CutFeatures]) -> CutFeatures:
        """One batch of several batches, scenes in order."""
        require(len(scenes) > 0, "CutFeatures.collate needs at least one scene")
        specs = {s.spec for s in scenes}
        require(len(specs) == 1, f"cannot batch features of different cuts: {specs}")
        keypoints = [s.keypoints for s in scenes if s.keypoints is not None]
        return CutFeatures(
            voxels=SparseVoxels.collate([s.voxels for s in scenes]),
            spec=scenes[0].spec,
            keypoints=Keypoints.collate(keypoints) if keypoints else None,
        )
