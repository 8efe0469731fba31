"""Overlap of rotated boxes, seen from above (BEV) and in space: intersections, intersection over union, and the loop of NMS.

Boxes are (x, y, z of the centre, dx, dy, dz, yaw), metres and radians, yaw counter-clockwise from +x.

The intersection of two rectangles A and B is an integral over the outline of B. In the frame of A, where A is |x| <= h, |y| <= w,

    area = integral over y in [-w, w] of the length of {x : (x, y) in B, |x| <= h} dy
         = sum over the four edges of B, counter-clockwise, of the integral of clamp(x, -h, h) dy on the part with |y| <= w,

the second line by Green's theorem. Each edge is a closed formula, so there are no vertices to collect and sort, no tolerance
for "corner inside", and coincident edges are no special case: the result is continuous in the boxes. All in float64.
Rectangles that a line parallel to one of their sides separates are found first, so that boxes apart have overlap exactly 0.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Table = NDArray[np.float64]  # (10, N): ``box_table``
# What to compute of a pair: intersection seen from above (m^2), its IoU, or the IoU of the volumes.
_AREA, _IOU_BEV, _IOU_3D = 0, 1, 2
# Rows of a box table: centre, half sizes along heading and across, heading, circumscribed radius, bottom, top, BEV area.
_X, _Y, _H, _W, _COS, _SIN, _R, _LOW, _HIGH, _BEV = range(10)
# Penetration below this part of the boxes' extent is touching: float64 rounding, far below the rounding of float32 boxes.
_TOUCHING = 1e-12
_PAIRS_PER_THREAD = 100_000  # below this a second thread costs more than it brings


def iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """IoU seen from above of every box of ``a`` (N, 7) with every box of ``b`` (M, 7): (N, M) float32 in [0, 1].

    A box without area has IoU 0 with everything; so has a negative size. Runs where the boxes are; no gradient.
    Raises ValueError for a wrong shape or a NaN or infinite value (as do all functions of this file).
    """
    return _matrix(a, b, _IOU_BEV)


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """IoU of the volumes of every box of ``a`` (N, 7) with every box of ``b`` (M, 7): (N, M) float32 in [0, 1]."""
    return _matrix(a, b, _IOU_3D)


def intersection_bev(a: Tensor, b: Tensor) -> Tensor:
    """Common area, m^2, seen from above of every box of ``a`` (N, 7) with every box of ``b`` (M, 7): (N, M) float32."""
    return _matrix(a, b, _AREA)


def iou_bev_aligned(a: Tensor, b: Tensor) -> Tensor:
    """IoU seen from above of row i of ``a`` (N, 7) with row i of ``b`` (N, 7): (N,) float32."""
    return _aligned(a, b, _IOU_BEV)


def iou_3d_aligned(a: Tensor, b: Tensor) -> Tensor:
    """IoU of the volumes of row i of ``a`` (N, 7) and row i of ``b`` (N, 7): (N,) float32."""
    return _aligned(a, b, _IOU_3D)


def iou_bev_nearest(a: Tensor, b: Tensor) -> Tensor:
    """Cheap IoU for anchor assignment: boxes (N, 7), (M, 7) turned to the nearest multiple of 90 degrees first -> (N, M) float32.

    Source: OpenPCDet ``box_utils.boxes3d_nearest_bev_iou`` (VoxelNet's and SECOND's assigner).
    """
    _check(a, b)
    low_a, high_a, area_a = _nearest_rectangle(a)
    low_b, high_b, area_b = _nearest_rectangle(b)
    # One axis at a time and in place, because memory traffic is the cost with 70,000 anchors of a class; and with the few boxes
    # outside and the many anchors inside, because elementwise operators loop fast over a long last axis only.
    common = a.new_ones(len(b), len(a), dtype=torch.float32)
    for axis in range(2):
        overlap = torch.minimum(high_a[axis], high_b[axis][:, None])
        overlap -= torch.maximum(low_a[axis], low_b[axis][:, None])
        common *= overlap.clamp_min_(0)
    union = (area_a + area_b[:, None]).sub_(common).clamp_min_(1e-12)
    return common.div_(union).clamp_max_(1).T


def iou_bev_reference(a: Tensor, b: Tensor) -> Tensor:
    """``iou_bev`` in plain torch, on any device."""
    return _matrix_reference(a, b, _IOU_BEV)


def iou_3d_reference(a: Tensor, b: Tensor) -> Tensor:
    """``iou_3d`` in plain torch, on any device."""
    return _matrix_reference(a, b, _IOU_3D)


def intersection_bev_reference(a: Tensor, b: Tensor) -> Tensor:
    """``intersection_bev`` in plain torch, on any device."""
    return _matrix_reference(a, b, _AREA)


def iou_bev_aligned_reference(a: Tensor, b: Tensor) -> Tensor:
    """``iou_bev_aligned`` in plain torch, on any device."""
    return _aligned_reference(a, b, _IOU_BEV)


def iou_3d_aligned_reference(a: Tensor, b: Tensor) -> Tensor:
    """``iou_3d_aligned`` in plain torch, on any device."""
    return _aligned_reference(a, b, _IOU_3D)


def box_table(boxes: Tensor) -> Tensor:
    """Boxes (N, 7) -> (10, N) float64, contiguous: what the kernels need of a box, one quantity a row (see the top)."""
    b = boxes.detach().double()
    half = b[:, 3:6].clamp_min(0) / 2
    yaw = b[:, 6]
    area = 4 * half[:, 0] * half[:, 1]
    radius = torch.hypot(half[:, 0], half[:, 1])
    low, high = b[:, 2] - half[:, 2], b[:, 2] + half[:, 2]
    return torch.stack([b[:, 0], b[:, 1], half[:, 0], half[:, 1], yaw.cos(), yaw.sin(), radius, low, high, area])


def _check(*boxes: Tensor) -> None:
    for b in boxes:
        if b.ndim != 2 or b.shape[1] != 7 or not b.is_floating_point():
            raise ValueError(f"boxes must be floating point (N, 7), got {b.dtype} {tuple(b.shape)}")
        finite = torch.isfinite(b)
        if not finite.all():
            bad = int((~finite.all(1)).sum())
            raise ValueError(f"{bad} of {len(b)} boxes have a NaN or infinite value; remove them first")


def _nearest_rectangle(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest corner (2, N) and area (N,) of boxes turned to the nearest multiple of 90 degrees."""
    boxes = boxes.detach().to(torch.float32)
    turned = torch.remainder(boxes[:, 6:7] + math.pi / 4, math.pi) > math.pi / 2  # heading is nearer to the y axis
    size = torch.where(turned, boxes[:, [4, 3]], boxes[:, 3:5]).clamp_min(0)
    center, half = boxes[:, :2].T.contiguous(), size.T.contiguous() / 2
    return center - half, center + half, size.prod(1)


