"""The part of a carved Llama that is always in memory: embeddings, attentions, norms, and the units that all tokens share.

It is read out of a model in memory, a Hugging Face Llama or Mistral or a `SmallLm`, by the names that these have in common.
Read next: `llama_decoder.py`, which computes with it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.foreign_text import shown
from ....core.tensor_value import shape_of
from ..layers.dense_ffn import DenseFfn
from ..surgery.ffn_sites import tensors_of
from .key_values import KeyValueShape

_FIXED_ANGLES = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary angles that do not depend on the length of the text."""


@dataclass(frozen=True, kw_only=True)
class LlamaShape:
    """Sizes of a Llama without its FFNs."""

    vocabulary: int
    """Number of tokens."""
    width: int
    """Width of the tokens, D."""
    layers: int
    """Number of layers."""
    heads: int
    """Number of query heads."""
    kv_heads: int
    """Number of key heads; it divides `heads`."""
    head_dim: int
    """Width of a head, even."""
    eps: float
    """Number that the RMS norms add."""
    longest: int
    """Largest number of tokens that the model was made for."""
    rotary_scale: float = 1.0
    """Factor of the rotary cosines and sines."""
    end_tokens: tuple[int, ...] = ()
    """Tokens that end a text."""

    def __post_init__(self) -> None:
        require_counts("LlamaShape", most=2**24, vocabulary=self.vocabulary, width=self.width, longest=self.longest)
        require_counts("LlamaShape", layers=self.layers, heads=self.heads, kv_heads=self.kv_heads, head_dim=self.head_dim)
        require_numbers("LlamaShape", least=0.0, most=1.0, eps=self.eps)
        require_numbers("LlamaShape", least=1e-6, most=1e6, rotary_scale=self.rotary_scale)
        require_counts("LlamaShape", least=0, most=self.vocabulary - 1, end_tokens=self.end_tokens)
        require(
            self.heads % self.kv_heads == 0 and self.head_dim % 2 == 0,
            f"{self.kv_heads} key heads must divide {self.heads} heads, whose width must be even, found {self.head_dim}",
        )

    def key_values(self, dtype: torch.dtype) -> KeyValueShape:
        """Say what the cache of a request holds.

        Args:
            dtype: Type of the numbers.

        Returns:
            Its sizes.
        """
        return KeyValueShape(layers=self.layers, heads=self.kv_heads, head_dim=self.head_dim, itemsize=dtype.itemsize)

    @classmethod
    def of(cls, model: nn.Module) -> LlamaShape:
        """Read the sizes from a model's configuration.

        Args:
            model: A Hugging Face Llama or Mistral, carved or not.

        Returns:
            The sizes.

        Raises:
            InvalidInput: It is another model, or has a part that this engine does not compute.
        """
        config: Any = getattr(model, "config", None)
        kind = getattr(config, "model_type", None)
        if kind not in ("llama", "mistral"):
            raise InvalidInput(
                f"the engine computes Llama and Mistral, found {type(model).__name__} of type {shown(kind)}; give a carved Llama"
            )
        rotary: Any = model.get_submodule("model.rotary_emb")
        window = getattr(config, "sliding_window", None)
        longest = int(config.max_position_embeddings)
        end = getattr(config, "eos_token_id", None)
        for good, message in (
            (
                rotary.rope_type in _FIXED_ANGLES,
                f"its rotary angles are {shown(rotary.rope_type)} and depend on the length of the text",
            ),
            (window is None or window >= longest, f"its attention sees {window} tokens only"),
        ):
            require(good, f"this {type(model).__name__} cannot be served: {message}; the engine computes plain Llamas")
        return cls(
            vocabulary=config.vocab_size,
            width=config.hidden_size,
            layers=config.num_hidden_layers,
            heads=config.num_attention_heads,
            kv_heads=config.num_key_value_heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
            eps=float(config.rms_norm_eps),
            longest=longest,
            rotary_scale=float(rotary.attention_scaling),
            end_tokens=() if end is None else tuple(end) if isinstance(end, list | tuple) else (int(end),),
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class LlamaLayer:
    """One layer. Queries, keys and values are one matrix, so they are one product."""

    norm1: Tensor
    """(D,) weight of the norm before the attention."""
    qkv: Tensor
    """((H + 2 K) W, D) rows of queries, keys and values."""
    qkv_bias: Tensor | None
    """Their biases, or None."""
    out: Tensor
    """(D, H W) output map of the attention."""
    out_bias: Tensor | None
    """(D,) its bias, or None."""
    norm2: Tensor
    """(D,) weight of the norm before the FFN."""
    shared: DenseFfn | None
    """The units that all tokens share; None where there are none and the outputs have no bias."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LlamaBackbone:
    """Weights that are always in memory."""

    shape: LlamaShape
    """Sizes."""
    embed: Tensor
    """(V, D) embedding of the tokens."""
    head: Tensor
    """(V, D) map to the logits; it may be the embedding."""
    norm: Tensor
    """(D,) weight of the last norm."""
    speeds: Tensor
    """(W / 2,) rotary angle per position; float32 as Hugging Face computes it."""
    layers: tuple[LlamaLayer, ...]
    """The layers."""

    def __post_init__(self) -> None:
        s = self.shape
        rows, wide = (s.heads + 2 * s.kv_heads) * s.head_dim, s.heads * s.head_dim
        require(len(self.layers) == s.layers, f"a backbone of {s.layers} layers has {len(self.layers)}")
        _same("the embedding", self.embed, (s.vocabulary, s.width))
        _same("the head", self.head, (s.vocabulary, s.width))
        _same("the last norm", self.norm, (s.width,))
        _same("the rotary angles", self.speeds, (s.head_dim // 2,))
        for number, layer in enumerate(self.layers):
            for name, wanted in (
                ("norm1", (s.width,)),
                ("norm2", (s.width,)),
                ("qkv", (rows, s.width)),
                ("qkv_bias", (rows,)),
                ("out", (s.width, wide)),
                ("out_bias", (s.width,)),
            ):
                _same(f"{name} of layer {number}", getattr(layer, name), wanted)
            ffn = layer.shared
            if ffn is not None and (ffn.width_in, ffn.width_out) != (s.width, s.width):
                raise InvalidInput(f"the FFN of layer {number} must be {s.width} wide, found {ffn.width_in} and {ffn.width_out}")

    @property
    def tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.head is self.embed

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        tensors = [self.embed, self.norm, self.speeds, *(() if self.tied else (self.head,))]
        for layer in self.layers:
            own = (layer.norm1, layer.qkv, layer.qkv_bias, layer.out, layer.out_bias, layer.norm2)
            tensors += [t for t in own if t is not None]
            tensors += [] if layer.shared is None else list(layer.shared.tensors().values())
        return sum(tensor.nbytes for tensor in tensors)


def _same(name: str, tensor: Tensor | None, shape: tuple[int, ...]) -> None:
    if tensor is not None and tuple(tensor.shape) != shape:
        raise InvalidInput(f"{name} must have the shape {shape}, found {shape_of(tensor)}")


def read_backbone(model: nn.Module, shape: LlamaShape, shared: Sequence[DenseFfn | None], *, speeds: Tensor) -> LlamaBackbone:
    """Read a backbone out of a model.

    Args:
        model: A Hugging Face Llama or Mistral, or a sequential `SmallLm`, carved or not.
        shape: Its sizes.
        shared: The units of each layer that all tokens share.
        speeds: (W / 2,) rotary angle per position.

    Returns:
        The backbone. Its tensors are the model's where they need not be joined.

    Raises:
        InvalidInput: A tensor is missing or has another shape.
    """
    tensors = tensors_of(model)
    inside = "model." if "model.embed_tokens.weight" in tensors else ""
    embed = _named(tensors, f"{inside}embed_tokens.weight")
    head = tensors.get("lm_head.weight", embed)
    tied = head.data_ptr() == embed.data_ptr()
    require(len(shared) == shape.layers, f"a model of {shape.layers} layers needs the shared units of each, found {len(shared)}")
    layers = []
    for number, ffn in enumerate(shared):
        at = f"{inside}layers.{number}."
        biases = [tensors.get(f"{at}self_attn.{name}_proj.bias") for name in "qkv"]
        maps = [_named(tensors, f"{at}self_attn.{name}_proj.weight") for name in "qkv"]
        known = [bias if bias is not None else m.new_zeros(len(m)) for bias, m in zip(biases, maps)]
        layers.append(
            LlamaLayer(
                norm1=_named(tensors, f"{at}input_layernorm.weight"),
                qkv=torch.cat(maps),
                qkv_bias=torch.cat(known) if any(b is not None for b in biases) else None,
                out=_named(tensors, f"{at}self_attn.o_proj.weight"),
                out_bias=tensors.get(f"{at}self_attn.o_proj.bias"),
                norm2=_named(tensors, f"{at}post_attention_layernorm.weight"),
                shared=ffn,
            )
        )
    norm = _named(tensors, f"{inside}norm.weight")
    return LlamaBackbone(shape=shape, embed=embed, head=embed if tied else head, norm=norm, speeds=speeds, layers=tuple(layers))


def _named(tensors: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in tensors:
        raise InvalidInput(f"the model has no tensor {name!r}, so it is no Llama that this engine computes")
    return tensors[name]
