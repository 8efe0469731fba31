"""Kernels of `ops/iou3d.py` and `ops/nms.py`: overlap of rotated boxes, and greedy suppression.

All of them read a table of boxes (10, N), float64, one quantity per row. `ops/iou3d.py` explains the method and makes the table
(`box_table`). Suppression stands here and not in a file of its own because numba's cache does not notice a change of
`_intersection` in another file.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_Table = NDArray[np.float64]

COMMON_AREA, IOU_BEV, IOU_3D = 0, 1, 2
"""What to compute of a pair of boxes: the intersection in BEV (m²), its IoU, or the IoU of the volumes."""

# Rows of a table: center, half length and half width, heading, circumscribed radius, bottom, top, BEV area.
_X, _Y, _H, _W, _COS, _SIN, _R, _LOW, _HIGH, _BEV = range(10)

TOUCHING = 1e-12
"""Boxes that penetrate less than this part of their extent only touch: float64 rounding, far below that of float32 boxes."""


@compiled()
def fill_rows(a: _Table, b: _Table, measure: int, start: int, stop: int, out: NDArray[np.float32]) -> None:
    """Compute some rows of the matrix of all pairs.

    Args:
        a: Table of N boxes.
        b: Table of M boxes.
        measure: `COMMON_AREA`, `IOU_BEV` or `IOU_3D`.
        start: First row to fill.
        stop: Row after the last one to fill.
        out: (N, M), zeros; receives the measure of box i of `a` and box j of `b` at [i, j].
    """
    for i in range(start, stop):
        for j in range(b.shape[1]):
            if _near(a, i, b, j):
                out[i, j] = _overlap(a, i, b, j, measure)


@compiled()
def fill_aligned(a: _Table, b: _Table, measure: int, out: NDArray[np.float32]) -> None:
    """Compute the overlap of each box with the box in the same place of another table.

    Args:
        a: Table of N boxes.
        b: Table of N boxes.
        measure: `COMMON_AREA`, `IOU_BEV` or `IOU_3D`.
        out: (N,), receives the results.
    """
    for i in range(len(out)):
        out[i] = _overlap(a, i, b, i, measure)


@compiled()
def suppress(table: _Table, threshold: float, limit: int) -> NDArray[np.int64]:
    """Keep the best boxes by greedy non-maximum suppression.

    A square grid with cells as large as the widest reach limits the comparisons to the 3 x 3 cells around a kept box.

    Args:
        table: Table of N boxes, best first.
        threshold: A box is dropped if its BEV IoU with a better kept box is above this.
        limit: Largest number of boxes to keep.

    Returns:
        (K,) columns of the kept boxes, ascending.
    """
    n = table.shape[1]
    kept = np.empty(min(n, limit), np.int64)
    if n == 0 or limit == 0:
        return kept[:0]
    x, y, r = table[_X], table[_Y], table[_R]
    x_low, y_low = x.min(), y.min()
    side = max(2.0 * r.max(), max(x.max() - x_low, y.max() - y_low) / 64, 1e-30)  # at most 65 x 65 cells
    columns = int((x.max() - x_low) / side) + 3  # a border of empty cells all around
    rows = int((y.max() - y_low) / side) + 3
    cell = np.empty(n, np.int64)
    start = np.zeros(rows * columns + 1, np.int64)
    for j in range(n):
        cell[j] = (int((y[j] - y_low) / side) + 1) * columns + int((x[j] - x_low) / side) + 1
        start[cell[j] + 1] += 1
    start = start.cumsum()
    end = start[:-1].copy()
    members = np.empty(n, np.int64)  # the boxes of a cell stand in start..end of the cell, best first
    for j in range(n):
        members[end[cell[j]]] = j
        end[cell[j]] += 1
    alive = np.ones(n, np.bool_)
    share = threshold / (1.0 + threshold)  # IoU > threshold needs a common area above this share of the sum of both areas
    count = 0
    for best in range(n):
        if not alive[best]:
            continue
        kept[count] = best
        count += 1
        if count == limit:
            break
        for row in range(-1, 2):
            for near in range(cell[best] + row * columns - 1, cell[best] + row * columns + 2):
                stay = start[near]
                for k in range(start[near], end[near]):
                    j = members[k]
                    if j <= best:
                        continue  # had its turn: leaves the cell
                    both = table[_BEV, best] + table[_BEV, j]
                    common = _intersection(table, best, table, j, share * both)
                    if common > 0.0 and common / (both - common) > threshold:
                        alive[j] = False
                    else:
                        members[stay] = j
                        stay += 1
                end[near] = stay
    return kept[:count]


@compiled()
def _near(a: _Table, i: int, b: _Table, j: int) -> bool:
    """Whether the circles around box i of table a and box j of table b meet in BEV."""
    dx, dy, reach = b[_X, j] - a[_X, i], b[_Y, j] - a[_Y, i], a[_R, i] + b[_R, j]
    return dx * dx + dy * dy < reach * reach


@compiled()
def _overlap(a: _Table, i: int, b: _Table, j: int, measure: int) -> float:
    """The `measure` of box i of table a and box j of table b."""
    height_a = a[_HIGH, i] - a[_LOW, i]
    height_b = b[_HIGH, j] - b[_LOW, j]
    height = 1.0
    if measure == IOU_3D:
        height = min(a[_HIGH, i], b[_HIGH, j]) - max(a[_LOW, i], b[_LOW, j])
        if height <= 0.0:
            return 0.0
    common = _intersection(a, i, b, j, 0.0)
    if measure == COMMON_AREA or common == 0.0:
        return common
    if measure == IOU_BEV:
        return common / (a[_BEV, i] + b[_BEV, j] - common)
    common *= height
    return common / (a[_BEV, i] * height_a + b[_BEV, j] * height_b - common)


@compiled()
def _intersection(a: _Table, i: int, b: _Table, j: int, threshold: float) -> float:
    """Common BEV area of box i of table a and box j of table b; 0 where a bound shows that it is not above `threshold`."""
    if not _near(a, i, b, j) or a[_BEV, i] <= 0.0 or b[_BEV, j] <= 0.0:
        return 0.0
    ha, wa, cos_a, sin_a = a[_H, i], a[_W, i], a[_COS, i], a[_SIN, i]
    hb, wb, cos_b, sin_b = b[_H, j], b[_W, j], b[_COS, j], b[_SIN, j]
    cos, sin = cos_a * cos_b + sin_a * sin_b, cos_a * sin_b - sin_a * cos_b
    abs_cos, abs_sin = abs(cos), abs(sin)
    dx, dy = b[_X, j] - a[_X, i], b[_Y, j] - a[_Y, i]
    x, y = dx * cos_a + dy * sin_a, dy * cos_a - dx * sin_a  # center of b in the frame of a
    bound = _shared(x, ha, hb * abs_cos + wb * abs_sin) * _shared(y, wa, hb * abs_sin + wb * abs_cos)
    if bound <= threshold:
        return 0.0
    u, v = dx * cos_b + dy * sin_b, dy * cos_b - dx * sin_b  # minus the center of a in the frame of b
    bound = _shared(u, hb, ha * abs_cos + wa * abs_sin) * _shared(v, wb, ha * abs_sin + wa * abs_cos)
    if bound <= threshold:
        return 0.0
    px, py = hb * cos - wb * sin, hb * sin + wb * cos  # front left corner of b, from its center
    qx, qy = -hb * cos - wb * sin, -hb * sin + wb * cos  # rear left; the other two are opposite
    area = _edge_integral(x + px, y + py, x + qx, y + qy, ha, wa)
    area += _edge_integral(x + qx, y + qy, x - px, y - py, ha, wa)
    area += _edge_integral(x - px, y - py, x - qx, y - qy, ha, wa)
    area += _edge_integral(x - qx, y - qy, x + px, y + py, ha, wa)
    return min(max(area, 0.0), a[_BEV, i], b[_BEV, j])


@compiled()
def _shared(offset: float, a: float, b: float) -> float:
    """Common length of the intervals [-a, a] and [offset - b, offset + b]; 0 when they only touch."""
    length = min(a, offset + b) - max(-a, offset - b)
    return length if length > (a + b) * TOUCHING else 0.0


@compiled()
def _edge_integral(x0: float, y0: float, x1: float, y1: float, h: float, w: float) -> float:
    """Integral of clamp(x, -h, h) dy along the part |y| <= w of the edge (x0, y0) -> (x1, y1)."""
    ya, yb = min(max(y0, -w), w), min(max(y1, -w), w)
    if ya == yb:
        return 0.0
    slope = (x1 - x0) / (y1 - y0)
    xa, xb = x0 + (ya - y0) * slope, x0 + (yb - y0) * slope
    low, high = min(xa, xb), max(xa, xb)
    clamped_low, clamped_high = min(max(low, -h), h), min(max(high, -h), h)
    mean = clamped_low
    if high > low:
        beyond = max(high - h, 0.0) - max(low - h, 0.0)  # length with x > h
        before = max(-h - low, 0.0) - max(-h - high, 0.0)  # length with x < -h
        between = 0.5 * (clamped_low + clamped_high) * (clamped_high - clamped_low)
        mean = (between + h * (beyond - before)) / (high - low)
        mean = min(max(mean, clamped_low), clamped_high)  # rounding, where the edge is nearly parallel to y
    return mean * (yb - ya)
