"""The dense attention that becomes an expert: four linear maps, the number of heads and the scale of the logits.

It is a value, not a module: what a Llama's attention, a CLIP's and `nn.MultiheadAttention` have in common.
Read next: `attention_readers.py`, which reads it from a module; `soft_attention.py`, which mixes several of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of

Positions = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""Rotary positions: takes queries (B, heads, Lq, head_dim) and keys (B, key heads, Lk, head_dim) and gives both turned.

The numbers of heads differ from those of the dense attention, so the function must treat all heads alike.
"""


@dataclass(frozen=True, kw_only=True, eq=False)
class DenseAttention:
    """The weights of one multi-head attention, with as many key heads as query heads or fewer (grouped-query attention).

    Query head h reads key head h // (heads / kv_heads). The tensors are held as they are given, without a copy.

    Example:
        >>> eye = torch.eye(2)
        >>> attention = DenseAttention(q=eye, k=eye, v=eye, o=eye, heads=1, kv_heads=1, head_dim=2, scale=1.0)
        >>> attention.apply(torch.tensor([[[3.0, -1.0]]])).tolist()
        [[[3.0, -1.0]]]
    """

    q: Tensor
    """(heads * head_dim, D) query map of tokens of width D."""

    k: Tensor
    """(kv_heads * head_dim, Dk) key map; Dk is the width of the tokens that are attended to."""

    v: Tensor
    """(kv_heads * head_dim, Dv) value map."""

    o: Tensor
    """(O, heads * head_dim) output map."""

    q_bias: Tensor | None = None
    """(heads * head_dim,), or None."""

    k_bias: Tensor | None = None
    """(kv_heads * head_dim,), or None."""

    v_bias: Tensor | None = None
    """(kv_heads * head_dim,), or None."""

    o_bias: Tensor | None = None
    """(O,), or None."""

    heads: int
    """Number of query heads."""

    kv_heads: int
    """Number of key and value heads; it divides `heads`."""

    head_dim: int
    """Width of one head."""

    scale: float
    """Factor of the logits, 1 / sqrt(head_dim) in most networks."""

    def __post_init__(self) -> None:
        require(
            self.heads >= 1 and self.kv_heads >= 1 and self.head_dim >= 1 and self.heads % self.kv_heads == 0,
            f"an attention needs kv_heads that divide heads and head_dim >= 1, found {self.kv_heads} key heads, {self.heads} "
            f"query heads and head_dim {self.head_dim}",
        )
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        for name, weight, rows in (("q", self.q, queries), ("k", self.k, keys), ("v", self.v, keys), ("o", self.o, None)):
            if weight.ndim != 2 or (rows is not None and len(weight) != rows):
                raise InvalidInput(
                    f"weight {name} of an attention with {self.heads} heads, {self.kv_heads} key heads and head_dim "
                    f"{self.head_dim} must be ({rows or 'O'}, width), found {shape_of(weight)}"
                )
        require(self.o.shape[1] == queries, f"weight o must be (O, {queries}), found {shape_of(self.o)}")
        for name, bias, weight in self._biases():
            if bias is not None and bias.shape != weight.shape[:1]:
                raise InvalidInput(f"bias {name} must be ({len(weight)},), found {shape_of(bias)}")
        kinds = {(tensor.dtype, tensor.device) for tensor in self.tensors().values()}
        require(len(kinds) == 1, f"the tensors of one attention need one type and one device, found {sorted(map(str, kinds))}")

    def _biases(self) -> tuple[tuple[str, Tensor | None, Tensor], ...]:
        return (
            ("q_bias", self.q_bias, self.q),
            ("k_bias", self.k_bias, self.k),
            ("v_bias", self.v_bias, self.v),
            ("o_bias", self.o_bias, self.o),
        )

    def tensors(self) -> dict[str, Tensor]:
        """Give the weights and those biases that exist.

        Returns:
            The tensors by the name of their field.
        """
        weights = {"q": self.q, "k": self.k, "v": self.v, "o": self.o}
        return weights | {name: bias for name, bias, _ in self._biases() if bias is not None}

    def apply(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding: Tensor | None = None,
        causal: bool = False,
        positions: Positions | None = None,
    ) -> Tensor:
        """Compute this attention in plain torch: the reference for the fused form.

        Args:
            query: (B, Lq, D) tokens.
            key: (B, Lk, Dk) tokens that are attended to; the queries themselves where it is None.
            value: (B, Lk, Dv) tokens whose values are averaged; the keys where it is None.
            mask: See `visible`.
            key_padding: See `visible`.
            causal: See `visible`.
            positions: Rotary positions, or None.

        Returns:
            (B, Lq, O). A query that sees no key gives the output bias alone.

        Raises:
            InvalidInput: A mask does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        q = split_heads(F.linear(query, self.q, self.q_bias), self.heads)
        k = split_heads(F.linear(key, self.k, self.k_bias), self.kv_heads)
        v = split_heads(F.linear(value, self.v, self.v_bias), self.kv_heads)
        if positions is not None:
            q, k = positions(q, k)
        group = self.heads // self.kv_heads
        k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
        logits = self.scale * q @ k.transpose(-1, -2)
        seen = visible(query, key, mask=mask, key_padding=key_padding, causal=causal)
        if seen is not None:
            logits = logits.masked_fill(~seen, -torch.inf) if seen.dtype == torch.bool else logits + seen
        share = logits.softmax(-1)
        share = share.masked_fill((logits == -torch.inf).all(-1, keepdim=True), 0.0)
        return F.linear((share @ v).transpose(1, 2).flatten(2), self.o, self.o_bias)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Divide the channels of tokens among heads.

    Args:
        x: (B, L, heads * head_dim).
        heads: Number of heads.

    Returns:
        (B, heads, L, head_dim), a view.
    """
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def visible(query: Tensor, key: Tensor, *, mask: Tensor | None, key_padding: Tensor | None, causal: bool) -> Tensor | None:
    """Join the three ways to hide keys from queries.

    Args:
        query: (B, Lq, D).
        key: (B, Lk, Dk).
        mask: (Lq, Lk), (B, Lq, Lk) or (B, 1 or heads, Lq, Lk). Boolean: True where the query may see the key. Floating point: it
            is added to the logits.
        key_padding: (B, Lk) boolean, True where the key is padding, as in `nn.MultiheadAttention`.
        causal: Whether a query sees the keys up to its own place only. With more keys than queries the queries are the last
            places, as when earlier keys come from a cache.

    Returns:
        A mask of four dimensions that broadcasts to (B, heads, Lq, Lk), or None where every query sees every key.

    Raises:
        InvalidInput: A shape or type does not fit, or a causal attention has more queries than keys.
    """
    batch, queries, keys = len(query), query.shape[1], key.shape[1]
    joined = _four_dimensions(mask, batch, queries, keys)
    hidden: list[Tensor] = []
    if key_padding is not None:
        if key_padding.shape != (batch, keys) or key_padding.dtype != torch.bool:
            raise InvalidInput(f"key_padding must be ({batch}, {keys}) bool, True for padding, found {shape_of(key_padding)}")
        hidden.append(key_padding[:, None, None])
    if causal:
        require(
            queries <= keys, f"a causal attention needs at least as many keys as queries, found {queries} queries, {keys} keys"
        )
        later = torch.ones(queries, keys, dtype=torch.bool, device=query.device).triu(1 + keys - queries)
        hidden.append(later[None, None])
    for part in hidden:
        if joined is None:
            joined = ~part
        elif joined.dtype == torch.bool:
            joined = joined & ~part
        else:
            joined = joined.masked_fill(part, -torch.inf)
    return joined


def _four_dimensions(mask: Tensor | None, batch: int, queries: int, keys: int) -> Tensor | None:
    if mask is None:
        return None
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise InvalidInput(f"an attention mask must be boolean (True: visible) or floating point (added), found {shape_of(mask)}")
    if mask.ndim not in (2, 3, 4) or mask.shape[-2:] != (queries, keys):
        raise InvalidInput(f"an attention mask must end with ({queries}, {keys}), queries by keys, found {shape_of(mask)}")
    if mask.ndim > 2 and len(mask) not in (1, batch):
        raise InvalidInput(f"an attention mask of {mask.ndim} dimensions must begin with {batch} or 1, found {shape_of(mask)}")
    return mask[None, None] if mask.ndim == 2 else mask[:, None] if mask.ndim == 3 else mask
