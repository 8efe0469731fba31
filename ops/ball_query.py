"""Ball query: which points lie within a radius of each centre, the first few of them in row order.

The neighbourhoods of PV-RCNN's set abstraction. "The first n in row order" makes the result depend on the order of the points and
on nothing else, hence it is equal on a vehicle and on a server. A neighbour is a point of the centre's own scene with
dx * dx + dy * dy + dz * dz < radius * radius, all in float32. OpenPCDet (``ball_query_gpu.cu``) pads to n by repeating the first
hit; a maximum over the neighbours does not see that, so here only real neighbours are listed and an empty ball has none.

How the CPU does it. The centres are sorted into the cells of a coarse grid over x and y. In one pass over the points, in row
order, each point is appended to the lists of the cells whose centres it could reach. So the list of a cell is already in row
order: each centre runs down its cell's list, tests a short block at a time in vector registers, and stops when all radii are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .farthest_point import check_points, check_starts, float32_array
from .threads import in_threads

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
Bounds = NDArray[np.int64]
_BLOCK = 64  # points tested at a time
_RANGE = 2048  # centres a thread takes at a time: about a millisecond, below which a thread is not worth starting
_CELLS = 1 << 16  # most cells of a scene's grid
_REFERENCE_PAIRS = 1 << 22  # distances the reference holds at a time


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The neighbours of Q centres within one radius, centre by centre."""

    index: Tensor  # (P,) int64, rows of the points, ascending and without repeats within a centre
    starts: Tensor  # (Q + 1,) int64, bounds of the centres in ``index``


