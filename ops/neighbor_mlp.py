"""The heart of set abstraction without gradient: a two-layer perceptron on every neighbour of a centre, and their maximum.

    out[q] = max over neighbours j of  second @ relu(points[j] - centres[q])

Points and centres are what a linear first layer makes of them. Written as gathering, subtraction, product and maximum, the pairs pass
through memory five times: the arithmetic is a sixth of the time (benchmarks/set_abstraction.py). Here a pair never leaves the
first cache.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from .segment_max import segment_max
from .threads import in_threads

Floats = NDArray[np.float32]
_RANGE = 256  # centres a thread takes at a time


def neighbor_mlp_max(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> Tensor:
    """The formula above for points (N, C1), centres (Q, C1), second (C2, C1): (Q, C2); 0 for a centre without neighbours.

    index: (P,) int64 rows of the points; starts: (Q + 1,) int64 bounds of each centre's rows in it (``ball_query.Neighbours``).
    Differentiable by way of the reference: the numba backend serves float32 on the CPU where no gradient is asked for.
    Raises ValueError for shapes that do not fit together.
    """
    _check(points, centers, index, starts, second)
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (points, centers, second))
    if needs_gradient or points.device.type != "cpu" or points.dtype != torch.float32:
        return neighbor_mlp_max_reference(points, centers, index, starts, second)
    out = torch.empty(len(centers), len(second))
    tables = [t.detach() for t in (points, centers, second)]
    if points.shape[1] % 4:  # the kernel takes four channels at a time
        tables = [F.pad(t, (0, -points.shape[1] % 4)) for t in tables]
    arrays: list[Any] = [t.contiguous().numpy() for t in (*tables[:2], index, starts, tables[2].T)]
    in_threads(_pool, -(-len(centers) // _RANGE), *arrays, out.numpy())
    return out


def neighbor_mlp_max_reference(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> Tensor:
    """``neighbor_mlp_max`` step by step in torch, on any device, differentiated by autograd."""
    _check(points, centers, index, starts, second)
    center = torch.repeat_interleave(torch.arange(len(centers), device=starts.device), starts.diff())
    hidden = torch.relu(points[index] - centers[center])
    return segment_max(hidden @ second.T, starts)


def _check(points: Tensor, centers: Tensor, index: Tensor, starts: Tensor, second: Tensor) -> None:
    channels = points.shape[-1]
    fits = (
        points.ndim == centers.ndim == second.ndim == 2
        and centers.shape[1] == second.shape[1] == channels
        and index.ndim == starts.ndim == 1
        and len(starts) == len(centers) + 1
        and index.dtype == starts.dtype == torch.int64
    )
    if not fits:
        shapes = ", ".join(f"{t.dtype} {tuple(t.shape)}" for t in (points, centers, index, starts, second))
        raise ValueError(
            f"neighbor_mlp_max: need points (N, C1), centres (Q, C1), int64 index (P,) and starts (Q + 1,), second (C2, C1); got {shapes}"
        )
    ends = starts[[0, -1]].tolist()
    if ends != [0, len(index)] or (len(index) and not 0 <= int(index.min()) <= int(index.max()) < len(points)):
        raise ValueError(f"neighbor_mlp_max: bounds {ends} of {len(index)} neighbours, or a row outside 0..{len(points) - 1}")


@numba.njit(cache=True, nogil=True, fastmath={"contract"})  # fused multiply-add: rounds once instead of twice
def _pool(
    task: int,
    points: Floats,
    centers: Floats,
    index: NDArray[np.int64],
    starts: NDArray[np.int64],
    second: Floats,
    out: Floats,
) -> None:
    channels, wide = second.shape
    # Two neighbours and four products a pass over the sums, so that these and the weights are loaded less often.
    a, b = np.empty((2, channels), np.float32)
    sum_a, sum_b = np.empty((2, wide), np.float32)
    for q in range(task * _RANGE, min(len(centers), (task + 1) * _RANGE)):
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
