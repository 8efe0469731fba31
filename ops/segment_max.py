"""Maximum over segments of rows: pools the neighbors of each center, however many there are.

Source: PointNet++'s max pooling (OpenPCDet, `pointnet2_modules.py`), there over padded neighborhoods of equal size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of
from .cpu.segment_max import SEGMENTS_PER_TASK, maximum, spread
from .dispatch import dispatch
from .threads import in_threads


def segment_max(values: Tensor, starts: Tensor) -> Tensor:
    """Compute the largest value of each segment and channel. An empty segment gives 0.

    It is differentiable once: the gradient goes to the first row that holds the maximum. A NaN is larger than any number, as in
    torch. The compiled kernel serves float32 on the CPU.

    Args:
        values: (P, C) rows.
        starts: (Q + 1,) int64 bounds of the segments, ascending from 0 to P.

    Returns:
        (Q, C) maxima.

    Raises:
        InvalidInput: Shapes, types or bounds that do not fit together.

    Example:
        >>> segment_max(torch.tensor([[1.0], [5.0], [2.0]]), torch.tensor([0, 2, 2, 3])).tolist()
        [[5.0], [0.0], [2.0]]
    """
    _check(values, starts)
    cpu = _SegmentMax.apply if values.dtype == torch.float32 else None
    out: Tensor = dispatch((values, starts), segment_max_reference, cpu=cpu)(values, starts)
    return out


def segment_max_reference(values: Tensor, starts: Tensor) -> Tensor:
    """Compute `segment_max` in plain torch, on any device, differentiated by autograd.

    Args:
        values: (P, C) rows.
        starts: (Q + 1,) int64 bounds of the segments.

    Returns:
        (Q, C) maxima.
    """
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
        tasks = -(-len(out) // SEGMENTS_PER_TASK)
        in_threads(maximum, tasks, values.contiguous().numpy(), starts.contiguous().numpy(), out.numpy(), row.numpy())
        ctx.save_for_backward(row, starts)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        row, starts = ctx.saved_tensors
        out = torch.empty(int(starts[-1]), grad.shape[1])
        tasks = -(-len(grad) // SEGMENTS_PER_TASK)
        in_threads(spread, tasks, grad.contiguous().numpy(), row.numpy(), starts.contiguous().numpy(), out.numpy())
        return out, None


def _check(values: Tensor, starts: Tensor) -> None:
    if values.ndim != 2 or not values.is_floating_point() or starts.ndim != 1 or starts.dtype != torch.int64 or len(starts) < 1:
        raise InvalidInput(
            "segment_max expects values as a floating-point tensor (P, C) and starts as int64 (Q + 1,), "
            f"found {shape_of(values)} and {shape_of(starts)}"
        )
    if starts[0] != 0 or starts[-1] != len(values) or (starts.diff() < 0).any():
        raise InvalidInput(f"segment_max: starts must ascend from 0 to the number of rows, {len(values)}")
