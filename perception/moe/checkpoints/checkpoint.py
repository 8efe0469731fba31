"""Checkpoints of mixtures: one safetensors file with all tensors, what was replaced, and how each router chooses.

The same weights under another routing rule are another model, so the rule, the score function and k are stored with the weights, and
loading builds routers from them and from nothing else. The file does not hold the code of the dense model: the caller builds that, from
`BaseModel.config` where it was stored, and loading puts the mixtures into a copy of it.

Read next: `replacement.py`, whose plan is stored; `hugging_face_clip.py`, which stores and rebuilds a CLIP.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol, TypeVar

from torch import nn

from ....core.config_json import config_stored_in, config_to_json
from ....core.errors import InvalidInput, require
from ....core.tensor_file import TensorFile, TensorFileKind, built_within, fill_module, not_finite, read_tensors, write_tensors
from ..attention.attention_sites import AttentionPlan
from ..layers.moe_ffn import MoeFfn, moe_layers
from ..surgery.replacement import MixtureSpot, ReplacementPlan
from .attention_forms import AttentionForms
from .mixture_forms import MixtureForm

MIXTURE_FILE = TensorFileKind(
    name="mixture checkpoint",
    format="upcycle3d mixture 1",
    advice="write it again with save_mixture, or copy it again from its source",
)


@dataclass(frozen=True, kw_only=True)
class BaseModel:
    """From what the dense model can be built again."""

    library: str
    """Who defines the class: `transformers`, or the name of your package."""
    model_class: str
    """Name of the dense model's class."""
    config: str
    """Configuration as JSON text, such as that of `config.to_json_string()` of Hugging Face."""


@dataclass(frozen=True, kw_only=True)
class MixtureDescription:
    """What a checkpoint says about its model. `print(description)` shows the routing, which belongs into every model card."""

    model_class: str
    """Class of the model."""
    plan: ReplacementPlan
    """What was replaced."""
    layers: tuple[MixtureForm, ...]
    """The mixture in each place of the plan."""
    base: BaseModel | None = None
    """From what the dense model can be built; None where the caller knows."""
    note: str = ""
    """Free text: how the mixture was trained and evaluated."""
    attentions: AttentionForms | None = None
    """Mixtures of attentions; None where there are none."""
    experts: tuple[str, ...] = ()
    """Names of the experts, in order; none where they have only numbers. Older files have no such entry."""

    def __post_init__(self) -> None:
        banks = {layer.bank.experts for layer in self.layers}
        require(
            not self.experts or banks == {len(self.experts)},
            f"{len(self.experts)} names of experts were given, and the mixtures have {', '.join(map(str, sorted(banks)))} experts",
        )
        require(
            len(self.layers) == len(self.plan.sites),
            f"a description needs one mixture per place, found {len(self.layers)} and {len(self.plan.sites)}",
        )
        for site, layer in zip(self.plan.sites, self.layers):
            bank = layer.bank
            found = (bank.width_in, bank.width_out, bank.activation, bank.gated)
            wanted = (site.width_in, site.width_out, site.activation, site.gate is not None)
            require(
                found == wanted,
                f"the experts of {site.name!r} have (inputs, outputs, activation, gate) {found}, and its plan says {wanted}",
            )

    def __str__(self) -> str:
        kinds: dict[str, list[str]] = {}
        for site, layer in zip(self.plan.sites, self.layers):
            kinds.setdefault(f"{layer.bank.experts} experts of {layer.numbers}, router {layer.router}", []).append(site.name)
        lines = [f"{len(names)} mixtures, {names[0]} first: {kind}" for kind, names in kinds.items()]
        lines += [] if self.attentions is None else [str(self.attentions)]
        lines += [f"experts: {', '.join(self.experts)}"] if self.experts else []
        return "\n".join([f"{self.model_class} with {len(self.layers)} mixtures", *lines, *([self.note] if self.note else [])])


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedMixture:
    """A mixture and what its checkpoint says."""

    model: nn.Module
    """The model in evaluation mode."""
    description: MixtureDescription
    """What was stored with it."""


def describe_mixture(
    model: nn.Module,
    plan: ReplacementPlan,
    *,
    base: BaseModel | None = None,
    note: str = "",
    attentions: AttentionPlan | None = None,
    experts: Sequence[str] = (),
) -> MixtureDescription:
    """Describe a model with mixtures as `save_mixture` stores it.

    Args:
        model: The model after `plan` was applied.
        plan: What was replaced.
        base: From what the dense model can be built.
        note: Free text.
        attentions: Which attentions became mixtures, as `Upcycled.attentions`.
        experts: Names of the experts, in order.

    Returns:
        The description.

    Raises:
        InvalidInput: A place of the plan has no mixture, the model has mixtures elsewhere, or one cannot be stored.
    """
    places = [_mixture_at(model, plan, number) for number in range(len(plan.sites))]
    known = {id(layer) for layer in places}
    for name, layer in moe_layers(model):
        require(
            id(layer) in known,
            f"the mixture {name!r} is not part of the plan; a checkpoint must know where every mixture belongs",
        )
    return MixtureDescription(
        model_class=type(model).__name__,
        plan=replace(plan, refused=()),
        layers=tuple(MixtureForm.of(layer) for layer in places),
        base=base,
        note=note,
        attentions=AttentionForms.of(model, attentions),
        experts=tuple(experts),
    )


