"""Losses of routers: balance, normalised so that a uniform router scores 1 in every setting, and the z loss.

The balance loss of a layer is E * sum over experts of f_e P_e, where f_e is the share of choices that expert e got (the shares sum to
1, whatever k is) and P_e its mean probability. Other libraries let f sum to k, so their uniform value is k: divide their coefficient
by k to compare.

Read next: `moe_ffn.py`, which keeps the routings that these take.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require, require_numbers
from ....core.tensor_value import shape_of
from .routing import Routing

SharesFrom = Literal["top1", "topk"]
BalanceOver = Literal["layer", "all_layers"]


@dataclass(frozen=True, kw_only=True)
class RouterLossConfig:
    """Coefficients of the router losses."""

    balance: float = 0.01
    """Coefficient of the balance loss. 0.01 to 0.001 is usual; with 0 experts tend to die. Turn it off in training with differential
    privacy, because it couples the examples of a batch."""
    z: float = 0.0
    """Coefficient of the z loss, which keeps logits small. 0.001 is usual where it is used."""
    shares_from: SharesFrom = "topk"
    """Which choices count as an expert's share: all of the top k, or only the first."""
    balance_over: BalanceOver = "layer"
    """`layer` balances each layer and averages the losses; `all_layers` joins the tokens of all layers first, so an expert may be
    rare in one layer if it is frequent in another."""

    def __post_init__(self) -> None:
        require_numbers("RouterLossConfig", least=0.0, most=1e6, balance=self.balance, z=self.z)
        require(
            self.shares_from in get_args(SharesFrom), f"RouterLossConfig.shares_from: top1 or topk, found {self.shares_from!r}"
        )
        require(
            self.balance_over in get_args(BalanceOver),
            f"RouterLossConfig.balance_over: layer or all_layers, found {self.balance_over!r}",
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class RouterLosses:
    """Losses of the routers of a model for one batch."""

    balance: Tensor
    """Balance loss without its coefficient: 1 for a uniform router, E where one expert gets everything."""
    z: Tensor
    """z loss without its coefficient."""
    total: Tensor
    """The sum with coefficients, to be added to the task's loss."""
    layers: int
    """Number of layers that have a part in it."""
    left_out: int
    """Number of layers without trained logits (controls), which have no part."""


def balance_loss(
    probs: Tensor, index: Tensor | None, *, shares_from: SharesFrom = "topk", padding_mask: Tensor | None = None
) -> Tensor:
    """Compute the balance loss of one layer.

    Args:
        probs: (T, E) scores that sum to 1; the gradient flows through them.
        index: (T, k) int64 chosen experts, best first; None for soft routing, whose share is that of the best expert.
        shares_from: Whether all k choices count, or the first. With soft routing both count the best expert.
        padding_mask: (T,) bool, True for padding, which is left out. None where there is no padding.

    Returns:
        Scalar: 1 for uniform probabilities; 0 for a batch without tokens.

    Raises:
        InvalidInput: Shapes that do not fit.
    """
    if probs.ndim != 2 or (index is not None and (index.ndim != 2 or len(index) != len(probs))):
        raise InvalidInput(f"balance_loss takes probs (T, E) and index (T, k), found {shape_of(probs)} and {shape_of(index)}")
    if padding_mask is not None:
        probs, index = _without_padding(probs, index, padding_mask)
    if len(probs) == 0:
        return probs.sum()
    experts = probs.shape[1]
    chosen = probs.detach().argmax(1) if index is None else index[:, 0] if shares_from == "top1" else index.reshape(-1)
    share = torch.bincount(chosen, minlength=experts).to(probs.dtype) / chosen.numel()
    return experts * (share * probs.mean(0)).sum()


def z_loss(logits: Tensor, *, padding_mask: Tensor | None = None) -> Tensor:
    """Compute the mean over tokens of the squared logarithm of the softmax's denominator.

    Args:
        logits: (T, E) output of a router.
        padding_mask: (T,) bool, True for padding, which is left out.

    Returns:
        Scalar; 0 for a batch without tokens.

    Raises:
        InvalidInput: Shapes that do not fit.
    """
    if logits.ndim != 2:
        raise InvalidInput(f"z_loss takes logits (T, E), found {shape_of(logits)}")
    if padding_mask is not None:
        logits, _ = _without_padding(logits, None, padding_mask)
    return torch.logsumexp(logits, dim=1).square().mean() if len(logits) else logits.sum()


def router_losses(routings: Sequence[Routing], config: RouterLossConfig) -> RouterLosses:
    """Compute the router losses of a model.

    Args:
        routings: The decision of each layer; `take_routings` collects them after a forward pass. Layers without logits (controls)
            are left out, so a model may mix them with learned ones.
        config: Coefficients and normalization.

    Returns:
        The losses.

    Raises:
        InvalidInput: A coefficient is above 0, but the losses could change no router: there is no routing, or no logits with a
            gradient. Or the layers have different numbers of experts under `balance_over="all_layers"`.
    """
    active = [r for r in routings if r.logits is not None and (r.logits.requires_grad or not torch.is_grad_enabled())]
    if not active:
        if config.balance or config.z:
            raise InvalidInput(_no_effect(routings, config))
        zero = torch.zeros(())
        return RouterLosses(balance=zero, z=zero, total=zero, layers=0, left_out=len(routings))
    busy = [r for r in active if len(r.probs)] or active[:1]
    if config.balance_over == "all_layers":
        balance = _balance_of_all(busy, config.shares_from)
    else:
        balance = torch.stack([balance_loss(r.probs, r.index, shares_from=config.shares_from) for r in busy]).mean()
    z = torch.stack([z_loss(r.logits) for r in busy if r.logits is not None]).mean()
    total = config.balance * balance + config.z * z if config.z else config.balance * balance
    return RouterLosses(balance=balance, z=z, total=total, layers=len(active), left_out=len(routings) - len(active))


def describe_router_losses(config: RouterLossConfig, trained: Sequence[bool]) -> str:
    """Say at the start of a training what the router losses will do; print it.

    Args:
        config: Coefficients and normalization.
        trained: For each layer with experts, whether its router is trained.

    Returns:
        One sentence with the effective coefficient and the number of layers.
    """
    if not any(trained) or not (config.balance or config.z):
        why = "both coefficients are 0" if any(trained) else "no router is trained"
        return f"router losses have no effect: {why} ({len(trained)} layers with experts)"
    over = "the mean over layers" if config.balance_over == "layer" else "the tokens of all layers together"
    return (
        f"router losses: balance {config.balance:g} (shares from {config.shares_from}, {over}, uniform value 1), z {config.z:g}, "
        f"on {sum(trained)} of {len(trained)} layers with experts"
    )


def _balance_of_all(routings: Sequence[Routing], shares_from: SharesFrom) -> Tensor:
    sizes = {r.num_experts for r in routings}
    if len(sizes) > 1:
        raise InvalidInput(f"layers with {sorted(sizes)} experts cannot be balanced together; use balance_over='layer'")
    chosen = [r.top1 if shares_from == "top1" or r.index is None else r.index.reshape(-1) for r in routings]
    probs = torch.cat([r.probs for r in routings])
    experts = probs.shape[1]
    # Layers may have different k: a share is a mean over tokens, so each token weighs the same.
    parts = [torch.bincount(c, minlength=experts) * (len(r.probs) / max(1, len(c))) for c, r in zip(chosen, routings)]
    share = torch.stack(parts).sum(0).to(probs.dtype) / max(1, len(probs))
    return experts * (share * probs.mean(0)).sum() if len(probs) else probs.sum()


def _without_padding(values: Tensor, index: Tensor | None, padding_mask: Tensor) -> tuple[Tensor, Tensor | None]:
    if padding_mask.dtype != torch.bool or padding_mask.shape != values.shape[:1]:
        raise InvalidInput(f"padding_mask must be ({len(values)},) bool, True for padding, found {shape_of(padding_mask)}")
    keep = ~padding_mask
    return values[keep], None if index is None else index[keep]


def _no_effect(routings: Sequence[Routing], config: RouterLossConfig) -> str:
    asked = f"a balance coefficient of {config.balance:g} and a z coefficient of {config.z:g} were asked for, but "
    if not routings:
        return asked + "no layer kept a routing: run the model in training mode, and call take_routings once per forward pass"
    if all(r.logits is None for r in routings):
        return asked + "no router has logits (uniform, oracle and hash routers learn nothing); set the coefficients to 0"
    return asked + (
        "no logits have a gradient: all routers are frozen, or the forward pass ran without gradients (torch.no_grad, or activation "
        "checkpointing with use_reentrant=True; use use_reentrant=False)"
    )
