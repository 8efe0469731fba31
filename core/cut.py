"""Grids and cuts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .errors import require

_Cells = TypeVar("_Cells", float, Tensor)


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

    def position(self, row: _Cells, column: _Cells) -> tuple[_Cells, _Cells]:
        """x, y in m of a place on the bird's-eye view given in cells (y, x), whole numbers being centres of cells.

        The centre of cell i is that of its receptive field, (i * stride + 1/2) voxels from the start of the range: strided
        convolutions with kernel 3 are centred on every second voxel.
        """
        x = self.grid.range[0] + (column * self.stride[2] + 0.5) * self.grid.voxel_size[0]
        y = self.grid.range[1] + (row * self.stride[1] + 0.5) * self.grid.voxel_size[1]
        return x, y


def cell_index(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
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
