"""Let a data owner train an expert of their own beside a frozen seed, so that `join_mixtures` can join it with those of others."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....core.errors import require
from ..layers.moe_ffn import moe_layers


@dataclass(frozen=True, kw_only=True)
class HeldSeed:
    """What an owner leaves alone inside the mixtures: the seed's expert, and its row of the routers."""

    values: dict[str, Tensor]
    """First slice of each parameter of the mixtures, by name."""

    @torch.no_grad()
    def restore(self, model: nn.Module) -> None:
        """Put the held values back bit by bit: an optimizer's decay or momentum may have moved them.

        Args:
            model: The model after training.
        """
        for name, parameter in model.named_parameters():
            if name in self.values:
                parameter[0] = self.values[name]


def freeze_for_owner(model: nn.Module) -> HeldSeed:
    """Let only experts 1, 2, ... and their rows of the routers train. Call it once, before the optimizer is made.

    Args:
        model: A mixture from `sparse_copy`, whose expert 0 is the common seed. The seed's row of each router is set to zero, so that it is
            the same for all owners; everything outside the mixtures is frozen.

    Returns:
        What has to be put back after training.

    Raises:
        InvalidInput: The model has no mixture.

    Example:
        held = freeze_for_owner(model)
        train(model, own_data)
        held.restore(model)
        joined = join_mixtures([model, *others], TopKRule(k=2, norm="renorm"))
    """
    inside = tuple(f"{name}." for name, _ in moe_layers(model))
    require(bool(inside), f"{type(model).__name__} has no mixture that an owner could train")
    values: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith(inside))
        if not name.startswith(inside):
            continue
        if name.endswith("router.weight"):
            with torch.no_grad():
                parameter[0] = 0
        values[name] = parameter.detach()[0].clone()
        parameter.register_hook(lambda grad: torch.cat([torch.zeros_like(grad[:1]), grad[1:]]))
    return HeldSeed(values=values)
