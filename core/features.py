"""Features at the cut inside a network: batched, live and differentiable.

    PointCloud ── encoder ── CutFeatures ─┬─ decoder ── Predictions
                                          └─ SmashedScene: the features of one frame at rest (`smashed_scene.py`)

There are two kinds of features: sparse voxels, which every detector has, and keypoints, which PV-RCNN has too. Sparse coordinates
are (batch, z, y, x). `perception/vehicle/` makes smashed scenes of live features, `perception/server/` turns them back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .config_json import config_to_json, first_difference
from .cut import CutSpec, cell_index
from .errors import InvalidInput, require
from .ledger import Ledger
from .tensor_value import TensorValue, shape_of


@dataclass(frozen=True, kw_only=True)
class VoxelCounts:
    """What became of the points of one scan when they were sorted into voxels."""

    points: int
    """Points of the scan."""

    points_outside: int
    """Points outside the grid."""

    cells: int
    """Cells that hold a point, those over the limit included."""

    cells_over_limit: int
    """Cells that hold a point and became no voxel, because the scan has more of them than the voxel limit."""

    def ledger(self, reading: Ledger | None = None) -> Ledger:
        """Give all counts of one scan: what its reader counted, and what the grid did.

        Args:
            reading: What the reader counted (`Frame.reading`). Points and scans that it did not count are counted here, so that the
                shares of the result have their whole.

        Returns:
            The counts of one scan.
        """
        reading = Ledger() if reading is None else reading
        return reading + Ledger(
            scans=0 if reading.scans else 1,
            scans_without_points=int(self.points == self.points_outside and not reading.scans_without_points),
            points=0 if reading.points else self.points,
            points_outside_range=self.points_outside,
            cells=self.cells,
            cells_over_limit=self.cells_over_limit,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseVoxels(TensorValue):
    """A sparse 3D tensor of a batch."""

    features: Tensor
    """(M, C) float."""

    coords: Tensor
    """(M, 4) int32 batch, z, y, x, without repeats."""

    shape: tuple[int, int, int]
    """Cells along z, y, x."""

    batch_size: int
    """Number of scenes. It cannot be read from `coords`, because the last scene may be empty."""

    counts: tuple[VoxelCounts, ...] = ()
    """For voxels that were made from scans, what became of the points of each scene's scan. Empty where nobody counted, as for features
    that come from a store."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.features, Tensor) and isinstance(self.coords, Tensor),
            f"SparseVoxels needs tensors, found {shape_of(self.features)} and {shape_of(self.coords)}",
        )
        m = self.features.shape[0]
        require(self.features.ndim == 2, f"SparseVoxels.features must be (M, C), found {shape_of(self.features)}")
        require(
            self.coords.shape == (m, 4) and self.coords.dtype == torch.int32,
            f"SparseVoxels.coords must be ({m}, 4) int32 (batch, z, y, x), found {shape_of(self.coords)}",
        )
        require(
            len(self.counts) in (0, self.batch_size),
            f"SparseVoxels.counts must have one entry for each of the {self.batch_size} scenes or none, found {len(self.counts)}",
        )

    def sorted(self) -> SparseVoxels:
        """Order the voxels ascending in (batch, z, y, x)."""
        order = (self.coords[:, 0].long() * math.prod(self.shape) + cell_index(self.coords[:, 1:], self.shape)).argsort()
        return replace(self, features=self.features[order], coords=self.coords[order])

    def starts(self) -> tuple[int, ...]:
        """Give the B + 1 row bounds of the scenes, for voxels whose scenes lie in order."""
        ends = torch.bincount(self.coords[:, 0], minlength=self.batch_size).cumsum(0)
        return (0, *ends.tolist())

    def scene(self, index: int) -> SparseVoxels:
        """Take one scene out of the batch.

        Args:
            index: Number of the scene in the batch.

        Returns:
            The scene as a batch of one.
        """
        mask = self.coords[:, 0] == index
        coords = self.coords[mask].clone()
        coords[:, 0] = 0
        return replace(self, features=self.features[mask], coords=coords, batch_size=1, counts=self.counts[index : index + 1])

    def dense(self) -> Tensor:
        """Fill in the empty cells: (B, C, Z, Y, X), zeros where no voxel is. Differentiable; voxels must not repeat."""
        z, y, x = self.shape
        c = self.coords.long()
        index = ((c[:, 0] * z + c[:, 1]) * y + c[:, 2]) * x + c[:, 3]
        flat = self.features.new_zeros(self.batch_size * z * y * x, self.features.shape[1])
        flat = flat.index_put((index,), self.features)
        return flat.view(self.batch_size, z, y, x, -1).permute(0, 4, 1, 2, 3).contiguous()

    @staticmethod
    def collate(parts: Sequence[SparseVoxels]) -> SparseVoxels:
        """Join several batches.

        Args:
            parts: At least one batch; all of one grid.

        Returns:
            One batch with all scenes, in order.
        """
        coords, start = [], 0
        for part in parts:
            shifted = part.coords.clone()
            shifted[:, 0] += start
            coords.append(shifted)
            start += part.batch_size
        features = torch.cat([p.features for p in parts])
        counted = all(len(p.counts) == p.batch_size for p in parts)
        counts = tuple(c for p in parts for c in p.counts) if counted else ()
        return replace(parts[0], features=features, coords=torch.cat(coords), batch_size=start, counts=counts)


