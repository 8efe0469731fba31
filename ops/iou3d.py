"""Overlap of rotated boxes in bird's-eye view (BEV) and in space: common area and intersection over union (IoU).

Boxes are (x, y, z of the center, dx, dy, dz, yaw) in meters and radians, yaw counter-clockwise from +x (see `core/boxes.py`).

The intersection of two rectangles A and B is an integral over the outline of B. In the frame of A, where A is |x| <= h, |y| <= w,

    area = integral over y in [-w, w] of the length of {x : (x, y) in B, |x| <= h} dy
         = sum over the four edges of B, counter-clockwise, of the integral of clamp(x, -h, h) dy on the part with |y| <= w.

The second line follows by Green's theorem. Each edge is a closed formula, so there are no vertices to collect and sort, no
tolerance for "corner inside", and coincident edges are no special case: the result is continuous in the boxes. All of it is
computed in float64. Rectangles that a line parallel to one of their sides separates are found first, so that boxes apart have an
overlap of exactly 0.

Every function refuses a wrong shape and NaN or infinite values with `InvalidInput`, gives no gradient, and runs on the device of
its boxes. A box without area, or with a negative size, has IoU 0 with everything. Read next: `cpu/iou3d.py`, the kernels.
"""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from .checks import check_boxes
from .cpu.iou3d import COMMON_AREA, IOU_3D, IOU_BEV, TOUCHING, fill_aligned, fill_rows
from .dispatch import dispatch

_OPERATORS = {COMMON_AREA: "intersection_bev", IOU_BEV: "iou_bev", IOU_3D: "iou_3d"}
_PAIRS_PER_THREAD = 100_000  # below this number a second thread costs more than it brings


# ---- every box of `a` with every box of `b`


def iou_bev(a: Tensor, b: Tensor) -> Tensor:
    """Compute the BEV IoU of every box of one set with every box of another.

    Args:
        a: (N, 7) boxes.
        b: (M, 7) boxes.

    Returns:
        (N, M) float32 in [0, 1].

    Raises:
        InvalidInput: A tensor has another shape, or a NaN or infinite value.

    Example:
        >>> car = torch.tensor([[10.0, 0, 0, 4, 2, 1.5, 0]])
        >>> iou_bev(car, car + torch.tensor([0.0, 1, 0, 0, 0, 0, 0]))
        tensor([[0.3333]])
    """
    return _matrix(a, b, IOU_BEV)


