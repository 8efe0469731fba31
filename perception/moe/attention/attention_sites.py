"""Find the attentions of a model by structure, and say which of them can become mixtures of attentions.

An attention is replaced together with the way it is called: `attention_calls.py` has a module for each way. Whether a module that takes
`hidden_states` computes what its weights say (rotary positions, scale, causality) is not read from its class. It is tried on random
tokens, and a module that computes something else is refused.

Read next: `bam.py`, which replaces what is found here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ..surgery.ffn_search import Refused
from .attention_calls import rotary
from .attention_readers import attention_of
from .dense_attention import DenseAttention
from .soft_attention import KeyValues

AttentionCall = Literal["hidden_states", "multihead"]
"""How a model calls an attention: `hidden_states` like the blocks of Hugging Face's library (Llama, Mistral, CLIP), `multihead` like
`torch.nn.MultiheadAttention`."""


@dataclass(frozen=True, kw_only=True)
class AttentionSite:
    """One attention of a model."""

    name: str
    """Name of the module."""
    call: AttentionCall
    """How the model calls it."""
    tensors: tuple[str, ...]
    """Names of all its tensors."""
    width: int
    """Width of the tokens that ask, D."""
    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key and value heads."""
    head_dim: int
    """Width of one head."""
    parameters: int
    """Number of values in the tensors."""
    key_value_parameters: int
    """Number of values in the key and value maps, which `shared` keeps once."""
    dropout: float = 0.0
    """Share of attention weights that are dropped in training."""

    def read(self, model: nn.Module) -> DenseAttention:
        """Read the attention out of a model of the same structure.

        Args:
            model: The model.

        Returns:
            Its weights, shared with the model.

        Raises:
            InvalidInput: The attention has another shape there.
        """
        found = attention_of(model.get_submodule(self.name))
        sizes = (found.heads, found.kv_heads, found.head_dim, found.q.shape[1])
        wanted = (self.heads, self.kv_heads, self.head_dim, self.width)
        require(
            sizes == wanted,
            f"the attention {self.name!r} has heads, key heads, head width and width {sizes} here, and {wanted} in the planned model",
        )
        return found


@dataclass(frozen=True, kw_only=True)
class AttentionPlan:
    """Which attentions become mixtures, and what it costs. `print(plan)` says it."""

    sites: tuple[AttentionSite, ...]
    """Attentions that will be replaced."""
    refused: tuple[Refused, ...]
    """What looks like an attention and stays as it is, with the reasons."""
    experts: int
    """Number of experts in the place of each attention, N."""
    key_values: KeyValues
    """`expert`: each expert has key and value maps of its own; `shared`: one mean map for all, so keys are cached once."""

    @property
    def parameters_before(self) -> int:
        """Parameters of the attentions before."""
        return sum(site.parameters for site in self.sites)

    @property
    def parameters_after(self) -> int:
        """Parameters of the attentions after, with their routers."""
        total = 0
        for site in self.sites:
            shared = site.key_value_parameters if self.key_values == "shared" else 0
            total += self.experts * (site.parameters - shared + site.width) + shared
        return total

    def multiply_adds(self, context: int, *, after: bool) -> int:
        """Count multiply-adds per token of the attentions: every expert computes every token.

        Args:
            context: Number of keys that a query sees.
            after: Whether to count the mixtures, or the dense attentions.

        Returns:
            The sum over all attentions.
        """
        total = 0
        for site in self.sites:
            attend = 2 * context * site.heads * site.head_dim
            times = self.experts if after else 1
            shared = site.key_value_parameters if self.key_values == "shared" and after else 0
            total += times * (site.parameters - shared + attend) + shared + (times * site.width if after else 0)
        return total

    def __str__(self) -> str:
        lines = [
            f"{len(self.sites)} attentions become soft mixtures of {self.experts} experts, key and value maps: {self.key_values}",
            f"  their parameters {self.parameters_before:,} -> {self.parameters_after:,}",
            f"  their multiply-adds per token with 256 keys {self.multiply_adds(256, after=False):,} -> "
            f"{self.multiply_adds(256, after=True):,}: every expert runs",
            *(f"  {site.name}: {site.heads} heads, {site.kv_heads} key heads of width {site.head_dim}" for site in self.sites),
        ]
        return "\n".join([*lines, *(f"stays dense: {refused}" for refused in self.refused)])