@dataclass(frozen=True, kw_only=True, repr=False)
class Keypoints(TensorValue):
    """A few points of each scene of a batch, with features of their surroundings."""

    xyz: Tensor
    """(K, 3) float32 x, y, z in meters, scene by scene."""

    features: Tensor
    """(K, C) float."""

    starts: tuple[int, ...]
    """B + 1 row bounds of the scenes. A scene with fewer points than the wanted number of keypoints has fewer keypoints."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.features, Tensor) and isinstance(self.xyz, Tensor),
            f"Keypoints needs tensors, found {shape_of(self.xyz)} and {shape_of(self.features)}",
        )
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
        """Number of scenes."""
        return len(self.starts) - 1

    def scene(self, index: int) -> Keypoints:
        """Take one scene out of the batch.

        Args:
            index: Number of the scene in the batch.

        Returns:
            The scene as a batch of one.
        """
        rows = slice(self.starts[index], self.starts[index + 1])
        return Keypoints(xyz=self.xyz[rows], features=self.features[rows], starts=(0, rows.stop - rows.start))

    def select(self, mask_or_index: Tensor) -> Keypoints:
        """Select keypoints of a batch of one.

        Args:
            mask_or_index: (K,) bool, or int64 rows in the wanted order.

        Returns:
            The keypoints selected.

        Raises:
            InvalidInput: The batch has several scenes, or none.
        """
        require(self.batch_size == 1, f"keypoints are selected from one scene at a time, found a batch of {self.batch_size}")
        features = self.features[mask_or_index]
        return Keypoints(xyz=self.xyz[mask_or_index], features=features, starts=(0, features.shape[0]))

    @staticmethod
    def collate(parts: Sequence[Keypoints]) -> Keypoints:
        """Join several batches.

        Args:
            parts: At least one batch.

        Returns:
            One batch with all scenes, in order.
        """
        starts = [0]
        for part in parts:
            starts += [starts[-1] + s for s in part.starts[1:]]
        return Keypoints(
            xyz=torch.cat([p.xyz for p in parts]), features=torch.cat([p.features for p in parts]), starts=tuple(starts)
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class CutFeatures(TensorValue):
    """What an encoder returns and a decoder takes."""

    voxels: SparseVoxels
    """Features of the occupied cells of the cut."""

    spec: CutSpec
    """The cut they belong to."""

    keypoints: Keypoints | None = None
    """Features of the keypoints, None where the cut has none."""

    def __post_init__(self) -> None:
        found = (self.voxels.features.shape[1], self.voxels.shape)
        require(
            found == (self.spec.channels, self.spec.shape),
            f"the features do not fit the cut {self.spec.layer!r}: expected (channels, shape) "
            f"{(self.spec.channels, self.spec.shape)}, found {found}",
        )
        wanted = self.spec.keypoints
        if self.keypoints is None or wanted is None:
            require(
                self.keypoints is None and wanted is None,
                f"the cut {self.spec.layer!r} has {'no' if wanted is None else wanted.count} keypoints, but the features have "
                f"{'none' if self.keypoints is None else 'some'}; encode with an encoder of this cut",
            )
            return
        size = (self.keypoints.features.shape[1], self.keypoints.batch_size)
        require(
            size == (wanted.channels, self.voxels.batch_size),
            f"the keypoints do not fit: expected (channels, scenes) {(wanted.channels, self.voxels.batch_size)}, found {size}",
        )

    @property
    def batch_size(self) -> int:
        """Number of scenes."""
        return self.voxels.batch_size

    def scene(self, index: int) -> CutFeatures:
        """Take one scene out of the batch.

        Args:
            index: Number of the scene in the batch.

        Returns:
            The scene as a batch of one.
        """
        keypoints = None if self.keypoints is None else self.keypoints.scene(index)
        return replace(self, voxels=self.voxels.scene(index), keypoints=keypoints)

    @staticmethod
    def collate(scenes: Sequence[CutFeatures]) -> CutFeatures:
        """Join several batches.

        Args:
            scenes: At least one batch; all of one cut.

        Returns:
            One batch with all scenes, in order.

        Raises:
            InvalidInput: There is no batch, or the cuts differ.
        """
        require(len(scenes) > 0, "CutFeatures.collate needs at least one scene")
        spec = scenes[0].spec
        for number, scene in enumerate(scenes):
            if scene.spec != spec:
                difference = first_difference(
                    config_to_json(spec), config_to_json(scene.spec), names=("the first has", f"number {number} has")
                )
                raise InvalidInput(
                    f"features of different cuts cannot be one batch; {difference}; use one encoder for all scenes"
                )
        keypoints = [s.keypoints for s in scenes if s.keypoints is not None]
        return CutFeatures(
            voxels=SparseVoxels.collate([s.voxels for s in scenes]),
            spec=spec,
            keypoints=Keypoints.collate(keypoints) if keypoints else None,
        )
