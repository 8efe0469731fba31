"""How experts are used: exact counts over forward passes, and what they tell.

Counts are secret where data are: they give away weather, place or fleet. Aggregate or noise them before they leave a machine.
Read next: `moe_ffn.py`, which counts.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from .routing import Routing


@dataclass(frozen=True, kw_only=True)
class ExpertUsage:
    """Use of the experts of one layer over some forward passes."""

    use: tuple[float, ...]
    """Choices that each expert got; under soft routing the sum of its weights. Padding is left out."""
    tokens: int
    """Number of tokens."""
    batches: int
    """Number of forward passes with at least one token. Recomputation in the backward pass is not one."""
    unique: int
    """Sum over the forward passes of the number of experts that ran."""
    weight: tuple[float, ...]
    """Sum of the weights with which each expert's output counted."""
    largest: tuple[int, ...]
    """Number of tokens in which each expert had the largest weight."""

    def __add__(self, other: ExpertUsage) -> ExpertUsage:
        require(len(self.use) == len(other.use), f"the use of {len(self.use)} and of {len(other.use)} experts cannot be added")
        return ExpertUsage(
            use=tuple(a + b for a, b in zip(self.use, other.use)),
            tokens=self.tokens + other.tokens,
            batches=self.batches + other.batches,
            unique=self.unique + other.unique,
            weight=tuple(a + b for a, b in zip(self.weight, other.weight)),
            largest=tuple(a + b for a, b in zip(self.largest, other.largest)),
        )

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of each expert; they sum to 1, or are all 0 before the first token."""
        total = sum(self.use)
        return tuple(use / total if total else 0.0 for use in self.use)

    @property
    def mean_weights(self) -> tuple[float, ...]:
        """Mean weight of each expert over all tokens, with 0 where it was not chosen. Where every expert computes every token, shares of choices
        say nothing, and these do."""
        return tuple(weight / self.tokens if self.tokens else 0.0 for weight in self.weight)

    @property
    def largest_shares(self) -> tuple[float, ...]:
        """Share of the tokens in which each expert has the largest weight."""
        return tuple(number / self.tokens if self.tokens else 0.0 for number in self.largest)

    @property
    def entropy(self) -> float:
        """Entropy of the shares, divided by its largest value: 1 if all are used equally, 0 if one expert serves everything."""
        if len(self.use) < 2:
            return 1.0
        return -sum(p * math.log(p) for p in self.shares if p > 0) / math.log(len(self.use))

    @property
    def dead(self) -> tuple[int, ...]:
        """Experts that no token chose."""
        return tuple(expert for expert, use in enumerate(self.use) if use == 0)

    @property
    def unique_per_batch(self) -> float:
        """Mean number of experts that run in one forward pass: what a runtime must hold in memory."""
        return self.unique / self.batches if self.batches else 0.0


class UsageCounter:
    """Adds up the use of one layer's experts. It is no part of a checkpoint.

    Example:
        layer.usage.reset()
        train_some_steps()
        print(layer.usage.value.entropy, layer.usage.value.dead)
    """

    def __init__(self, num_experts: int) -> None:
        zeros = (0.0,) * num_experts
        self._zero = ExpertUsage(use=zeros, tokens=0, batches=0, unique=0, weight=zeros, largest=(0,) * num_experts)
        self._value = self._zero
        self._sums: Tensor | None = (
            None  # (2, E) weights and largest ones, on the device of the decisions: read only when asked for
        )

    @property
    def value(self) -> ExpertUsage:
        """What was counted since the last `reset`."""
        if self._sums is None:
            return self._value
        weight, largest = self._sums.tolist()
        return replace(self._value, weight=tuple(weight), largest=tuple(map(int, largest)))

    def reset(self) -> ExpertUsage:
        """Start again from 0.

        Returns:
            What was counted until now.
        """
        value, self._value, self._sums = self.value, self._zero, None
        return value

    def add(self, routing: Routing) -> None:
        """Count one forward pass.

        Args:
            routing: The decision for its tokens, without padding.

        Raises:
            InvalidInput: The decision is for another number of experts.
        """
        if routing.num_experts != len(self._zero.use):
            raise InvalidInput(f"the decision is for {routing.num_experts} experts, and the counter for {len(self._zero.use)}")
        tokens = len(routing.probs)
        if not tokens:
            return
        plan = routing.plan
        use = tuple(map(float, plan.counts)) if plan else tuple(routing.weight.detach().sum(0, dtype=torch.float64).tolist())
        unique = sum(n > 0 for n in use)
        self._value = self._value + replace(self._zero, use=use, tokens=tokens, batches=1, unique=unique)
        weight = routing.weight.detach().double()
        largest = weight.new_zeros(routing.num_experts).index_add(0, routing.top1, weight.new_ones(tokens))
        if routing.index is None:
            weight = weight.sum(0)
        else:
            weight = torch.zeros_like(largest).index_add(0, routing.index.flatten(), weight.flatten())
        sums = torch.stack([weight, largest])
        self._sums = sums if self._sums is None else self._sums.to(sums.device) + sums


def in_backward() -> bool:
    """Say whether this code runs inside a backward pass, as a forward pass does that activation checkpointing repeats.

    Returns:
        True inside a backward pass. torch's own checkpointing asks the same.
    """
    return bool(torch._C._current_graph_task_id() != -1)
