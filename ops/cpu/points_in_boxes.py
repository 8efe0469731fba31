"""Kernels of `ops/points_in_boxes.py`.

All of them read points (3, N) x, y, z and boxes (8, M) x, y, z, half length, half width, half height, cosine and sine of the
heading, both float64 and contiguous: one quantity per row lets the loops over points run in vector registers.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_Columns = NDArray[np.float64]


@compiled()
def _inside(points: _Columns, i: int, boxes: _Columns, j: int) -> bool:
    dx, dy, dz = points[0, i] - boxes[0, j], points[1, i] - boxes[1, j], points[2, i] - boxes[2, j]
    cos, sin = boxes[6, j], boxes[7, j]
    # & instead of `and`: without branches the compiler vectorizes the loop over points.
    return (abs(dx * cos + dy * sin) <= boxes[3, j]) & (abs(dy * cos - dx * sin) <= boxes[4, j]) & (abs(dz) <= boxes[5, j])


@compiled()
def membership(points: _Columns, boxes: _Columns, mask: NDArray[np.bool_]) -> None:
    """Find which points lie in which box.

    Args:
        points: (3, N) points.
        boxes: (8, M) boxes.
        mask: (M, N), receives whether point i lies in box j at [j, i].
    """
    for j in range(mask.shape[0]):
        for i in range(mask.shape[1]):
            mask[j, i] = _inside(points, i, boxes, j)


@compiled()
def first_box(points: _Columns, boxes: _Columns, first: NDArray[np.int64]) -> None:
    """Find the first box that each point lies in.

    Args:
        points: (3, N) points.
        boxes: (8, M) boxes.
        first: (N,), filled with -1; receives the lowest index of a box that holds the point.
    """
    for i in range(len(first)):
        for j in range(boxes.shape[1]):
            if _inside(points, i, boxes, j):
                first[i] = j
                break


@compiled()
def count(points: _Columns, boxes: _Columns, counts: NDArray[np.int64]) -> None:
    """Count the points in each box.

    Args:
        points: (3, N) points.
        boxes: (8, M) boxes.
        counts: (M,), receives the numbers.
    """
    for j in range(len(counts)):
        total = 0
        for i in range(points.shape[1]):
            total += _inside(points, i, boxes, j)
        counts[j] = total
