"""Routers that are learned: token top-k, soft, and the gate that decides once per scene.

All compute in float32 under autocast (in float64 for float64 tokens): in bfloat16 the order of near ties changes, and with it the
experts. Read next: `control_routers.py`, the controls that a comparison needs; `moe_ffn.py`.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod
from typing import Any, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from .routing import Routing, TokenPlaces, TopKRule

Match = Literal["nearest", "inner"]


class Router(nn.Module, ABC):
    """Decides which experts serve which tokens."""

    num_experts: int
    """Number of experts, E."""

    @abstractmethod
    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Decide.

        Args:
            x: (T, D) tokens, without padding.
            places: Where they stand in the batch; None where they are the whole batch.

        Returns:
            The decision for the T tokens.
        """


class _LinearRouter(Router):
    """One linear map from a token to logits."""

    def __init__(self, width: int, num_experts: int, *, bias: bool = False) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, width))
        self.bias = nn.Parameter(torch.zeros(num_experts)) if bias else None
        nn.init.uniform_(self.weight, -1 / math.sqrt(width), 1 / math.sqrt(width))
        self.register_load_state_dict_post_hook(_warn_of_equal_rows)

    def logits(self, x: Tensor) -> Tensor:
        """Compute the logits in float32, whatever autocast says.

        Args:
            x: (T, D) tokens.

        Returns:
            (T, E) logits: float64 for float64 tokens, else float32.

        Raises:
            InvalidInput: The tokens have another width.
        """
        if x.ndim != 2 or x.shape[1] != self.weight.shape[1]:
            raise InvalidInput(f"the router takes tokens of shape (T, {self.weight.shape[1]}), found {shape_of(x)}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(dtype), self.weight.to(dtype), None if self.bias is None else self.bias.to(dtype))


class TopKRouter(_LinearRouter):
    """Each token chooses its k best experts by a linear map of its features.

    Example:
        router = TopKRouter(256, 4, TopKRule(k=2, norm="renorm"))
        routing = router(torch.randn(100, 256))  # routing.index (100, 2), routing.weight (100, 2)
    """

    def __init__(self, width: int, num_experts: int, rule: TopKRule, *, bias: bool = False) -> None:
        super().__init__(width, num_experts, bias=bias)
        rule.check(num_experts)
        if rule.k == 1 and rule.norm == "renorm" and num_experts > 1:
            warnings.warn(
                "a top-1 router with norm='renorm' always weighs its expert by 1, so the task gives it no gradient and only the "
                "balance loss trains it; use k=2, or norm='none'",
                stacklevel=2,
            )
        self.rule = rule

    @classmethod
    def from_rows(cls, rows: Tensor, rule: TopKRule, *, bias: Tensor | None = None) -> Self:
        """Make a router with given weights.

        Args:
            rows: (E, D) one row per expert.
            rule: How logits become choices.
            bias: (E,) or None.

        Returns:
            The router.

        Raises:
            InvalidInput: Two rows (with their biases) are equal, so the router could never tell their experts apart.
        """
        if rows.ndim != 2 or not rows.is_floating_point() or (bias is not None and bias.shape != rows.shape[:1]):
            raise InvalidInput(
                f"router rows must be (E, D) numbers with a bias (E,), found {shape_of(rows)} and {shape_of(bias)}"
            )
        _require_unequal_rows(rows if bias is None else torch.cat([rows, bias[:, None].to(rows)], dim=1))
        router = cls(rows.shape[1], rows.shape[0], rule, bias=bias is not None).to(rows)
        with torch.no_grad():
            router.weight.copy_(rows)
            if router.bias is not None and bias is not None:
                router.bias.copy_(bias)
        return router

    @classmethod
    def from_centroids(cls, centroids: Tensor, rule: TopKRule, *, match: Match = "nearest", temperature: float = 1.0) -> Self:
        """Make a router whose rows are the centers of clusters of tokens, so it starts with their division of the data.

        Args:
            centroids: (E, D) centers, one per expert.
            rule: How logits become choices.
            match: `nearest` adds the bias -|c|^2 / 2, so a token chooses the center with the smallest distance, exactly as k-means
                does. `inner` has no bias: a token chooses the largest inner product (Cluster-aware Upcycling).
            temperature: The logits are divided by it. Raise it for softer weights.

        Returns:
            The router.

        Raises:
            InvalidInput: Two centers are equal, or the temperature is not positive.
        """
        require(0 < temperature < math.inf, f"the temperature of a router must be positive, found {temperature}")
        bias = None if match == "inner" else -centroids.square().sum(1) / (2 * temperature)
        return cls.from_rows(centroids / temperature, rule, bias=bias)

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Choose the experts of each token.

        Args:
            x: (T, D) tokens.
            places: Not used.

        Returns:
            The decision.
        """
        return self.rule.route(self.logits(x))

    def extra_repr(self) -> str:
        """Describe the router, for `print`.

        Returns:
            Sizes and rule.
        """
        return f"{self.weight.shape[1]} -> top {self.rule.k} of {self.num_experts}, norm={self.rule.norm}, {self.rule.score}"


class SoftRouter(_LinearRouter):
    """Every token uses every expert, weighted by a softmax: BTX soft, and the attention experts of BAM."""

    @classmethod
    def from_rows(cls, rows: Tensor) -> Self:
        """Make a router with given weights.

        Args:
            rows: (E, D) one row per expert.

        Returns:
            The router.

        Raises:
            InvalidInput: Two rows are equal, so the router could never tell their experts apart.
        """
        _require_unequal_rows(rows)
        router = cls(rows.shape[1], rows.shape[0]).to(rows)
        with torch.no_grad():
            router.weight.copy_(rows)
        return router

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Weigh all experts for each token.

        Args:
            x: (T, D) tokens.
            places: Not used.

        Returns:
            The decision, with `index` None.
        """
        logits = self.logits(x)
        probs = torch.softmax(logits, dim=1)
        return Routing(logits=logits, probs=probs, index=None, weight=probs)


class SceneGate(nn.Module):
    """Decides once per scene, from a description that is known before the network runs: one decision for all layers.

    It is not a `Router`: its decision is handed to the layers by a `GivenRouter` in each.

    Example:
        gate = SceneGate(12, 4, TopKRule(k=2, norm="renorm"))
        decision = gate(descriptors)  # descriptors (S, 12): number of points, range, height and intensity histograms, ...
        with given_routing(model, decision):
            out = model(scenes)
    """

    def __init__(self, width: int, num_experts: int, rule: TopKRule | None, *, hidden: int = 64) -> None:
        super().__init__()
        if rule is not None:
            rule.check(num_experts)
        self.num_experts, self.rule = num_experts, rule
        self.hidden = nn.Linear(width, hidden)
        self.out = nn.Linear(hidden, num_experts)

    def forward(self, descriptor: Tensor) -> Routing:
        """Decide for each scene.

        Args:
            descriptor: (S, C) description of each scene, scaled to about unit variance.

        Returns:
            The decision for the S scenes; soft where the gate has no rule.

        Raises:
            InvalidInput: The description has another width.
        """
        if descriptor.ndim != 2 or descriptor.shape[1] != self.hidden.in_features:
            raise InvalidInput(f"the gate takes descriptions (S, {self.hidden.in_features}), found {shape_of(descriptor)}")
        with torch.autocast(descriptor.device.type, enabled=False):
            logits = self.out(F.relu(self.hidden(descriptor.to(self.hidden.weight.dtype))))
        logits = logits if logits.dtype == torch.float64 else logits.float()
        if self.rule is not None:
            return self.rule.route(logits)
        probs = torch.softmax(logits, dim=1)
        return Routing(logits=logits, probs=probs, index=None, weight=probs)


def equal_rows(rows: Tensor, tolerance: float = 1e-6) -> list[tuple[int, int]]:
    """Find rows of a router that are equal: their experts get the same logits for every token, and the same gradient for ever.

    Args:
        rows: (E, D) weights.
        tolerance: Largest distance that counts as equal, as a share of the longest row.

    Returns:
        Pairs of rows, the smaller number first.
    """
    rows = rows.detach().double()
    near = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist") <= tolerance * rows.norm(dim=1).max()
    return [(int(i), int(j)) for i, j in near.triu(1).nonzero()]


def _require_unequal_rows(rows: Tensor) -> None:
    if pairs := equal_rows(rows):
        raise InvalidInput(_equal_rows_text(pairs))


def _equal_rows_text(pairs: list[tuple[int, int]]) -> str:
    named = ", ".join(f"{i} and {j}" for i, j in pairs[:5])
    return (
        f"the router's rows of experts {named} are equal, so no token can ever tell these experts apart; draw the rows at random, "
        "or use centers of different clusters (equal prompts or empty clusters give equal rows)"
    )


def _warn_of_equal_rows(module: nn.Module, _keys: Any) -> None:
    assert isinstance(module, _LinearRouter)
    weight = module.weight.detach()
    if weight.is_meta:
        return
    if pairs := equal_rows(weight if module.bias is None else torch.cat([weight, module.bias.detach()[:, None]], dim=1)):
        warnings.warn(_equal_rows_text(pairs), stacklevel=3)
