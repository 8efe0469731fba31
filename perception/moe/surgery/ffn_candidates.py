"""Parts of a model that may be FFNs, judged by their layers and shapes alone. `ffn_probe.py` runs them; `ffn_search.py` decides.

A candidate has several hypotheses where the shapes leave a choice, such as which of two linear maps is the gate.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ....core.errors import InvalidInput
from ..layers.dense_ffn import ACTIVATIONS, activate
from .ffn_probe import ModelPart
from .ffn_sites import Edit, FfnSite, MapSpot, NormSpot, WeightLayout

_CONVOLUTIONS: dict[type[nn.Module], int] = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}


@dataclass(frozen=True, kw_only=True, eq=False)
class Candidate:
    """A part of a model that may be an FFN."""

    name: str
    """Name of the module that the mixture would take the place of."""
    hypotheses: tuple[FfnSite, ...] = ()
    """What it may be. The activation and the dropouts are not known yet."""
    part: ModelPart | None = None
    """The modules, so that they can be run."""
    parts: tuple[str, ...] = ()
    """Names of the modules that are taken out of the model."""
    reason: str = ""
    """Why it is none; empty where it may be one."""
    start: int = 0
    """In a chain: place of the first layer."""
    end: int = 0
    """In a chain: place of the last layer."""

    @property
    def signature(self) -> str:
        """Equal for candidates that compute the same function of their weights."""
        assert self.part is not None
        described = [f"{type(m).__qualname__} {m!r} {_settings(m)}" for child in self.part.children() for m in child.modules()]
        return "\n".join([self.hypotheses[0].kind, *described])


def _settings(module: nn.Module) -> list[str]:
    """Class and attributes of a module: two layers may differ in nothing but the function that is their activation."""
    own = [(name, value) for name, value in vars(module).items() if not name.startswith("_")]
    return [str(id(type(module))), *(f"{n}={v if isinstance(v, int | float | str | tuple) else id(v)}" for n, v in own)]


@dataclass(frozen=True, kw_only=True)
class LinearForm:
    """What a layer is as a linear map of each token."""

    layout: WeightLayout
    """How its weight is stored."""
    inputs: int
    """Number of inputs."""
    outputs: int
    """Number of outputs."""
    dims: int = 0
    """Dimensions behind the channels: 0 for a linear layer, 1 for `Conv1d`, 2 for `Conv2d`."""


def linear_form(module: nn.Module) -> LinearForm | None:
    """Say whether a layer maps every token linearly: a linear layer, or a convolution of kernel size 1.

    Args:
        module: Any layer.

    Returns:
        Its form, or None.
    """
    kind = type(module)
    weight = getattr(module, "weight", None)
    if not isinstance(weight, Tensor) or isinstance(weight, nn.UninitializedParameter):
        return None
    if isinstance(module, nn.Linear):
        good = kind.forward is nn.Linear.forward
        return LinearForm(layout="rows", inputs=module.in_features, outputs=module.out_features) if good else None
    for base, dims in _CONVOLUTIONS.items():
        if isinstance(module, base):
            m: Any = module
            unpadded = m.padding in ("same", "valid") or not any(m.padding)
            pointwise = kind.forward is base.forward and {*m.kernel_size, *m.stride, m.groups} == {1} and unpadded
            return LinearForm(layout="kernel", inputs=m.in_channels, outputs=m.out_channels, dims=dims) if pointwise else None
    if kind.__name__ == "Conv1D" and weight.ndim == 2 and getattr(module, "nf", None) == weight.shape[1]:  # GPT-2 in transformers
        return LinearForm(layout="columns", inputs=weight.shape[0], outputs=weight.shape[1])
    return None


def is_activation(module: nn.Module) -> bool:
    """Say whether a layer is one of the known activations, by its values.

    Args:
        module: Any layer.

    Returns:
        Whether it agrees with one of them.
    """
    if any(True for _ in (*module.parameters(), *module.buffers())) or isinstance(module, nn.Identity | nn.Dropout):
        return False
    grid = torch.linspace(-4, 4, 33, dtype=torch.float64)[None]
    try:
        with torch.no_grad():
            value = module(grid.clone())
    except Exception:  # a layer that takes something else
        return False
    return isinstance(value, Tensor) and any(_equal(value, activate(grid, name)) for name in ACTIVATIONS)


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype and bool((a - b).abs().max() < 1e-9)


def join_names(prefix: str, name: str) -> str:
    """Join the name of a module and a name inside it.

    Args:
        prefix: Name of the module; empty for the model itself.
        name: Name inside it.

    Returns:
        Name from the model on.
    """
    return f"{prefix}.{name}" if prefix and name else prefix or name


def map_spot(path: str, module: nn.Module, form: LinearForm, norm: tuple[str, _BatchNorm] | None = None) -> MapSpot:
    """Say where the tensors of a linear map are.

    Args:
        path: Name of the layer.
        module: The layer.
        form: What it is as a linear map.
        norm: Name and layer of a batch norm that is folded into it, or None.

    Returns:
        Names of the tensors.
    """
    bias = None if getattr(module, "bias", None) is None else join_names(path, "bias")
    return MapSpot(
        weight=join_names(path, "weight"), bias=bias, layout=form.layout, norm=None if norm is None else _norm_spot(*norm)
    )


def _norm_spot(path: str, norm: _BatchNorm) -> NormSpot:
    def name(attribute: str) -> str | None:
        return None if getattr(norm, attribute) is None else join_names(path, attribute)

    return NormSpot(
        mean=join_names(path, "running_mean"),
        variance=join_names(path, "running_var"),
        weight=name("weight"),
        bias=name("bias"),
        counter=name("num_batches_tracked"),
        eps=norm.eps,
    )


def _leaves(prefix: str, module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Modules with parameters of their own."""
    return [(n, m) for n, m in module.named_modules(prefix=prefix) if any(True for _ in m.parameters(recurse=False))]


