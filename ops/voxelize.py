"""Points to voxels: group the points of one LiDAR scan by grid cell and average each group.

The result is part of a detector's input contract: a fleet and a server must agree on which points a voxel keeps and in which
order the voxels come. So the rule is fixed, "hard" voxelisation, first come first served in point order:

1. cell = floor((point - range start) / voxel size), all in float32; points outside the grid are dropped;
2. a cell becomes a voxel when its first point arrives, unless there are ``max_voxels`` already: then the point is dropped;
3. a voxel keeps its first ``max_points`` points; its feature is their float32 sum, in point order, over their number.

Source: OpenPCDet ``data_processor.py`` (spconv ``VoxelGenerator``) followed by ``MeanVFE``.
"""

from __future__ import annotations

import itertools
import threading
from dataclasses import dataclass

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Floats = NDArray[np.float32]
_LARGEST_GRID = 2**31 - 1  # cell numbers are stored as int32


@dataclass(frozen=True, kw_only=True)
class Voxels:
    """The M occupied voxels of one scan, in the order their first points came.

    features: (M, C) float32, mean of the kept points, columns as in the points. coords: (M, 3) int32 cell z, y, x.
    num_points: (M,) int32, kept points, 1..max_points.
    """

    features: Tensor
    coords: Tensor
    num_points: Tensor


def voxelize(
    points: Tensor,
    *,
    point_range: tuple[float, float, float, float, float, float],
    voxel_size: tuple[float, float, float],
    max_points: int,
    max_voxels: int,
) -> Voxels:
    """Voxels of ``points`` (N, C >= 3): x, y, z in m, then any features; the rule is at the top of this file.

    point_range: x, y, z of the grid's start, then of its end, m. voxel_size: x, y, z, m. Runs where the points are; no gradient.
    Raises ValueError for a wrong shape, non-finite points (with their number), or a grid without cells or with more than 2^31.
    """
    shape = _grid_shape(points, point_range, voxel_size, max_points, max_voxels)
    if points.device.type != "cpu":
        return voxelize_reference(
            points, point_range=point_range, voxel_size=voxel_size, max_points=max_points, max_voxels=max_voxels
        )
    array = points.detach().to(torch.float32).contiguous().numpy()
    start, size = np.asarray(point_range[:3], np.float32), np.asarray(voxel_size, np.float32)
    max_voxels = min(max_voxels, len(points))
    bits = max(4, (2 * max_voxels - 1).bit_length())  # the table is at most half full
    table, cell_of_voxel, voxel_of_point = _scratch(1 << bits, max_voxels, len(points))
    number = _number_voxels(array, start, size, np.asarray(shape, np.int64), table, cell_of_voxel, voxel_of_point)
    means, coords, counts = _average(array, voxel_of_point, cell_of_voxel[:number], shape[0], shape[1], max_points)
    return Voxels(features=torch.from_numpy(means), coords=torch.from_numpy(coords), num_points=torch.from_numpy(counts))


def voxelize_reference(
    points: Tensor,
    *,
    point_range: tuple[float, float, float, float, float, float],
    voxel_size: tuple[float, float, float],
    max_points: int,
    max_voxels: int,
) -> Voxels:
    """``voxelize`` in plain torch, on any device, bit-equal to it."""
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

    # The how-many-th point of its voxel is each point? Sort the points by voxel, keeping their order inside it.
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


def _grid_shape(
    points: Tensor,
    point_range: tuple[float, float, float, float, float, float],
    voxel_size: tuple[float, float, float],
    max_points: int,
    max_voxels: int,
) -> tuple[int, int, int]:
    """Check the arguments of ``voxelize``; the number of cells along x, y, z."""
    if points.ndim != 2 or points.shape[1] < 3 or not points.is_floating_point():
        raise ValueError(f"voxelize: points must be floating point (N, 3 or more), got {points.dtype} {tuple(points.shape)}")
    if not _all_finite(points):
        bad = int((~torch.isfinite(points).all(1)).sum())
        raise ValueError(f"voxelize: {bad} of {len(points)} points have a NaN or infinite value; remove them first")
    if max_points < 1 or max_voxels < 1:
        raise ValueError(f"voxelize: max_points and max_voxels must be positive, got {max_points} and {max_voxels}")
    if min(voxel_size) <= 0 or any(point_range[k + 3] <= point_range[k] for k in range(3)):
        raise ValueError(f"voxelize: no grid with range {point_range} and voxel size {voxel_size}")
    nx, ny, nz = (round((point_range[k + 3] - point_range[k]) / voxel_size[k]) for k in range(3))
    if not 0 < nx * ny * nz <= _LARGEST_GRID:
        raise ValueError(
            f"voxelize: {nx} x {ny} x {nz} cells of size {voxel_size} in range {point_range}; the number must be 1..2^31"
        )
    return nx, ny, nz


