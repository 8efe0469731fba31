"""Points to voxels: group the points of one scan by grid cell and average each group.

The result is part of a detector's input contract: a fleet and a server must agree on which points a voxel keeps and in which
order the voxels come. So the rule is fixed:

1. cell = floor((point - range start) / voxel size), all in float32; points outside the grid are dropped. Cells are numbered
   (z * ny + y) * nx + x;
2. where at most `max_voxels` cells hold a point, each of them becomes a voxel. Where more do, the `max_voxels` cells with the smallest
   `cell_priority` become voxels, and the points of the others are dropped. The priority is a fixed mixing of the bits of the
   cell's number and of the number of occupied cells. So the loss is even in every direction and at every distance, it is not the
   same cells that are lost in every scan, and neither the order of the points nor the machine has a say in which cells stay;
3. voxels come in the order of their first points;
4. a voxel keeps its first `max_points` points; its feature is their float32 sum, in point order, divided by their number.

Source: OpenPCDet, `data_processor.py` (spconv's `VoxelGenerator`) followed by `MeanVFE`. They differ in step 2: OpenPCDet keeps the
cells whose points come first in the scan, so a spinning sensor loses a sector, or its lower beams. Below the limit both are equal.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.features import VoxelCounts
from ..core.tensor_value import shape_of
from .cpu.voxelize import average, number_voxels
from .dispatch import dispatch

_LARGEST_GRID = 2**31 - 1  # cell numbers are stored as int32
_WORD = 0xFFFFFFFF


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """The occupied voxels of one scan, in the order their first points came."""

    features: Tensor
    """(M, C) float32, mean of the points kept, with the same columns as the points."""

    coords: Tensor
    """(M, 3) int32, cell z, y, x."""

    num_points: Tensor
    """(M,) int32, number of points kept, 1..`max_points`."""

    counts: VoxelCounts
    """What became of the scan's points and cells."""


def voxelize(
    points: Tensor,
    *,
    point_range: tuple[float, float, float, float, float, float],
    voxel_size: tuple[float, float, float],
    max_points: int,
    max_voxels: int,
) -> Voxels:
    """Group points by grid cell and average each group, by the rule at the top of this file. It gives no gradient.

    Args:
        points: (N, C >= 3) x, y, z in meters, then any features.
        point_range: x, y, z where the grid starts, then where it ends, in meters.
        voxel_size: x, y, z size of a cell, in meters.
        max_points: Largest number of points that a voxel keeps.
        max_voxels: Largest number of voxels. `Voxels.counts` says what it cost.

    Returns:
        The occupied voxels, in the order their first points came.

    Raises:
        InvalidInput: A wrong shape, non-finite points, a limit below 1, or a grid without cells or with more than 2^31.

    Example:
        >>> points = torch.tensor([[0.1, 0.1, 0.1, 0.5], [0.2, 0.1, 0.1, 0.7], [3.1, 0.1, 0.1, 0.2]])
        >>> grid = {"point_range": (0, 0, 0, 4, 4, 4), "voxel_size": (1, 1, 1)}
        >>> voxelize(points, **grid, max_points=5, max_voxels=100).coords.tolist()
        [[0, 0, 0], [0, 0, 3]]
    """
    implementation = dispatch((points,), voxelize_reference, cpu=_voxelize_on_cpu)
    return implementation(points, point_range=point_range, voxel_size=voxel_size, max_points=max_points, max_voxels=max_voxels)


