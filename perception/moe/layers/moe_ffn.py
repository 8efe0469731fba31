"""A mixture of experts in the place of an FFN: a router and an expert bank, with what training and reports need around them.

Read next: `losses.py`, which takes the routings; `usage.py`, the counts.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput
from ....core.tensor_value import shape_of
from .backends import Backend
from .bank import ExpertBank
from .routers import Router
from .routing import Routing, TokenPlaces
from .usage import UsageCounter, in_backward


class MoeFfn(nn.Module):
    """Takes the place of an FFN: (..., D) in, (..., O) out.

    Example:
        layer = MoeFfn(ExpertBank.from_dense([ffn] * 4), TopKRouter(256, 4, TopKRule(k=2, norm="renorm")))
        y = layer(x)  # x (B, N, 256)
        loss = task(y) + router_losses(take_routings(layer), RouterLossConfig()).total
    """

    def __init__(self, bank: ExpertBank, router: Router, *, backend: Backend = "auto") -> None:
        super().__init__()
        if bank.shape.experts != router.num_experts:
            raise InvalidInput(f"the router chooses among {router.num_experts} experts, and the bank has {bank.shape.experts}")
        self.bank = bank
        self.router = router
        self.backend: Backend = backend
        self.usage = UsageCounter(bank.shape.experts)
        self._routing: Routing | None = None
        self._kept = 0
        self._padding_mask: Tensor | None = None

    def forward(self, x: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Route the tokens and compute their experts.

        Args:
            x: (..., D) tokens, with any number of leading dimensions.
            padding_mask: (...) bool, True for padding: those tokens are not routed, counted or balanced, and their output is 0. None
                takes the mask of `padding_left_out`, if there is one.

        Returns:
            (..., O) outputs.

        Raises:
            InvalidInput: Shapes that do not fit.
        """
        if x.ndim < 1 or x.shape[-1] != self.bank.shape.width_in:
            raise InvalidInput(f"this mixture takes tokens (..., {self.bank.shape.width_in}), found {shape_of(x)}")
        leading, width = x.shape[:-1], self.bank.shape.width_out
        padding_mask = self._padding_mask if padding_mask is None else padding_mask
        flat = x.reshape(-1, x.shape[-1])
        kept = None if padding_mask is None else _kept(padding_mask, leading)
        total = len(flat)
        if kept is not None:
            flat = flat.index_select(0, kept)
        routing = self.router(flat, TokenPlaces(total=total, kept=kept))
        if len(routing.probs) != len(flat) or routing.num_experts != self.bank.shape.experts:
            raise InvalidInput(
                f"the router decided for {len(routing.probs)} tokens and {routing.num_experts} experts; the layer has {len(flat)} "
                f"and {self.bank.shape.experts}"
            )
        if not in_backward():
            self.usage.add(routing)
            self._keep(routing)
        out = self.bank(flat, routing.plan, routing.weight, self.backend)
        if kept is not None:
            out = out.new_zeros(total, width).index_copy(0, kept, out)
        return out.view(*leading, width)

    @property
    def last_routing(self) -> Routing | None:
        """Decision of the last forward pass. In training it carries gradients until the backward pass has used them."""
        return self._routing

    def take_routing(self) -> Routing | None:
        """Get the decision of the last forward pass and forget it.

        Returns:
            The decision, or None if it was taken already.
        """
        routing, self._routing = self._routing, None
        return routing

    def extra_repr(self) -> str:
        """Describe the layer, for `print`.

        Returns:
            The backend.
        """
        return f"backend={self.backend}"

    def _keep(self, routing: Routing) -> None:
        """Keep a decision for the losses. Its graph is let go in the backward pass, so no step holds the activations of another."""
        self._kept += 1
        if not (self.training and routing.weight.requires_grad):
            self._routing = routing.detach()
            return
        self._routing = routing
        layer, number = weakref.ref(self), self._kept  # no strong reference: a circle through the graph would never be freed

        def let_go(_: Tensor) -> None:
            here = layer()
            if here is not None and here._routing is not None and here._kept == number:
                here._routing = here._routing.detach()

        routing.weight.register_hook(let_go)  # the output of the layer always depends on the weights

    def __getstate__(self) -> dict[str, Any]:
        """Leave the last decision out of copies: a tensor with a history cannot be copied."""
        return {**self.__dict__, "_routing": None, "_padding_mask": None}


def moe_layers(model: nn.Module) -> tuple[tuple[str, MoeFfn], ...]:
    """List the mixtures of a model.

    Args:
        model: A model in which some FFNs, or all, were replaced.

    Returns:
        Name and layer, in the order of `named_modules`.
    """
    return tuple((name, module) for name, module in model.named_modules() if isinstance(module, MoeFfn))


def take_routings(model: nn.Module) -> list[Routing]:
    """Get the decisions of the last forward pass for `router_losses`, and forget them. Call it before the backward pass.

    Args:
        model: The model. A layer that ran several times gives its last decision.

    Returns:
        The decision of each layer that ran.
    """
    taken = (layer.take_routing() for _, layer in moe_layers(model))
    return [routing for routing in taken if routing is not None]


@contextmanager
def padding_left_out(model: nn.Module, padding_mask: Tensor) -> Iterator[None]:
    """Leave padding out of all mixtures of a model that cannot pass a mask to its FFNs.

    Args:
        model: The model.
        padding_mask: Bool mask of the shape of the mixtures' batch, such as (B, N); True for padding. With activation recomputation
            the backward pass belongs into the block too.

    Yields:
        Nothing.
    """
    layers = [layer for _, layer in moe_layers(model)]
    before = [layer._padding_mask for layer in layers]
    for layer in layers:
        layer._padding_mask = padding_mask
    try:
        yield
    finally:
        for layer, mask in zip(layers, before):
            layer._padding_mask = mask


def _kept(padding_mask: Tensor, leading: torch.Size) -> Tensor | None:
    """Places of the tokens that are no padding in the flattened batch; None if that is all of them."""
    if padding_mask.dtype != torch.bool or padding_mask.shape != leading:
        raise InvalidInput(
            f"padding_mask must be bool of shape {tuple(leading)}, True for padding, found {shape_of(padding_mask)}; an attention "
            "mask with 1 for tokens is its opposite: pass attention_mask == 0"
        )
    kept = (~padding_mask).reshape(-1).nonzero()[:, 0]
    return None if len(kept) == padding_mask.numel() else kept