def module_candidate(name: str, module: nn.Module, places: Sequence[tuple[str, str]]) -> Candidate | None:
    """Look at a module as a whole: it has two or three linear maps that fit together.

    Args:
        name: Its name.
        module: The module.
        places: Where it is used: name of the module around it, and the attribute.

    Returns:
        The candidate; None if the module has another number of linear maps, or is one layer.
    """
    leaves = _leaves(name, module)
    linear = [(path, m, form) for path, m in leaves if (form := linear_form(m)) is not None]
    changed = [(path, m) for path, m in leaves if isinstance(m, nn.Linear) and linear_form(m) is None]
    if changed and len(linear) + len(changed) in (2, 3):
        path, layer = changed[0]
        return Candidate(
            name=name,
            reason=f"{path!r} is a {type(layer).__name__}, which computes something else than its weight says (such as an adapter); merge it "
            "into an nn.Linear first",
        )
    if len(linear) not in (2, 3) or len(leaves) > len(linear) + 2:
        return None
    shapes = ", ".join(f"{path.removeprefix(name + '.')} {form.inputs} -> {form.outputs}" for path, _, form in linear)
    if not places:
        return Candidate(
            name=name, reason="the model itself may be an FFN and has no place to put a mixture; wrap it in nn.Sequential"
        )
    edits = tuple(Edit(owner=owner, attribute=attribute, becomes="mixture") for owner, attribute in places)
    hypotheses = tuple(_hypotheses(name, linear, edits))
    if not hypotheses:
        return Candidate(name=name, reason=f"its linear maps do not fit together as an FFN: {shapes}")
    return Candidate(name=name, hypotheses=hypotheses, part=ModelPart({name: module}, module), parts=(name,))


def _hypotheses(name: str, linear: list[tuple[str, nn.Module, LinearForm]], edits: tuple[Edit, ...]) -> Iterator[FfnSite]:
    """All ways in which the shapes allow two or three linear maps to be an FFN."""
    if len({form.dims for _, _, form in linear}) > 1:
        return
    dims = linear[0][2].dims
    spots = [(map_spot(path, m, form), form) for path, m, form in linear]
    for down, down_form in reversed(spots):
        others = [(spot, form) for spot, form in spots if spot is not down]
        first = others[0][1]
        if any((form.inputs, form.outputs) != (first.inputs, first.outputs) for _, form in others):
            continue
        pairs: list[tuple[MapSpot, MapSpot | None]] = []
        if len(others) == 2 and first.outputs == down_form.inputs:
            pairs = [(others[1][0], others[0][0]), (others[0][0], others[1][0])]
        elif len(others) == 1 and first.outputs == down_form.inputs:
            pairs = [(others[0][0], None)]
        elif len(others) == 1 and first.outputs == 2 * down_form.inputs:
            halves = [_half(others[0][0], "first"), _half(others[0][0], "second")]
            pairs = [(halves[1], halves[0]), (halves[0], halves[1])]
        for up, gate in pairs:
            yield FfnSite(
                name=name,
                kind="module",
                up=up,
                gate=gate,
                down=down,
                activation="relu",
                width_in=first.inputs,
                width_hidden=down_form.inputs,
                width_out=down_form.outputs,
                channel_dim=-1 - dims if dims else None,
                edits=edits,
            )
        if pairs and len({form.inputs for _, form in spots} | {form.outputs for _, form in spots}) > 1:
            return  # square maps leave open which of them is the last


def _half(spot: MapSpot, half: Any) -> MapSpot:
    return MapSpot(weight=spot.weight, bias=spot.bias, layout=spot.layout, half=half)


