"""What a model costs: parameters that are stored, those that one token uses, and multiply-adds per token.

It is counted on the model itself, mixtures of FFNs and of attentions included, so the numbers of two models can be compared whatever
replaced what. Read next: `perception/moe/report.py`, which puts scores beside the cost.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from ..layers.moe_ffn import MoeFfn, moe_layers
from .soft_attention import SoftAttention


@dataclass(frozen=True, kw_only=True)
class ModelCost:
    """Cost of a model of tokens."""

    stored: int
    """Number of parameters; tied ones count once."""
    active: int
    """Number of parameters that one token uses: all but those of experts that were not chosen. Every attention expert is used."""
    multiply_adds: int
    """Multiply-adds per token in linear maps, experts, routers and attentions."""
    context: int
    """Number of keys that a query was counted to see."""


def model_cost(model: nn.Module, *, context: int = 256) -> ModelCost:
    """Count what a model costs.

    Args:
        model: A model of tokens whose maps are `nn.Linear`, mixtures of FFNs and attentions. Convolutions are not counted.
        context: Number of keys that a query sees.

    Returns:
        The cost.
    """
    stored = sum(parameter.numel() for parameter in model.parameters())
    total = sum(_multiply_adds(module, context) for module in model.modules())
    return ModelCost(
        stored=stored,
        active=stored - sum(idle_parameters(layer) for _, layer in moe_layers(model)),
        multiply_adds=total,
        context=context,
    )


def idle_parameters(layer: MoeFfn) -> int:
    """Count the parameters of a mixture that a token does not use.

    Args:
        layer: The mixture.

    Returns:
        Parameters of the experts that are not chosen.
    """
    size = sum(parameter.numel() for parameter in layer.bank.parameters())
    return size - size * _active(layer) // layer.bank.shape.experts


def _active(layer: MoeFfn) -> int:
    rule = getattr(layer.router, "rule", None)
    return layer.bank.shape.experts if rule is None else int(rule.k)


def _multiply_adds(module: nn.Module, context: int) -> int:
    """Multiply-adds per token of one module, without those of the modules inside."""
    if isinstance(module, nn.Linear):
        return module.weight.numel()
    if isinstance(module, MoeFfn):
        shape = module.bank.shape
        expert = shape.width_hidden * ((2 if shape.gated else 1) * shape.width_in + shape.width_out)
        rows = getattr(module.router, "weight", None)
        return _active(module) * expert + (0 if rows is None else rows.numel())
    if isinstance(module, SoftAttention):
        maps = sum(tensor.numel() for tensor in (module.router, module.q, module.k, module.v, module.o))
        return maps + 2 * context * module.q.shape[0] * module.q.shape[1]
    if isinstance(module, nn.MultiheadAttention):  # its joint map is no nn.Linear
        joint = 0 if module.in_proj_weight is None else module.in_proj_weight.numel()
        return joint + 2 * context * module.embed_dim
    if isinstance(query := getattr(module, "q_proj", None), nn.Linear):
        return 2 * context * query.out_features
    return 0
