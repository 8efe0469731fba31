"""What a router decides, as a value: chosen experts and weights, with the probabilities that the losses need.

Read next: `routers.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require, require_counts
from ....core.tensor_value import shape_of
from .dispatch import DispatchPlan

Norm = Literal["none", "renorm"]
Score = Literal["softmax", "sigmoid"]


@dataclass(frozen=True, kw_only=True)
class TopKRule:
    """How logits become chosen experts. It belongs into every checkpoint: another rule makes another model of the same weights."""

    k: int
    """Number of experts per token. 1 is cheapest; 2 keeps the router's gradient under `renorm`."""
    norm: Norm
    """`renorm` divides the weights of the chosen experts by their sum, which is the same as a softmax over the top k logits; a
    mixture of equal experts then equals one of them. `none` keeps the probabilities, as BAM does with k = 1: the output starts
    smaller than the dense one."""
    score: Score = "softmax"
    """Function that makes scores of logits: `softmax` over all experts, or `sigmoid` of each."""

    def __post_init__(self) -> None:
        require_counts("TopKRule", k=self.k)
        require(self.norm in get_args(Norm), f"TopKRule.norm must be none or renorm, found {self.norm!r}")
        require(self.score in get_args(Score), f"TopKRule.score must be softmax or sigmoid, found {self.score!r}")

    def check(self, experts: int) -> None:
        """Refuse to choose more experts than there are.

        Args:
            experts: Number of experts, E.

        Raises:
            InvalidInput: k is larger than E.
        """
        require(self.k <= experts, f"a router cannot choose k = {self.k} of {experts} experts; lower k or add experts")

    def route(self, logits: Tensor) -> Routing:
        """Choose experts.

        Args:
            logits: (T, E) in float32 or float64.

        Returns:
            The decision. Its experts are sorted by score.

        Raises:
            InvalidInput: k is larger than E.
        """
        self.check(logits.shape[1])
        if self.score == "softmax":
            probs = torch.softmax(logits, dim=1)
            top, index = (probs if self.norm == "none" else logits).topk(self.k, dim=1)
            return Routing(logits=logits, probs=probs, index=index, weight=top if self.norm == "none" else top.softmax(dim=1))
        scores = torch.sigmoid(logits)
        least = torch.finfo(scores.dtype).tiny
        top, index = scores.topk(self.k, dim=1)
        weight = top if self.norm == "none" else top / top.sum(1, keepdim=True).clamp_min(least)
        probs = scores / scores.sum(1, keepdim=True).clamp_min(least)
        return Routing(logits=logits, probs=probs, index=index, weight=weight)


@dataclass(frozen=True, kw_only=True, eq=False)
class Routing:
    """The decision of a router for T tokens. Padding is not among them."""

    logits: Tensor | None
    """(T, E) output of the router, or None where nothing was computed from the token: oracle, hash and uniform routers."""
    probs: Tensor
    """(T, E) scores that sum to 1 over the experts."""
    index: Tensor | None
    """(T, k) int64 chosen experts, best first; None for soft routing, which uses all of them."""
    weight: Tensor
    """(T, k) weight of each chosen expert; (T, E) for soft routing."""

    def __post_init__(self) -> None:
        shape = self.probs.shape
        wanted = shape if self.index is None else self.index.shape
        good = self.probs.ndim == 2 and len(wanted) == 2 and wanted[0] == shape[0] and self.weight.shape == wanted
        if not good or (self.logits is not None and self.logits.shape != shape):
            raise InvalidInput(
                f"a routing needs probs (T, E), index (T, k) or None and weight like it, found {shape_of(self.probs)}, "
                f"{shape_of(self.index)} and {shape_of(self.weight)}"
            )

    @property
    def num_experts(self) -> int:
        """Number of experts, E."""
        return self.probs.shape[1]

    @cached_property
    def plan(self) -> DispatchPlan | None:
        """The choices sorted by expert, made once however many layers share the decision; None for soft routing."""
        return None if self.index is None else DispatchPlan.of(self.index, self.num_experts)

    @property
    def top1(self) -> Tensor:
        """(T,) expert with the largest score of each token."""
        return self.probs.argmax(1) if self.index is None else self.index[:, 0]

    def rows(self, take: Tensor) -> Routing:
        """Get the decision of some tokens; a token may be taken several times.

        Args:
            take: (M,) int64 tokens.

        Returns:
            The decision of these M tokens.
        """
        return Routing(
            logits=None if self.logits is None else self.logits[take],
            probs=self.probs[take],
            index=None if self.index is None else self.index[take],
            weight=self.weight[take],
        )

    def detach(self) -> Routing:
        """Cut the decision off from the graph of gradients.

        Returns:
            The same numbers without a history.
        """
        logits = None if self.logits is None else self.logits.detach()
        return Routing(logits=logits, probs=self.probs.detach(), index=self.index, weight=self.weight.detach())


@dataclass(frozen=True, kw_only=True, eq=False)
class TokenPlaces:
    """Where the tokens of a layer stand in its batch: routers that decide per scene, or by an id, need it."""

    total: int
    """Number of tokens of the batch, with padding."""
    kept: Tensor | None = None
    """(T,) int64 place of each token that is no padding; None where all tokens are there."""
