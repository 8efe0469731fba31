"""How an expert bank computes: four backends that give the same result, and the one rule that chooses among them.

| backend | how | when |
|---|---|---|
| `loop` | for each expert: find its tokens, plain FFN, `index_add` | the reference that the others are tested against |
| `sorted` | one sort, each expert's FFN on its rows, inverse gather | many rows per expert, 16 bits on the CPU, and every type and size |
| `grouped` | the same with `torch.nn.functional.grouped_mm` | few rows per expert in 32 bits, and CUDA |
| `dense_all` | every expert on every token, as two large products | soft routing |

None of them drops a token. Under autocast all compute in the type of autocast, like `torch.nn.Linear`.
Read next: `bank.py`, the module that holds the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.errors import InvalidInput
from .dense_ffn import Activation, activate
from .dispatch import DispatchPlan
from .grouped import GROUPED_DTYPES, combine_rows, gather_rows, grouped_linear

Backend = Literal["auto", "loop", "sorted", "grouped", "dense_all"]


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertWeights:
    """The stacked weights of E experts for one forward pass."""

    up: Tensor
    """(E, F, D); (E, 2F, D) with a gate, of which the first F rows are the gate."""
    down: Tensor
    """(E, O, F)."""
    up_bias: Tensor | None
    """(E, F) or (E, 2F), or None."""
    down_bias: Tensor | None
    """(E, O), or None."""
    gated: bool
    """Whether `up` holds gates."""
    activation: Activation
    """Function of the hidden units."""
    dropout: float
    """Share of hidden units that is set to zero in this pass; 0 outside training."""

    def to(self, dtype: torch.dtype) -> ExpertWeights:
        """Convert the weights.

        Args:
            dtype: The new type.

        Returns:
            The weights in that type; the gradient flows back to the originals.
        """
        up_bias = None if self.up_bias is None else self.up_bias.to(dtype)
        down_bias = None if self.down_bias is None else self.down_bias.to(dtype)
        return replace(self, up=self.up.to(dtype), down=self.down.to(dtype), up_bias=up_bias, down_bias=down_bias)

    def act(self, hidden: Tensor) -> Tensor:
        """Apply gate, activation and dropout.

        Args:
            hidden: (..., F), or (..., 2F) with a gate.

        Returns:
            (..., F).
        """
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = activate(gate, self.activation) * hidden
        else:
            hidden = activate(hidden, self.activation)
        return F.dropout(hidden, self.dropout) if self.dropout else hidden


# ---- the rule


@dataclass(frozen=True, kw_only=True)
class DispatchCase:
    """What the choice of a backend depends on."""

    soft: bool
    """Whether every token goes to every expert."""
    device: str
    """Kind of device: `cpu` or `cuda`."""
    grouped_serves: bool
    """Whether `grouped_mm` takes these types and sizes as they are, without padding."""
    rows_per_expert: float
    """Number of choices divided by the number of experts."""
    sixteen_bits: bool = False
    """Whether the products run on numbers of 16 bits."""


@dataclass(frozen=True, kw_only=True)
class BackendRule:
    """One row of the rule: the first row that holds decides."""

    holds: Callable[[DispatchCase], bool]
    """Whether the row applies."""
    backend: Backend
    """The backend that it chooses."""
    reason: str
    """Why, for people."""


GROUPED_BELOW_ROWS = 200
_ROWS_IN_CACHE = 512  # that an expert takes at a time where nothing is kept for a backward pass
_ROWS_COMPILED = (
    64  # on the CPU, a product of 16-bit numbers is compiled for each new number of rows, which costs more than the product
)
BACKEND_RULES = (
    BackendRule(holds=lambda case: case.soft, backend="dense_all", reason="soft routing runs every expert anyway"),
    BackendRule(holds=lambda case: not case.grouped_serves, backend="sorted", reason="grouped_mm lacks this type or size"),
    BackendRule(holds=lambda case: case.device == "cuda", backend="grouped", reason="one launch for all experts"),
    BackendRule(
        holds=lambda case: case.device == "cpu" and case.sixteen_bits,
        backend="sorted",
        reason="products of 16 bits are compiled for each number of rows, and only this backend keeps to a few numbers",
    ),
    BackendRule(
        holds=lambda case: case.device == "cpu" and case.rows_per_expert < GROUPED_BELOW_ROWS,
        backend="grouped",
        reason="with few rows per expert, one call costs less than several",
    ),
    BackendRule(
        holds=lambda case: True, backend="sorted", reason="with many rows, the products of the experts are fastest alone"
    ),
)


def choose_backend(case: DispatchCase) -> BackendRule:
    """Find the first row of `BACKEND_RULES` that holds.

    Args:
        case: What is to be computed.

    Returns:
        The row; its `backend` is never `auto`.
    """
    return next(rule for rule in BACKEND_RULES if rule.holds(case))


def dispatch_case(x: Tensor, weights: ExpertWeights, choices: int | None) -> DispatchCase:
    """Describe a forward pass for the rule.

    Args:
        x: (T, D) tokens in the type in which the products run.
        weights: The experts.
        choices: Number of choices, or None for soft routing.

    Returns:
        The case.
    """
    experts, hidden, width = weights.up.shape
    sizes = (width, hidden, weights.down.shape[1], weights.down.shape[2])
    return DispatchCase(
        soft=choices is None,
        device=x.device.type,
        grouped_serves=_grouped_exists(x) and all(size * x.dtype.itemsize % 16 == 0 for size in sizes),
        rows_per_expert=(len(x) * experts if choices is None else choices) / experts,
        sixteen_bits=x.dtype.itemsize == 2,
    )


def _grouped_exists(x: Tensor) -> bool:
    if not hasattr(F, "grouped_mm") or x.dtype not in GROUPED_DTYPES:
        return False
    if x.device.type == "cuda":
        return x.dtype == torch.bfloat16 and torch.cuda.get_device_capability(x.device) >= (8, 0)
    return x.device.type == "cpu" and (x.dtype == torch.bfloat16 or not torch.compiler.is_compiling())


# ---- the computation


def run_experts(
    x: Tensor, weights: ExpertWeights, choice: DispatchPlan | Tensor | None, weight: Tensor, backend: Backend = "auto"
) -> Tensor:
    """Compute the weighted sum of the chosen experts for each token.

    Args:
        x: (T, D) tokens.
        weights: The experts.
        choice: The plan of the tokens; or (T, k) int64 chosen experts; or None for soft routing.
        weight: (T, k) weight of each choice; (T, E) for soft routing.
        backend: How to compute. `auto` follows `BACKEND_RULES`. `grouped` becomes `sorted` where `grouped_mm` cannot serve the type.

    Returns:
        (T, O) tokens, in the type of autocast where it is on, else in the type of `x`.

    Raises:
        InvalidInput: The types of tokens and experts differ, or the backend is unknown.
    """
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
        x, weights = x.to(dtype), weights.to(dtype)
    elif x.dtype != weights.up.dtype:
        raise InvalidInput(f"tokens are {x.dtype} and experts are {weights.up.dtype}: convert one of them, or use torch.autocast")
    if backend == "auto":
        index = choice.index if isinstance(choice, DispatchPlan) else choice
        backend = choose_backend(dispatch_case(x, weights, None if index is None else index.numel())).backend
    with torch.autocast(device, enabled=False):
        if backend == "dense_all":
            return _run_all(x, weights, choice.index if isinstance(choice, DispatchPlan) else choice, weight)
        experts = len(weights.up)
        if choice is None:
            choice = DispatchPlan.of_all(len(x), experts, x.device)
        plan = choice if isinstance(choice, DispatchPlan) else DispatchPlan.of(choice, experts)
        if backend == "loop":
            return _run_loop(x, weights, plan.index, weight)
        if backend in ("sorted", "grouped"):
            run = _run_grouped if backend == "grouped" and _grouped_exists(x) else _run_sorted
            return run(x, weights, plan, weight)
    raise InvalidInput(f"unknown backend {backend!r}; choose auto, loop, sorted, grouped or dense_all")


def _run_loop(x: Tensor, weights: ExpertWeights, index: Tensor, weight: Tensor) -> Tensor:
    """The reference: nothing but indexing and `F.linear`. It does not use the sort of a plan."""
    out = x.new_zeros(len(x), weights.down.shape[1], dtype=torch.promote_types(x.dtype, weight.dtype))
    for expert in range(len(weights.up)):
        token, slot = (index == expert).nonzero(as_tuple=True)
        hidden = F.linear(x[token], weights.up[expert], None if weights.up_bias is None else weights.up_bias[expert])
        bias = None if weights.down_bias is None else weights.down_bias[expert]
        part = F.linear(weights.act(hidden), weights.down[expert], bias)
        out = out.index_add(0, token, part * weight[token, slot, None])
    return out.to(x.dtype)


def _run_sorted(x: Tensor, weights: ExpertWeights, plan: DispatchPlan, weight: Tensor) -> Tensor:
    """One expert after the other, its whole FFN at once: its hidden units are still in the cache when the second product reads them."""
    rows = gather_rows(x, plan)
    most = max(1, len(rows)) if torch.is_grad_enabled() else _ROWS_IN_CACHE
    step = _ROWS_COMPILED if x.device.type == "cpu" and x.dtype.itemsize == 2 else 1
    up, down = weights.up.unbind(), weights.down.unbind()
    nothing: tuple[None, ...] = (None,) * len(up)
    up_bias = nothing if weights.up_bias is None else weights.up_bias.unbind()
    down_bias = nothing if weights.down_bias is None else weights.down_bias.unbind()
    parts = []
    for expert, count in enumerate(
        plan.counts if len(rows) else plan.counts[:1]
    ):  # of no rows, one expert gives all zero gradients
        own = rows[plan.bounds[expert] :][:count]
        for some in own.split(most) if count or not len(rows) else ():
            filled = F.pad(some, (0, 0, 0, -len(some) % step)) if step > 1 else some
            hidden = weights.act(F.linear(filled, up[expert], up_bias[expert]))
            parts.append(F.linear(hidden, down[expert], down_bias[expert])[: len(some)])
    return combine_rows(torch.cat(parts), weight, plan)


def _run_grouped(x: Tensor, weights: ExpertWeights, plan: DispatchPlan, weight: Tensor) -> Tensor:
    hidden = grouped_linear(gather_rows(x, plan), weights.up, weights.up_bias, plan)
    rows = grouped_linear(weights.act(hidden), weights.down, weights.down_bias, plan)
    return combine_rows(rows, weight, plan)


def _run_all(x: Tensor, weights: ExpertWeights, index: Tensor | None, weight: Tensor) -> Tensor:
    """Two products for all experts: the weights scale the hidden units, so the second product also sums over the experts."""
    experts, wide, width = weights.up.shape
    if index is not None:
        weight = weight.new_zeros(len(x), experts).scatter_add(1, index, weight)
    bias = None if weights.up_bias is None else weights.up_bias.reshape(-1)
    hidden = F.linear(x, weights.up.reshape(experts * wide, width), bias).view(len(x), experts, wide)
    scale = weight.to(x.dtype)
    scaled = (weights.act(hidden) * scale[..., None]).flatten(1)
    out = F.linear(scaled, weights.down.permute(1, 0, 2).reshape(weights.down.shape[1], -1))
    return out if weights.down_bias is None else out + scale @ weights.down_bias