def save_mixture(
    path: str | Path,
    model: nn.Module,
    plan: ReplacementPlan,
    *,
    base: BaseModel | None = None,
    note: str = "",
    attentions: AttentionPlan | None = None,
    experts: Sequence[str] = (),
) -> MixtureDescription:
    """Write a model with mixtures as one file. A reader sees the old file or the whole new one.

    Args:
        path: The file, by custom `NAME.safetensors`.
        model: The model after `plan` was applied, as `Upcycled.model`.
        plan: What was replaced, as `Upcycled.plan`. For joined mixtures the plan of one owner serves.
        base: From what the dense model can be built, so that the file is complete without its folder.
        note: How the model was trained and evaluated.
        attentions: Which attentions became mixtures, as `Upcycled.attentions`.
        experts: Names of the experts, in order.

    Returns:
        What the file says about the model.

    Raises:
        InvalidInput: As for `describe_mixture`, or a tensor holds NaN or inf; nothing is written then.
        OSError: The file cannot be written.

    Example:
        save_mixture("mixture.safetensors", upcycled.model, upcycled.plan)
        loaded = load_mixture("mixture.safetensors", dense_model)
    """
    description = describe_mixture(model, plan, base=base, note=note, attentions=attentions, experts=experts)
    state = model.state_dict()
    bad = not_finite(state)
    if bad:
        raise InvalidInput(
            f"{len(bad)} tensors hold NaN or inf, first {bad[0]!r}, so the model was not written; its training went wrong"
        )
    write_tensors(path, state, {"description": json.dumps(config_to_json(description))}, MIXTURE_FILE)
    return description


def read_description(path: str | Path) -> MixtureDescription:
    """Read what a checkpoint says about its model, and check the whole file.

    Args:
        path: The file.

    Returns:
        The description.

    Raises:
        InvalidInput: The file is missing, of another kind or damaged.
    """
    file = read_tensors(path, MIXTURE_FILE)
    return config_stored_in(file.path, MixtureDescription, file.described("description"), MIXTURE_FILE.advice)


def load_mixture(path: str | Path, dense: nn.Module | Callable[[MixtureDescription], nn.Module]) -> LoadedMixture:
    """Load a model with mixtures.

    Args:
        path: The file.
        dense: The dense model, or a function that builds it from the description. Its weights do not matter; a copy of it is used.

    Returns:
        The model, and what the file says about it.

    Raises:
        InvalidInput: The file is missing, of another kind or damaged; the dense model has another structure (the message names the first
            difference); or the file's tensors do not fit or hold NaN.
    """
    file = read_tensors(path, MIXTURE_FILE)
    description = config_stored_in(file.path, MixtureDescription, file.described("description"), MIXTURE_FILE.advice)
    given = given_dense(dense, description, file)
    model = copy.deepcopy(given)
    with built_within(file.tensors, file.path):
        modules = {site.name: form.build() for site, form in zip(description.plan.sites, description.layers)}
        if description.attentions is not None:
            description.attentions.put_into(model)
    description.plan.apply(model, modules)
    fill_module(model, file.tensors, file.path)
    bad = not_finite(model.state_dict())
    require(not bad, f"the weights of {file.path} hold NaN or inf, first in {bad[:1]}; its training went wrong, use another file")
    return LoadedMixture(model=model.eval(), description=description)


class NamesDenseModel(Protocol):
    """A description of a model that was made of a dense one."""

    @property
    def model_class(self) -> str:
        """Class of the dense model."""

    @property
    def plan(self) -> ReplacementPlan:
        """What was replaced in it."""


_Description = TypeVar("_Description", bound=NamesDenseModel)


def given_dense(dense: nn.Module | Callable[[_Description], nn.Module], description: _Description, file: TensorFile) -> nn.Module:
    """Take the dense model that a caller gives for a file, and refuse one that the file was not made of.

    Args:
        dense: The dense model, or a function that builds it from the description.
        description: What the file says.
        file: The file; a function may build no more than its size explains.

    Returns:
        The dense model.

    Raises:
        InvalidInput: It has another class or another structure; the message names the first difference.
    """
    with built_within(file.tensors, file.path):
        given = dense if isinstance(dense, nn.Module) else dense(description)
    if type(given).__name__ != description.model_class:
        raise InvalidInput(
            f"{file.path} holds a {description.model_class}, and the given dense model is a {type(given).__name__}; build the class that "
            "it was made of"
        )
    description.plan.check(given, "the given dense model")
    return given


def _mixture_at(model: nn.Module, plan: ReplacementPlan, number: int) -> MoeFfn:
    """The mixture in one place of the plan."""
    site = plan.sites[number]
    path = next(edit.path for edit in site.edits if edit.becomes == "mixture")
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise InvalidInput(f"the model has nothing at {path!r}, where the plan puts a mixture") from error
    layer = found.mixture if isinstance(found, MixtureSpot) else found
    if not isinstance(layer, MoeFfn):
        raise InvalidInput(
            f"the model has a {type(layer).__name__} at {path!r}, and the plan puts a mixture there; apply the plan first"
        )
    return layer