def voxelize_reference(
    points: Tensor,
    *,
    point_range: tuple[float, float, float, float, float, float],
    voxel_size: tuple[float, float, float],
    max_points: int,
    max_voxels: int,
) -> Voxels:
    """Compute `voxelize` in plain torch, on any device, bit-equal to it.

    Args:
        points: (N, C >= 3) points.
        point_range: Start and end of the grid.
        voxel_size: Size of a cell.
        max_points: Largest number of points per voxel.
        max_voxels: Largest number of voxels.

    Returns:
        The occupied voxels, in the order their first points came.
    """
    nx, ny, nz = _grid_shape(points, point_range, voxel_size, max_points, max_voxels)
    points = points.detach().to(torch.float32)
    cells = ((points[:, :3] - points.new_tensor(point_range[:3])) / points.new_tensor(voxel_size)).floor()
    inside = ((cells >= 0) & (cells < points.new_tensor([nx, ny, nz]))).all(1)
    points, cells = points[inside], cells[inside].long()
    key = (cells[:, 2] * ny + cells[:, 1]) * nx + cells[:, 0]
    _, voxel = torch.unique(key, return_inverse=True)

    # Number the occupied cells by their first point instead of by their place in the grid.
    index = torch.arange(len(key), device=key.device)
    occupied = int(voxel.max()) + 1 if len(key) else 0
    first = torch.full((occupied,), len(key), device=key.device).scatter_reduce(0, voxel, index, "amin")
    first, by_arrival = first.sort()
    row_of_voxel = torch.empty_like(by_arrival)
    row_of_voxel[by_arrival] = torch.arange(occupied, device=key.device)
    row = row_of_voxel[voxel]
    counts = VoxelCounts(
        points=len(inside),
        points_outside=len(inside) - len(key),
        cells=occupied,
        cells_over_limit=max(0, occupied - max_voxels),
    )
    if occupied > max_voxels:  # the cells that stay keep their order; the points of the others go
        priority = cell_priority(key[first], occupied)
        stays = priority <= priority.sort().values[max_voxels - 1]
        first, row_of_row = first[stays], stays.cumsum(0) - 1
        points, row = points[stays[row]], row_of_row[row[stays[row]]]
        index = torch.arange(len(row), device=key.device)

    # The rank of each point among the points of its voxel: sort the points by voxel, keeping their order inside it.
    row, order = row.sort(stable=True)
    arrived = torch.bincount(row, minlength=len(first))
    rank = index - (arrived.cumsum(0) - arrived)[row]
    kept = arrived.clamp(max=max_points)

    sums = points.new_zeros(len(first), points.shape[1])
    for turn in range(int(kept.max()) if len(kept) else 0):  # one point per voxel at a time: a fixed order of summation
        now = rank == turn
        sums[row[now]] += points[order[now]]
    return Voxels(
        features=sums / kept[:, None].to(torch.float32),
        coords=cells[first].flip(1).to(torch.int32),
        num_points=kept.to(torch.int32),
        counts=counts,
    )


def cell_priority(cells: Tensor, occupied: int) -> Tensor:
    """Give the numbers by which cells stay when a scan has more of them than the limit: the smallest stay.

    They are x = mix(cell XOR mix(occupied)) with the 32-bit finalizer of MurmurHash3 as `mix`: a one-to-one map of 32-bit numbers, so no
    two cells have the same priority.

    Args:
        cells: (M,) int64 numbers of cells, 0 to 2^31 - 1.
        occupied: Number of occupied cells of the scan.

    Returns:
        (M,) int64 priorities, 0 to 2^32 - 1.
    """

    def mix(x: Tensor) -> Tensor:
        # int64 products wrap around, and their low 32 bits are right all the same.
        x = ((x ^ (x >> 16)) * 0x85EBCA6B) & _WORD
        x = ((x ^ (x >> 13)) * 0xC2B2AE35) & _WORD
        return x ^ (x >> 16)

    return mix(cells ^ mix(torch.tensor(occupied, device=cells.device)))


