"""Where a network is cut, and the grids on both sides of the cut.

A detector is an encoder on the vehicle and a decoder on the server. The *cut* is the layer whose output leaves the vehicle; a
`CutSpec` describes it completely, so that both sides can refuse features that do not fit. Cells and voxels are counted (z, y, x),
points are (x, y, z) in meters.

Read next: `features.py` for features in a network, `smashed_scene.py` for features that left it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeVar

import torch
from torch import Tensor

from .errors import require

MAX_VOXELS_PER_AXIS = 1 << 20
MAX_VOXELS = 1 << 40
"""Cells are numbered with 64 bits, the scenes of a batch among them; no LiDAR sees a millionth of this."""

_Cells = TypeVar("_Cells", float, Tensor)


@dataclass(frozen=True, kw_only=True)
class VoxelGrid:
    """A box of space cut into voxels.

    Example:
        >>> VoxelGrid(range=(0.0, -40.0, -3.0, 70.4, 40.0, 1.0), voxel_size=(0.05, 0.05, 0.1)).shape
        (40, 1600, 1408)
    """

    range: tuple[float, float, float, float, float, float]
    """x, y, z where the grid starts, then where it ends, in meters. Each extent is a whole number of voxels. Points outside are
    not seen; a larger range costs time and memory."""

    voxel_size: tuple[float, float, float]
    """x, y, z size of a voxel in meters. Smaller voxels see smaller objects and cost more time."""

    def __post_init__(self) -> None:
        require(
            all(map(math.isfinite, (*self.range, *self.voxel_size))),
            f"VoxelGrid needs finite numbers, found the range {self.range} and the voxel size {self.voxel_size}",
        )
        require(all(v > 0 for v in self.voxel_size), f"VoxelGrid.voxel_size must be positive, found {self.voxel_size}")
        for axis in range(3):
            extent = (self.range[axis + 3] - self.range[axis]) / self.voxel_size[axis]
            require(
                0.5 < extent < math.inf and abs(extent - round(extent)) < 1e-3,
                f"VoxelGrid.range {self.range} must be a positive whole number of voxels of {self.voxel_size} along {'xyz'[axis]}, "
                f"found {extent:.3f}; change the range or the voxel size",
            )
        require(
            max(self.shape) <= MAX_VOXELS_PER_AXIS and math.prod(self.shape) <= MAX_VOXELS,
            f"VoxelGrid.range {self.range} has {self.shape} voxels (z, y, x), more than {MAX_VOXELS_PER_AXIS} along an axis or "
            f"{MAX_VOXELS} in all; use a smaller range or larger voxels",
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """Number of voxels along z, y, x."""
        sizes = [round((self.range[a + 3] - self.range[a]) / self.voxel_size[a]) for a in (2, 1, 0)]
        return (sizes[0], sizes[1], sizes[2])


@dataclass(frozen=True, kw_only=True)
class KeypointSpec:
    """The keypoints at a cut, which PV-RCNN has besides its voxels."""

    count: int
    """Largest number of keypoints per scene."""

    channels: int
    """Channels of their features."""

    source: Literal["voxel_centers", "raw_points"] = "voxel_centers"
    """Where keypoints lie. "voxel_centers" are cells of the input grid, which a smashed scene can hold as whole numbers.
    "raw_points" are points of the scan itself, as in the original PV-RCNN: 2,048 exact LiDAR points per scan. A detector may be
    trained with them, but they never leave a vehicle."""


@dataclass(frozen=True, kw_only=True)
class CutSpec:
    """The layer whose output leaves the vehicle."""

    layer: str
    """Name of the layer."""

    channels: int
    """Channels of the features of a cell."""

    stride: tuple[int, int, int]
    """Input voxels per cell of the cut along z, y, x."""

    shape: tuple[int, int, int]
    """Cells of the cut along z, y, x."""

    grid: VoxelGrid
    """The input grid."""

    keypoints: KeypointSpec | None = None
    """The keypoints, None for a detector without."""

    def cell_size(self) -> tuple[float, float]:
        """Give the size x, y of a cell in BEV, in meters."""
        return (self.grid.voxel_size[0] * self.stride[2], self.grid.voxel_size[1] * self.stride[1])

    def position(self, row: _Cells, column: _Cells) -> tuple[_Cells, _Cells]:
        """Find where a place of the BEV map lies in the world.

        The center of cell i is the center of its receptive field, (i * stride + 1/2) voxels from the start of the range: strided
        convolutions with kernel 3 are centered on every second voxel.

        Args:
            row: Row in cells; a whole number is the center of a cell.
            column: Column in cells.

        Returns:
            x and y in meters.
        """
        x = self.grid.range[0] + (column * self.stride[2] + 0.5) * self.grid.voxel_size[0]
        y = self.grid.range[1] + (row * self.stride[1] + 0.5) * self.grid.voxel_size[1]
        return x, y


def cell_index(cells: Tensor, shape: tuple[int, int, int]) -> Tensor:
    """Number cells in the order of the grid.

    Args:
        cells: (M, 3) z, y, x.
        shape: Cells along z, y, x.

    Returns:
        (M,) int64, (z * Y + y) * X + x.
    """
    wide = cells.long()
    return (wide[:, 0] * shape[1] + wide[:, 1]) * shape[2] + wide[:, 2]


def cell_centers(cells: Tensor, grid: VoxelGrid, stride: int = 1) -> Tensor:
    """Find the centers of cells.

    Args:
        cells: (N, 3) z, y, x.
        grid: The input grid.
        stride: Voxels of `grid` along each side of a cell.

    Returns:
        (N, 3) float32 x, y, z in meters.
    """
    start, size = (cells.new_tensor(v, dtype=torch.float32) for v in (grid.range[:3], grid.voxel_size))
    return (cells.flip(1).float() + 0.5) * (size * stride) + start


def cells_of_centers(xyz: Tensor, grid: VoxelGrid) -> Tensor:
    """Find the voxels that points are the centers of: the inverse of `cell_centers`.

    Args:
        xyz: (N, 3) x, y, z in meters.
        grid: The input grid.

    Returns:
        (N, 3) int32 z, y, x.

    Raises:
        InvalidInput: A point is not the center of a voxel, as a raw point is not.
    """
    start, size = (xyz.new_tensor(v) for v in (grid.range[:3], grid.voxel_size))
    cells = ((xyz - start) / size).floor().to(torch.int32).flip(1)
    off = (cell_centers(cells, grid) - xyz).abs().amax().item() if len(xyz) else 0.0
    require(off < 1e-3, f"a keypoint lies {off:.3f} m off the center of its voxel; only voxel centers leave a vehicle")
    return cells
