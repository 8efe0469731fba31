"""Routers that learn nothing from the tokens: the controls of a comparison, and the layers' half of a decision per scene.

A gain of a mixture means little without them: a frozen random router, the uniform average, the true domain, and a hash.
Read next: `moe_ffn.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ....core.tensor_value import shape_of
from .routers import Router
from .routing import Routing, TokenPlaces, TopKRule

_Given = TypeVar("_Given", bound="GivenRouter")


class FrozenRouter(Router):
    """A top-k router whose weights are drawn once and never trained. They are buffers, so no stage can unfreeze them."""

    weight: Tensor

    def __init__(self, width: int, num_experts: int, rule: TopKRule, *, seed: int) -> None:
        super().__init__()
        rule.check(num_experts)
        self.num_experts, self.rule = num_experts, rule
        generator = torch.Generator().manual_seed(seed)
        self.register_buffer("weight", (torch.rand(num_experts, width, generator=generator) * 2 - 1) / width**0.5)

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Choose the experts of each token. No gradient reaches the token through the choice.

        Args:
            x: (T, D) tokens.
            places: Not used.

        Returns:
            The decision.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            return self.rule.route(F.linear(x.detach().to(dtype), self.weight.to(dtype)))


class UniformRouter(Router):
    """Every token uses every expert with the weight 1 / E: the average of the experts' outputs."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Weigh all experts equally.

        Args:
            x: (T, D) tokens.
            places: Not used.

        Returns:
            The decision, with `index` None and without logits.
        """
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        weight = torch.full((len(x), self.num_experts), 1 / self.num_experts, dtype=dtype, device=x.device)
        return Routing(logits=None, probs=weight, index=None, weight=weight)


class GivenRouter(Router):
    """Uses the decision that is given from outside for each scene, by `given_routing`.

    A decision for S scenes serves a batch of N tokens if S divides N: each scene then has N / S tokens in a row, as in a batch
    (scenes, tokens, features). A decision for N tokens is one per token.
    """

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self._decision: Routing | None = None
        self._spread: dict[int, Routing] = {}

    @contextmanager
    def given(self, decision: Routing) -> Iterator[None]:
        """Use a decision inside a `with` block. With activation recomputation the backward pass belongs into the block too.

        Args:
            decision: The decision for each scene, or for each token.

        Yields:
            Nothing.

        Raises:
            InvalidInput: The decision is for another number of experts.
        """
        if decision.num_experts != self.num_experts:
            raise InvalidInput(f"the decision is for {decision.num_experts} experts, and this layer has {self.num_experts}")
        before = self._decision, self._spread
        self._decision, self._spread = decision, {}
        try:
            yield
        finally:
            self._decision, self._spread = before

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Spread the given decision over the tokens.

        Args:
            x: (T, D) tokens.
            places: Where they stand in the batch.

        Returns:
            The decision for the T tokens.

        Raises:
            InvalidInput: No decision was given, or it does not fit the number of tokens.
        """
        total = len(x) if places is None else places.total
        if self._decision is None:
            raise InvalidInput(
                f"{type(self).__name__} was given no decision for this forward pass; run the model inside `with given_routing(...)` "
                "(or given_domains, given_ids), and with activation recomputation the backward pass too"
            )
        scenes = len(self._decision.probs)
        if total and (scenes == 0 or total % scenes):
            raise InvalidInput(
                f"a decision for {scenes} scenes does not fit a batch of {total} tokens: {scenes} must divide {total}"
            )
        if total not in self._spread:
            take = torch.arange(total, device=x.device).div(max(1, total // max(1, scenes)), rounding_mode="floor")
            self._spread[total] = self._decision if scenes == total else self._decision.rows(take)
        whole = self._spread[total]
        return whole if places is None or places.kept is None else whole.rows(places.kept)


class OracleRouter(GivenRouter):
    """Sends each scene to the expert of its true domain: the upper bound of routing by domain."""

    def decide(self, domain: Tensor) -> Routing:
        """Make the decision of domains.

        Args:
            domain: (S,) int64 expert of each scene.

        Returns:
            One expert per scene, with the weight 1.

        Raises:
            InvalidInput: A domain has no expert.
        """
        if domain.ndim != 1 or domain.is_floating_point():
            raise InvalidInput(f"domains must be integers of shape (S,), found {shape_of(domain)}")
        if len(domain) and not 0 <= int(domain.min()) <= int(domain.max()) < self.num_experts:
            raise InvalidInput(
                f"domains lie in {int(domain.min())}..{int(domain.max())}, and there are {self.num_experts} experts"
            )
        index = domain.to(torch.int64)[:, None]
        weight = torch.ones(index.shape, device=domain.device)
        return Routing(logits=None, probs=F.one_hot(index[:, 0], self.num_experts).float(), index=index, weight=weight)


class HashRouter(GivenRouter):
    """Sends each id (of a word, a region, a scene) to k experts that are drawn once: balanced, and blind to meaning."""

    table: Tensor

    def __init__(self, num_experts: int, k: int, *, seed: int, buckets: int = 4096) -> None:
        super().__init__(num_experts)
        TopKRule(k=k, norm="renorm").check(num_experts)
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.rand(buckets, num_experts, generator=generator).argsort(1)[:, :k]
        self.register_buffer("table", drawn.contiguous())

    def decide(self, ids: Tensor) -> Routing:
        """Make the decision of ids.

        Args:
            ids: (S,) int64 ids; the same id has the same experts in every batch and layer of this router.

        Returns:
            k experts per id, each with the weight 1 / k.

        Raises:
            InvalidInput: The ids are not integers.
        """
        if ids.ndim != 1 or ids.is_floating_point():
            raise InvalidInput(f"ids must be integers of shape (S,), found {shape_of(ids)}")
        mixed = (ids.to(torch.int64) * 0x9E3779B1) >> 7  # neighboring ids must not fall into neighboring buckets
        index = self.table[mixed % len(self.table)]
        probs = torch.zeros(len(ids), self.num_experts, device=ids.device).scatter_(1, index, 1 / index.shape[1])
        return Routing(
            logits=None, probs=probs, index=index, weight=torch.full(index.shape, 1 / index.shape[1], device=ids.device)
        )


@contextmanager
def given_routing(model: nn.Module, decision: Routing) -> Iterator[None]:
    """Give one decision to every `GivenRouter` of a model, for all forward passes inside the `with` block.

    Args:
        model: The model, or one layer.
        decision: The decision for each scene; `SceneGate` makes one.

    Yields:
        Nothing.

    Raises:
        InvalidInput: No layer of the model takes a decision.
    """
    with ExitStack() as stack:
        for router in _routers_of(model, GivenRouter):
            stack.enter_context(router.given(decision))
        yield


@contextmanager
def given_domains(model: nn.Module, domain: Tensor) -> Iterator[None]:
    """Give the true domains of the scenes to every `OracleRouter` of a model.

    Args:
        model: The model, or one layer.
        domain: (S,) int64 domain of each scene, which is the number of its expert.

    Yields:
        Nothing.

    Raises:
        InvalidInput: The model has no oracle router, or a domain has no expert.
    """
    with ExitStack() as stack:
        for router in _routers_of(model, OracleRouter):
            stack.enter_context(router.given(router.decide(domain)))
        yield


@contextmanager
def given_ids(model: nn.Module, ids: Tensor) -> Iterator[None]:
    """Give ids to every `HashRouter` of a model.

    Args:
        model: The model, or one layer.
        ids: (S,) int64 ids: one per token, in the order of the flattened batch, or one per scene.

    Yields:
        Nothing.

    Raises:
        InvalidInput: The model has no hash router.
    """
    with ExitStack() as stack:
        for router in _routers_of(model, HashRouter):
            stack.enter_context(router.given(router.decide(ids)))
        yield


def _routers_of(model: nn.Module, kind: type[_Given]) -> list[_Given]:
    found = [module for module in model.modules() if isinstance(module, kind)]
    if not found:
        raise InvalidInput(f"no layer of this {type(model).__name__} has a {kind.__name__}; nothing would use what is given")
    return found
