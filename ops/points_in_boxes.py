"""Which points lie in which rotated box: to count an object's points, to cut an object out of a scan, to label points.

Boxes are (x, y, z of the centre, dx, dy, dz, yaw), metres and radians. A point is inside when in the box's own frame
|coordinate| <= half size on all three axes, faces included, computed in float64.
Source: OpenPCDet ``roiaware_pool3d_kernel.cu`` (there in float32, with the side faces excluded).
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Columns = NDArray[np.float64]  # one quantity a row, one point or box a column


def points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """The first box (lowest row of ``boxes`` (M, 7)) that holds each of ``points`` (N, 3): (N,) int64, -1 for none.

    Runs where the points are. Raises ValueError for a wrong shape or a non-finite box. A non-finite point is in no box.
    """
    _check(points, boxes)
    if points.device.type != "cpu":
        return points_in_boxes_reference(points, boxes)
    first = np.full(len(points), -1, np.int64)
    _first_box(_columns(points).numpy(), _box_table(boxes).numpy(), first)
    return torch.from_numpy(first)


def points_in_boxes_mask(points: Tensor, boxes: Tensor) -> Tensor:
    """Membership of every point (N, 3) in every box (M, 7): (M, N) bool."""
    _check(points, boxes)
    if points.device.type != "cpu":
        return points_in_boxes_mask_reference(points, boxes)
    mask = np.empty((len(boxes), len(points)), np.bool_)
    _membership(_columns(points).numpy(), _box_table(boxes).numpy(), mask)
    return torch.from_numpy(mask)


def count_points_in_boxes(points: Tensor, boxes: Tensor) -> Tensor:
    """How many of ``points`` (N, 3) each box (M, 7) holds, a point in several boxes counting in each: (M,) int64."""
    _check(points, boxes)
    if points.device.type != "cpu":
        return count_points_in_boxes_reference(points, boxes)
    counts = np.zeros(len(boxes), np.int64)
    _count(_columns(points).numpy(), _box_table(boxes).numpy(), counts)
    return torch.from_numpy(counts)


def points_in_boxes_reference(points: Tensor, boxes: Tensor) -> Tensor:
    """``points_in_boxes`` in plain torch, on any device."""
    mask = points_in_boxes_mask_reference(points, boxes)
    rows = torch.arange(len(boxes), device=mask.device)[:, None]
    nowhere = mask.new_full((1, len(points)), len(boxes), dtype=torch.int64)
    first = torch.cat([torch.where(mask, rows, len(boxes)), nowhere]).amin(0)
    return torch.where(first == len(boxes), -1, first)


def points_in_boxes_mask_reference(points: Tensor, boxes: Tensor) -> Tensor:
    """``points_in_boxes_mask`` in plain torch, on any device."""
    _check(points, boxes)
    x, y, z, half_x, half_y, half_z, cos, sin = _box_table(boxes)[..., None]  # (M, 1) each
    px, py, pz = _columns(points)
    dx, dy = px - x, py - y
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    return (along.abs() <= half_x) & (across.abs() <= half_y) & ((pz - z).abs() <= half_z)


def count_points_in_boxes_reference(points: Tensor, boxes: Tensor) -> Tensor:
    """``count_points_in_boxes`` in plain torch, on any device."""
    return points_in_boxes_mask_reference(points, boxes).sum(1)


def _check(points: Tensor, boxes: Tensor) -> None:
    if points.ndim != 2 or points.shape[1] != 3 or boxes.ndim != 2 or boxes.shape[1] != 7:
        raise ValueError(f"points must be (N, 3) and boxes (M, 7), got {tuple(points.shape)} and {tuple(boxes.shape)}")
    bad = int((~torch.isfinite(boxes).all(1)).sum())
    if bad:
        raise ValueError(f"{bad} of {len(boxes)} boxes have a NaN or infinite value; remove them first")


def _columns(points: Tensor) -> Tensor:
    """(N, 3) -> (3, N) float64, contiguous, so that the loops over points run in vector registers."""
    return points.detach().T.double().contiguous()


def _box_table(boxes: Tensor) -> Tensor:
    """(M, 7) -> (8, M) float64: centre, half sizes, cosine and sine of the heading, one a row."""
    b = boxes.detach().double()
    return torch.cat([b[:, :3].T, b[:, 3:6].T / 2, b[:, 6].cos()[None], b[:, 6].sin()[None]])


@numba.njit(cache=True, nogil=True)
def _inside(points: Columns, i: int, boxes: Columns, j: int) -> bool:
    dx, dy, dz = points[0, i] - boxes[0, j], points[1, i] - boxes[1, j], points[2, i] - boxes[2, j]
    cos, sin = boxes[6, j], boxes[7, j]
    # & instead of `and`: without branches the compiler vectorises the loop over points.
    return (abs(dx * cos + dy * sin) <= boxes[3, j]) & (abs(dy * cos - dx * sin) <= boxes[4, j]) & (abs(dz) <= boxes[5, j])


@numba.njit(cache=True, nogil=True)
def _membership(points: Columns, boxes: Columns, mask: NDArray[np.bool_]) -> None:
    for j in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            mask[j, i] = _inside(points, i, boxes, j)


@numba.njit(cache=True, nogil=True)
def _first_box(points: Columns, boxes: Columns, first: NDArray[np.int64]) -> None:
    for i in range(len(first)):
        for j in range(boxes.shape[1]):
            if _inside(points, i, boxes, j):
                first[i] = j
                break


@numba.njit(cache=True, nogil=True)
def _count(points: Columns, boxes: Columns, counts: NDArray[np.int64]) -> None:
    for j in range(len(counts)):
        total = 0
        for i in range(points.shape[1]):
            total += _inside(points, i, boxes, j)
        counts[j] = total
