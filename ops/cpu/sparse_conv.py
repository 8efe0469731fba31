"""Kernels of `ops/sparse_conv.py`. Read next: `row_products.py`, their inner loops.

Threads meet once per layer, not once per product: on a busy machine the latter costs seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled
from .row_products import add_outer_products, add_products

_PAIRS_AT_A_TIME = 256  # their rows stay in the inner caches while all parts of the gradient look at them

ROWS_PER_TASK = 1024
"""Output rows that a thread takes at a time."""


@compiled()
def convolve_range(
    task: int,
    source: NDArray[Any],
    matrices: NDArray[Any],
    rows_from: NDArray[Any],
    rows_to: NDArray[Any],
    starts: NDArray[Any],
    out: NDArray[Any],
) -> None:
    """Compute some output rows of a sparse convolution.

    Args:
        task: Index of the range of output rows; a task of `in_threads`.
        source: (N, C_from) input rows.
        matrices: (K, C_from, C_to) weight of each kernel offset; C_to is a `padded_width`.
        rows_from: (P,) input row of each pair.
        rows_to: (P,) output row of each pair, ascending within an offset.
        starts: (K + 1,) bounds of the offsets in the pairs.
        out: (M, C_to), zeros; receives the output rows.
    """
    for k in range(len(matrices)):
        group = rows_to[starts[k] : starts[k + 1]]
        first = starts[k] + np.searchsorted(group, task * ROWS_PER_TASK)
        last = starts[k] + np.searchsorted(group, (task + 1) * ROWS_PER_TASK)
        add_products(source, rows_from, rows_to, first, last, matrices[k], out)


@compiled()
def weight_gradient(
    k: int,
    features: NDArray[Any],
    grad: NDArray[Any],
    rows_in: NDArray[Any],
    rows_out: NDArray[Any],
    starts: NDArray[Any],
    total: NDArray[Any],
) -> None:
    """Compute the gradient of the weight of one kernel offset: transposed input features times output gradients, over its pairs.

    Args:
        k: Index of the kernel offset; a task of `in_threads`.
        features: (N, C_in) input rows.
        grad: (M, C_out) gradient of the output rows; C_out is a `padded_width`.
        rows_in: (P,) input row of each pair.
        rows_out: (P,) output row of each pair.
        starts: (K + 1,) bounds of the offsets in the pairs.
        total: (K, C_in, C_out), zeros; receives the gradient at [k].
    """
    for first in range(starts[k], starts[k + 1], _PAIRS_AT_A_TIME):
        last = min(first + _PAIRS_AT_A_TIME, starts[k + 1])
        add_outer_products(features, grad, rows_in, rows_out, first, last, total[k])