def _matrix(a: Tensor, b: Tensor, measure: int) -> Tensor:
    if a.device.type != "cpu":
        return _matrix_reference(a, b, measure)
    _check(a, b)
    table_a, table_b = box_table(a).numpy(), box_table(b).numpy()
    out = np.zeros((len(a), len(b)), np.float32)
    threads = max(1, min(torch.get_num_threads(), out.size // _PAIRS_PER_THREAD))
    if threads == 1:
        _fill_rows(table_a, table_b, measure, 0, len(a), out)
    else:
        # More ranges than threads, because boxes come sorted by place and some ranges are crowded. A pool for each call,
        # because the threads of a kept one do not survive a fork.
        bounds = [len(a) * k // (4 * threads) for k in range(4 * threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda r: _fill_rows(table_a, table_b, measure, r[0], r[1], out), pairwise(bounds)))
    return torch.from_numpy(out)


def _aligned(a: Tensor, b: Tensor, measure: int) -> Tensor:
    if a.device.type != "cpu":
        return _aligned_reference(a, b, measure)
    _check_aligned(a, b)
    out = np.zeros(len(a), np.float32)
    _fill_aligned(box_table(a).numpy(), box_table(b).numpy(), measure, out)
    return torch.from_numpy(out)


def _check_aligned(a: Tensor, b: Tensor) -> None:
    _check(a, b)
    if len(a) != len(b):
        raise ValueError(f"aligned overlap needs as many boxes on both sides, got {len(a)} and {len(b)}")


@numba.njit(cache=True, nogil=True)
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
        within = 0.5 * (clamped_low + clamped_high) * (clamped_high - clamped_low)
        mean = (within + h * (beyond - before)) / (high - low)
        mean = min(max(mean, clamped_low), clamped_high)  # rounding, where the edge is nearly parallel to y
    return mean * (yb - ya)


@numba.njit(cache=True, nogil=True)
def _near(a: Table, i: int, b: Table, j: int) -> bool:
    """Whether the circles around box i of table a and box j of table b, seen from above, meet."""
    dx, dy, reach = b[_X, j] - a[_X, i], b[_Y, j] - a[_Y, i], a[_R, i] + b[_R, j]
    return dx * dx + dy * dy < reach * reach


@numba.njit(cache=True, nogil=True)
def _shared(offset: float, a: float, b: float) -> float:
    """Common length of the intervals [-a, a] and [offset - b, offset + b]; 0 when they only touch."""
    length = min(a, offset + b) - max(-a, offset - b)
    return length if length > (a + b) * _TOUCHING else 0.0


@numba.njit(cache=True, nogil=True)
def _intersection(a: Table, i: int, b: Table, j: int, least: float) -> float:
    """Common area of box i of table a and box j of table b, seen from above; 0 where it is surely not above ``least``."""
    if not _near(a, i, b, j) or a[_BEV, i] <= 0.0 or b[_BEV, j] <= 0.0:
        return 0.0
    ha, wa, cos_a, sin_a = a[_H, i], a[_W, i], a[_COS, i], a[_SIN, i]
    hb, wb, cos_b, sin_b = b[_H, j], b[_W, j], b[_COS, j], b[_SIN, j]
    cos, sin = cos_a * cos_b + sin_a * sin_b, cos_a * sin_b - sin_a * cos_b
    abs_cos, abs_sin = abs(cos), abs(sin)
    dx, dy = b[_X, j] - a[_X, i], b[_Y, j] - a[_Y, i]
    x, y = dx * cos_a + dy * sin_a, dy * cos_a - dx * sin_a  # centre of b in the frame of a
    bound = _shared(x, ha, hb * abs_cos + wb * abs_sin) * _shared(y, wa, hb * abs_sin + wb * abs_cos)
    if bound <= least:
        return 0.0
    u, v = dx * cos_b + dy * sin_b, dy * cos_b - dx * sin_b  # minus the centre of a in the frame of b
    bound = _shared(u, hb, ha * abs_cos + wa * abs_sin) * _shared(v, wb, ha * abs_sin + wa * abs_cos)
    if bound <= least:
        return 0.0
    px, py = hb * cos - wb * sin, hb * sin + wb * cos  # front left corner of b, from its centre
    qx, qy = -hb * cos - wb * sin, -hb * sin + wb * cos  # rear left; the other two are opposite
    area = _edge_integral(x + px, y + py, x + qx, y + qy, ha, wa)
    area += _edge_integral(x + qx, y + qy, x - px, y - py, ha, wa)
    area += _edge_integral(x - px, y - py, x - qx, y - qy, ha, wa)
    area += _edge_integral(x - qx, y - qy, x + px, y + py, ha, wa)
    return min(max(area, 0.0), a[_BEV, i], b[_BEV, j])


@numba.njit(cache=True, nogil=True)
def _overlap(a: Table, i: int, b: Table, j: int, measure: int) -> float:
    """The ``measure`` of box i of table a and box j of table b."""
    height_a = a[_HIGH, i] - a[_LOW, i]
    height_b = b[_HIGH, j] - b[_LOW, j]
    height = 1.0
    if measure == _IOU_3D:
        height = min(a[_HIGH, i], b[_HIGH, j]) - max(a[_LOW, i], b[_LOW, j])
        if height <= 0.0:
            return 0.0
    common = _intersection(a, i, b, j, 0.0)
    if measure == _AREA or common == 0.0:
        return common
    if measure == _IOU_BEV:
        return common / (a[_BEV, i] + b[_BEV, j] - common)
    common *= height
    return common / (a[_BEV, i] * height_a + b[_BEV, j] * height_b - common)


@numba.njit(cache=True, nogil=True)
def _fill_rows(a: Table, b: Table, measure: int, start: int, stop: int, out: NDArray[np.float32]) -> None:
    """Rows start..stop of the matrix ``out`` (N, M), which holds zeros."""
    for i in range(start, stop):
        for j in range(b.shape[1]):
            if _near(a, i, b, j):
                out[i, j] = _overlap(a, i, b, j, measure)


@numba.njit(cache=True, nogil=True)
def _fill_aligned(a: Table, b: Table, measure: int, out: NDArray[np.float32]) -> None:
    for i in range(len(out)):
        out[i] = _overlap(a, i, b, i, measure)


@numba.njit(cache=True, nogil=True)
def suppress(table: Table, threshold: float, limit: int) -> NDArray[np.int64]:
    """Greedy NMS of the boxes of a table, best first: rows kept, at most ``limit`` (for ``nms.py``).

    A square grid with cells as large as the widest reach limits the comparisons to the 3 x 3 cells around a kept box.
    It stands here because numba's cache does not notice a change of ``_intersection`` in another file.
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
    members = np.empty(n, np.int64)  # those of a cell stand in start..end of the cell, best first
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


def _matrix_reference(a: Tensor, b: Tensor, measure: int) -> Tensor:
    _check(a, b)
    table_a, table_b = box_table(a), box_table(b)
    distance = torch.hypot(table_a[_X, :, None] - table_b[_X], table_a[_Y, :, None] - table_b[_Y])
    i, j = (distance < table_a[_R, :, None] + table_b[_R]).nonzero(as_tuple=True)
    out = a.new_zeros(len(a), len(b), dtype=torch.float32)
    out[i, j] = _overlap_reference(table_a[:, i], table_b[:, j], measure)
    return out


def _aligned_reference(a: Tensor, b: Tensor, measure: int) -> Tensor:
    _check_aligned(a, b)
    return _overlap_reference(box_table(a), box_table(b), measure)


def _overlap_reference(a: Tensor, b: Tensor, measure: int) -> Tensor:
    """The ``measure`` of column k of table a and column k of table b, both (10, K): (K,) float32."""
    common = _intersection_reference(a, b)
    if measure == _AREA:
        return common.float()
    size_a, size_b = a[_BEV], b[_BEV]
    if measure == _IOU_3D:
        common = common * (torch.minimum(a[_HIGH], b[_HIGH]) - torch.maximum(a[_LOW], b[_LOW])).clamp_min(0)
        size_a, size_b = size_a * (a[_HIGH] - a[_LOW]), size_b * (b[_HIGH] - b[_LOW])
    iou = common / (size_a + size_b - common)
    return torch.where(common > 0, iou, 0.0).float()


def _intersection_reference(a: Tensor, b: Tensor) -> Tensor:
    """``_intersection`` of column k of both tables: (K,) float64."""
    half_a, half_b = a[_H : _W + 1], b[_H : _W + 1]
    offset = b[_X : _Y + 1] - a[_X : _Y + 1]
    cos, sin = a[_COS] * b[_COS] + a[_SIN] * b[_SIN], a[_COS] * b[_SIN] - a[_SIN] * b[_COS]
    x, y = _into_frame(offset, a)
    u, v = _into_frame(offset, b)
    abs_cos, abs_sin = cos.abs(), sin.abs()
    apart = _apart_reference(x, half_a[0], half_b[0] * abs_cos + half_b[1] * abs_sin)
    apart |= _apart_reference(y, half_a[1], half_b[0] * abs_sin + half_b[1] * abs_cos)
    apart |= _apart_reference(u, half_b[0], half_a[0] * abs_cos + half_a[1] * abs_sin)
    apart |= _apart_reference(v, half_b[1], half_a[0] * abs_sin + half_a[1] * abs_cos)
    along = half_b[0] * torch.tensor([1.0, -1, -1, 1], dtype=a.dtype, device=a.device)[:, None]
    across = half_b[1] * torch.tensor([1.0, 1, -1, -1], dtype=a.dtype, device=a.device)[:, None]
    x0, y0 = x + along * cos - across * sin, y + along * sin + across * cos  # (4, K), counter-clockwise
    x1, y1 = x0.roll(-1, 0), y0.roll(-1, 0)
    h, w = half_a
    ya, yb = y0.clamp(-w, w), y1.clamp(-w, w)
    slope = (x1 - x0) / torch.where(ya == yb, 1.0, y1 - y0)
    xa, xb = x0 + (ya - y0) * slope, x0 + (yb - y0) * slope
    low, high = torch.minimum(xa, xb), torch.maximum(xa, xb)
    clamped_low, clamped_high = low.clamp(-h, h), high.clamp(-h, h)
    beyond = (high - h).clamp_min(0) - (low - h).clamp_min(0)
    before = (-h - low).clamp_min(0) - (-h - high).clamp_min(0)
    within = 0.5 * (clamped_low + clamped_high) * (clamped_high - clamped_low)
    mean = (within + h * (beyond - before)) / torch.where(high > low, high - low, 1.0)
    mean = torch.where(high > low, mean.clamp(clamped_low, clamped_high), clamped_low)
    area = (mean * (yb - ya)).sum(0).clamp_min(0)
    empty = apart | (a[_BEV] <= 0) | (b[_BEV] <= 0)
    return torch.where(empty, 0.0, torch.minimum(area, torch.minimum(a[_BEV], b[_BEV])))


def _apart_reference(offset: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whether the intervals [-a, a] and [offset - b, offset + b] have no common length."""
    return a + b - offset.abs() <= (a + b) * _TOUCHING


def _into_frame(offset: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Vectors (2, K) turned by minus the heading of the boxes of a table (10, K)."""
    cos, sin = table[_COS], table[_SIN]
    return offset[0] * cos + offset[1] * sin, offset[1] * cos - offset[0] * sin
