"""FFNs inside a `torch.nn.Sequential`: linear map, batch norm, activation, dropout, linear map, in this order.

Detectors' heads and open_clip's blocks are made so. A linear map is a linear layer or a convolution of kernel size 1.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .ffn_candidates import Candidate, LinearForm, is_activation, join_names, linear_form, map_spot
from .ffn_probe import ModelPart
from .ffn_sites import Edit, FfnSite

_Layers = list[tuple[str, nn.Module]]


def chain_candidates(name: str, chain: nn.Sequential, batch_norm: Literal["fold", "share", "refuse"]) -> Iterator[Candidate]:
    """Look for FFNs at every linear map of a chain; they may overlap.

    Args:
        name: Name of the chain.
        chain: The outermost `nn.Sequential`; those directly inside it belong to it.
        batch_norm: What happens to batch norms.

    Yields:
        Candidates in the order of their first layer.
    """
    layers = list(_flat(name, chain))
    for start, (path, module) in enumerate(layers):
        form = linear_form(module)
        if form is not None:
            found = _from(layers, start, path, form, batch_norm)
            if found is not None:
                yield found


def _flat(name: str, chain: nn.Sequential) -> Iterator[tuple[str, nn.Module]]:
    for attribute, module in chain._modules.items():
        if module is None:
            continue
        if isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            yield from _flat(join_names(name, attribute), module)
        else:
            yield join_names(name, attribute), module


def _from(layers: _Layers, start: int, path: str, form: LinearForm, rule: str) -> Candidate | None:
    """The candidate whose first linear map is at `start`; None where no activation follows or the chain ends after it."""
    at = start + 1
    norm = _norm_at(layers, at, form.outputs)
    at += norm is not None
    if at >= len(layers) or not is_activation(layers[at][1]):
        return None
    at += 1
    while at < len(layers) and isinstance(layers[at][1], nn.Dropout | nn.Identity):
        at += 1
    if at >= len(layers):
        return None
    down_path, down = layers[at]
    down_form = linear_form(down)
    if down_form is None or down_form.inputs != form.outputs or down_form.dims != form.dims:
        return Candidate(
            name=path, reason=f"after its activation comes {down_path!r}, {_said(down)}, and no linear map that fits"
        )
    if norm is not None and rule == "refuse":
        return Candidate(name=path, reason=f"the batch norm {norm[0]!r} lies between its linear maps, and batch_norm='refuse'")
    if norm is not None and norm[1].running_mean is None:
        return Candidate(name=path, reason=f"the batch norm {norm[0]!r} keeps no running statistics, so it cannot be folded")
    last = _norm_at(layers, at + 1, down_form.outputs) if rule == "fold" else None
    last = None if last is None or last[1].running_mean is None else last
    end = at + (last is not None)
    site = FfnSite(
        name=path,
        kind="chain",
        up=map_spot(path, layers[start][1], form, norm),
        gate=None,
        down=map_spot(down_path, down, down_form, last),
        activation="relu",
        width_in=form.inputs,
        width_hidden=form.outputs,
        width_out=down_form.outputs,
        channel_dim=-1 - form.dims if form.dims else None,
        edits=tuple(
            Edit(
                owner=place.rpartition(".")[0],
                attribute=place.rpartition(".")[2],
                becomes="mixture" if number == 0 else "identity",
            )
            for number, (place, _) in enumerate(layers[start : end + 1])
        ),
    )
    inside = dict(layers[start : end + 1])
    part = ModelPart(inside, _ChainRun(list(inside.values())))
    return Candidate(name=path, hypotheses=(site,), part=part, parts=tuple(inside), start=start, end=end)


class _ChainRun:
    """Runs layers in order."""

    def __init__(self, layers: list[nn.Module]) -> None:
        self.layers = layers

    def __call__(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def _norm_at(layers: _Layers, at: int, width: int) -> tuple[str, _BatchNorm] | None:
    if at >= len(layers):
        return None
    name, module = layers[at]
    return (name, module) if isinstance(module, _BatchNorm) and module.num_features == width else None


def _said(module: nn.Module) -> str:
    return f"{type(module).__name__}({module.extra_repr()})"