def _all_finite(points: Tensor) -> bool:
    if points.device.type == "cpu":
        return bool(np.isfinite(points.detach().numpy()).all())  # five times faster than torch's on one core
    return bool(torch.isfinite(points).all())


_kept = threading.local()


def _scratch(*sizes: int) -> tuple[NDArray[np.int32], ...]:
    """Uninitialised int32 arrays of these sizes, this thread's own, kept for its next scan.

    Fresh memory of this size comes from the system page by page: a third of the time of voxelising a scan.
    """
    memory: NDArray[np.int32] | None = getattr(_kept, "memory", None)
    if memory is None or len(memory) < sum(sizes):
        memory = _kept.memory = np.empty(sum(sizes), np.int32)
    ends = list(itertools.accumulate(sizes))
    return tuple(memory[end - size : end] for size, end in zip(sizes, ends, strict=True))


@numba.njit(cache=True, nogil=True)
def _number_voxels(
    points: Floats,
    start: Floats,
    size: Floats,
    shape: NDArray[np.int64],
    table: NDArray[np.int32],
    cell_of_voxel: NDArray[np.int32],
    voxel_of_point: NDArray[np.int32],
) -> int:
    """Fill in the voxel of each point (N,), -1 for none, and the cell of each voxel; the number of voxels.

    table: scratch, a power of two, 16 or more: a hash table with linear probing, in which sixteen neighbouring cells along x share
    a cache line: consecutive points of a scan are neighbours. At most ``len(cell_of_voxel)`` voxels.
    """
    table[:] = -1
    blocks, shift = len(table) >> 4, 64
    while (1 << (64 - shift)) < blocks:
        shift -= 1
    nx, ny, nz = shape
    voxels = 0
    for i in range(len(points)):
        voxel_of_point[i] = -1
        fx = np.floor((points[i, 0] - start[0]) / size[0])
        fy = np.floor((points[i, 1] - start[1]) / size[1])
        fz = np.floor((points[i, 2] - start[2]) / size[2])
        # Compare as floats: a far point overflows an integer.
        if not (fx >= 0 and fx < nx and fy >= 0 and fy < ny and fz >= 0 and fz < nz):
            continue
        cell = (np.int64(fz) * ny + np.int64(fy)) * nx + np.int64(fx)
        # Fibonacci hashing: the upper bits of block number * 2^64 / golden ratio.
        block = (np.uint64(cell >> 4) * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(min(shift, 63))
        slot = (np.int64(block) & (blocks - 1)) << 4 | (cell & 15)
        voxel = table[slot]
        while voxel >= 0 and cell_of_voxel[voxel] != cell:
            slot = (slot + 1) & (16 * blocks - 1)
            voxel = table[slot]
        if voxel < 0:
            if voxels == len(cell_of_voxel):
                continue
            voxel = voxels
            table[slot], cell_of_voxel[voxel] = voxel, cell
            voxels += 1
        voxel_of_point[i] = voxel
    return voxels


@numba.njit(cache=True, nogil=True)
def _average(
    points: Floats, voxel_of_point: NDArray[np.int32], cell_of_voxel: NDArray[np.int32], nx: int, ny: int, max_points: int
) -> tuple[Floats, NDArray[np.int32], NDArray[np.int32]]:
    """Of each voxel: mean (M, C) and number (M,) of its first ``max_points`` points, and its place z, y, x (M, 3)."""
    channels, voxels = points.shape[1], len(cell_of_voxel)
    means = np.zeros((voxels, channels), np.float32)
    counts = np.zeros(voxels, np.int32)
    for i in range(len(points)):
        voxel = voxel_of_point[i]
        if voxel >= 0 and counts[voxel] < max_points:
            counts[voxel] += 1
            for c in range(channels):
                means[voxel, c] += points[i, c]
    coords = np.empty((voxels, 3), np.int32)
    for voxel in range(voxels):
        for c in range(channels):
            means[voxel, c] /= np.float32(counts[voxel])
        cell = np.uint32(cell_of_voxel[voxel])
        row = cell // np.uint32(nx)
        coords[voxel, 0], coords[voxel, 1], coords[voxel, 2] = row // np.uint32(ny), row % np.uint32(ny), cell % np.uint32(nx)
    return means, coords, counts