def iou_3d(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of the volumes of every box of one set with every box of another.

    Args:
        a: (N, 7) boxes.
        b: (M, 7) boxes.

    Returns:
        (N, M) float32 in [0, 1].

    Raises:
        InvalidInput: A tensor has another shape, or a NaN or infinite value.
    """
    return _matrix(a, b, IOU_3D)


def intersection_bev(a: Tensor, b: Tensor) -> Tensor:
    """Compute the common BEV area of every box of one set with every box of another.

    Args:
        a: (N, 7) boxes.
        b: (M, 7) boxes.

    Returns:
        (N, M) float32 in m².

    Raises:
        InvalidInput: A tensor has another shape, or a NaN or infinite value.
    """
    return _matrix(a, b, COMMON_AREA)


def iou_bev_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `iou_bev` in plain torch, on any device.

    Args:
        a: (N, 7) boxes.
        b: (M, 7) boxes.

    Returns:
        (N, M) float32 in [0, 1].
    """
    return _matrix_reference(a, b, IOU_BEV)


def iou_3d_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `iou_3d` in plain torch, on any device.

    Args:
        a: (N, 7) boxes.
        b: (M, 7) boxes.

    Returns:
        (N, M) float32 in [0, 1].
    """
    return _matrix_reference(a, b, IOU_3D)


def intersection_bev_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `intersection_bev` in plain torch, on any device.

    Args:
        a: (N, 7) boxes.
        b: (M, 7) boxes.

    Returns:
        (N, M) float32 in m².
    """
    return _matrix_reference(a, b, COMMON_AREA)


# ---- row i of `a` with row i of `b`


def iou_bev_aligned(a: Tensor, b: Tensor) -> Tensor:
    """Compute the BEV IoU of row i of one set with row i of another.

    Args:
        a: (N, 7) boxes.
        b: (N, 7) boxes.

    Returns:
        (N,) float32 in [0, 1].

    Raises:
        InvalidInput: The sets differ in size, or a tensor has another shape or a NaN or infinite value.
    """
    return _aligned(a, b, IOU_BEV)


def iou_3d_aligned(a: Tensor, b: Tensor) -> Tensor:
    """Compute the IoU of the volumes of row i of one set with row i of another.

    Args:
        a: (N, 7) boxes.
        b: (N, 7) boxes.

    Returns:
        (N,) float32 in [0, 1].

    Raises:
        InvalidInput: The sets differ in size, or a tensor has another shape or a NaN or infinite value.
    """
    return _aligned(a, b, IOU_3D)


def iou_bev_aligned_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `iou_bev_aligned` in plain torch, on any device.

    Args:
        a: (N, 7) boxes.
        b: (N, 7) boxes.

    Returns:
        (N,) float32 in [0, 1].
    """
    return _aligned_reference(a, b, IOU_BEV)


def iou_3d_aligned_reference(a: Tensor, b: Tensor) -> Tensor:
    """Compute `iou_3d_aligned` in plain torch, on any device.

    Args:
        a: (N, 7) boxes.
        b: (N, 7) boxes.

    Returns:
        (N,) float32 in [0, 1].
    """
    return _aligned_reference(a, b, IOU_3D)


# ---- for the assignment of anchors


def iou_bev_nearest(a: Tensor, b: Tensor) -> Tensor:
    """Compute a cheap BEV IoU: every box is first turned to the nearest multiple of 90 degrees.

    VoxelNet and SECOND assign anchors by it. Source: OpenPCDet, `box_utils.boxes3d_nearest_bev_iou`.

    Args:
        a: (N, 7) boxes, usually the many anchors.
        b: (M, 7) boxes, usually the few labels.

    Returns:
        (N, M) float32 in [0, 1].

    Raises:
        InvalidInput: A tensor has another shape, or a NaN or infinite value.
    """
    check_boxes("iou_bev_nearest", a, b)
    low_a, high_a, area_a = _nearest_rectangle(a)
    low_b, high_b, area_b = _nearest_rectangle(b)
    # One axis at a time and in place, because memory traffic is the cost with 70,000 anchors per class; and with the few boxes
    # outside and the many anchors inside, because elementwise operators loop fast over a long last axis only.
    common = a.new_ones(len(b), len(a), dtype=torch.float32)
    for axis in range(2):
        overlap = torch.minimum(high_a[axis], high_b[axis][:, None])
        overlap -= torch.maximum(low_a[axis], low_b[axis][:, None])
        common *= overlap.clamp_min_(0)
    union = (area_a + area_b[:, None]).sub_(common).clamp_min_(1e-12)
    return common.div_(union).clamp_max_(1).T


def _nearest_rectangle(boxes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lowest and highest corner (2, N) and area (N,) of boxes turned to the nearest multiple of 90 degrees."""
    boxes = boxes.detach().to(torch.float32)
    turned = torch.remainder(boxes[:, 6:7] + math.pi / 4, math.pi) > math.pi / 2  # heading is nearer to the y axis
    size = torch.where(turned, boxes[:, [4, 3]], boxes[:, 3:5]).clamp_min(0)
    center, half = boxes[:, :2].T.contiguous(), size.T.contiguous() / 2
    return center - half, center + half, size.prod(1)


# ---- implementations


def box_table(boxes: Tensor) -> Tensor:
    """Compute what the overlap of boxes needs, one quantity per row.

    Args:
        boxes: (N, 7) boxes. A negative size counts as 0.

    Returns:
        (10, N) float64, contiguous: x and y of the center, half length, half width, cosine and sine of the heading, radius of the
        circumscribed circle, bottom, top, BEV area.
    """
    b = boxes.detach().double()
    half = b[:, 3:6].clamp_min(0) / 2
    yaw = b[:, 6]
    area = 4 * half[:, 0] * half[:, 1]
    radius = torch.hypot(half[:, 0], half[:, 1])
    low, high = b[:, 2] - half[:, 2], b[:, 2] + half[:, 2]
    return torch.stack([b[:, 0], b[:, 1], half[:, 0], half[:, 1], yaw.cos(), yaw.sin(), radius, low, high, area])


def _matrix(a: Tensor, b: Tensor, measure: int) -> Tensor:
    return dispatch((a, b), _matrix_reference, cpu=_matrix_on_cpu)(a, b, measure)


def _aligned(a: Tensor, b: Tensor, measure: int) -> Tensor:
    return dispatch((a, b), _aligned_reference, cpu=_aligned_on_cpu)(a, b, measure)


def _check_aligned(a: Tensor, b: Tensor, measure: int) -> None:
    check_boxes(f"{_OPERATORS[measure]}_aligned", a, b)
    if len(a) != len(b):
        raise InvalidInput(
            f"{_OPERATORS[measure]}_aligned compares row i with row i and needs equally many boxes, found {len(a)} and {len(b)}"
        )


def _matrix_on_cpu(a: Tensor, b: Tensor, measure: int) -> Tensor:
    check_boxes(_OPERATORS[measure], a, b)
    table_a, table_b = box_table(a).numpy(), box_table(b).numpy()
    out = np.zeros((len(a), len(b)), np.float32)
    threads = max(1, min(torch.get_num_threads(), out.size // _PAIRS_PER_THREAD))
    if threads == 1:
        fill_rows(table_a, table_b, measure, 0, len(a), out)
    else:
        # More ranges than threads, because boxes come sorted by place and some ranges are crowded. A pool for each call,
        # because the threads of a kept one do not survive a fork.
        bounds = [len(a) * k // (4 * threads) for k in range(4 * threads + 1)]
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(lambda r: fill_rows(table_a, table_b, measure, r[0], r[1], out), pairwise(bounds)))
    return torch.from_numpy(out)


def _aligned_on_cpu(a: Tensor, b: Tensor, measure: int) -> Tensor:
    _check_aligned(a, b, measure)
    out = np.zeros(len(a), np.float32)
    fill_aligned(box_table(a).numpy(), box_table(b).numpy(), measure, out)
    return torch.from_numpy(out)


def _matrix_reference(a: Tensor, b: Tensor, measure: int) -> Tensor:
    check_boxes(_OPERATORS[measure], a, b)
    table_a, table_b = box_table(a), box_table(b)
    (x_a, y_a, radius_a), (x_b, y_b, radius_b) = (table[[0, 1, 6]] for table in (table_a, table_b))
    distance = torch.hypot(x_a[:, None] - x_b, y_a[:, None] - y_b)
    i, j = (distance < radius_a[:, None] + radius_b).nonzero(as_tuple=True)
    out = a.new_zeros(len(a), len(b), dtype=torch.float32)
    out[i, j] = _overlap_reference(table_a[:, i], table_b[:, j], measure)
    return out


def _aligned_reference(a: Tensor, b: Tensor, measure: int) -> Tensor:
    _check_aligned(a, b, measure)
    return _overlap_reference(box_table(a), box_table(b), measure)


def _overlap_reference(a: Tensor, b: Tensor, measure: int) -> Tensor:
    """The `measure` of column k of table a and column k of table b, both (10, K): (K,) float32."""
    common = _intersection_reference(a, b)
    if measure == COMMON_AREA:
        return common.float()
    (low_a, high_a, size_a), (low_b, high_b, size_b) = a[7:], b[7:]
    if measure == IOU_3D:
        common = common * (torch.minimum(high_a, high_b) - torch.maximum(low_a, low_b)).clamp_min(0)
        size_a, size_b = size_a * (high_a - low_a), size_b * (high_b - low_b)
    iou = common / (size_a + size_b - common)
    return torch.where(common > 0, iou, 0.0).float()


def _intersection_reference(a: Tensor, b: Tensor) -> Tensor:
    """Common BEV area of column k of both tables, by the formula at the top of the file: (K,) float64."""
    x_a, y_a, h, w, cos_a, sin_a, _, _, _, area_a = a
    x_b, y_b, half_length, half_width, cos_b, sin_b, _, _, _, area_b = b
    dx, dy = x_b - x_a, y_b - y_a
    cos, sin = cos_a * cos_b + sin_a * sin_b, cos_a * sin_b - sin_a * cos_b
    x, y = dx * cos_a + dy * sin_a, dy * cos_a - dx * sin_a  # center of b in the frame of a
    u, v = dx * cos_b + dy * sin_b, dy * cos_b - dx * sin_b  # minus the center of a in the frame of b
    abs_cos, abs_sin = cos.abs(), sin.abs()
    apart = _apart_reference(x, h, half_length * abs_cos + half_width * abs_sin)
    apart |= _apart_reference(y, w, half_length * abs_sin + half_width * abs_cos)
    apart |= _apart_reference(u, half_length, h * abs_cos + w * abs_sin)
    apart |= _apart_reference(v, half_width, h * abs_sin + w * abs_cos)
    along = half_length * torch.tensor([1.0, -1, -1, 1], dtype=a.dtype, device=a.device)[:, None]
    across = half_width * torch.tensor([1.0, 1, -1, -1], dtype=a.dtype, device=a.device)[:, None]
    x0, y0 = x + along * cos - across * sin, y + along * sin + across * cos  # (4, K) corners, counter-clockwise
    x1, y1 = x0.roll(-1, 0), y0.roll(-1, 0)
    ya, yb = y0.clamp(-w, w), y1.clamp(-w, w)
    slope = (x1 - x0) / torch.where(ya == yb, 1.0, y1 - y0)
    xa, xb = x0 + (ya - y0) * slope, x0 + (yb - y0) * slope
    low, high = torch.minimum(xa, xb), torch.maximum(xa, xb)
    clamped_low, clamped_high = low.clamp(-h, h), high.clamp(-h, h)
    beyond = (high - h).clamp_min(0) - (low - h).clamp_min(0)
    before = (-h - low).clamp_min(0) - (-h - high).clamp_min(0)
    between = 0.5 * (clamped_low + clamped_high) * (clamped_high - clamped_low)
    mean = (between + h * (beyond - before)) / torch.where(high > low, high - low, 1.0)
    mean = torch.where(high > low, mean.clamp(clamped_low, clamped_high), clamped_low)
    area = (mean * (yb - ya)).sum(0).clamp_min(0)
    empty = apart | (area_a <= 0) | (area_b <= 0)
    return torch.where(empty, 0.0, torch.minimum(area, torch.minimum(area_a, area_b)))


def _apart_reference(offset: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Whether the intervals [-a, a] and [offset - b, offset + b] have no common length."""
    return a + b - offset.abs() <= (a + b) * TOUCHING
