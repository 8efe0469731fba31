"""Points to voxels: group the points of one scan by grid cell and average each group.

The result is part of a detector's input contract: a fleet and a server must agree on which points a voxel keeps and in which
order the voxels come. So the rule is fixed. It is "hard" voxelization, first come first served in point order:

1. cell = floor((point - range start) / voxel size), all in float32; points outside the grid are dropped;
2. a cell becomes a voxel when its first point arrives, unless there are `max_voxels` already: then the point is dropped;
3. a voxel keeps its first `max_points` points; its feature is their float32 sum, in point order, divided by their number.

Source: OpenPCDet, `data_processor.py` (spconv's `VoxelGenerator`) followed by `MeanVFE`.
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
from ..core.tensor_value import shape_of
from .cpu.voxelize import average, number_voxels
from .dispatch import dispatch

_LARGEST_GRID = 2**31 - 1  # cell numbers are stored as int32


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """The occupied voxels of one scan, in the order their first points came."""

    features: Tensor
    """(M, C) float32, mean of the points kept, with the same columns as the points."""

    coords: Tensor
    """(M, 3) int32, cell z, y, x."""

    num_points: Tensor
    """(M,) int32, number of points kept, 1..`max_points`."""


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
        max_voxels: Largest number of voxels.

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

    # Number the voxels by their first point instead of by their place in the grid, and drop those that came too late.
    index = torch.arange(len(key), device=key.device)
    first = torch.full((int(voxel.max()) + 1 if len(key) else 0,), len(key), device=key.device)
    first = first.scatter_reduce(0, voxel, index, "amin")
    first, by_arrival = first.sort()
    row_of_voxel = torch.empty_like(by_arrival)
    row_of_voxel[by_arrival] = torch.arange(len(by_arrival), device=key.device)
    first = first[:max_voxels]

    # The rank of each point among the points of its voxel: sort the points by voxel, keeping their order inside it.
    row, order = row_of_voxel[voxel].sort(stable=True)
    arrived = torch.bincount(row, minlength=len(by_arrival))
    rank = index - (arrived.cumsum(0) - arrived)[row]
    counts = arrived[:max_voxels].clamp(max=max_points)

    sums = points.new_zeros(len(first), points.shape[1])
    for turn in range(int(counts.max()) if len(counts) else 0):  # one point per voxel at a time: a fixed order of summation
        now = (rank == turn) & (row < max_voxels)
        sums[row[now]] += points[order[now]]
    return Voxels(
        features=sums / counts[:, None].to(torch.float32),
        coords=cells[first].flip(1).to(torch.int32),
        num_points=counts.to(torch.int32),
    )


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
    max_voxels = min(max_voxels, len(points))
    bits = max(4, (2 * max_voxels - 1).bit_length())  # the table is at most half full
    table, cell_of_voxel, voxel_of_point = _scratch(1 << bits, max_voxels, len(points))
    number = number_voxels(array, start, size, np.asarray(shape, np.int64), table, cell_of_voxel, voxel_of_point)
    means, coords, counts = average(array, voxel_of_point, cell_of_voxel[:number], shape[0], shape[1], max_points)
    return Voxels(features=torch.from_numpy(means), coords=torch.from_numpy(coords), num_points=torch.from_numpy(counts))


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
