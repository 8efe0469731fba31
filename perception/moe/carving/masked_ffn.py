"""The form of a carved FFN that is trained: one dense FFN, of which each token sees the shared units and those of its experts.

A unit that belongs to several experts has one set of weights here, so all its tokens train it: the weights are tied. The cost is that of
the dense FFN. With the decision i and weight w of a token, and the units h(x),

    y = down( (shared + sum_i w_i own_i) * h(x) ) + bias

Read next: `carved_ffn.py`, the form that is served; `pre_gate.py`, which makes the decisions.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from ..layers.control_routers import GivenRouter
from ..layers.dense_ffn import DenseFfn, activate
from ..layers.routers import Router
from ..layers.routing import Routing, TokenPlaces
from ..surgery.ffn_sites import FfnSite, tensors_of
from .activity import SeeHidden
from .shared_routed import RepresentativeRouter
from .units import Carving, SiteUnits

RouterOf = Callable[[FfnSite, DenseFfn, SiteUnits], Router]
"""Makes the router of one carved FFN."""


class FfnWeights(nn.Module):
    """A dense FFN as a module: its tensors are parameters."""

    up: nn.Parameter
    down: nn.Parameter
    gate: nn.Parameter | None
    up_bias: nn.Parameter | None
    gate_bias: nn.Parameter | None
    down_bias: nn.Parameter | None

    def __init__(self, ffn: DenseFfn) -> None:
        super().__init__()
        self.activation = ffn.activation
        own = ffn.clone()
        for name in ("up", "gate", "down", "up_bias", "gate_bias", "down_bias"):
            tensor: Tensor | None = getattr(own, name)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))

    @property
    def value(self) -> DenseFfn:
        """The weights as a value. Gradients reach the parameters."""
        return DenseFfn(
            up=self.up,
            gate=self.gate,
            down=self.down,
            up_bias=self.up_bias,
            gate_bias=self.gate_bias,
            down_bias=self.down_bias,
            activation=self.activation,
        )

    def hidden(self, x: Tensor) -> Tensor:
        """Compute the hidden units.

        Args:
            x: (..., D) inputs.

        Returns:
            (..., F).
        """
        hidden = F.linear(x, self.up, self.up_bias)
        if self.gate is None:
            return activate(hidden, self.activation)
        return activate(F.linear(x, self.gate, self.gate_bias), self.activation) * hidden

    def forward(self, x: Tensor) -> Tensor:
        """Compute the FFN.

        Args:
            x: (..., D) inputs.

        Returns:
            (..., O) outputs.
        """
        return F.linear(self.hidden(x), self.down, self.down_bias)

    def extra_repr(self) -> str:
        """Describe the FFN, for `print`.

        Returns:
            Widths and activation.
        """
        gate = "" if self.gate is None else ", gated"
        return f"{self.up.shape[1]} -> {self.up.shape[0]} -> {self.down.shape[0]}, {self.activation}{gate}"


class MaskedFfn(nn.Module):
    """Takes the place of an FFN: (..., D) in, (..., O) out, with masks over the hidden units.

    Example:
        layer = MaskedFfn(ffn, units, GivenRouter(4))
        with given_routing(layer, pre_gate.decide(ids)):
            y = layer(x)
    """

    shared: Tensor
    own: Tensor

    def __init__(self, ffn: DenseFfn, units: SiteUnits, router: Router, *, dropout: float = 0.0) -> None:
        super().__init__()
        if ffn.width_hidden != units.width or router.num_experts != units.experts:
            raise InvalidInput(
                f"{units.site!r} has {units.width} units and {units.experts} experts in the carving, and {ffn.width_hidden} units in the "
                f"FFN; its router chooses among {router.num_experts} experts"
            )
        self.site, self.representatives, self.dropout = units.site, units.representatives, dropout
        self.ffn = FfnWeights(ffn)
        self.router = router
        self.register_buffer("shared", units.shared.to(ffn.up.device))
        self.register_buffer("own", units.own.to(ffn.up.device))
        self._chosen = bool(units.own.any())
        self._routing: Routing | None = None
        self._dense = False
        self._see: Callable[[Tensor, Tensor], None] | None = None

    @property
    def units(self) -> SiteUnits:
        """Which units belong to whom."""
        return SiteUnits(site=self.site, shared=self.shared, own=self.own, representatives=self.representatives)

    @property
    def last_routing(self) -> Routing | None:
        """Decision of the last forward pass; None where no expert has units of its own."""
        return self._routing

    def take_routing(self) -> Routing | None:
        """Get the decision of the last forward pass and forget it: a trained router's decision holds the graph of its gradients.

        Returns:
            The decision, or None.
        """
        routing, self._routing = self._routing, None
        return routing

    def forward(self, x: Tensor) -> Tensor:
        """Compute the units of each token's experts.

        Args:
            x: (..., D) tokens.

        Returns:
            (..., O) outputs.

        Raises:
            InvalidInput: Shapes that do not fit.
        """
        if x.ndim < 1 or x.shape[-1] != self.ffn.up.shape[1]:
            raise InvalidInput(f"this carved FFN takes tokens (..., {self.ffn.up.shape[1]}), found {shape_of(x)}")
        flat = x.reshape(-1, x.shape[-1])
        hidden = self.ffn.hidden(flat)
        if self._see is not None:
            self._see(x, hidden.view(*x.shape[:-1], hidden.shape[1]))
        if not self._dense:
            hidden = hidden * self._scale(flat).to(hidden.dtype)
        if self.dropout and self.training:
            hidden = F.dropout(hidden, self.dropout)
        out = F.linear(hidden, self.ffn.down, self.ffn.down_bias)
        return out.view(*x.shape[:-1], out.shape[1])

    def _scale(self, flat: Tensor) -> Tensor:
        """(T, F) or (F,) factor of each unit."""
        if not self._chosen:
            self._routing = None
            return self.shared
        routing = self.router(flat, TokenPlaces(total=len(flat)))
        if routing.probs.shape != (len(flat), len(self.own)):
            raise InvalidInput(
                f"the router of {self.site!r} decided for {shape_of(routing.probs)}; the layer has {len(flat)} tokens and "
                f"{len(self.own)} experts"
            )
        self._routing = routing
        own = self.own.to(routing.weight.dtype)
        if routing.index is None:
            chosen = routing.weight @ own
        elif routing.index.shape[1] == 1:
            chosen = own[routing.index[:, 0]] * routing.weight
        else:
            every = torch.zeros_like(routing.probs, dtype=routing.weight.dtype)
            chosen = every.scatter_add(1, routing.index, routing.weight) @ own
        return chosen + self.shared.to(chosen.dtype)

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last decision out of copies: a tensor with a history cannot be copied."""
        return {**self.__dict__, "_routing": None, "_see": None}

    def extra_repr(self) -> str:
        """Describe the layer, for `print`.

        Returns:
            Numbers of units.
        """
        return f"shared={int(self.shared.sum())}, own={tuple(self.own.sum(1).tolist())}"