def plan_attentions(
    model: nn.Module, *, experts: int, key_values: KeyValues = "expert", only: Sequence[str] | None = None
) -> AttentionPlan:
    """Look for the attentions of a model. The model is not changed.

    Args:
        model: The model.
        experts: Number of experts.
        key_values: Whether key and value maps are each expert's own, or shared.
        only: Names or patterns such as `layers.2?.self_attn`; None for all.

    Returns:
        The plan.

    Raises:
        InvalidInput: No attention was found; the message has what was looked at and why it does not fit.
    """
    require(experts >= 1, f"a mixture of attentions needs at least one expert, found {experts}")
    require(key_values in ("expert", "shared"), f"key_values must be 'expert' or 'shared', found {key_values!r}")
    sites: list[AttentionSite] = []
    refused: list[Refused] = []
    places = Counter(id(module) for _, module in model.named_modules(remove_duplicate=False))
    for name, module in model.named_modules():
        if not _looks_like_attention(module) or (only is not None and not any(fnmatchcase(name, pattern) for pattern in only)):
            continue
        found = _site(name, module) if places[id(module)] == 1 else f"it is used in {places[id(module)]} places of the model"
        if isinstance(found, AttentionSite):
            sites.append(found)
        else:
            refused.append(Refused(name=name, reason=found))
    if not sites:
        if only is not None and not refused:
            there = [name for name, module in model.named_modules() if _looks_like_attention(module)]
            raise InvalidInput(f"no attention fits {', '.join(map(repr, only))}; there are {', '.join(there) or 'none'}")
        looked = "\n".join(f"  {entry}" for entry in refused) or "  nothing looked like one"
        raise InvalidInput(f"found no attention that can become a mixture. Looked at:\n{looked}")
    return AttentionPlan(sites=tuple(sites), refused=tuple(refused), experts=experts, key_values=key_values)


def _looks_like_attention(module: nn.Module) -> bool:
    children: Mapping[str, nn.Module | None] = module._modules
    return isinstance(module, nn.MultiheadAttention) or all(children.get(n) is not None for n in ("q_proj", "k_proj", "v_proj"))


def _site(name: str, module: nn.Module) -> AttentionSite | str:
    """The site of one attention, or the reason why it has none."""
    try:
        attention = attention_of(module)
    except InvalidInput as error:
        return str(error)
    if module._forward_hooks or module._forward_pre_hooks:
        return "it has forward hooks, which would be lost; remove them first"
    call: AttentionCall = "multihead" if isinstance(module, nn.MultiheadAttention) else "hidden_states"
    if call == "hidden_states" and (reason := _difference(module, attention)):
        return reason
    dropout = getattr(module, "attention_dropout", getattr(module, "dropout", 0.0))
    keys = [attention.k, attention.v, attention.k_bias, attention.v_bias]
    return AttentionSite(
        name=name,
        call=call,
        tensors=tuple(f"{name}.{inner}" if name else inner for inner in module.state_dict()),
        width=attention.q.shape[1],
        heads=attention.heads,
        kv_heads=attention.kv_heads,
        head_dim=attention.head_dim,
        parameters=sum(parameter.numel() for parameter in module.parameters()),
        key_value_parameters=sum(tensor.numel() for tensor in keys if tensor is not None),
        dropout=float(dropout) if isinstance(dropout, int | float) else 0.0,
    )


def _difference(module: nn.Module, attention: DenseAttention) -> str | None:
    """Run a module on random tokens, with rotary positions and without, and say how it differs from its weights."""
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(1, 5, attention.q.shape[1], generator=draw).to(attention.q)
    angle = torch.rand(1, 5, attention.head_dim // 2, generator=draw) * 3
    cos, sin = (torch.cat([f(angle)] * 2, -1).to(x) for f in (torch.cos, torch.sin))
    hidden = torch.full((5, 5), torch.finfo(x.dtype).min).triu(1).to(x)[None, None]
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    tried: list[str] = []
    try:
        for positions in (True, False):
            given = {"position_embeddings": (cos, sin)} if positions else {}
            try:
                with torch.no_grad():
                    out = module(hidden_states=x, attention_mask=hidden, **given)
            except Exception as error:  # a module of another kind
                tried.append(f"{type(error).__name__}: {error}")
                continue
            if not isinstance(out, tuple) or not isinstance(out[0], Tensor):
                tried.append(f"it returned a {type(out).__name__}, not a tuple that begins with a tensor")
                continue
            with torch.no_grad():
                wanted = attention.apply(x, causal=True, positions=rotary(cos, sin) if positions else None)
                if torch.allclose(out[0].float(), wanted.float(), rtol=1e-2, atol=1e-3 * float(wanted.float().abs().max())):
                    return None
            tried.append("its output is not that of its four linear maps" + (" with rotary positions" if positions else ""))
    finally:
        for part, training in modes:
            part.training = training
    return f"{type(module).__name__} could not be understood: {'; '.join(dict.fromkeys(tried))}"
