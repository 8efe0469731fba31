"""The form of a carved FFN that is served: the units of each expert stand next to each other, and nothing of the other experts is computed.

Two arrangements compute the same:

| | memory | products per token | when |
|---|---|---|---|
| split | the shared units once, and the own units of each expert | two narrow FFNs | experts are loaded and dropped; several experts per token |
| fused | every expert holds a copy of the shared units | one FFN | all experts fit into memory; one expert per token |

Own parts may have different widths: a bank fills narrower ones up with units of zeros, which contribute exactly 0.
Read next: `masked_ffn.py`, from which it is made; `checkpoints/carved_models.py`, which writes it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from ..layers.backends import Backend
from ..layers.bank import ExpertBank
from ..layers.dense_ffn import DenseFfn
from ..layers.moe_ffn import MoeFfn
from ..layers.routers import Router
from ..layers.routing import Routing
from .masked_ffn import FfnWeights, MaskedFfn, RouterOf, mask_ffns, masked_layers
from .units import Carving, SiteUnits


def take_units(ffn: DenseFfn, units: Tensor, *, out_bias: bool) -> DenseFfn:
    """Take some units out of an FFN.

    Args:
        ffn: The FFN.
        units: (U,) int64 indices; U may be 0.
        out_bias: Whether the bias of the outputs is taken, too.

    Returns:
        An FFN of these units with tensors of its own. Gradients reach the FFN that they came from.
    """

    def rows(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor[units]

    units = units.to(ffn.up.device)
    return replace(
        ffn,
        up=ffn.up[units],
        gate=rows(ffn.gate),
        down=ffn.down[:, units],
        up_bias=rows(ffn.up_bias),
        gate_bias=rows(ffn.gate_bias),
        down_bias=ffn.down_bias if out_bias else None,
    )


class CarvedFfn(nn.Module):
    """Takes the place of an FFN: (..., D) in, (..., O) out, with a part that all tokens share and a bank of experts.

    Make one with `from_units`.
    """

    def __init__(
        self, shared: FfnWeights | None, own: MoeFfn | None, router: Router, site: str, *, fused: bool, dropout: float = 0.0
    ) -> None:
        super().__init__()
        require(shared is not None or own is not None, f"the carved FFN {site!r} has neither shared units nor experts")
        self.shared = shared
        self.own = own
        self.unused_router = router if own is None else None  # takes a decision that no unit depends on
        self.site, self.fused, self.dropout = site, fused, dropout

    @classmethod
    def from_units(
        cls,
        ffn: DenseFfn,
        units: SiteUnits,
        router: Router,
        *,
        fuse: bool = False,
        dropout: float = 0.0,
        backend: Backend = "auto",
    ) -> CarvedFfn:
        """Materialize the experts of an FFN.

        Args:
            ffn: The dense FFN.
            units: Which units belong to whom.
            router: Makes the decisions, or takes them from outside.
            fuse: Whether every expert gets a copy of the shared units. Each token must then use one expert with the weight 1.
            dropout: Share of hidden units that is set to zero in training.
            backend: How the experts are computed.

        Returns:
            The layer.

        Raises:
            InvalidInput: The FFN has another number of units.
        """
        if ffn.width_hidden != units.width:
            raise InvalidInput(f"{units.site!r} has {units.width} units in the carving and {ffn.width_hidden} in the FFN")
        if not bool(units.own.any()):
            whole = FfnWeights(take_units(ffn, units.shared_units, out_bias=True))
            return cls(whole, None, router, units.site, fused=False, dropout=dropout)
        kept = units.with_shared if fuse else units.own
        experts = [take_units(ffn, row.nonzero()[:, 0], out_bias=fuse) for row in kept]
        own = MoeFfn(ExpertBank.from_dense(experts, dropout=dropout, pad_hidden=True), router, backend=backend)
        bare = not bool(units.shared.any()) and ffn.down_bias is None
        shared = None if fuse or bare else FfnWeights(take_units(ffn, units.shared_units, out_bias=True))
        return cls(shared, own, router, units.site, fused=fuse, dropout=dropout)

    @property
    def router(self) -> Router:
        """What decides, or takes the decision."""
        router = self.unused_router if self.own is None else self.own.router
        assert router is not None
        return router

    @property
    def last_routing(self) -> Routing | None:
        """Decision of the last forward pass; None where no expert has units of its own."""
        return None if self.own is None else self.own.last_routing

    def forward(self, x: Tensor) -> Tensor:
        """Compute the shared units and those of each token's experts.

        Args:
            x: (..., D) tokens.

        Returns:
            (..., O) outputs.

        Raises:
            InvalidInput: Shapes that do not fit, or a token of the fused form uses several experts.
        """
        shared = None if self.shared is None else self._shared_part(self.shared, x)
        if self.own is None:
            assert shared is not None
            return shared
        out: Tensor = self.own(x)
        if self.fused:
            routing = self.own.last_routing
            if routing is not None and (routing.index is None or routing.index.shape[1] != 1):
                raise InvalidInput(
                    f"every expert of {self.site!r} holds the shared units, so a token may use one expert only, found "
                    f"{'all of them' if routing.index is None else routing.index.shape[1]}; make the form without fuse=True"
                )
        return out if shared is None else out + shared

    def _shared_part(self, shared: FfnWeights, x: Tensor) -> Tensor:
        if x.ndim < 1 or x.shape[-1] != shared.up.shape[1]:
            raise InvalidInput(f"this carved FFN takes tokens (..., {shared.up.shape[1]}), found {shape_of(x)}")
        if not (self.dropout and self.training):
            out: Tensor = shared(x)
            return out
        hidden = torch.nn.functional.dropout(shared.hidden(x), self.dropout)
        return torch.nn.functional.linear(hidden, shared.down, shared.down_bias)

    def extra_repr(self) -> str:
        """Describe the layer, for `print`.

        Returns:
            The arrangement.
        """
        return "fused" if self.fused else "split"


# ---- whole models


def materialize(model: nn.Module, *, fuse: bool = False, backend: Backend = "auto") -> nn.Module:
    """Make the form to serve of a masked model, trained or not.

    Args:
        model: A model from `mask_ffns`. It is not changed.
        fuse: Whether every expert gets a copy of the shared units.
        backend: How the experts are computed.

    Returns:
        A copy with a `CarvedFfn` in the place of each `MaskedFfn`, and with the same routers.

    Raises:
        InvalidInput: The model has no masked FFN.
    """
    masked_layers(model)
    twin = copy.deepcopy(model)
    made: dict[int, CarvedFfn] = {}
    for owner, name, layer in list(_places(twin)):
        if id(layer) not in made:
            with torch.no_grad():
                new = CarvedFfn.from_units(
                    layer.ffn.value, layer.units, layer.router, fuse=fuse, dropout=layer.dropout, backend=backend
                )
            made[id(layer)] = new.train(layer.training)
        setattr(owner, name, made[id(layer)])
    return twin


def serve_ffns(model: nn.Module, carving: Carving, routers: RouterOf | None = None, *, fuse: bool = False) -> nn.Module:
    """Carve a dense model and materialize its experts.

    Args:
        model: The dense model. It is not changed.
        carving: The units of each FFN.
        routers: Makes the routers; None for `given_routers`.
        fuse: Whether every expert gets a copy of the shared units.

    Returns:
        A copy with a `CarvedFfn` in the place of each FFN.

    Raises:
        InvalidInput: The model has another structure than the planned one.
    """
    return materialize(mask_ffns(model, carving, routers), fuse=fuse)


def carved_layers(model: nn.Module) -> tuple[CarvedFfn, ...]:
    """List the carved FFNs of a model in the order of its modules.

    Args:
        model: A model from `materialize`.

    Returns:
        The layers; none if the model has none.
    """
    return tuple(module for module in model.modules() if isinstance(module, CarvedFfn))


def _places(model: nn.Module) -> Iterator[tuple[nn.Module, str, MaskedFfn]]:
    """Owner and attribute of every masked FFN; a layer that is used in several places comes several times."""
    for owner in model.modules():
        for name, child in owner._modules.items():  # `named_children` would give a child once even if it has two names
            if isinstance(child, MaskedFfn):
                yield owner, name, child
