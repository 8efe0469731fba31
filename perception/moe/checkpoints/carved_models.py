"""Files of carved models: all tensors, which unit belongs to which expert, how tokens are routed, and the pre-gate.

A mixture's file (`checkpoint.py`) knows experts of one width and no units that all share, so carved models have a format of their own, of
the same kind: one safetensors file with a hash, checked completely before anything is used. Without its carving a masked model would
compute something else with the same weights, so the units are tensors of the file.

The file does not hold the code of the dense model: the caller builds that, and loading puts the carved FFNs into a copy of it.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ....core.config_json import config_stored_in, config_to_json
from ....core.errors import InvalidInput, require
from ....core.tensor_file import TensorFileKind, built_within, fill_module, not_finite, read_tensors, write_tensors
from ....core.tensor_value import shape_of
from ..carving.carved_ffn import CarvedFfn
from ..carving.masked_ffn import MaskedFfn
from ..carving.pre_gate import LayerRouter, PreGate, PreGateConfig
from ..carving.shared_routed import RepresentativeRouter
from ..carving.units import Carving, CarvingMethod, SiteUnits
from ..layers.control_routers import GivenRouter, OracleRouter
from ..layers.dense_ffn import DenseFfn
from ..layers.routers import Router
from ..surgery.ffn_sites import FfnSite, tensors_of
from ..surgery.replacement import MixtureSpot, ReplacementPlan
from .checkpoint import BaseModel, given_dense

CARVED_FILE = TensorFileKind(
    name="carved model",
    format="upcycle3d carved model 1",
    advice="write it again with save_carved, or copy it again from its source",
)

CarvedForm = Literal["masked", "split", "fused"]
"""`masked` trains; `split` and `fused` serve (`carving/carved_ffn.py`)."""
CarvedRouterKind = Literal["given", "oracle", "layer", "representative"]
_ROUTERS: dict[type[Router], CarvedRouterKind] = {
    GivenRouter: "given",
    OracleRouter: "oracle",
    LayerRouter: "layer",
    RepresentativeRouter: "representative",
}
_UNITS, _MODEL, _GATE = "units.", "model.", "pre_gate."


@dataclass(frozen=True, kw_only=True)
class CarvedDescription:
    """What a file says about its model besides the tensors. `print(description)` shows it."""

    model_class: str
    """Class of the model."""
    plan: ReplacementPlan
    """Which FFNs were carved, and into how many experts."""
    domains: tuple[str, ...]
    """Name of each expert."""
    ratio: float
    """Ratio of the carving."""
    method: CarvingMethod
    """How the units were chosen."""
    form: CarvedForm
    """How the FFNs are arranged."""
    routers: tuple[CarvedRouterKind, ...]
    """Router of each FFN."""
    representatives: tuple[tuple[int, ...] | None, ...]
    """Representative units of each FFN's experts, where its router uses them."""
    pre_gate: PreGateConfig | None = None
    """Sizes of the pre-gate; None where the file has none."""
    base: BaseModel | None = None
    """From what the dense model can be built; None where the caller knows."""
    note: str = ""
    """Free text: how the model was trained and evaluated."""

    def __post_init__(self) -> None:
        number = len(self.plan.sites)
        require(
            len(self.routers) == len(self.representatives) == number,
            f"a carved model needs a router for each of {number} FFNs, found {len(self.routers)} and {len(self.representatives)}",
        )
        require(self.form in get_args(CarvedForm), f"CarvedDescription.form: unknown form {self.form!r}")
        require(
            self.pre_gate is None or self.pre_gate.experts == self.plan.experts,
            f"the pre-gate does not choose among the {self.plan.experts} experts of the carving",
        )

    def __str__(self) -> str:
        kinds = ", ".join(sorted(set(self.routers)))
        gate = "no pre-gate" if self.pre_gate is None else f"pre-gate of width {self.pre_gate.width}"
        lines = [
            f"{self.model_class} with {len(self.plan.sites)} carved FFNs, {self.form}: {self.method}, ratio {self.ratio:g}",
            f"experts: {', '.join(self.domains)}; {self.plan.active} per token; routers: {kinds}; {gate}",
        ]
        return "\n".join(lines + ([self.note] if self.note else []))


@dataclass(frozen=True, kw_only=True, eq=False)
class LoadedCarved:
    """A carved model and what its file says."""

    model: nn.Module
    """The model in evaluation mode."""
    carving: Carving
    """The units of each FFN."""
    pre_gate: PreGate | None
    """The pre-gate in evaluation mode; None where the file has none."""
    description: CarvedDescription
    """What was stored with it."""


