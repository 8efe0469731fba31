"""Which tokens go to which expert: one sort of the router's choices, used by every backend and by every layer that shares a decision.

A *choice* is one (token, expert) pair. Each of T tokens makes k choices, so there are R = T * k of them. A plan puts the choices into
the order of their experts; nothing is dropped and nothing is padded.

Read next: `grouped.py`, the products over the sorted rows, and `backends.py`, which uses them.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np
import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of


@dataclass(frozen=True, kw_only=True, eq=False)
class DispatchPlan:
    """The choices of a batch, sorted by expert. Make one with `DispatchPlan.of`.

    Example:
        plan = DispatchPlan.of(torch.tensor([[1, 0], [1, 2]]), num_experts=4)
        plan.bounds  # (0, 1, 3, 4, 4): the sorted rows of expert 1 are 1 and 2
    """

    index: Tensor
    """(T, k) int64 experts of each token, as the router chose them."""
    order: Tensor
    """(R,) int64 choice that stands in each sorted row; choice c belongs to token c // k."""
    inverse: Tensor
    """(R,) int64 sorted row of each choice."""
    bounds: tuple[int, ...]
    """E + 1 bounds: the sorted rows of expert e are `bounds[e]:bounds[e + 1]`."""

    def __post_init__(self) -> None:
        rows, bounds = self.index.numel(), self.bounds
        require(self.index.ndim == 2, f"DispatchPlan.index must be (T, k), found {shape_of(self.index)}")
        for name in ("order", "inverse"):
            tensor: Tensor = getattr(self, name)
            if tensor.shape != (rows,) or tensor.dtype != torch.int64:
                raise InvalidInput(f"DispatchPlan.{name} must be ({rows},) int64, one row per choice, found {shape_of(tensor)}")
        ascending = all(low <= high for low, high in pairwise(bounds))
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != rows or not ascending:
            raise InvalidInput(
                f"the bounds of the experts' rows must ascend from 0 to the number of choices, {rows}, found {bounds}: rows behind "
                "the last bound would be left without a value; make the plan with `DispatchPlan.of`"
            )

    @classmethod
    def of(cls, index: Tensor, num_experts: int) -> Self:
        """Sort the choices of a batch by expert. The sort is stable, so the result does not depend on the machine.

        Args:
            index: (T, k) integers, the experts that each token chose.
            num_experts: Number of experts, E.

        Returns:
            The plan.

        Raises:
            InvalidInput: `index` has another shape or type, or names an expert that does not exist.
        """
        if index.ndim != 2 or index.shape[1] == 0 or index.is_floating_point() or index.dtype == torch.bool:
            raise InvalidInput(f"the chosen experts must be integers of shape (T, k) with k >= 1, found {shape_of(index)}")
        index = index.detach().to(torch.int64)
        flat = index.reshape(-1)
        order, counts = (_sorted_on_cpu if flat.device.type == "cpu" else _sorted_on_device)(flat, num_experts)
        inverse = torch.empty_like(order)
        inverse[order] = torch.arange(len(order), device=order.device)
        bounds = (0, *np.cumsum(counts).tolist())
        return cls(index=index, order=order, inverse=inverse, bounds=bounds)

    @classmethod
    def of_all(cls, tokens: int, num_experts: int, device: torch.device) -> Self:
        """Make the plan in which every token goes to every expert, as under soft routing.

        Args:
            tokens: Number of tokens, T.
            num_experts: Number of experts, E.
            device: Where the plan lies.

        Returns:
            The plan, with k = E.
        """
        choice = torch.arange(tokens * num_experts, device=device)
        index = (choice % num_experts).view(tokens, num_experts)
        order = choice.view(tokens, num_experts).t().reshape(-1)
        inverse = choice.view(num_experts, tokens).t().reshape(-1)
        bounds = tuple(tokens * expert for expert in range(num_experts + 1))
        return cls(index=index, order=order, inverse=inverse, bounds=bounds)

    @property
    def tokens(self) -> int:
        """Number of tokens, T."""
        return self.index.shape[0]

    @property
    def k(self) -> int:
        """Number of experts of each token."""
        return self.index.shape[1]

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return len(self.bounds) - 1

    @property
    def counts(self) -> tuple[int, ...]:
        """Number of choices of each expert."""
        return tuple(high - low for low, high in pairwise(self.bounds))

    @cached_property
    def token(self) -> Tensor:
        """(R,) int64 token of each sorted row."""
        return self.order if self.k == 1 else self.order.div(self.k, rounding_mode="floor")

    @cached_property
    def offsets(self) -> Tensor:
        """(E,) int32 row behind the last row of each expert, as grouped products want it."""
        return torch.tensor(self.bounds[1:], dtype=torch.int32, device=self.order.device)

    @cached_property
    def expert(self) -> Tensor:
        """(R,) int64 expert of each sorted row."""
        return self.index.reshape(-1)[self.order]


def _sorted_on_cpu(flat: Tensor, num_experts: int) -> tuple[Tensor, np.ndarray]:
    """numpy sorts 16-bit keys by their digits, which is several times faster than a sort by comparison."""
    keys = flat.numpy()
    if len(keys) and (keys.min() < 0 or keys.max() >= num_experts):
        raise _no_such_expert(int(keys.min()), int(keys.max()), num_experts)
    counts = np.bincount(keys, minlength=num_experts)
    narrow = keys.astype(np.int16) if num_experts <= 2**15 else keys
    return torch.from_numpy(np.argsort(narrow, kind="stable").astype(np.int64, copy=False)), counts


def _sorted_on_device(flat: Tensor, num_experts: int) -> tuple[Tensor, np.ndarray]:
    keys, order = torch.sort(flat, stable=True)
    if len(keys) and (int(keys[0]) < 0 or int(keys[-1]) >= num_experts):
        raise _no_such_expert(int(keys[0]), int(keys[-1]), num_experts)
    return order, torch.bincount(flat, minlength=num_experts).cpu().numpy()


def _no_such_expert(least: int, most: int, num_experts: int) -> InvalidInput:
    return InvalidInput(
        f"a token chose an expert that does not exist: there are {num_experts} experts, 0..{num_experts - 1}, and the choices "
        f"lie in {least}..{most}; check that router and experts have the same number"
    )
