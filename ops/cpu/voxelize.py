"""Kernels of `ops/voxelize.py`: number the occupied cells of a grid in the order of arrival, and average the points of each."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int32]


@compiled()
def number_voxels(
    points: _Floats,
    start: _Floats,
    size: _Floats,
    shape: NDArray[np.int64],
    table: _Ints,
    cell_of_voxel: _Ints,
    voxel_of_point: _Ints,
) -> tuple[int, int]:
    """Find the voxel of each point.

    Args:
        points: (N, C >= 3) x, y, z in meters, then any columns.
        start: (3,) x, y, z where the grid starts, in meters.
        size: (3,) x, y, z size of a cell, in meters.
        shape: (3,) number of cells along x, y, z.
        table: Scratch memory whose length is a power of two, at least 16 and at least twice that of `cell_of_voxel`: a hash table
            with linear probing, in which sixteen neighboring cells along x share a cache line, because consecutive points of a scan
            are neighbors.
        cell_of_voxel: Receives the number of the cell of each voxel, (z * ny + y) * nx + x. Its length is the largest number of voxels.
        voxel_of_point: (N,), receives the voxel of each point, -1 for points outside the grid.

    Returns:
        voxels: The number of voxels.
        outside: The number of points outside the grid; -1 if there are more occupied cells than `cell_of_voxel` has places. Then the call
            ended early and wrote nothing of use.
    """
    table[:] = -1
    blocks, shift = len(table) >> 4, 64
    while (1 << (64 - shift)) < blocks:
        shift -= 1
    nx, ny, nz = shape
    voxels, outside = 0, 0
    for i in range(len(points)):
        voxel_of_point[i] = -1
        fx = np.floor((points[i, 0] - start[0]) / size[0])
        fy = np.floor((points[i, 1] - start[1]) / size[1])
        fz = np.floor((points[i, 2] - start[2]) / size[2])
        # Compare as floats: a far point overflows an integer.
        if not (fx >= 0 and fx < nx and fy >= 0 and fy < ny and fz >= 0 and fz < nz):
            outside += 1
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
                return voxels, -1
            voxel = voxels
            table[slot], cell_of_voxel[voxel] = voxel, cell
            voxels += 1
        voxel_of_point[i] = voxel
    return voxels, outside


@compiled()
def average(
    points: _Floats, voxel_of_point: _Ints, cell_of_voxel: _Ints, nx: int, ny: int, max_points: int
) -> tuple[_Floats, _Ints, _Ints]:
    """Average the first points of each voxel.

    Args:
        points: (N, C) columns to average.
        voxel_of_point: (N,) voxel of each point, -1 for none.
        cell_of_voxel: (M,) number of each voxel's cell.
        nx: Number of cells along x.
        ny: Number of cells along y.
        max_points: Largest number of points per voxel; later ones are left out.

    Returns:
        means: (M, C) averages, summed in point order.
        coords: (M, 3) cells z, y, x.
        counts: (M,) number of points averaged.
    """
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
