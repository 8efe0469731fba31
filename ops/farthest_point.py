"""Farthest point sampling: a few points of a scan that cover it evenly, the keypoints of PV-RCNN.

The first pick is a scene's first point; each further pick is the point farthest from all earlier ones (float32 squared distance,
equal distances: the lowest row). So the picks of 100 are the first 100 picks of 200.

How the CPU does it. A pick changes the distance only of points nearer to it than to any earlier pick: hardly any, after the first
few picks. The points are sorted by place and cut into short blocks with a bounding box each; a block whose box is farther from the
pick than its points are from the earlier ones is left out. The result is that of the full search bit for bit: rounding is
monotone, so the rounded distance of a box is never above the rounded distance of a point in it.

Source: Qi et al., "PointNet++", NIPS 2017, section 3.2; OpenPCDet ``sampling_gpu.cu`` (there ties go by thread order, and a scene
with too few points repeats them). The blocks: Han et al., "QuickFPS", IEEE TCAD 2023, with a grid instead of a k-d tree.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .threads import in_threads

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]
_BLOCK = 64  # points of a block
_SIDE = 64  # cells along each side of the grid by which points are sorted


def farthest_point_sample(points: Tensor, starts: Sequence[int], count: int) -> tuple[Tensor, tuple[int, ...]]:
    """The ``count`` points of each scene that farthest point sampling picks.

    Args:
        points: (N, 3) x, y, z in m, the scenes one after the other; repeated points are legal.
        starts: B + 1 row bounds of the scenes; scenes without points are legal.
        count: picks of a scene. One with fewer points gives each of them once.

    Returns:
        rows: (K,) int64 rows of ``points``, scene by scene in the order of picking, no row twice.
        out_starts: B + 1 bounds of the scenes in ``rows``.

    No gradient. Runs where the points are. Raises ValueError for a wrong shape, bounds that do not fit, or non-finite points.
    """
    out_starts = _check(points, starts, count)
    if points.device.type != "cpu":
        return farthest_point_sample_reference(points, starts, count)
    array = float32_array(points)
    rows = np.empty(out_starts[-1], np.int64)
    in_threads(_sample_scene, len(starts) - 1, array, np.array(starts, np.int64), np.array(out_starts, np.int64), rows)
    return torch.from_numpy(rows), out_starts


def farthest_point_sample_reference(points: Tensor, starts: Sequence[int], count: int) -> tuple[Tensor, tuple[int, ...]]:
    """``farthest_point_sample`` in plain torch, on any device, all scenes at once; equal to it on the CPU."""
    out_starts = _check(points, starts, count)
    sizes = [end - start for start, end in pairwise(starts)]
    picks = max((end - start for start, end in pairwise(out_starts)), default=0)
    if picks == 0:
        return torch.empty(0, dtype=torch.int64, device=points.device), out_starts
    padded = points.new_zeros(len(sizes), max(sizes), 3, dtype=torch.float32)
    nearest = padded.new_full(padded.shape[:2], -torch.inf)  # squared distance to the nearest pick; -inf: no point here
    for scene, size in enumerate(sizes):
        padded[scene, :size] = points.detach()[starts[scene] : starts[scene + 1]]
        nearest[scene, :size] = torch.inf
    scenes = torch.arange(len(sizes), device=points.device)
    pick, picked = torch.zeros_like(scenes), []
    for _ in range(picks):
        picked.append(pick)
        dx, dy, dz = (padded - padded[scenes, pick][:, None]).unbind(2)
        nearest = torch.minimum(nearest, dx * dx + dy * dy + dz * dz)
        nearest[scenes, pick] = -1
        pick = nearest.argmax(1)
    bounds = zip(torch.stack(picked, 1), starts, pairwise(out_starts))
    return torch.cat([start + rows[: high - low] for rows, start, (low, high) in bounds]), out_starts


def check_starts(name: str, starts: Sequence[int], rows: int) -> None:
    """Raise ValueError unless ``starts`` are row bounds of scenes that lie one after the other in ``rows`` rows."""
    if len(starts) < 1 or starts[0] != 0 or starts[-1] != rows or any(end < start for start, end in pairwise(starts)):
        raise ValueError(
            f"{name}: the bounds of the scenes must ascend from 0 to the number of rows, {rows}, got {tuple(starts)}"
        )


def check_points(name: str, points: Tensor) -> None:
    """Raise ValueError unless ``points`` are (N, 3), floating point and finite in float32."""
    if points.ndim != 2 or points.shape[1] != 3 or not points.is_floating_point():
        raise ValueError(f"{name}: points must be floating point (N, 3), got {points.dtype} {tuple(points.shape)}")
    if points.device.type == "cpu" and np.isfinite(float32_array(points)).all():
        return
    finite = torch.isfinite(points.detach().to(torch.float32)).all(1)
    if not finite.all():
        bad = int((~finite).sum())
        raise ValueError(f"{name}: {bad} of {len(points)} points have a NaN or infinite value; remove them first")


def float32_array(points: Tensor) -> Floats:
    """Points on the CPU as a contiguous float32 array; by numpy, because torch's threads cost more than they save here."""
    return np.ascontiguousarray(points.detach().to(torch.float32).numpy())