def save_carved(
    path: str | Path,
    model: nn.Module,
    carving: Carving,
    *,
    pre_gate: PreGate | None = None,
    base: BaseModel | None = None,
    note: str = "",
) -> CarvedDescription:
    """Write a carved model as one file. A reader sees the old file or the whole new one.

    Args:
        path: The file, by custom `NAME.safetensors`.
        model: A model from `mask_ffns` or `materialize`.
        carving: Its carving.
        pre_gate: Its pre-gate.
        base: From what the dense model can be built.
        note: How the model was trained and evaluated.

    Returns:
        What the file says about the model.

    Raises:
        InvalidInput: The model is not carved like this, a router cannot be stored, or a tensor holds NaN; nothing is written then.
        OSError: The file cannot be written.
    """
    layers = [_layer_at(model, site) for site in carving.plan.sites]
    forms = {_form_of(layer) for layer in layers} - {None}
    require(len(forms) <= 1, f"the model mixes the forms {sorted(map(str, forms))}; carve all FFNs alike")
    description = CarvedDescription(
        model_class=type(model).__name__,
        plan=replace(carving.plan, refused=()),
        domains=carving.domains,
        ratio=carving.ratio,
        method=carving.method,
        form=next((form for form in forms if form is not None), "split"),
        routers=tuple(_kind_of(layer.router) for layer in layers),
        representatives=tuple(units.representatives for units in carving.units),
        pre_gate=None if pre_gate is None else pre_gate.config,
        base=base,
        note=note,
    )
    for layer, units, site in zip(layers, carving.units, carving.plan.sites):
        _require_same_units(layer, units, site)
    tensors = {f"{_MODEL}{name}": tensor for name, tensor in model.state_dict().items()}
    if pre_gate is not None:
        tensors |= {f"{_GATE}{name}": tensor for name, tensor in pre_gate.state_dict().items()}
    if bad := not_finite(tensors):
        raise InvalidInput(f"{len(bad)} tensors hold NaN or inf, first {bad[0]!r}, so the model was not written")
    for number, units in enumerate(carving.units):
        tensors[f"{_UNITS}{number}"] = torch.cat([units.shared[None], units.own]).to(torch.uint8)
    write_tensors(path, tensors, {"description": json.dumps(config_to_json(description))}, CARVED_FILE)
    return description


def load_carved(path: str | Path, dense: nn.Module | Callable[[CarvedDescription], nn.Module]) -> LoadedCarved:
    """Load a carved model.

    Args:
        path: The file.
        dense: The dense model, or a function that builds it from the description. Its weights do not matter; a copy of it is used.

    Returns:
        The model, its carving and its pre-gate.

    Raises:
        InvalidInput: The file is missing, of another kind or damaged; the dense model has another structure; or the file's tensors do not
            fit or hold NaN.
    """
    file = read_tensors(path, CARVED_FILE)
    description = config_stored_in(file.path, CarvedDescription, file.described("description"), CARVED_FILE.advice)
    given = given_dense(dense, description, file)
    carving = _carving_of(description, file.tensors, file.path)
    model = copy.deepcopy(given)
    tensors = tensors_of(model)
    parts = {prefix: _part(file.tensors, prefix) for prefix in (_MODEL, _GATE)}
    with built_within(file.tensors, file.path):
        modules: dict[str, nn.Module] = {
            site.name: _built(site.read(tensors), site, units, kind, description)
            for site, units, kind in zip(description.plan.sites, carving.units, description.routers)
        }
        gate = None if description.pre_gate is None else description.pre_gate.build(seed=0)
    description.plan.apply(model, modules)
    numbers = {name: tensor.dtype for name, tensor in parts[_MODEL].items()}
    _to_stored_types(model, numbers)
    fill_module(model, parts[_MODEL], file.path)
    bad = not_finite(model.state_dict())
    if gate is not None:
        _to_stored_types(gate, {name: tensor.dtype for name, tensor in parts[_GATE].items()})
        fill_module(gate, parts[_GATE], file.path)
        bad += not_finite(gate.state_dict())
    require(not bad, f"the weights of {file.path} hold NaN or inf, first in {bad[:1]}; its training went wrong, use another file")
    gate = None if gate is None else gate.eval()
    return LoadedCarved(model=model.eval(), carving=carving, pre_gate=gate, description=description)


def read_carved_description(path: str | Path) -> CarvedDescription:
    """Read what a file says about its model, and check the whole file.

    Args:
        path: The file.

    Returns:
        The description.

    Raises:
        InvalidInput: The file is missing, of another kind or damaged.
    """
    file = read_tensors(path, CARVED_FILE)
    return config_stored_in(file.path, CarvedDescription, file.described("description"), CARVED_FILE.advice)


