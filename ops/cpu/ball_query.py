"""Kernels of `ops/ball_query.py`, which explains the search: list the points near each grid cell, then search the lists."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int32]
_Bounds = NDArray[np.int64]
_BLOCK = 64  # points tested at a time

QUERIES_PER_TASK = 2048
"""Centers that a thread takes at a time: about a millisecond, below which a thread is not worth starting."""


@compiled()
def list_points(
    centers: _Floats,
    center_starts: _Bounds,
    points: _Floats,
    point_starts: _Bounds,
    origin: NDArray[np.float64],
    per_meter: float,
    reach: float,
    columns: int,
    rows: int,
) -> tuple[_Ints, _Bounds, _Ints, _Floats]:
    """List, for each grid cell that holds centers, the points that its centers could reach.

    The cell of a place is a monotone function of the place, rounding included, so no point within reach is missed.

    Args:
        centers: (Q, 3) centers of all scenes, in order.
        center_starts: B + 1 bounds of the scenes in `centers`.
        points: (N, 3) points of all scenes, in order.
        point_starts: B + 1 bounds of the scenes in `points`.
        origin: (2,) x, y where the grid starts, in meters.
        per_meter: Cells per meter.
        reach: Largest radius and a margin, in meters.
        columns: Number of cells along x.
        rows: Number of cells along y.

    Returns:
        cell: (Q,) cell of each center.
        starts: (number of cells + 2,) bounds of the lists, which lie in the order of their cells; the last one has no use.
        listed: (L,) rows of `points`, ascending within a list.
        xyz: (3, L) their coordinates.
    """
    scenes, cells = len(center_starts) - 1, columns * rows
    cell, used = np.empty(len(centers), np.int32), np.zeros(scenes * cells, np.bool_)
    for scene in range(scenes):
        for i in range(center_starts[scene], center_starts[scene + 1]):
            column = int((np.float64(centers[i, 0]) - origin[0]) * per_meter)  # never negative
            row = int((np.float64(centers[i, 1]) - origin[1]) * per_meter)
            cell[i] = scene * cells + row * columns + column
            used[cell[i]] = True

    # The cells whose centers a point could reach: from span[i, 0] to before span[i, 1] along x, then likewise along y.
    span, shape = np.empty((len(points), 2, 2), np.int32), (columns, rows)
    starts = np.zeros(scenes * cells + 2, np.int64)
    for scene in range(scenes):
        for i in range(point_starts[scene], point_starts[scene + 1]):
            for axis in range(2):
                place, most = np.float64(points[i, axis]), np.float64(shape[axis])
                below = ((place - reach) - origin[axis]) * per_meter
                above = ((place + reach) - origin[axis]) * per_meter + 1
                # Stored as integers: cut to the whole number below, for these are no longer negative.
                span[i, axis, 0], span[i, axis, 1] = min(max(below, 0.0), most), min(max(above, 0.0), most)
            for row in range(span[i, 1, 0], span[i, 1, 1]):
                for c in range(span[i, 0, 0], span[i, 0, 1]):
                    at = scene * cells + row * columns + c
                    starts[at + 2] += used[at]
    for at in range(scenes * cells):
        starts[at + 2] += starts[at + 1]

    listed, xyz = np.empty(starts[-1], np.int32), np.empty((3, starts[-1]), np.float32)
    for scene in range(scenes):
        for i in range(point_starts[scene], point_starts[scene + 1]):
            for row in range(span[i, 1, 0], span[i, 1, 1]):
                for c in range(span[i, 0, 0], span[i, 0, 1]):
                    at = scene * cells + row * columns + c
                    if used[at]:
                        end = starts[at + 1]
                        listed[end], xyz[0, end], xyz[1, end], xyz[2, end] = i, points[i, 0], points[i, 1], points[i, 2]
                        starts[at + 1] += 1  # where the next one goes; in the end, where the next cell starts
    return cell, starts, listed, xyz


@compiled()
def search(
    task: int,
    centers: _Floats,
    cell: _Ints,
    starts: _Bounds,
    rows: _Ints,
    xyz: _Floats,
    squared: _Floats,
    limits: _Bounds,
    found: _Ints,
    counts: _Bounds,
) -> None:
    """Find the neighbors of some centers.

    Args:
        task: Index of the range of centers; a task of `in_threads`.
        centers: (Q, 3) centers.
        cell: (Q,) from `list_points`.
        starts: _Bounds of the lists, from `list_points`.
        rows: (L,) from `list_points`, named `listed` there.
        xyz: (3, L) from `list_points`.
        squared: (K,) squared radii.
        limits: (K,) largest number of neighbors for each radius.
        found: (Q, sum of the limits), receives the rows of the neighbors, the radii side by side.
        counts: (K, Q), receives the numbers of neighbors.
    """
    distance = np.empty(_BLOCK, np.float32)
    # A block is written past the limit rather than tested for it.
    hits, taken = np.empty((len(limits), limits.max() + _BLOCK), np.int32), np.empty(len(limits), np.int64)
    for q in range(task * QUERIES_PER_TASK, min(len(centers), (task + 1) * QUERIES_PER_TASK)):
        cx, cy, cz = centers[q]
        taken[:] = 0
        last = starts[cell[q] + 1]
        for first in range(starts[cell[q]], last, _BLOCK):
            size = min(_BLOCK, last - first)
            block = slice(first, first + size)
            x, y, z, row = xyz[0][block], xyz[1][block], xyz[2][block], rows[block]
            for j in range(size):
                dx, dy, dz = x[j] - cx, y[j] - cy, z[j] - cz
                distance[j] = dx * dx + dy * dy + dz * dz
            open_radii = 0
            for k in range(len(limits)):
                count, limit = taken[k], squared[k]
                if count < limits[k]:
                    hit = hits[k]
                    for j in range(size):  # without branches: whether a point is a hit cannot be predicted
                        hit[count] = row[j]
                        count += distance[j] < limit
                    taken[k] = count
                    open_radii += count < limits[k]
            if open_radii == 0:
                break
        column = 0
        for k in range(len(limits)):
            counts[k, q] = min(taken[k], limits[k])
            for j in range(counts[k, q]):
                found[q, column + j] = hits[k, j]
            column += limits[k]


@compiled()
def compact(found: _Ints, column: int, counts: _Bounds) -> tuple[_Bounds, _Bounds]:
    """Remove the gaps between the neighbors of one radius.

    Args:
        found: (Q, sum of the limits), from `search`.
        column: Column where the radius starts.
        counts: (Q,) numbers of neighbors within the radius.

    Returns:
        index: (P,) rows of the neighbors, center by center.
        starts: (Q + 1,) bounds of the centers in `index`.
    """
    starts = np.zeros(len(counts) + 1, np.int64)
    for q in range(len(counts)):
        starts[q + 1] = starts[q] + counts[q]
    index = np.empty(starts[-1], np.int64)
    for q in range(len(counts)):
        for j in range(counts[q]):
            index[starts[q] + j] = found[q, column + j]
    return index, starts
