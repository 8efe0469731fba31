"""Carved Llamas as files to serve: the backbone with the pre-gate in one file, the experts in another, the tokenizer beside them.

| file | holds | in memory |
|---|---|---|
| `backbone.safetensors` | embeddings, attentions, norms, shared units, pre-gate, and what the model is | always |
| `experts.safetensors` | a piece for each expert and layer | as the budget allows |

The hash of the backbone's file stands in the experts' file, so files of two models are not mixed up.
Read next: `completion_server.py`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ....core.config_json import config_stored_in, config_to_json
from ....core.errors import InvalidInput, require, require_counts
from ....core.safetensors_bytes import FILE_DIGEST_KEY
from ....core.tensor_file import TensorFileKind, build_module, not_finite, read_tensors, write_tensors
from ..carving.carved_ffn import CarvedFfn, take_units
from ..carving.masked_ffn import MaskedFfn
from ..carving.pre_gate import PreGate, PreGateConfig
from ..carving.units import SiteUnits
from ..checkpoints.carved_models import LoadedCarved
from ..layers.dense_ffn import Activation, DenseFfn
from .expert_files import ExpertFile, open_experts, write_experts
from .llama_backbone import LlamaBackbone, LlamaLayer, LlamaShape, read_backbone

BACKBONE_FILE = TensorFileKind(
    name="backbone of a served model",
    format="upcycle3d served backbone 1",
    advice="write it again with write_served, or copy it again from its source",
)
BACKBONE_NAME, EXPERTS_NAME = "backbone.safetensors", "experts.safetensors"
_LAYER, _SHARED, _GATE = "layer", "shared", "pre_gate."
_PARTS = ("norm1", "qkv", "qkv_bias", "out", "out_bias", "norm2")
_FFN = ("up", "gate", "down", "up_bias", "gate_bias", "down_bias")


@dataclass(frozen=True, kw_only=True)
class ServedDescription:
    """What a served model is. `print(description)` shows it."""

    name: str
    """Name that requests call the model by."""
    shape: LlamaShape
    """Sizes of the backbone."""
    activation: Activation
    """Function between the linear maps of all FFNs."""
    shared_units: tuple[int, ...]
    """Number of units that all tokens share, for each layer."""
    domains: tuple[str, ...]
    """Name of each expert."""
    ratio: float
    """Share of the units of an FFN that serves a token."""
    pre_gate: PreGateConfig | None
    """Sizes of the pre-gate; None where there is one expert only."""
    note: str = ""
    """Free text: how the model was trained and evaluated."""

    def __post_init__(self) -> None:
        require_counts("ServedDescription", least=0, most=2**24, shared_units=self.shared_units)
        require(
            len(self.shared_units) == self.shape.layers,
            f"a served model of {self.shape.layers} layers needs the shared units of each, found {len(self.shared_units)}",
        )
        gated = 1 if self.pre_gate is None else self.pre_gate.experts
        require(gated == len(self.domains), f"{len(self.domains)} experts need a pre-gate that chooses among them, found {gated}")

    def __str__(self) -> str:
        gate = "no pre-gate" if self.pre_gate is None else f"pre-gate of width {self.pre_gate.width}"
        return (
            f"{self.name}: {self.shape.layers} layers of width {self.shape.width}, {len(self.domains)} experts "
            f"({', '.join(self.domains)}), ratio {self.ratio:g}, {gate}"
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class ServedModel:
    """A served model that was opened and checked."""

    description: ServedDescription
    """What it is."""
    backbone: LlamaBackbone
    """What is always in memory."""
    pre_gate: PreGate | None
    """The pre-gate in evaluation mode, or None."""
    experts: ExpertFile
    """The file of experts, mapped."""

    @property
    def resident_bytes(self) -> int:
        """Bytes that are always in memory: backbone and pre-gate."""
        gate = [] if self.pre_gate is None else list(self.pre_gate.parameters())
        return self.backbone.nbytes + sum(parameter.nbytes for parameter in gate)


def split_layer(layer: nn.Module, units: SiteUnits) -> tuple[DenseFfn | None, tuple[DenseFfn, ...]]:
    """Divide a carved FFN of any form into the shared units and the own units of each expert.

    Args:
        layer: A `MaskedFfn` or `CarvedFfn`.
        units: Which units belong to whom.

    Returns:
        The shared units with the bias of the outputs, None where there is neither; and each expert's own units, possibly none.

    Raises:
        InvalidInput: It is another module.
    """
    if isinstance(layer, MaskedFfn):
        ffn = layer.ffn.value
        shared = take_units(ffn, units.shared_units, out_bias=True)
        own = tuple(take_units(ffn, units.own_units(e), out_bias=False) for e in range(units.experts))
    elif isinstance(layer, CarvedFfn):
        shared, own = _split_carved(layer, units)
    else:
        raise InvalidInput(f"{units.site!r} must hold a carved FFN, found {type(layer).__name__}")
    bare = not shared.width_hidden and shared.down_bias is None
    return None if bare else shared, own


def _split_carved(layer: CarvedFfn, units: SiteUnits) -> tuple[DenseFfn, tuple[DenseFfn, ...]]:
    none = torch.empty(0, dtype=torch.int64)
    if layer.own is None:
        assert layer.shared is not None
        whole = layer.shared.value
        return whole, tuple(take_units(whole, none, out_bias=False) for _ in range(units.experts))
    experts = [layer.own.bank.to_dense(e) for e in range(units.experts)]
    if not layer.fused:
        own = tuple(
            take_units(ffn, torch.arange(width), out_bias=False) for ffn, width in zip(experts, units.own_widths)
        )  # a bank fills narrower experts up with zeros behind their units
        shared = take_units(experts[0], none, out_bias=True) if layer.shared is None else layer.shared.value
        return shared, own
    kept = [row.nonzero()[:, 0] for row in units.with_shared]
    places = [units.own[e, rows].nonzero()[:, 0] for e, rows in enumerate(kept)]
    own = tuple(take_units(ffn, places[e], out_bias=False) for e, ffn in enumerate(experts))
    return take_units(experts[0], units.shared[kept[0]].nonzero()[:, 0], out_bias=True), own


def write_served(
    folder: str | Path, carved: LoadedCarved, *, name: str, shape: LlamaShape | None = None, speeds: Tensor | None = None
) -> ServedDescription:
    """Write a carved Llama as files to serve.

    Args:
        folder: The folder; it is made where needed.
        carved: The model, its carving and its pre-gate.
        name: Name that requests call the model by.
        shape: Sizes of the model; None reads them from a Hugging Face configuration.
        speeds: (W / 2,) rotary angle per position; None reads it from a Hugging Face model.

    Returns:
        What was written.

    Raises:
        InvalidInput: The model is no Llama that can be served; the message names the first reason. Nothing is written then.
        OSError: A file cannot be written.
    """
    carving, model = carved.carving, carved.model
    shape = LlamaShape.of(model) if shape is None else shape
    if speeds is None:
        speeds = model.get_submodule("model.rotary_emb").get_buffer("inv_freq")
    _check_carving(carved, shape)
    layers = [module for module in model.modules() if isinstance(module, MaskedFfn | CarvedFfn)]
    require(
        [layer.site for layer in layers] == [units.site for units in carving.units] and len(layers) == shape.layers,
        f"all {shape.layers} FFNs must be carved to be served, found {len(layers)}; carve the model without leaving FFNs out",
    )
    parts = [split_layer(layer, units) for layer, units in zip(layers, carving.units)]
    backbone = read_backbone(model, shape, [shared for shared, _ in parts], speeds=speeds)
    gate = carved.pre_gate if carving.experts > 1 else None
    description = ServedDescription(
        name=name,
        shape=shape,
        activation=parts[0][1][0].activation,
        shared_units=tuple(0 if shared is None else shared.width_hidden for shared, _ in parts),
        domains=carving.domains,
        ratio=carving.ratio,
        pre_gate=None if gate is None else gate.config,
        note=carved.description.note,
    )
    tensors = _backbone_tensors(backbone)
    if gate is not None:
        tensors |= {f"{_GATE}{key}": tensor for key, tensor in gate.state_dict().items()}
    if bad := not_finite(tensors):
        raise InvalidInput(f"{len(bad)} tensors hold NaN or inf, first {bad[0]!r}, so the model was not written")
    path = Path(folder) / BACKBONE_NAME
    write_tensors(path, tensors, {"description": json.dumps(config_to_json(description))}, BACKBONE_FILE)
    digest = read_tensors(path, BACKBONE_FILE).meta[FILE_DIGEST_KEY]
    write_experts(Path(folder) / EXPERTS_NAME, [own for _, own in parts], model=digest)
    return description


def _check_carving(carved: LoadedCarved, shape: LlamaShape) -> None:
    carving, description = carved.carving, carved.description
    if carving.experts > 1:
        require(
            carved.pre_gate is not None, f"{carving.experts} experts need a pre-gate that chooses among them; train one first"
        )
        odd = sorted(set(description.routers) - {"given", "oracle"})
        require(
            not odd, f"the FFNs have routers of their own ({', '.join(odd)}), and this engine takes the decisions of a pre-gate"
        )
    require(carving.active == 1, f"{carving.active} experts serve a token, and this engine computes one besides the shared units")
    if carved.pre_gate is not None and carving.experts > 1:
        known = carved.pre_gate.config.vocabulary
        require(known >= shape.vocabulary, f"the pre-gate knows {known} tokens, and the model {shape.vocabulary}")


def _backbone_tensors(backbone: LlamaBackbone) -> dict[str, Tensor]:
    tensors = {"embed": backbone.embed, "norm": backbone.norm, "speeds": backbone.speeds}
    if not backbone.tied:
        tensors["head"] = backbone.head
    for number, layer in enumerate(backbone.layers):
        for name in _PARTS:
            tensor: Tensor | None = getattr(layer, name)
            if tensor is not None:
                tensors[f"{_LAYER}.{number}.{name}"] = tensor
        if layer.shared is not None:
            tensors |= {f"{_SHARED}.{number}.{name}": tensor for name, tensor in layer.shared.tensors().items()}
    return {name: tensor.detach() for name, tensor in tensors.items()}


def open_served(folder: str | Path) -> ServedModel:
    """Open and check the files of a served model. The backbone is read into memory, the experts are mapped.

    Args:
        folder: Their folder.

    Returns:
        The model.

    Raises:
        InvalidInput: A file is missing, damaged or of another kind, or both are not from one model.
    """
    file = read_tensors(Path(folder) / BACKBONE_NAME, BACKBONE_FILE)
    description = config_stored_in(file.path, ServedDescription, file.described("description"), BACKBONE_FILE.advice)
    try:
        backbone = _read_backbone(file.tensors, description)
    except InvalidInput as error:
        raise InvalidInput(f"{file.path} cannot be used: {error}; {BACKBONE_FILE.advice}") from error
    config, gate = description.pre_gate, None
    if config is not None:
        own = {key.removeprefix(_GATE): tensor for key, tensor in file.tensors.items() if key.startswith(_GATE)}
        gate = build_module(lambda: _gate_of(config, own), own, file.path).eval()
    experts = open_experts(Path(folder) / EXPERTS_NAME)
    if experts.form.model != file.meta[FILE_DIGEST_KEY]:
        experts.file.close()
        raise InvalidInput(f"{EXPERTS_NAME} in {folder} belongs to another model than {BACKBONE_NAME}; {BACKBONE_FILE.advice}")
    return ServedModel(description=description, backbone=backbone, pre_gate=gate, experts=experts)


def _gate_of(config: PreGateConfig, tensors: Mapping[str, Tensor]) -> PreGate:
    kinds = {tensor.dtype for tensor in tensors.values()}
    gate = config.build(seed=0)
    return gate.to(kinds.pop()) if len(kinds) == 1 else gate


def _read_backbone(tensors: Mapping[str, Tensor], description: ServedDescription) -> LlamaBackbone:
    if bad := not_finite(tensors):
        raise InvalidInput(f"its tensors hold NaN or inf in {bad[0]}")

    def named(name: str) -> Tensor:
        if name not in tensors:
            raise InvalidInput(f"it has no tensor {name}")
        return tensors[name]

    layers = []
    for number, units in enumerate(description.shared_units):
        at, ffn_at = f"{_LAYER}.{number}.", f"{_SHARED}.{number}."
        ffn = {name.removeprefix(ffn_at): tensor for name, tensor in tensors.items() if name.startswith(ffn_at)}
        unknown = sorted(set(ffn) - set(_FFN))
        require(not unknown and (not ffn or {"up", "down"} <= set(ffn)), f"the shared units of layer {number} are {sorted(ffn)}")
        shared = DenseFfn(activation=description.activation, **ffn) if ffn else None  # type: ignore[arg-type]
        found = 0 if shared is None else shared.width_hidden
        require(found == units, f"layer {number} has {found} shared units, and the description says {units}")
        layers.append(
            LlamaLayer(
                norm1=named(f"{at}norm1"),
                qkv=named(f"{at}qkv"),
                qkv_bias=tensors.get(f"{at}qkv_bias"),
                out=named(f"{at}out"),
                out_bias=tensors.get(f"{at}out_bias"),
                norm2=named(f"{at}norm2"),
                shared=shared,
            )
        )
    embed = named("embed")
    return LlamaBackbone(
        shape=description.shape,
        embed=embed,
        head=tensors.get("head", embed),
        norm=named("norm"),
        speeds=named("speeds"),
        layers=tuple(layers),
    )
