"""Differentiable products over rows that are sorted by expert: gather, one linear map per expert, weighted sum.

The products are those of `torch.nn.functional.grouped_mm`, one call for all experts. What that operator demands is met here and nowhere
else: gradients in memory order, int32 offsets that end at the number of rows (a `DispatchPlan` guarantees it), rows of a multiple of 16
bytes, no bias, no empty input.

The derivatives are written with the same functions, so second derivatives work too. An expert without rows gets a gradient of zeros.

Read next: `backends.py`, which makes an FFN of these.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .dispatch import DispatchPlan

GROUPED_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gather_rows(x: Tensor, plan: DispatchPlan) -> Tensor:
    """Copy the row of its token into each sorted row.

    Args:
        x: (T, D) tokens.
        plan: The plan of these tokens.

    Returns:
        (R, D) rows.
    """
    rows: Tensor = _Gather.apply(x, plan)
    return rows


def grouped_linear(rows: Tensor, weight: Tensor, bias: Tensor | None, plan: DispatchPlan) -> Tensor:
    """Apply its expert's linear map to each sorted row.

    Args:
        rows: (R, K) sorted rows.
        weight: (E, N, K) weights in the layout of `torch.nn.Linear`.
        bias: (E, N) biases, or None.
        plan: The plan that sorted the rows.

    Returns:
        (R, N) rows.
    """
    out: Tensor = _Linear.apply(rows, weight, bias, plan)
    return out


def combine_rows(rows: Tensor, weight: Tensor, plan: DispatchPlan) -> Tensor:
    """Sum the rows of each token, weighted. The order of the sum is fixed, so the result is the same in every run.

    Args:
        rows: (R, O) sorted rows.
        weight: (T, k) weight of each choice. Sums are computed in the wider type of `rows` and `weight`.
        plan: The plan that sorted the rows.

    Returns:
        (T, O) tokens in the type of `rows`.
    """
    out: Tensor = _Combine.apply(rows, weight, plan)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, plan: DispatchPlan) -> Tensor:
        return x.index_select(0, plan.token)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan: DispatchPlan = ctx.plan
        grad = grad.index_select(0, plan.inverse)
        return (grad if plan.k == 1 else grad.view(plan.tokens, plan.k, grad.shape[1]).sum(1)), None


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weight: Tensor, bias: Tensor | None, plan: DispatchPlan) -> Tensor:
        out = _rows_product(rows, weight.transpose(1, 2), plan)
        return out if bias is None else out + bias.index_select(0, plan.expert)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rows, weight, _, ctx.plan = inputs
        ctx.save_for_backward(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight = ctx.saved_tensors
        for_rows, for_weight, for_bias = ctx.needs_input_grad[:3]
        grad = grad.contiguous()
        return (
            grouped_linear(grad, weight.transpose(1, 2), None, ctx.plan) if for_rows else None,
            _Outer.apply(grad, rows, ctx.plan) if for_weight else None,
            _Sum.apply(grad, ctx.plan) if for_bias else None,
            None,
        )


class _Outer(torch.autograd.Function):
    """(R, N), (R, K) -> (E, N, K): sum of the outer products of the rows of each expert."""

    @staticmethod
    def forward(left: Tensor, right: Tensor, plan: DispatchPlan) -> Tensor:
        if not len(left):
            return left.new_zeros(plan.num_experts, left.shape[1], right.shape[1])
        (left, width), (right, depth) = _aligned(left), _aligned(right)
        return F.grouped_mm(left.t(), right, offs=plan.offsets)[:, :width, :depth]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        left, right, ctx.plan = inputs
        ctx.save_for_backward(left, right)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right = ctx.saved_tensors
        for_left, for_right = ctx.needs_input_grad[:2]
        return (
            grouped_linear(right, grad, None, ctx.plan) if for_left else None,
            grouped_linear(left, grad.transpose(1, 2), None, ctx.plan) if for_right else None,
            None,
        )


class _Sum(torch.autograd.Function):
    """(R, N) -> (E, N): sum of the rows of each expert."""

    @staticmethod
    def forward(rows: Tensor, plan: DispatchPlan) -> Tensor:
        out = rows.new_zeros(plan.num_experts, rows.shape[1])
        for expert, (low, high) in enumerate(pairwise(plan.bounds)):
            if low < high:
                torch.sum(rows[low:high], 0, out=out[expert])
        return out

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.plan = inputs[1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad.index_select(0, ctx.plan.expert), None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(rows: Tensor, weight: Tensor, plan: DispatchPlan) -> Tensor:
        parts = rows.index_select(0, plan.inverse).view(plan.tokens, plan.k, rows.shape[1])
        out = parts[:, 0] * weight[:, :1]
        for j in range(1, plan.k):
            out.addcmul_(parts[:, j].to(out.dtype), weight[:, j : j + 1].to(out.dtype))
        return out.to(rows.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        rows, weight, ctx.plan = inputs
        ctx.save_for_backward(rows, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weight = ctx.saved_tensors
        plan: DispatchPlan = ctx.plan
        for_rows, for_weight = ctx.needs_input_grad[:2]
        spread = grad.index_select(0, plan.token)
        grad_rows = grad_weight = None
        if for_weight:
            product = rows.to(weight.dtype) * spread if rows.dtype != weight.dtype else rows * spread
            grad_weight = product.sum(1).index_select(0, plan.inverse).view_as(weight).to(weight.dtype)
        if for_rows:
            grad_rows = (spread * weight.reshape(-1).index_select(0, plan.order)[:, None]).to(rows.dtype)
        return grad_rows, grad_weight, None


def _rows_product(rows: Tensor, weight: Tensor, plan: DispatchPlan) -> Tensor:
    """(R, K) @ (E, K, N) -> (R, N). Every row of the result is written: the bounds of a plan end at R."""
    if not len(rows):
        return rows.new_zeros(0, weight.shape[2])
    rows, _ = _aligned(rows)
    weight, width = _aligned_weight(weight, rows.shape[1])
    return F.grouped_mm(rows, weight, offs=plan.offsets)[:, :width]


def _missing(size: int, dtype: torch.dtype) -> int:
    """Number of values by which a row falls short of a multiple of 16 bytes."""
    return -size % (16 // dtype.itemsize)


def _aligned(rows: Tensor) -> tuple[Tensor, int]:
    """Rows in memory order whose width is a multiple of 16 bytes, padded by zeros where needed, and the width before."""
    width = rows.shape[1]
    missing = _missing(width, rows.dtype)
    return (F.pad(rows, (0, missing)) if missing else rows.contiguous()), width


def _aligned_weight(weight: Tensor, depth: int) -> tuple[Tensor, int]:
    """(E, K, N) weights padded to `depth` rows and to a multiple of 16 bytes; a weight that fits is used without a copy."""
    width = weight.shape[2]
    deeper, wider = depth - weight.shape[1], _missing(width, weight.dtype)
    if deeper or wider:
        return F.pad(weight, (0, wider, 0, deeper)), width
    usable = weight.stride(2) == 1 or weight.stride(1) == 1
    return (weight if usable else weight.contiguous()), width
