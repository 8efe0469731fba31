"""Ball query: which points lie within a radius of each center, the first few of them in row order.

The neighborhoods of PV-RCNN's set abstraction. "The first n in row order" makes the result depend on the order of the points and
on nothing else, hence it is equal on a vehicle and on a server. A neighbor is a point of the center's own scene with
dx * dx + dy * dy + dz * dz < radius * radius, all in float32. OpenPCDet (`ball_query_gpu.cu`) pads to n by repeating the first
hit; a maximum over the neighbors does not see that, so here only real neighbors are listed and an empty ball has none.

How the CPU does it. The centers are sorted into the cells of a coarse grid over x and y. In one pass over the points, in row
order, each point is appended to the lists of the cells whose centers it could reach. So the list of a cell is already in row
order: each center runs down its cell's list, tests a short block at a time in vector registers, and stops when all radii are full.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput
from .checks import check_points, check_row_bounds, float32_array
from .cpu.ball_query import QUERIES_PER_TASK, compact, list_points, search
from .dispatch import dispatch
from .threads import in_threads

_CELLS = 1 << 16  # largest number of cells of a scene's grid
_REFERENCE_PAIRS = 1 << 22  # distances that the reference holds at a time


@dataclass(frozen=True, kw_only=True)
class Neighbors:
    """The neighbors of Q centers within one radius, center by center."""

    index: Tensor
    """(P,) int64 rows of the points, ascending and without repeats within a center."""

    starts: Tensor
    """(Q + 1,) int64 bounds of the centers in `index`."""


def ball_query(
    centers: Tensor,
    center_starts: Sequence[int],
    points: Tensor,
    point_starts: Sequence[int],
    radii: Sequence[float],
    limits: Sequence[int],
) -> list[Neighbors]:
    """Find the first `limits[k]` points within `radii[k]` of each center, for every k. It gives no gradient.

    Args:
        centers: (Q, 3) x, y, z in meters, scene by scene.
        center_starts: B + 1 row bounds of the scenes in `centers`.
        points: (N, 3) x, y, z in meters, scene by scene. Types other than float32 are rounded to it.
        point_starts: B + 1 row bounds of the scenes in `points`. Scenes without centers or points are legal.
        radii: Radii in meters, in any order; one search serves them all.
        limits: Largest number of neighbors of a center, one per radius.

    Returns:
        The neighbors within each radius.

    Raises:
        InvalidInput: Wrong shapes, bounds that do not fit, non-finite values, no radius, or a radius or limit that is not positive.

    Example:
        >>> points = torch.tensor([[0.0, 0, 0], [0.4, 0, 0], [3, 0, 0]])
        >>> (near,) = ball_query(points[:1], (0, 1), points, (0, 3), radii=[0.5], limits=[16])
        >>> near.index
        tensor([0, 1])
    """
    implementation = dispatch((centers, points), ball_query_reference, cpu=_ball_query_on_cpu)
    return implementation(centers, center_starts, points, point_starts, radii, limits)


def ball_query_reference(
    centers: Tensor,
    center_starts: Sequence[int],
    points: Tensor,
    point_starts: Sequence[int],
    radii: Sequence[float],
    limits: Sequence[int],
) -> list[Neighbors]:
    """Compute `ball_query` in plain torch, on any device, by the distances of all pairs; on the CPU it finds the same points.

    Args:
        centers: (Q, 3) centers.
        center_starts: B + 1 row bounds of the scenes in `centers`.
        points: (N, 3) points.
        point_starts: B + 1 row bounds of the scenes in `points`.
        radii: Radii in meters.
        limits: Largest number of neighbors, one per radius.

    Returns:
        The neighbors within each radius.
    """
    _check(centers, center_starts, points, point_starts, radii, limits)
    centers, points = centers.detach().float(), points.detach().float()
    index: list[list[Tensor]] = [[torch.empty(0, dtype=torch.int64, device=points.device)] for _ in radii]
    counts: list[list[Tensor]] = [[torch.zeros(1, dtype=torch.int64, device=points.device)] for _ in radii]
    for (first, last), (low, high) in zip(pairwise(center_starts), pairwise(point_starts)):
        for chunk in centers[first:last].split(max(1, _REFERENCE_PAIRS // max(1, high - low))):
            dx, dy, dz = (points[low:high, None] - chunk).unbind(2)  # (points, centers)
            distance = (dx * dx + dy * dy + dz * dz).T
            for k, squared in enumerate(_squared(radii)):
                hit = distance < float(squared)
                hit &= hit.cumsum(1) <= limits[k]
                index[k].append(low + hit.nonzero()[:, 1])
                counts[k].append(hit.sum(1))
    return [Neighbors(index=torch.cat(i), starts=torch.cat(c).cumsum(0)) for i, c in zip(index, counts)]


def _ball_query_on_cpu(
    centers: Tensor,
    center_starts: Sequence[int],
    points: Tensor,
    point_starts: Sequence[int],
    radii: Sequence[float],
    limits: Sequence[int],
) -> list[Neighbors]:
    _check(centers, center_starts, points, point_starts, radii, limits)
    center, point = float32_array(centers), float32_array(points)
    cell, starts, rows, xyz = list_points(center, np.array(center_starts), point, np.array(point_starts), *_grid(center, radii))
    # No scene has more neighbors than points: a limit beyond that reserves nothing.
    most = np.minimum(np.array(limits, np.int64), max(len(point), 1))
    found, counts = np.empty((len(center), most.sum()), np.int32), np.zeros((len(most), len(center)), np.int64)
    tasks = -(-len(center) // QUERIES_PER_TASK)
    in_threads(search, tasks, center, cell, starts, rows, xyz, np.array(_squared(radii)), most, found, counts)
    return [
        Neighbors(index=torch.from_numpy(index), starts=torch.from_numpy(bounds))
        for index, bounds in (compact(found, column, counts[k]) for k, column in enumerate(np.cumsum(most) - most))
    ]


def _check(
    centers: Tensor,
    center_starts: Sequence[int],
    points: Tensor,
    point_starts: Sequence[int],
    radii: Sequence[float],
    limits: Sequence[int],
) -> None:
    for name, tensor, starts in (("centers", centers, center_starts), ("points", points, point_starts)):
        check_points(f"ball_query: {name}", tensor)
        check_row_bounds(f"ball_query: {name}", starts, len(tensor))
    if len(center_starts) != len(point_starts):
        raise InvalidInput(
            f"ball_query needs as many scenes of centers as of points, found {len(center_starts) - 1} scenes of centers and "
            f"{len(point_starts) - 1} of points"
        )
    if len(radii) < 1 or len(radii) != len(limits) or not all(0 < r < np.inf for r in radii) or min(limits) < 1:
        raise InvalidInput(
            f"ball_query needs finite positive radii and one positive limit per radius, found {radii} and {limits}"
        )


def _squared(radii: Sequence[float]) -> list[np.float32]:
    return [np.float32(radius) * np.float32(radius) for radius in radii]


def _grid(centers: NDArray[np.float32], radii: Sequence[float]) -> tuple[NDArray[np.float64], float, float, int, int]:
    """A grid over the centers of all scenes: origin x, y, cells per meter, reach in meters, number of columns and rows."""
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
