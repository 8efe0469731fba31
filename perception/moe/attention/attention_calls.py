"""Mixtures of attentions that are called as the attentions of Hugging Face's library, or as `torch.nn.MultiheadAttention`.

`soft_attention.py` has the arithmetic. The modules here translate arguments only: masks, rotary positions, caches of keys.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from .dense_attention import Positions
from .soft_attention import SoftAttention


def rotary(cos: Tensor, sin: Tensor) -> Positions:
    """Make the function that turns queries and keys by their positions, as Llama does: the halves of a head form the pairs.

    Args:
        cos: (B, L, head_dim) cosines of the angles.
        sin: (B, L, head_dim) sines.

    Returns:
        The function; it treats all heads alike.
    """
    cos, sin = cos[:, None], sin[:, None]

    def turned(x: Tensor) -> Tensor:
        first, second = x.chunk(2, -1)
        return (x * cos + torch.cat([-second, first], -1) * sin).to(x.dtype)

    return lambda q, k: (turned(q), turned(k))


class MixedAttention(nn.Module):
    """Holds a mixture of attentions and weights that are given from outside, as for an oracle or a uniform average."""

    def __init__(self, mixture: SoftAttention) -> None:
        super().__init__()
        self.mixture = mixture
        self._given: Tensor | None = None
        self._use: Tensor | None = None
        self._queries = 0

    @contextmanager
    def given(self, weights: Tensor) -> Iterator[None]:
        """Use given weights of the experts inside a `with` block.

        Args:
            weights: (N,) for all queries, or (B, N) for each element of the batch.

        Yields:
            Nothing.

        Raises:
            InvalidInput: The weights are for another number of experts.
        """
        if weights.shape[-1] != self.mixture.experts or weights.ndim not in (1, 2):
            raise InvalidInput(
                f"weights must be ({self.mixture.experts},) or (B, {self.mixture.experts}), found {shape_of(weights)}"
            )
        before, self._given = self._given, weights
        try:
            yield
        finally:
            self._given = before

    def take_use(self) -> tuple[float, ...]:
        """Get the mean weight of each expert over the queries since the last call, and start again.

        Returns:
            N numbers that sum to 1 if anything ran.
        """
        use = None if self._use is None else (self._use / max(1, self._queries)).tolist()
        self._use, self._queries = None, 0
        return tuple(use) if use is not None else (0.0,) * self.mixture.experts

    def _weights(self, query: Tensor) -> Tensor:
        if self._given is None:
            weights = self.mixture.expert_weights(query)
        else:
            given = self._given if self._given.ndim == 1 else self._given[:, None]
            weights = given.to(query.device).expand(*query.shape[:2], self.mixture.experts)
        if not self.training:
            seen = weights.detach().double().sum((0, 1))
            self._use = seen if self._use is None else self._use + seen
            self._queries += query.shape[0] * query.shape[1]
        return weights


class HiddenStatesAttention(MixedAttention):
    """Takes the place of an attention of Hugging Face's library: hidden states in, (output, None) out. Caches of keys are used."""

    def __init__(self, mixture: SoftAttention, *, is_causal: bool, layer_idx: int | None) -> None:
        super().__init__(mixture)
        self.is_causal, self.layer_idx = is_causal, layer_idx

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache: Any = None,
        is_causal: bool | None = None,
        **unused: object,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            hidden_states: (B, L, D) tokens.
            position_embeddings: Cosines and sines of the rotary positions, each (B, L, head_dim), or None.
            attention_mask: Boolean (True: visible) or additive mask of four dimensions, or None.
            past_key_values: Cache of keys and values, whose `update` is called, or None: its name in older versions of the library.
            cache: The same, by its newer name.
            is_causal: Whether a query sees the keys up to its own place only, where there is no mask; the module's own rule if None.
            **unused: What the library passes to every attention and this one does not need.

        Returns:
            (B, L, O) output, and None for the attention weights, which are not kept.
        """
        causal = self.is_causal if is_causal is None else is_causal
        store = past_key_values if cache is None else cache
        joined = None
        if store is not None:
            require(
                self.layer_idx is not None, "a cache of keys was passed to an attention that does not know its layer's number"
            )

            def joined(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
                both: tuple[Tensor, Tensor] = store.update(k, v, self.layer_idx)
                return both

        out = self.mixture(
            hidden_states,
            mask=attention_mask,
            causal=causal and attention_mask is None and hidden_states.shape[1] > 1,
            positions=None if position_embeddings is None else rotary(*position_embeddings),
            expert_weights=self._weights(hidden_states),
            cache=joined,
        )
        return out, None


class MultiheadMixture(MixedAttention):
    """Takes the place of an `nn.MultiheadAttention`. Its masks are translated: there True means hidden."""

    in_proj_bias = None  # these four keep `nn.TransformerEncoderLayer` from its fused path, which reads the dense weights
    in_proj_weight = None
    _qkv_same_embed_dim = False

    def __init__(self, mixture: SoftAttention, *, batch_first: bool) -> None:
        super().__init__(mixture)
        self.batch_first = batch_first
        self.num_heads = mixture.heads

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = False,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            query: (B, Lq, D), or (Lq, B, D) without `batch_first`.
            key: (B, Lk, Dk) likewise.
            value: (B, Lk, Dv) likewise.
            key_padding_mask: (B, Lk), True (or minus infinity) for padding.
            need_weights: Not supported: the weights of N experts have no single matrix. None is returned.
            attn_mask: (Lq, Lk) or (B * heads, Lq, Lk), True for hidden, or additive.
            average_attn_weights: Not used.
            is_causal: A hint that `attn_mask` is causal; the mask itself is used.

        Returns:
            The output in the order of `query`, and None.

        Raises:
            InvalidInput: The tokens have no batch dimension.
        """
        require(query.ndim == 3, f"a mixture of attentions takes batches of three dimensions, found {shape_of(query)}")
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        mask = attn_mask
        if mask is not None:
            mask = ~mask if mask.dtype == torch.bool else mask
            mask = mask.unflatten(0, (len(query), -1)) if mask.ndim == 3 else mask
        if key_padding_mask is not None and key_padding_mask.dtype != torch.bool:
            key_padding_mask = key_padding_mask == -torch.inf
        out = self.mixture(query, key, value, mask=mask, key_padding=key_padding_mask, expert_weights=self._weights(query))
        return (out if self.batch_first else out.transpose(0, 1)), None


def mixed_attentions(model: nn.Module) -> tuple[tuple[str, MixedAttention], ...]:
    """List the mixtures of attentions of a model.

    Args:
        model: The model.

    Returns:
        Name and module, in the order of `named_modules`.
    """
    return tuple((name, module) for name, module in model.named_modules() if isinstance(module, MixedAttention))


@contextmanager
def given_attention_weights(model: nn.Module, weights: Tensor) -> Iterator[None]:
    """Give all mixtures of attentions the same weights of their experts, as an oracle does that knows the domain.

    Args:
        model: The model.
        weights: (N,) or (B, N).

    Yields:
        Nothing.
    """
    with ExitStack() as stack:
        for _, layer in mixed_attentions(model):
            stack.enter_context(layer.given(weights))
        yield
