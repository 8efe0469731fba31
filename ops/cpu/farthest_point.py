"""Kernel of `ops/farthest_point.py`, which explains the blocks with bounding boxes that it skips."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_Floats = NDArray[np.float32]
_Ints = NDArray[np.int32]
_BLOCK = 64  # points of a block
_SIDE = 64  # cells along each side of the grid by which points are sorted


@compiled()
def sample_scene(
    scene: int, points: _Floats, starts: NDArray[np.int64], out_starts: NDArray[np.int64], rows: NDArray[np.int64]
) -> None:
    """Pick the points of one scene.

    Args:
        scene: Index of the scene; a task of `in_threads`.
        points: (N, 3) x, y, z of all scenes, in order.
        starts: B + 1 bounds of the scenes in `points`.
        out_starts: B + 1 bounds of the scenes in `rows`.
        rows: (K,), receives the rows picked, in the order of picking.
    """
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


@compiled()
def _by_place(points: _Floats) -> _Ints:
    """Rows of `points` (N, 3) in the order of the cells of a grid over their extent in x and y."""
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
