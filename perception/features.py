"""Features at the cut: live in a network, and at rest in a smashed scene; see ``structures.py`` for what surrounds them.

    PointCloud ── encoder ── SplitFeatures ─┬─ decoder ── Predictions
                                            └─ SmashedScene: the same at rest, on disk and on the wire

Sparse coordinates are (batch, z, y, x). Only ``vehicle/`` makes a smashed scene from live features, only ``server/`` turns it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .structures import Value, require, shape_of


@dataclass(frozen=True, kw_only=True)
class VoxelGrid:
    """A box of space cut into voxels.

    range: (x0, y0, z0, x1, y1, z1) m. voxel_size: (x, y, z) m. ``shape`` is (z, y, x) in voxels.
    """

    range: tuple[float, float, float, float, float, float]
    voxel_size: tuple[float, float, float]

    def __post_init__(self) -> None:
        require(all(v > 0 for v in self.voxel_size), f"VoxelGrid.voxel_size must be positive, found {self.voxel_size}")
        for axis in range(3):
            extent = (self.range[axis + 3] - self.range[axis]) / self.voxel_size[axis]
            require(
                extent > 0.5 and abs(extent - round(extent)) < 1e-3,
                f"VoxelGrid range {self.range} is not a positive whole number of voxels of {self.voxel_size} along {'xyz'[axis]} "
                f"({extent:.3f}); change the range or the voxel size",
            )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(z, y, x) number of voxels."""
        sizes = [round((self.range[a + 3] - self.range[a]) / self.voxel_size[a]) for a in (2, 1, 0)]
        return (sizes[0], sizes[1], sizes[2])


@dataclass(frozen=True, kw_only=True, repr=False)
class SparseVoxels(Value):
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


@dataclass(frozen=True, kw_only=True)
class SplitSpec:
    """Where a network is cut: the layer whose output leaves the vehicle.

    stride is (z, y, x) input voxels per cell of the cut; shape is the sparse grid (z, y, x) at the cut.
    """

    layer: str
    channels: int
    stride: tuple[int, int, int]
    shape: tuple[int, int, int]
    grid: VoxelGrid

    def cell_size(self) -> tuple[float, float]:
        """(x, y) metres of one bird's-eye-view cell."""
        return (self.grid.voxel_size[0] * self.stride[2], self.grid.voxel_size[1] * self.stride[1])


@dataclass(frozen=True, kw_only=True, repr=False)
class SplitFeatures(Value):
    """Live, batched, differentiable features at the cut: what ``encode`` returns and ``decode`` takes."""

    voxels: SparseVoxels
    spec: SplitSpec

    def __post_init__(self) -> None:
        found = (self.voxels.features.shape[1], self.voxels.shape)
        require(
            found == (self.spec.channels, self.spec.shape),
            f"features do not fit the cut {self.spec.layer!r}: expected (channels, shape) {(self.spec.channels, self.spec.shape)}, found {found}",
        )

    @property
    def batch_size(self) -> int:
        return self.voxels.batch_size

    def scene(self, index: int) -> SplitFeatures:
        return replace(self, voxels=self.voxels.scene(index))

    @staticmethod
    def collate(scenes: Sequence[SplitFeatures]) -> SplitFeatures:
        """One batch of several batches, scenes in order."""
        require(len(scenes) > 0, "SplitFeatures.collate needs at least one scene")
        specs = {s.spec for s in scenes}
        require(len(specs) == 1, f"cannot batch features of different cuts: {specs}")
        coords, start = [], 0
        for s in scenes:
            shifted = s.voxels.coords.clone()
            shifted[:, 0] += start
            coords.append(shifted)
            start += s.batch_size
        voxels = replace(
            scenes[0].voxels,
            features=torch.cat([s.voxels.features for s in scenes]),
            coords=torch.cat(coords),
            batch_size=start,
        )
        return SplitFeatures(voxels=voxels, spec=scenes[0].spec)


SMASHED_SCHEMA_VERSION = 1


@dataclass(frozen=True, kw_only=True, repr=False)
class SmashedScene(Value):
    """One scene's features at rest: what a vehicle hands over.

    There is no field for a raw point, a time, a pose or a vehicle, on purpose. ``scene_id`` is random.
    coords: (M, 3) int32 z, y, x, ascending and unique. features: (M, C) float32, after the codec's round trip if it was read.
    codec: how features are stored ("fp16", "int8"). encoder_fingerprint: SHA-256 of the encoder that made it.
    """

    spec: SplitSpec
    coords: Tensor
    features: Tensor
    codec: str
    encoder_fingerprint: str
    scene_id: str
    schema_version: int = SMASHED_SCHEMA_VERSION

    def __post_init__(self) -> None:
        m = self.features.shape[0]
        require(
            self.features.shape == (m, self.spec.channels) and self.features.is_floating_point(),
            f"SmashedScene.features must be (M, {self.spec.channels}) float, found {shape_of(self.features)}",
        )
        require(
            self.coords.shape == (m, 3) and self.coords.dtype == torch.int32,
            f"SmashedScene.coords must be ({m}, 3) int32 (z, y, x) cells of the cut, found {shape_of(self.coords)}; raw points cannot be stored",
        )
        if m:
            z, y, x = self.spec.shape
            require(
                bool((self.coords >= 0).all() and (self.coords < torch.tensor([z, y, x], dtype=torch.int32)).all()),
                f"SmashedScene.coords leave the grid {self.spec.shape}: found {self.coords.amin(0).tolist()} to {self.coords.amax(0).tolist()}",
            )
            c = self.coords.long()
            index = (c[:, 0] * y + c[:, 1]) * x + c[:, 2]
            require(bool((index[1:] > index[:-1]).all()), "SmashedScene.coords must be unique and ascending in (z, y, x)")
            require(
                bool(torch.isfinite(self.features).all()),
                "SmashedScene.features hold NaN or inf; the encoder or its input is broken",
            )