def _carving_of(description: CarvedDescription, tensors: Mapping[str, Tensor], path: Path) -> Carving:
    units = []
    for number, (site, chosen) in enumerate(zip(description.plan.sites, description.representatives)):
        mask = tensors.get(f"{_UNITS}{number}")
        shape = (description.plan.experts + 1, site.width_hidden)
        if mask is None or tuple(mask.shape) != shape or mask.dtype != torch.uint8 or bool((mask > 1).any()):
            raise InvalidInput(f"{path} needs the units of {site.name!r} as 0 and 1 of shape {shape}, found {shape_of(mask)}")
        units.append(SiteUnits(site=site.name, shared=mask[0].bool(), own=mask[1:].bool(), representatives=chosen))
    return Carving(
        plan=description.plan,
        domains=description.domains,
        ratio=description.ratio,
        method=description.method,
        units=tuple(units),
    )


def _part(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


def _to_stored_types(module: nn.Module, numbers: Mapping[str, torch.dtype]) -> None:
    """Give the carved FFNs and the pre-gate the types of the file; the rest keeps the dense model's."""
    carved = [(n, m) for n, m in module.named_modules() if isinstance(m, MaskedFfn | CarvedFfn | PreGate)]
    for name, part in carved:
        for inner, tensor in (*part.named_parameters(), *part.named_buffers()):
            stored = numbers.get(f"{name}.{inner}" if name else inner)
            if stored is not None and stored.is_floating_point and tensor.is_floating_point():
                tensor.data = tensor.data.to(stored)


def _built(
    ffn: DenseFfn, site: FfnSite, units: SiteUnits, kind: CarvedRouterKind, description: CarvedDescription
) -> MaskedFfn | CarvedFfn:
    router = _router(kind, ffn, units, description.plan.active)
    if description.form == "masked":
        return MaskedFfn(ffn, units, router, dropout=site.dropout)
    return CarvedFfn.from_units(ffn, units, router, fuse=description.form == "fused", dropout=site.dropout)


def _router(kind: CarvedRouterKind, ffn: DenseFfn, units: SiteUnits, active: int) -> Router:
    if kind == "representative":
        if units.representatives is None:
            raise InvalidInput(f"the router of {units.site!r} needs representative units, and the file names none")
        return RepresentativeRouter(ffn, units.representatives, active)
    if kind == "layer":
        return LayerRouter(ffn.width_in, units.experts)
    return OracleRouter(units.experts) if kind == "oracle" else GivenRouter(units.experts)


def _kind_of(router: Router) -> CarvedRouterKind:
    if type(router) not in _ROUTERS:
        raise InvalidInput(
            f"a file of a carved model cannot hold a router of the class {type(router).__name__}; use one of "
            f"{', '.join(kind.__name__ for kind in _ROUTERS)}"
        )
    return _ROUTERS[type(router)]


def _form_of(layer: MaskedFfn | CarvedFfn) -> CarvedForm | None:
    """None for a layer without experts, whose forms to serve are the same."""
    if isinstance(layer, MaskedFfn):
        return "masked"
    return None if layer.own is None else "fused" if layer.fused else "split"


def _require_same_units(layer: MaskedFfn | CarvedFfn, units: SiteUnits, site: FfnSite) -> None:
    """Refuse a carving that is not the model's, as far as the layer knows it."""
    if isinstance(layer, MaskedFfn):
        good = torch.equal(layer.shared.cpu(), units.shared.cpu()) and torch.equal(layer.own.cpu(), units.own.cpu())
    else:
        shared, own = int(units.shared.sum()), max(units.own_widths)
        found = 0 if layer.own is None else layer.own.bank.shape.width_hidden
        wanted = 0 if not own else max(units.with_shared.sum(1).tolist()) if layer.fused else own
        good = layer.router.num_experts == units.experts and found == wanted
        good = good and (layer.shared is None or layer.shared.up.shape[0] == shared)
    require(
        good,
        f"the carved FFN {site.name!r} of the model has other units than the carving; save the carving that it was made with",
    )


def _layer_at(model: nn.Module, site: FfnSite) -> MaskedFfn | CarvedFfn:
    path = next(edit.path for edit in site.edits if edit.becomes == "mixture")
    try:
        found = model.get_submodule(path)
    except AttributeError as error:
        raise InvalidInput(f"the model has nothing at {path!r}, where the carving puts an FFN") from error
    layer = found.mixture if isinstance(found, MixtureSpot) else found
    if not isinstance(layer, MaskedFfn | CarvedFfn):
        raise InvalidInput(f"the model has a {type(layer).__name__} at {path!r}, and the carving puts a carved FFN there")
    return layer
