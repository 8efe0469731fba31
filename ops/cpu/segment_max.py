"""Kernels of `ops/segment_max.py`: the maximum of segments of rows, and its gradient."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_Floats = NDArray[np.float32]

SEGMENTS_PER_TASK = 2048
"""Segments that a thread takes at a time: about a millisecond, below which a thread is not worth starting."""


@compiled()
def maximum(task: int, values: _Floats, starts: NDArray[np.int64], out: _Floats, row: NDArray[np.int32]) -> None:
    """Compute the maximum of some segments.

    Args:
        task: Index of the range of segments; a task of `in_threads`.
        values: (P, C) rows.
        starts: (Q + 1,) bounds of the segments.
        out: (Q, C), receives the maxima, 0 for an empty segment.
        row: (Q, C), receives the first row that holds the maximum, -1 for an empty segment.
    """
    for q in range(task * SEGMENTS_PER_TASK, min(len(out), (task + 1) * SEGMENTS_PER_TASK)):
        first, last = starts[q], starts[q + 1]
        best, at = out[q], row[q]
        if first == last:
            best[:], at[:] = 0, -1
            continue
        best[:], at[:] = values[first], first
        for p in range(first + 1, last):
            value = values[p]
            for c in range(len(value)):
                # & and | instead of `and` and `or`: without branches this runs in vector registers.
                larger = (value[c] > best[c]) | ((value[c] != value[c]) & (best[c] == best[c]))
                best[c] = value[c] if larger else best[c]
                at[c] = p if larger else at[c]


@compiled()
def spread(task: int, grad: _Floats, row: NDArray[np.int32], starts: NDArray[np.int64], out: _Floats) -> None:
    """Give the gradient of some segments to the rows that held the maximum, and 0 to the others.

    Args:
        task: Index of the range of segments; a task of `in_threads`.
        grad: (Q, C) gradient of the maxima.
        row: (Q, C) from `maximum`.
        starts: (Q + 1,) bounds of the segments.
        out: (P, C), receives the gradient of the rows.
    """
    first, last = task * SEGMENTS_PER_TASK, min(len(grad), (task + 1) * SEGMENTS_PER_TASK)
    out[starts[first] : starts[last]] = 0
    for q in range(first, last):
        if starts[q] < starts[q + 1]:
            for c in range(grad.shape[1]):
                out[row[q, c], c] = grad[q, c]
