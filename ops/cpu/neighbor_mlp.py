"""Kernel of `ops/neighbor_mlp.py`: a pair of point and center never leaves the first cache."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_Floats = NDArray[np.float32]

CENTERS_PER_TASK = 256
"""Centers that a thread takes at a time."""


@compiled(fastmath={"contract"})  # fused multiply-add: rounds once instead of twice
def pool(
    task: int,
    points: _Floats,
    centers: _Floats,
    index: NDArray[np.int64],
    starts: NDArray[np.int64],
    second: _Floats,
    out: _Floats,
) -> None:
    """Apply the perceptron to every neighbor of some centers, and take the maximum.

    Args:
        task: Index of the range of centers; a task of `in_threads`.
        points: (N, C1) first-layer values of the points; C1 is a multiple of 4.
        centers: (Q, C1) first-layer values of the centers.
        index: (P,) rows of the points.
        starts: (Q + 1,) bounds of the centers in `index`.
        second: (C1, C2) transposed weight of the second layer.
        out: (Q, C2), receives the results, 0 for a center without neighbors.
    """
    channels, wide = second.shape
    # Two neighbors and four products per pass over the sums, so that these and the weights are loaded less often.
    a, b = np.empty((2, channels), np.float32)
    sum_a, sum_b = np.empty((2, wide), np.float32)
    for q in range(task * CENTERS_PER_TASK, min(len(centers), (task + 1) * CENTERS_PER_TASK)):
        last = starts[q + 1] - 1
        for c in range(wide):
            out[q, c] = 0.0 if last < starts[q] else -np.inf
        for p in range(starts[q], last + 1, 2):
            row_a, row_b = index[p], index[min(p + 1, last)]
            for k in range(channels):
                a[k] = max(points[row_a, k] - centers[q, k], np.float32(0))
                b[k] = max(points[row_b, k] - centers[q, k], np.float32(0))
            for c in range(wide):
                sum_a[c] = sum_b[c] = 0
            for k in range(0, channels, 4):
                a0, a1, a2, a3, b0, b1, b2, b3 = a[k], a[k + 1], a[k + 2], a[k + 3], b[k], b[k + 1], b[k + 2], b[k + 3]
                for c in range(wide):
                    w0, w1, w2, w3 = second[k, c], second[k + 1, c], second[k + 2, c], second[k + 3, c]
                    sum_a[c] += a0 * w0 + a1 * w1 + (a2 * w2 + a3 * w3)
                    sum_b[c] += b0 * w0 + b1 * w1 + (b2 * w2 + b3 * w3)
            for c in range(wide):
                out[q, c] = max(out[q, c], max(sum_a[c], sum_b[c]))
