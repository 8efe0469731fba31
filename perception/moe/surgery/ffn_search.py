"""Find the feed-forward networks of any PyTorch model by their structure; `ffn_probe.py` checks each by running it.

Four forms are known: a module of its own (CLIP, Llama, ViT, DINOv2, timm), a layer of `torch.nn.Transformer`, a pair of modules (BERT
and the older ViT, whose second module also has the residual connection), and a chain in a `torch.nn.Sequential` (open_clip, detectors'
heads). What looks like an FFN and is none is reported with the reason. Read next: `replacement.py`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Literal, get_args

from torch import nn

from ....core.errors import InvalidInput, require
from .ffn_candidates import Candidate, layer_candidate, module_candidate, pair_candidates
from .ffn_chains import chain_candidates
from .ffn_probe import Verdict, probe
from .ffn_sites import FfnSite, first_quantized_tensor

BatchNormRule = Literal["fold", "share", "refuse"]
"""What happens to batch norms of an FFN. `fold`: each expert takes the norms of its own model into its weights, which then do not
follow the data any more; a norm behind the last linear map goes the same way. `share`: the experts use one common batch norm; one behind
the last linear map stays in the model and learns on. `refuse`: an FFN with a batch norm between its linear maps stays dense."""


@dataclass(frozen=True, kw_only=True)
class Refused:
    """A part of a model that was looked at and is no FFN, or one that cannot be replaced."""

    name: str
    """Name of the part."""
    reason: str
    """Why it stays as it is."""

    def __str__(self) -> str:
        return f"{self.name or 'the model'}: {self.reason}"


@dataclass(frozen=True, kw_only=True)
class FfnSearch:
    """What a search found."""

    sites: tuple[FfnSite, ...]
    """FFNs, in the order of the model's modules."""
    refused: tuple[Refused, ...]
    """What was looked at and refused, in the same order."""
    contents: str
    """Kinds of the model's layers and their numbers, for messages."""


def find_ffns(model: nn.Module, *, batch_norm: BatchNormRule = "fold", widest_input: int | None = 8192) -> FfnSearch:
    """Find every FFN of a model. The model is not changed.

    Args:
        model: Any model, on any device.
        batch_norm: What happens to batch norms of an FFN.
        widest_input: FFNs with more inputs stay dense: the first layer of a detector's region head has 27,648, and one expert of it would
            outweigh the rest of the head. None sets no limit.

    Returns:
        The FFNs, and what was refused and why.

    Raises:
        InvalidInput: The model is quantized.
    """
    require(batch_norm in get_args(BatchNormRule), f"batch_norm must be one of {get_args(BatchNormRule)}, found {batch_norm!r}")
    if quantized := first_quantized_tensor(model):
        raise InvalidInput(
            f"the model is quantized: {quantized}. Experts are trained, so load the model in float32 or bfloat16 (or convert its "
            "weights and build it again) before its FFNs are replaced"
        )
    search = _Search(model, widest_input)
    for name, module in _innermost_first(model):
        search.look_at(name, module, batch_norm)
    order = {name: number for number, (name, _) in enumerate(model.named_modules())}
    kinds = Counter(type(m).__name__ for m in model.modules() if any(True for _ in m.parameters(recurse=False)))
    return FfnSearch(
        sites=tuple(sorted(search.sites, key=lambda site: order.get(site.name, 0))),
        refused=tuple(sorted(search.refused, key=lambda refused: order.get(refused.name, 0))),
        contents=", ".join(f"{number} x {kind}" for kind, number in kinds.most_common(8)) or "no layer with parameters",
    )