# ---- whole models


def given_routers(carving: Carving) -> RouterOf:
    """Say which routers a carving has unless the caller wants others.

    Args:
        carving: The carving.

    Returns:
        A `RepresentativeRouter` where the carving names representatives, else a `GivenRouter`, which takes its decision from outside.
    """

    def make(_: FfnSite, ffn: DenseFfn, units: SiteUnits) -> Router:
        if units.representatives is None:
            return GivenRouter(units.experts)
        return RepresentativeRouter(ffn, units.representatives, carving.active)

    return make


def mask_ffns(model: nn.Module, carving: Carving, routers: RouterOf | None = None) -> nn.Module:
    """Make the form to train of a carved model. A batch norm that lies in an FFN is folded into it.

    Args:
        model: The dense model. It is not changed.
        carving: The units of each FFN.
        routers: Makes the routers; None for `given_routers`.

    Returns:
        A copy with a `MaskedFfn` in the place of each FFN.

    Raises:
        InvalidInput: The model has another structure than the planned one.
    """
    carving.plan.check(model)
    make = given_routers(carving) if routers is None else routers
    twin = copy.deepcopy(model)
    tensors = tensors_of(twin)
    layers: dict[str, nn.Module] = {}
    for site, units in zip(carving.plan.sites, carving.units):
        ffn = site.read(tensors)
        layers[site.name] = MaskedFfn(ffn, units, make(site, ffn, units).to(ffn.up.device), dropout=site.dropout)
    carving.plan.apply(twin, layers)
    return twin


def masked_layers(model: nn.Module) -> tuple[MaskedFfn, ...]:
    """List the masked FFNs of a model in the order of its modules.

    Args:
        model: A model from `mask_ffns`.

    Returns:
        The layers.

    Raises:
        InvalidInput: There is none.
    """
    found = tuple(module for module in model.modules() if isinstance(module, MaskedFfn))
    require(bool(found), f"this {type(model).__name__} has no masked FFN; make one with `mask_ffns`")
    return found


def layers_of_sites(model: nn.Module, carving: Carving) -> tuple[MaskedFfn, ...]:
    """List the masked FFNs of a model in the order of a carving's plan.

    Args:
        model: A model from `mask_ffns`.
        carving: Its carving.

    Returns:
        One layer for each FFN.

    Raises:
        InvalidInput: The model has no layer for one.
    """
    there: Mapping[str, MaskedFfn] = {layer.site: layer for layer in masked_layers(model)}
    missing = [site.name for site in carving.plan.sites if site.name not in there]
    require(not missing, f"the model has no masked FFN for {missing[:3]}; carve it with the same carving")
    return tuple(there[site.name] for site in carving.plan.sites)


@contextmanager
def run_dense(model: nn.Module, carving: Carving, see: SeeHidden | None = None) -> Iterator[None]:
    """Run a masked model with all units inside the block: the current dense model as a teacher.

    Args:
        model: A model from `mask_ffns`.
        carving: Its carving.
        see: Is shown the hidden units of every FFN; None for nobody.

    Yields:
        Nothing.
    """
    layers = layers_of_sites(model, carving)
    try:
        for number, layer in enumerate(layers):
            layer._dense = True
            layer._see = None if see is None else _numbered(see, number)
        yield
    finally:
        for layer in layers:
            layer._dense, layer._see = False, None


def _numbered(see: SeeHidden, number: int) -> Callable[[Tensor, Tensor], None]:
    return lambda x, hidden: see(number, x, hidden)
