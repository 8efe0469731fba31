"""Kernels of `ops/sparse_conv.py`: gather a tile of pairs, multiply, add to the output rows.

Products that small run on the calling thread (BLAS through numba), so threads meet once per layer, not once per product: on a busy
machine the latter costs seconds.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_PRODUCT = 1 << 18  # multiply-adds of one tile's product; above this BLAS (OpenBLAS, for numba) starts threads of its own
_TILES = (8, 256)  # smallest and largest number of pairs of a tile

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
        matrices: (K, C_from, C_to) weight of each kernel offset.
        rows_from: (P,) input row of each pair.
        rows_to: (P,) output row of each pair, ascending within an offset.
        starts: (K + 1,) bounds of the offsets in the pairs.
        out: (M, C_to), zeros; receives the output rows.
    """
    tile = _tile(matrices.shape[1], matrices.shape[2])
    gathered = np.empty((tile, source.shape[1]), source.dtype)
    products = np.empty((tile, out.shape[1]), out.dtype)
    for k in range(len(matrices)):
        group = rows_to[starts[k] : starts[k + 1]]
        begin = starts[k] + np.searchsorted(group, task * ROWS_PER_TASK)
        end = starts[k] + np.searchsorted(group, (task + 1) * ROWS_PER_TASK)
        for low in range(begin, end, tile):
            count = min(tile, end - low)
            for p in range(count):
                row = rows_from[low + p]
                for c in range(source.shape[1]):
                    gathered[p, c] = source[row, c]
            np.dot(gathered[:count], matrices[k], products[:count])
            for p in range(count):
                row = rows_to[low + p]
                for c in range(out.shape[1]):
                    out[row, c] += products[p, c]


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
    """Compute the gradient of the weight of one kernel offset: transposed output gradients times input features, over its pairs.

    Args:
        k: Index of the kernel offset; a task of `in_threads`.
        features: (N, C_in) input rows.
        grad: (M, C_out) gradient of the output rows.
        rows_in: (P,) input row of each pair.
        rows_out: (P,) output row of each pair.
        starts: (K + 1,) bounds of the offsets in the pairs.
        total: (K, C_out, C_in), zeros; receives the gradient at [k].
    """
    tile = _tile(features.shape[1], grad.shape[1])
    inputs = np.empty((tile, features.shape[1]), features.dtype)
    grads = np.empty((tile, grad.shape[1]), grad.dtype)
    product = np.empty((grad.shape[1], features.shape[1]), total.dtype)
    for low in range(starts[k], starts[k + 1], tile):
        count = min(tile, starts[k + 1] - low)
        for p in range(count):
            row_in, row_out = rows_in[low + p], rows_out[low + p]
            for c in range(features.shape[1]):
                inputs[p, c] = features[row_in, c]
            for c in range(grad.shape[1]):
                grads[p, c] = grad[row_out, c]
        np.dot(grads[:count].T, inputs[:count], product)
        for o in range(product.shape[0]):
            for c in range(product.shape[1]):
                total[k, o, c] += product[o, c]


@compiled()
def _tile(width_a: int, width_b: int) -> int:
    return min(max(_PRODUCT // (width_a * width_b), _TILES[0]), _TILES[1])