def _innermost_first(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules; the innermost come first, and those of one depth in their order."""
    named = list(model.named_modules())
    return sorted(named, key=lambda pair: -(pair[0].count(".") + 1 if pair[0] else 0))


class _Search:
    """What is known while a model is searched."""

    def __init__(self, model: nn.Module, widest_input: int | None) -> None:
        self.model, self.widest_input = model, widest_input
        self.sites: list[FfnSite] = []
        self.refused: list[Refused] = []
        self.taken: set[str] = set()  # names of modules that are part of a site, and of the modules around them
        self.known: dict[str, Verdict | str] = {}
        self.owners = _owners(model)
        self.parents = _parents(model)

    def look_at(self, name: str, module: nn.Module, batch_norm: BatchNormRule) -> None:
        """Try all forms on one module."""
        candidates: list[Candidate] = []
        if isinstance(module, nn.TransformerEncoderLayer | nn.TransformerDecoderLayer):
            candidates = [layer_candidate(self.model, name, module)]
        elif isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward:
            if not self._inside_a_sequential(name):
                candidates = list(chain_candidates(name, module, batch_norm))
        elif not isinstance(module, nn.ModuleList | nn.ModuleDict):
            candidates = list(pair_candidates(name, module))
            if not any(c.hypotheses for c in candidates) and name not in self.taken and (name or not self.taken):
                own = module_candidate(name, module, self.parents.get(id(module), []))
                candidates += [] if own is None else [own]
        last_taken = -1  # of a chain: where the site before ends
        for candidate in candidates:
            if candidate.start <= last_taken or any(part in self.taken for part in candidate.parts):
                continue
            result = self._judge(candidate)
            if isinstance(result, FfnSite):
                self.sites.append(result)
                last_taken = candidate.end
                for part in candidate.parts:
                    self._take(part)
            else:
                self.refused.append(Refused(name=candidate.name, reason=result))

    def _judge(self, candidate: Candidate) -> FfnSite | str:
        """Decide about one candidate: by what is known of its structure, by its tensors, and by running it."""
        if candidate.reason:
            return candidate.reason
        first = candidate.hypotheses[0]
        if self.widest_input is not None and first.width_in > self.widest_input:
            return (
                f"it has {first.width_in:,} inputs, more than widest_input={self.widest_input:,}, so one expert would hold "
                f"{first.multiply_adds:,} weights; pass widest_input=None to replace it"
            )
        if reason := self._foreign_tensors(candidate):
            return reason
        assert candidate.part is not None
        if candidate.signature not in self.known:
            self.known[candidate.signature] = probe(candidate.part, candidate.hypotheses)
        result = self.known[candidate.signature]
        if isinstance(result, str):
            return result
        site = candidate.hypotheses[result.hypothesis]
        after = result.dropout_after if site.kind == "module" else 0.0  # elsewhere it stays in the model
        return replace(site, activation=result.activation, dropout=result.dropout, dropout_after=after)

    def _foreign_tensors(self, candidate: Candidate) -> str | None:
        """A tensor that would be lost, that others use too, or that is not what it seems."""
        mine = set(candidate.hypotheses[0].tensors)
        for name in candidate.parts:
            module = self.model.get_submodule(name)
            for inner, part in module.named_modules(prefix=name):
                if getattr(part, "parametrizations", None):
                    return f"{inner!r} has parametrizations; remove them with torch.nn.utils.parametrize.remove_parametrizations"
                if part._forward_hooks or part._forward_pre_hooks:
                    return f"{inner!r} has forward hooks, which would be lost; remove them first"
            for tensor, value in (*module.named_parameters(prefix=name), *module.named_buffers(prefix=name)):
                if tensor not in mine:
                    return f"it also has the tensor {tensor!r} {tuple(value.shape)}, which no part of an FFN explains"
                others = [owner for owner in self.owners[id(value)] if owner.rpartition(".")[0] != tensor.rpartition(".")[0]]
                if others:
                    return f"its tensor {tensor!r} is also {others[0]!r}: tied weights cannot become experts of one place"
            if candidate.hypotheses[0].kind != "module" and any(True for _ in module.parameters()):
                places = self.parents[id(module)]
                if len(places) > 1:
                    return f"{name!r} is used in {len(places)} places: {', '.join('.'.join(p).strip('.') for p in places)}"
        return None

    def _take(self, name: str) -> None:
        while name:
            self.taken.add(name)
            name = name.rpartition(".")[0]

    def _inside_a_sequential(self, name: str) -> bool:
        parent = self.model.get_submodule(name.rpartition(".")[0]) if name else None
        return isinstance(parent, nn.Sequential) and type(parent).forward is nn.Sequential.forward


def _owners(model: nn.Module) -> dict[int, list[str]]:
    """Names of each tensor, one for every module that holds it."""
    found: dict[int, list[str]] = {}
    for prefix, module in model.named_modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                found.setdefault(id(tensor), []).append(f"{prefix}.{name}" if prefix else name)
    return found


def _parents(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """Where each module is used: name of the module that holds it, and the attribute."""
    found: dict[int, list[tuple[str, str]]] = {}
    for prefix, attribute, child in _children(model):
        found.setdefault(id(child), []).append((prefix, attribute))
    return found


def _children(model: nn.Module) -> Iterator[tuple[str, str, nn.Module]]:
    for prefix, module in model.named_modules():
        for attribute, child in module._modules.items():
            if child is not None:
                yield prefix, attribute, child