def _voxelize_on_cpu(
    points: Tensor,
    *,
    point_range: tuple[float, float, float, float, float, float],
    voxel_size: tuple[float, float, float],
    max_points: int,
    max_voxels: int,
) -> Voxels:
    shape = _grid_shape(points, point_range, voxel_size, max_points, max_voxels)
    array = points.detach().to(torch.float32).contiguous().numpy()
    start, size = np.asarray(point_range[:3], np.float32), np.asarray(voxel_size, np.float32)
    cells_along = np.asarray(shape, np.int64)

    def number(limit: int) -> tuple[int, int, NDArray[np.int32], NDArray[np.int32]]:
        limit = min(limit, len(points))
        bits = max(4, (2 * limit - 1).bit_length())  # the table is at most half full
        table, cell_of_voxel, voxel_of_point = _scratch(1 << bits, limit, len(points))
        voxels, outside = number_voxels(array, start, size, cells_along, table, cell_of_voxel, voxel_of_point)
        return voxels, outside, cell_of_voxel[:voxels], voxel_of_point

    # The table of the limit is small and fast. Only a scan with more cells than that is numbered again with room for all of them.
    occupied, outside, cell_of_voxel, voxel_of_point = number(max_voxels)
    if outside < 0:
        occupied, outside, cell_of_voxel, voxel_of_point = number(len(points))
        cell_of_voxel, voxel_of_point = _within_limit(cell_of_voxel, voxel_of_point, max_voxels)
    means, coords, kept = average(array, voxel_of_point, cell_of_voxel, shape[0], shape[1], max_points)
    return Voxels(
        features=torch.from_numpy(means),
        coords=torch.from_numpy(coords),
        num_points=torch.from_numpy(kept),
        counts=VoxelCounts(
            points=len(points), points_outside=outside, cells=occupied, cells_over_limit=occupied - len(cell_of_voxel)
        ),
    )


def _within_limit(
    cell_of_voxel: NDArray[np.int32], voxel_of_point: NDArray[np.int32], limit: int
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Keep the cells of the smallest priorities, in the order they have; the points of the others get no voxel."""
    priority = cell_priority(torch.from_numpy(cell_of_voxel).long(), len(cell_of_voxel)).numpy()
    stays = priority <= np.partition(priority, limit - 1)[limit - 1]
    new_number = np.full(len(stays) + 1, -1, np.int32)  # the last entry is for points without a voxel, whose number is -1
    new_number[:-1][stays] = np.arange(limit, dtype=np.int32)
    return cell_of_voxel[stays], new_number[voxel_of_point]


def _grid_shape(
    points: Tensor,
    point_range: tuple[float, float, float, float, float, float],
    voxel_size: tuple[float, float, float],
    max_points: int,
    max_voxels: int,
) -> tuple[int, int, int]:
    """Check the arguments of `voxelize`, and give the number of cells along x, y, z."""
    if points.ndim != 2 or points.shape[1] < 3 or not points.is_floating_point():
        raise InvalidInput(f"voxelize expects points as a floating-point tensor (N, 3 or more), found {shape_of(points)}")
    if not _all_finite(points):
        bad = int((~torch.isfinite(points).all(1)).sum())
        raise InvalidInput(f"voxelize: {bad} of {len(points)} points have a NaN or infinite value; remove them first")
    if max_points < 1 or max_voxels < 1:
        raise InvalidInput(f"voxelize: max_points and max_voxels must be positive, found {max_points} and {max_voxels}")
    if min(voxel_size) <= 0 or any(point_range[k + 3] <= point_range[k] for k in range(3)):
        raise InvalidInput(
            f"voxelize: the range {point_range} with voxels of {voxel_size} is no grid; give start before end, and positive sizes"
        )
    nx, ny, nz = (round((point_range[k + 3] - point_range[k]) / voxel_size[k]) for k in range(3))
    if not 0 < nx * ny * nz <= _LARGEST_GRID:
        raise InvalidInput(
            f"voxelize: the range {point_range} has {nx} x {ny} x {nz} cells of {voxel_size}; the number of cells must be 1..2^31"
        )
    return nx, ny, nz


def _all_finite(points: Tensor) -> bool:
    if points.device.type == "cpu":
        return bool(np.isfinite(points.detach().numpy()).all())  # five times faster than torch's on one core
    return bool(torch.isfinite(points).all())


_kept = threading.local()


def _scratch(*sizes: int) -> tuple[NDArray[np.int32], ...]:
    """Uninitialized int32 arrays of these sizes, kept by the calling thread for its next scan.

    Fresh memory of this size comes from the system page by page, which takes a third of the time of voxelizing a scan.
    """
    memory: NDArray[np.int32] | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < sum(sizes):
        memory = _kept.memory = np.empty(sum(sizes), np.int32)
    ends = list(itertools.accumulate(sizes))
    return tuple(memory[end - size : end] for size, end in zip(sizes, ends, strict=True))