def ball_query(
    centers: Tensor,
    center_starts: Sequence[int],
    points: Tensor,
    point_starts: Sequence[int],
    radii: Sequence[float],
    limits: Sequence[int],
) -> list[Neighbors]:
    """The first ``limits[k]`` points within ``radii[k]`` of each centre, for every k.

    Args:
        centres: (Q, 3) x, y, z in m, the scenes one after the other.
        center_starts: B + 1 row bounds of the scenes in ``centres``.
        points: (N, 3) x, y, z in m, likewise; float32 like the centres (other types are rounded to it).
        point_starts: B + 1 row bounds of the scenes in ``points``. Scenes without centres or points are legal.
        radii: in m, in any order; one search serves them all.
        limits: most neighbours of a centre, one per radius.

    No gradient. Runs where the points are. Raises ValueError for wrong shapes, bounds that do not fit, non-finite values, no radius,
    or a radius or limit that is not positive.
    """
    _check(centers, center_starts, points, point_starts, radii, limits)
    if points.device.type != "cpu":
        return ball_query_reference(centers, center_starts, points, point_starts, radii, limits)
    center, point = float32_array(centers), float32_array(points)
    cell, starts, rows, xyz = _lists(center, np.array(center_starts), point, np.array(point_starts), *_grid(center, radii))
    # No scene has more neighbours than points: a limit beyond that reserves nothing.
    most = np.minimum(np.array(limits, np.int64), max(len(point), 1))
    found, counts = np.empty((len(center), most.sum()), np.int32), np.zeros((len(most), len(center)), np.int64)
    tasks = -(-len(center) // _RANGE)
    in_threads(_search, tasks, center, cell, starts, rows, xyz, np.array(_squared(radii)), most, found, counts)
    return [
        Neighbors(index=torch.from_numpy(index), starts=torch.from_numpy(bounds))
        for index, bounds in (_compact(found, column, counts[k]) for k, column in enumerate(np.cumsum(most) - most))
    ]


def ball_query_reference(
    centers: Tensor,
    center_starts: Sequence[int],
    points: Tensor,
    point_starts: Sequence[int],
    radii: Sequence[float],
    limits: Sequence[int],
) -> list[Neighbors]:
    """``ball_query`` in plain torch, on any device, by the distances of all pairs; equal to it on the CPU."""
    _check(centers, center_starts, points, point_starts, radii, limits)
    centers, points = centers.detach().float(), points.detach().float()
    index: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64, device=points.device)] for _ in radii]
    counts: list[list[Tensor]] = [[torch.zeros(1, dtype=torch.int64, device=points.device)] for _ in radii]
    for (first, last), (low, high) in zip(pairwise(center_starts), pairwise(point_starts)):
        for chunk in centers[first:last].split(max(1, _REFERENCE_PAIRS // max(1, high - low))):
            dx, dy, dz = (points[low:high, None] - chunk).unbind(2)  # (points, centres)
            distance = (dx * dx + dy * dy + dz * dz).T
            for k, squared in enumerate(_squared(radii)):
                within = distance < float(squared)
                within &= within.cumsum(1) <= limits[k]
                index[k].append(low + within.nonzero()[:, 1])
                counts[k].append(within.sum(1))
    return [Neighbors(index=torch.cat(i), starts=torch.cat(c).cumsum(0)) for i, c in zip(index, counts)]


def _check(
    centers: Tensor,
    center_starts: Sequence[int],
    points: Tensor,
    point_starts: Sequence[int],
    radii: Sequence[float],
    limits: Sequence[int],
) -> None:
    for name, tensor, starts in (("centers", centers, center_starts), ("points", points, point_starts)):
        check_points(f"ball_query, {name}", tensor)
        check_starts(f"ball_query, {name}", starts, len(tensor))
    if len(center_starts) != len(point_starts) or centers.device != points.device:
        raise ValueError(
            f"ball_query: {len(center_starts) - 1} scenes of centres on {centers.device}, "
            f"but {len(point_starts) - 1} of points on {points.device}"
        )
    if len(radii) < 1 or len(radii) != len(limits) or not all(0 < r < np.inf for r in radii) or min(limits) < 1:
        raise ValueError(f"ball_query: needs a finite positive radius and a positive limit each, got {radii} and {limits}")


def _squared(radii: Sequence[float]) -> list[np.float32]:
    return [np.float32(radius) * np.float32(radius) for radius in radii]


def _grid(centers: Floats, radii: Sequence[float]) -> tuple[NDArray[np.float64], float, float, int, int]:
    """Origin x, y of the grid, cells per metre, reach in m, number of columns and rows: a grid over the centres of all scenes."""
    # The reach has a margin: a point just outside the largest radius may be inside after rounding.
    reach = 1.0001 * float(np.float32(max(radii)))
    if len(centers) == 0:
        return np.zeros(2), 1.0, reach, 1, 1
    low, high = (np.array([end(centers[:, axis]) for axis in (0, 1)], np.float64) for end in (np.min, np.max))
    cell = 1.5 * reach
    while np.prod(np.floor((high - low) * (1 / cell)) + 1) > _CELLS:
        cell *= 2
    columns, rows = (int(n) + 1 for n in np.floor((high - low) * (1 / cell)))
    return low, 1 / cell, reach, columns, rows


@numba.njit(cache=True, nogil=True)
def _lists(
    centers: Floats,
    center_starts: Bounds,
    points: Floats,
    point_starts: Bounds,
    origin: NDArray[np.float64],
    per_meter: float,
    reach: float,
    columns: int,
    rows: int,
) -> tuple[Ints, Bounds, Ints, Floats]:
    """The cell of each centre (Q,), and for the cells that hold centres the list of points within reach of the cell.

    The lists lie one after the other: their bounds (cells + 2; the last is of no use), rows of points (L,), coordinates (3, L).
    The cell of a place is a monotone function of it, rounding included, so no point within reach is missed.
    """
    scenes, cells = len(center_starts) - 1, columns * rows
    cell, used = np.empty(len(centers), np.int32), np.zeros(scenes * cells, np.bool_)
    for scene in range(scenes):
        for i in range(center_starts[scene], center_starts[scene + 1]):
            column = int((np.float64(centers[i, 0]) - origin[0]) * per_meter)  # never negative
            row = int((np.float64(centers[i, 1]) - origin[1]) * per_meter)
            cell[i] = scene * cells + row * columns + column
            used[cell[i]] = True

    # The cells whose centres a point could reach: from span[i, 0] to before span[i, 1] along x, then likewise along y.
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


@numba.njit(cache=True, nogil=True)
def _search(
    task: int,
    centers: Floats,
    cell: Ints,
    starts: Bounds,
    rows: Ints,
    xyz: Floats,
    squared: Floats,
    limits: Bounds,
    found: Ints,
    counts: Bounds,
) -> None:
    """Fill in ``counts`` (K, Q) and ``found`` (Q, sum of the limits), the radii side by side, for a range of centres."""
    distance = np.empty(_BLOCK, np.float32)
    # A block is written past the limit rather than tested for it.
    hits, taken = np.empty((len(limits), limits.max() + _BLOCK), np.int32), np.empty(len(limits), np.int64)
    for q in range(task * _RANGE, min(len(centers), (task + 1) * _RANGE)):
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


@numba.njit(cache=True, nogil=True)
def _compact(found: Ints, column: int, counts: Bounds) -> tuple[Bounds, Bounds]:
    """The rows ``found`` from ``column`` on, as many as ``counts`` (Q,) says, without gaps (P,), and their bounds (Q + 1,)."""
    starts = np.zeros(len(counts) + 1, np.int64)
    for q in range(len(counts)):
        starts[q + 1] = starts[q] + counts[q]
    index = np.empty(starts[-1], np.int64)
    for q in range(len(counts)):
        for j in range(counts[q]):
            index[starts[q] + j] = found[q, column + j]
    return index, starts