def _check(points: Tensor, starts: Sequence[int], count: int) -> tuple[int, ...]:
    """Check the arguments; the bounds of the scenes in the result."""
    check_points("farthest_point_sample", points)
    check_starts("farthest_point_sample", starts, len(points))
    if count < 1:
        raise ValueError(f"farthest_point_sample: count must be positive, got {count}")
    return tuple(accumulate((min(count, end - start) for start, end in pairwise(starts)), initial=0))


@numba.njit(cache=True, nogil=True)
def _sample_scene(
    scene: int, points: Floats, starts: NDArray[np.int64], out_starts: NDArray[np.int64], rows: NDArray[np.int64]
) -> None:
    """Fill in the picks of one scene."""
    first = starts[scene]
    picks = rows[out_starts[scene] : out_starts[scene + 1]]
    if len(picks) == 0:
        return
    order = _by_place(points[first : starts[scene + 1]])  # row of the scene, of each slot
    size, blocks = len(order), (len(order) + _BLOCK - 1) // _BLOCK
    x, y, z = np.empty(size, np.float32), np.empty(size, np.float32), np.empty(size, np.float32)
    low, high = np.full((3, blocks), np.inf, np.float32), np.full((3, blocks), -np.inf, np.float32)
    slot = 0
    for i in range(size):
        x[i], y[i], z[i] = points[first + order[i]]
        for axis in range(3):
            low[axis, i // _BLOCK] = min(low[axis, i // _BLOCK], points[first + order[i], axis])
            high[axis, i // _BLOCK] = max(high[axis, i // _BLOCK], points[first + order[i], axis])
        if order[i] == 0:
            slot = i
    # Squared distance to the nearest pick, of each point and the largest of each block; -1 for picks. As integers the bits of
    # floats that are not negative have the same order, and a maximum of integers runs in vector registers.
    nearest, farthest = np.full(size, np.inf, np.float32), np.full(blocks, np.inf, np.float32)
    nearest_bits, farthest_bits = nearest.view(np.int32), farthest.view(np.int32)
    to_box, zero = np.empty(blocks, np.float32), np.float32(0)

    for k in range(len(picks)):
        picks[k] = first + order[slot]
        nearest[slot] = -1
        px, py, pz = x[slot], y[slot], z[slot]
        for b in range(blocks):
            dx = max(max(low[0, b] - px, px - high[0, b]), zero)
            dy = max(max(low[1, b] - py, py - high[1, b]), zero)
            dz = max(max(low[2, b] - pz, pz - high[2, b]), zero)
            to_box[b] = dx * dx + dy * dy + dz * dz
        for b in range(blocks):
            if to_box[b] < farthest[b] or b == slot // _BLOCK:
                begin, end = b * _BLOCK, min(size, (b + 1) * _BLOCK)
                for i in range(begin, end):
                    dx, dy, dz = x[i] - px, y[i] - py, z[i] - pz
                    distance = dx * dx + dy * dy + dz * dz
                    nearest[i] = distance if distance < nearest[i] else nearest[i]  # min() would not run in vector registers
                largest = nearest_bits[begin]
                for i in range(begin, end):
                    largest = max(largest, nearest_bits[i])
                farthest_bits[b] = largest
        largest = farthest_bits[0]
        for b in range(blocks):
            largest = max(largest, farthest_bits[b])
        row = size
        for b in range(blocks):
            if farthest_bits[b] == largest:
                for i in range(b * _BLOCK, min(size, (b + 1) * _BLOCK)):
                    if nearest_bits[i] == largest and order[i] < row:
                        row, slot = order[i], i


@numba.njit(cache=True, nogil=True)
def _by_place(points: Floats) -> Ints:
    """Rows of ``points`` (N, 3) in the order of the cells of a grid over their extent in x and y."""
    low = points[0, :2].copy()
    high = low.copy()
    for i in range(len(points)):
        for axis in range(2):
            low[axis], high[axis] = min(low[axis], points[i, axis]), max(high[axis], points[i, axis])
    cells, starts = np.empty(len(points), np.int32), np.zeros(_SIDE * _SIDE + 1, np.int32)
    for i in range(len(points)):
        cell = 0
        for axis in range(2):
            size = (np.float64(high[axis]) - np.float64(low[axis])) / _SIDE
            if size > 0:
                place = (np.float64(points[i, axis]) - np.float64(low[axis])) / size
                cell += int(min(place, _SIDE - 1)) * (_SIDE if axis == 1 else 1)
        cells[i] = cell
        starts[cell + 1] += 1
    for cell in range(_SIDE * _SIDE):
        starts[cell + 1] += starts[cell]
    order = np.empty(len(points), np.int32)
    for i in range(len(points)):
        order[starts[cells[i]]] = i
        starts[cells[i]] += 1
    return order
