"""Features at the cut: live in a network, and at rest in a smashed scene; see ``structures.py`` for what surrounds them.

    PointCloud ── encoder ── CutFeatures ─┬─ decoder ── Predictions
                                            └─ SmashedScene: the same at rest, on disk and on the wire

Two kinds of features: sparse voxels of every detector and, of PV-RCNN, keypoints. Sparse coordinates are (batch, z, y, x). Only ``vehicle/`` makes a smashed scene from live features, only ``server/`` turns it back.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .errors import require
from .structures import Value, shape_of

Place = TypeVar("Place", float, Tensor)


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

    def sorted(self) -> SparseVoxels:
        """The same voxels, ascending in (batch, z, y, x)."""
        order = (self.coords[:, 0].long() * math.prod(self.shape) + _cell_index(self.coords[:, 1:], self.shape)).argsort()
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
class Keypoints(Value):
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


@dataclass(frozen=True, kw_only=True)
class KeypointSpec:
    """Keypoints at the cut. count: at most so many a scene. channels: of their features.

    source: where they lie. "voxel_centers" are cells of the input grid, which a smashed scene can hold as whole numbers.
    "raw_points" are points of the scan itself, as in the reference PV-RCNN: 2,048 exact LiDAR points a scan, so they may be trained
    with and never leave a vehicle.
    """

    count: int
    channels: int
    source: Literal["voxel_centers", "raw_points"] = "voxel_centers"


@dataclass(frozen=True, kw_only=True)
class CutSpec:
    """Where a network is cut: the layer whose output leaves the vehicle.

    stride is (z, y, x) input voxels per cell of the cut; shape is the sparse grid (z, y, x) at the cut. keypoints: None without.
    """

    layer: str
    channels: int
    stride: tuple[int, int, int]
    shape: tuple[int, int, int]
    grid: VoxelGrid
    keypoints: KeypointSpec | None = None

    def cell_size(self) -> tuple[float, float]:
        """(x, y) metres of one bird's-eye-view cell."""
        return (self.grid.voxel_size[0] * self.stride[2], self.grid.voxel_size[1] * self.stride[1])

    def position(self, row: Place, column: Place) -> tuple[Place, Place]:
        """x, y in m of a place on the bird's-eye view given in cells (y, x), whole numbers being centres of cells.

        The centre of cell i is that of its receptive field, (i * stride + 1/2) voxels from the start of the range: strided
        convolutions with kernel 3 are centred on every second voxel.
        """
        x = self.grid.range[0] + (column * self.stride[2] + 0.5) * self.grid.voxel_size[0]
        y = self.grid.range[1] + (row * self.stride[1] + 0.5) * self.grid.voxel_size[1]
        return x, y


@dataclass(frozen=True, kw_only=True, repr=False)
class CutFeatures(Value):
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


SMASHED_SCHEMA_VERSION = 2  # 2: keypoints


@dataclass(frozen=True, kw_only=True, repr=False)
class SmashedScene(Value):
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
        index = _cell_index(self.coords, self.spec.shape)
        require(bool((index[1:] > index[:-1]).all()), "SmashedScene.coords must be unique and ascending in (z, y, x)")
        self._check_cells(
            "keypoint_", self.keypoint_cells, self.keypoint_features, self.spec.grid.shape, limit.channels if limit else 0
        )
        require(
            len(self.keypoint_cells) <= (limit.count if limit else 0),
            f"the cut allows {limit.count if limit else 0} keypoints a scene, found {len(self.keypoint_cells)}",
        )
        index = _cell_index(self.keypoint_cells, self.spec.grid.shape)
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


def _cell_index(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """(M, 3) z, y, x -> (M,) int64 place in the grid."""
    wide = cells.long()
    return (wide[:, 0] * shape[1] + wide[:, 1]) * shape[2] + wide[:, 2]


def cell_centers(cells: Tensor, grid: VoxelGrid, stride: int = 1) -> Tensor:
    """Centres (N, 3) x, y, z in m of cells (N, 3) z, y, x, each ``stride`` voxels of ``grid`` wide."""
    start, size = (cells.new_tensor(v, dtype=torch.float32) for v in (grid.range[:3], grid.voxel_size))
    return (cells.flip(1).float() + 0.5) * (size * stride) + start


def cells_of_centers(xyz: Tensor, grid: VoxelGrid) -> Tensor:
    """The cells (N, 3) int32 z, y, x whose centres ``xyz`` (N, 3) are: the inverse of ``cell_centers``.

    Raises InvalidInput for a point that is no centre of a cell, as a raw point is not.
    """
    start, size = (xyz.new_tensor(v) for v in (grid.range[:3], grid.voxel_size))
    cells = ((xyz - start) / size).floor().to(torch.int32).flip(1)
    off = (cell_centers(cells, grid) - xyz).abs().amax().item() if len(xyz) else 0.0
    require(off < 1e-3, f"a keypoint lies {off:.3f} m off the centre of its voxel; only voxel centres leave a vehicle")
    return cells
