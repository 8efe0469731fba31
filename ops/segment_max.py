"""Maximum over segments of rows: pools the neighbours of each centre, however many there are.

Source: PointNet++'s max pooling (OpenPCDet ``pointnet2_modules.py``), there over padded neighbourhoods of equal size.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd.function import once_differentiable

from .threads import in_threads

Floats = NDArray[np.float32]
_RANGE = 2048  # segments a thread takes at a time: about a millisecond, below which a thread is not worth starting


def segment_max(values: Tensor, starts: Tensor) -> Tensor:
    """Largest of ``values`` (P, C) in each segment and channel: (Q, C). An empty segment gives 0.

    starts: (Q + 1,) int64, bounds of the segments, from 0 ascending to P. A NaN is larger than any number, as in torch.
    Differentiable (once): the gradient goes to the first row that holds the maximum. On the CPU in fp32 it runs the numba backend,
    everything else runs `segment_max_reference`. Raises ValueError for wrong shapes or bounds that do not fit.
    """
    _check(values, starts)
    if values.device.type == "cpu" and values.dtype == torch.float32:
        return _SegmentMax.apply(values, starts)
    return segment_max_reference(values, starts)


def segment_max_reference(values: Tensor, starts: Tensor) -> Tensor:
    """``segment_max`` in plain torch, on any device, differentiated by autograd."""
    _check(values, starts)
    segments, channels = len(starts) - 1, values.shape[1]
    if len(values) == 0:
        return values.new_zeros(segments, channels)
    counts = starts.diff()
    segment = torch.repeat_interleave(torch.arange(segments, device=values.device), counts)[:, None].expand_as(values)
    detached = values.detach()
    largest = detached.new_full((segments, channels), -torch.inf).scatter_reduce(0, segment, detached, "amax")
    rows = torch.arange(len(values), device=values.device)[:, None]
    holds = (detached == largest.gather(0, segment)) | detached.isnan()
    first = torch.full_like(largest, len(values) - 1, dtype=torch.int64)
    first = first.scatter_reduce(0, segment, torch.where(holds, rows, len(values) - 1), "amin")
    return torch.where((counts > 0)[:, None], values.gather(0, first), 0)


class _SegmentMax(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, starts: Tensor) -> Tensor:
        out = torch.empty(len(starts) - 1, values.shape[1])
        row = torch.empty(out.shape, dtype=torch.int32)
        tasks = -(-len(out) // _RANGE)
        in_threads(_maximum, tasks, values.contiguous().numpy(), starts.contiguous().numpy(), out.numpy(), row.numpy())
        ctx.save_for_backward(row, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        row, starts = ctx.saved_tensors
        out = torch.empty(int(starts[-1]), grad.shape[1])
        tasks = -(-len(grad) // _RANGE)
        in_threads(_spread, tasks, grad.contiguous().numpy(), row.numpy(), starts.contiguous().numpy(), out.numpy())
        return out, None


def _check(values: Tensor, starts: Tensor) -> None:
    if values.ndim != 2 or not values.is_floating_point() or starts.ndim != 1 or starts.dtype != torch.int64 or len(starts) < 1:
        raise ValueError(
            "segment_max: values must be floating point (P, C) and starts int64 (Q + 1,), "
            f"got {values.dtype} {tuple(values.shape)} and {starts.dtype} {tuple(starts.shape)}"
        )
    if values.device != starts.device:
        raise ValueError(f"segment_max: values on {values.device}, starts on {starts.device}")
    if starts[0] != 0 or starts[-1] != len(values) or (starts.diff() < 0).any():
        raise ValueError(f"segment_max: starts must ascend from 0 to the number of rows, {len(values)}")


@numba.njit(cache=True, nogil=True)
def _maximum(task: int, values: Floats, starts: NDArray[np.int64], out: Floats, row: NDArray[np.int32]) -> None:
    """For a range of segments: the maximum and the first row that holds it, -1 for none."""
    for q in range(task * _RANGE, min(len(out), (task + 1) * _RANGE)):
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


@numba.njit(cache=True, nogil=True)
def _spread(task: int, grad: Floats, row: NDArray[np.int32], starts: NDArray[np.int64], out: Floats) -> None:
    """For a range of segments: the gradient to the rows that held the maximum, 0 to the others."""
    first, last = task * _RANGE, min(len(grad), (task + 1) * _RANGE)
    out[starts[first] : starts[last]] = 0
    for q in range(first, last):
        if starts[q] < starts[q + 1]:
            for c in range(grad.shape[1]):
                out[row[q, c], c] = grad[q, c]
