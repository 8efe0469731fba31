"""The mixtures of FFNs of a model without their weights: what a checkpoint stores to build them again. Read next: `checkpoint.py`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch

from ....core.errors import InvalidInput, require
from ..layers.backends import Backend
from ..layers.bank import BankShape, ExpertBank
from ..layers.control_routers import FrozenRouter, GivenRouter, HashRouter, OracleRouter, UniformRouter
from ..layers.moe_ffn import MoeFfn
from ..layers.routers import Router, SoftRouter, TopKRouter
from ..layers.routing import TopKRule

WeightType = Literal["float32", "float64", "bfloat16", "float16"]
RouterKind = Literal["top_k", "soft", "frozen", "uniform", "given", "oracle", "hash"]


@dataclass(frozen=True, kw_only=True)
class RouterForm:
    """All that is needed to build a router again before its weights are loaded."""

    kind: RouterKind
    """Class of the router: `TopKRouter`, `SoftRouter`, or one of the controls."""
    rule: TopKRule | None = None
    """How logits become choices: k, renormalization and score function. None for routers without a rule."""
    bias: bool = False
    """Whether the logits have a bias."""
    k: int | None = None
    """Experts per id, of a hash router."""
    buckets: int | None = None
    """Size of a hash router's table."""

    def __post_init__(self) -> None:
        require(self.kind in get_args(RouterKind), f"RouterForm.kind: unknown router {self.kind!r}")
        ruled, hashed = self.kind in ("top_k", "frozen"), self.kind == "hash"
        require(ruled == (self.rule is not None), f"a router of kind {self.kind!r} {'needs a' if ruled else 'has no'} rule")
        require(
            (self.k is not None) == (self.buckets is not None) == hashed,
            f"k and buckets belong to hash routers, not to {self.kind!r}",
        )

    @classmethod
    def of(cls, router: Router) -> RouterForm:
        """Describe a router.

        Args:
            router: The router of a mixture.

        Returns:
            Its form.

        Raises:
            InvalidInput: It is of a class that checkpoints do not know; a subclass could compute something else.
        """
        if type(router) is TopKRouter:
            return cls(kind="top_k", rule=router.rule, bias=router.bias is not None)
        if type(router) is SoftRouter:
            return cls(kind="soft", bias=router.bias is not None)
        if type(router) is FrozenRouter:
            return cls(kind="frozen", rule=router.rule)
        if type(router) is HashRouter:
            return cls(kind="hash", k=router.table.shape[1], buckets=len(router.table))
        plain: dict[type[Router], RouterKind] = {UniformRouter: "uniform", GivenRouter: "given", OracleRouter: "oracle"}
        if type(router) in plain:
            return cls(kind=plain[type(router)])
        raise InvalidInput(
            f"a checkpoint cannot hold a router of the class {type(router).__name__}: loading could not build it again; use one of "
            "routers.py or control_routers.py"
        )

    def build(self, width: int, experts: int) -> Router:
        """Build the router with fresh weights.

        Args:
            width: Width of the tokens.
            experts: Number of experts.

        Returns:
            The router.

        Raises:
            InvalidInput: k is larger than the number of experts.
        """
        if self.kind == "top_k" and self.rule is not None:
            return TopKRouter(width, experts, self.rule, bias=self.bias)
        if self.kind == "frozen" and self.rule is not None:
            return FrozenRouter(width, experts, self.rule, seed=0)
        if self.kind == "hash" and self.k is not None and self.buckets is not None:
            return HashRouter(experts, self.k, seed=0, buckets=self.buckets)
        if self.kind == "soft":
            return SoftRouter(width, experts, bias=self.bias)
        if self.kind == "uniform":
            return UniformRouter(experts)
        return OracleRouter(experts) if self.kind == "oracle" else GivenRouter(experts)

    def __str__(self) -> str:
        if self.rule is None:
            return f"{self.kind}, k = {self.k}" if self.k is not None else self.kind
        return f"{self.kind}, k = {self.rule.k}, norm = {self.rule.norm}, score = {self.rule.score}"


@dataclass(frozen=True, kw_only=True)
class MixtureForm:
    """One mixture without its weights."""

    bank: BankShape
    """Sizes of the experts."""
    router: RouterForm
    """How tokens are routed."""
    backend: Backend = "auto"
    """How the experts are computed."""
    numbers: WeightType = "float32"
    """Type of the experts' weights."""
    router_numbers: WeightType = "float32"
    """Type of the router's weights."""

    @classmethod
    def of(cls, layer: MoeFfn) -> MixtureForm:
        """Describe a mixture.

        Args:
            layer: The mixture.

        Returns:
            Its form.

        Raises:
            InvalidInput: Its router or the type of its numbers cannot be stored.
        """
        floats = [t.dtype for t in layer.router.state_dict().values() if t.is_floating_point()]
        return cls(
            bank=layer.bank.shape,
            router=RouterForm.of(layer.router),
            backend=layer.backend,
            numbers=_number_type(layer.bank.down_proj.dtype),
            router_numbers=_number_type(floats[0]) if floats else "float32",
        )

    def build(self) -> MoeFfn:
        """Build the mixture with fresh weights.

        Returns:
            The mixture.
        """
        router = self.router.build(self.bank.width_in, self.bank.experts)
        bank = ExpertBank(self.bank).to(getattr(torch, self.numbers))
        return MoeFfn(bank, router.to(getattr(torch, self.router_numbers)), backend=self.backend)


def _number_type(dtype: torch.dtype) -> WeightType:
    for name in get_args(WeightType):
        if getattr(torch, name) is dtype:
            found: WeightType = name
            return found
    raise InvalidInput(f"a checkpoint holds experts of {', '.join(get_args(WeightType))}, found {dtype}")