def layer_candidate(model: nn.Module, name: str, layer: nn.TransformerEncoderLayer | nn.TransformerDecoderLayer) -> Candidate:
    """Look at a layer of `torch.nn.Transformer`, whose two linear maps lie between its other parts.

    Args:
        model: The model, in which an `nn.TransformerEncoder` around the layer is looked for.
        name: Name of the layer.
        layer: The layer.

    Returns:
        The candidate.
    """
    up, down = layer.linear1, layer.linear2
    forms = linear_form(up), linear_form(down)
    if forms[0] is None or forms[1] is None:
        return Candidate(
            name=name, reason=f"linear1 is {type(up).__name__} and linear2 is {type(down).__name__}, not linear layers"
        )
    edits = [
        Edit(owner=name, attribute="linear1", becomes="mixture"),
        Edit(owner=name, attribute="activation", becomes="identity"),
        Edit(owner=name, attribute="dropout", becomes="identity"),
        Edit(owner=name, attribute="linear2", becomes="identity"),
    ]
    if hasattr(layer, "activation_relu_or_gelu"):  # forbids torch's fused evaluation, which reads linear1.weight
        edits.append(Edit(owner=name, attribute="activation_relu_or_gelu", becomes="zero"))
    for prefix, around in model.named_modules():
        if isinstance(around, nn.TransformerEncoder) and any(inner is layer for inner in around.layers):
            edits.append(Edit(owner=prefix, attribute="use_nested_tensor", becomes="false"))
    site = FfnSite(
        name=join_names(name, "linear1"),
        kind="layer",
        up=map_spot(join_names(name, "linear1"), up, forms[0]),
        gate=None,
        down=map_spot(join_names(name, "linear2"), down, forms[1]),
        activation="relu",
        width_in=forms[0].inputs,
        width_hidden=forms[1].inputs,
        width_out=forms[1].outputs,
        edits=tuple(edits),
    )
    parts = (join_names(name, "linear1"), join_names(name, "linear2"))
    return Candidate(name=site.name, hypotheses=(site,), part=ModelPart({name: layer}, layer._ff_block), parts=parts)


def pair_candidates(name: str, module: nn.Module) -> Iterator[Candidate]:
    """Look at pairs of neighbors in a module: one linear map with an activation, then a module (hidden, residual) with one linear map.

    Args:
        name: Name of the module.
        module: The module.

    Yields:
        Candidates.
    """
    children = [(attribute, child) for attribute, child in module._modules.items() if child is not None]
    for (first_name, first), (second_name, second) in pairwise(children):
        paths = join_names(name, first_name), join_names(name, second_name)
        ups, downs = _leaves(paths[0], first), _leaves(paths[1], second)
        linear = [(path, m, form) for path, m in downs if (form := linear_form(m)) is not None]
        up_form = linear_form(ups[0][1]) if len(ups) == 1 else None
        if up_form is None or len(linear) != 1 or ups[0][1] is first or linear[0][1] is second:
            continue
        down_path, down, down_form = linear[0]
        if up_form.outputs != down_form.inputs or up_form.dims or down_form.dims:
            continue
        owner, _, attribute = down_path.rpartition(".")
        site = FfnSite(
            name=paths[0],
            kind="pair",
            up=map_spot(ups[0][0], ups[0][1], up_form),
            gate=None,
            down=map_spot(down_path, down, down_form),
            activation="relu",
            width_in=up_form.inputs,
            width_hidden=down_form.inputs,
            width_out=down_form.outputs,
            edits=(
                Edit(owner=name, attribute=first_name, becomes="mixture"),
                Edit(owner=owner, attribute=attribute, becomes="identity"),
            ),
        )
        part = ModelPart({paths[0]: first, paths[1]: second}, _PairRun(first, second, down, down_form.outputs))
        yield Candidate(name=paths[0], hypotheses=(site,), part=part, parts=(paths[0], down_path))


class _PairRun:
    """Runs a pair and gives the output of the last linear map, which must get the output of the first module unchanged."""

    def __init__(self, first: nn.Module, second: nn.Module, down: nn.Module, width: int) -> None:
        self.first, self.second, self.down, self.width = first, second, down, width

    def __call__(self, x: Tensor) -> Tensor:
        hidden, seen = self.first(x), []
        hook = self.down.register_forward_hook(lambda _, given, out: seen.append((given[0], out)))
        try:
            self.second(hidden, x.new_zeros(*x.shape[:-1], self.width))
        finally:
            hook.remove()
        if len(seen) != 1 or not torch.equal(seen[0][0], hidden):
            raise InvalidInput("the second module changes the hidden units before its linear map")
        return seen[0][1]
