"""A soft mixture of attentions (the attention experts of BAM, Zhang et al., 2024): every expert runs, a router weights them.

    y = sum_n g_n Attention_n(x),    g = softmax(W x) over the N experts, for every query

No loop over the experts is needed. N attentions with H heads are one attention with N * H heads whose head groups are multiplied by
the weights of their experts before one joint output map. With keys and values of their own ("expert") each expert keeps its K and
V maps. With shared ones ("shared") all query heads that read one key head lie next to each other, which is grouped-query
attention with N times as many queries per key; keys and values are then computed and cached once.

The balance losses do not concern this layer: a soft router leaves no expert without gradient.
Read next: `dense_attention.py` (one expert and its plain reference), `attention_readers.py` (where experts come from).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from .dense_attention import DenseAttention, Positions, split_heads, visible

KeyValues = Literal["expert", "shared"]


class SoftAttention(nn.Module):
    """Several attentions with the same input, weighted per query by a soft router that computes in float32.

    Make one with `SoftAttention.from_dense`. Weights have the layout (N, out, in); with shared keys and values the first
    dimension of `k` and `v` is 1.

    Attributes:
        router: (N, D) weights of the router, which reads the query tokens and has no bias.
        q: (N, H * head_dim, D); likewise `k`, `v` (N or 1, KV * head_dim, Dk) and `o` (N, O, H * head_dim).
        q_bias: (N, H * head_dim) or None; likewise `k_bias`, `v_bias` and `o_bias`.
        top_k: Number of experts with a weight per query, or None for all.
        renormalize: Whether the `top_k` weights are divided by their sum.
        dropout: Share of attention weights that are dropped in training mode.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    o: Tensor
    q_bias: Tensor | None
    k_bias: Tensor | None
    v_bias: Tensor | None
    o_bias: Tensor | None

    def __init__(
        self,
        experts: Sequence[DenseAttention],
        router: Tensor,
        *,
        key_values: KeyValues = "expert",
        top_k: int | None = None,
        renormalize: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        first = _checked(experts)
        count, width = len(experts), first.q.shape[1]
        require(
            router.shape == (count, width), f"the router of {count} experts must be ({count}, {width}), found {shape_of(router)}"
        )
        require(key_values in ("expert", "shared"), f"key_values must be 'expert' or 'shared', found {key_values!r}")
        require(0.0 <= dropout < 1.0, f"dropout must be in 0..1, found {dropout}")
        if top_k is not None and not 1 <= top_k <= count:
            raise InvalidInput(f"top_k must be in 1..{count}, the number of experts, found {top_k}; None weights all of them")
        self.heads, self.kv_heads, self.head_dim, self.scale = first.heads, first.kv_heads, first.head_dim, first.scale
        self.key_values: KeyValues = key_values
        self.top_k, self.renormalize, self.dropout = top_k, renormalize, dropout
        self.router = nn.Parameter(router.detach().clone())
        tensors = [expert.tensors() for expert in experts]
        for name in ("q", "k", "v", "o", "q_bias", "k_bias", "v_bias", "o_bias"):
            if name not in tensors[0]:
                self.register_parameter(name, None)
                continue
            stacked = torch.stack([own[name].detach() for own in tensors])
            if key_values == "shared" and name[0] in "kv":
                stacked = _mean(stacked)
            self.register_parameter(name, nn.Parameter(stacked))

    @classmethod
    def from_dense(
        cls,
        experts: Sequence[DenseAttention],
        *,
        key_values: KeyValues = "expert",
        top_k: int | None = None,
        renormalize: bool = False,
        dropout: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> SoftAttention:
        """Mix attentions; their weights are copied, and the router is drawn like the weights of `nn.Linear`.

        Args:
            experts: Attentions of the same shapes, scale and type.
            key_values: "expert" keeps each expert's own key and value maps; "shared" replaces them by their mean.
            top_k: Gives only this number of experts a weight per query, the ablation of BAM. All experts still run: this option
                serves comparisons and saves no time.
            renormalize: Divides the `top_k` weights by their sum. BAM does not.
            dropout: Share of attention weights that are dropped in training mode.
            generator: Draws the router; torch's own where it is None.

        Returns:
            The mixture, on the device of the experts.

        Raises:
            InvalidInput: The experts differ, or an option does not fit.

        Example:
            >>> eye = torch.eye(2)
            >>> dense = DenseAttention(q=eye, k=eye, v=eye, o=eye, heads=1, kv_heads=1, head_dim=2, scale=1.0)
            >>> mixture = SoftAttention.from_dense([dense, dense], key_values="shared")
            >>> mixture(torch.tensor([[[3.0, -1.0]]])).shape
            torch.Size([1, 1, 2])
        """
        like = _checked(experts).q
        bound = like.shape[1] ** -0.5
        drawn = (2 * torch.rand(len(experts), like.shape[1], generator=generator) - 1) * bound
        return cls(
            experts,
            drawn.to(like),
            key_values=key_values,
            top_k=top_k,
            renormalize=renormalize,
            dropout=dropout,
        )

    @property
    def experts(self) -> int:
        """Number of experts."""
        return len(self.q)

    def to_dense(self, expert: int) -> DenseAttention:
        """Give one expert back as a dense attention.

        Args:
            expert: Its place, 0 for the first.

        Returns:
            A copy of its weights; with shared keys and values it holds the shared ones.

        Raises:
            InvalidInput: There is no such expert.
        """
        require(0 <= expert < self.experts, f"the mixture has experts 0..{self.experts - 1}, found {expert}")

        def of(stacked: Tensor | None) -> Tensor | None:
            return None if stacked is None else stacked[min(expert, len(stacked) - 1)].detach().clone()

        q, k, v, o = (w[min(expert, len(w) - 1)].detach().clone() for w in (self.q, self.k, self.v, self.o))
        return DenseAttention(
            q=q,
            k=k,
            v=v,
            o=o,
            q_bias=of(self.q_bias),
            k_bias=of(self.k_bias),
            v_bias=of(self.v_bias),
            o_bias=of(self.o_bias),
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            scale=self.scale,
        )

    def expert_weights(self, query: Tensor) -> Tensor:
        """Compute the weights of the experts per query, in float32 (or float64 for float64 tokens) also under autocast.

        Args:
            query: (B, Lq, D) tokens.

        Returns:
            (B, Lq, N). They add up to 1 unless `top_k` cuts some off without renormalization.
        """
        kind = torch.promote_types(query.dtype, torch.float32)
        with torch.autocast(query.device.type, enabled=False):
            weights = F.linear(query.to(kind), self.router.to(kind)).softmax(-1)
        if self.top_k is None:
            return weights
        chosen, index = weights.topk(self.top_k, -1)
        if self.renormalize:
            chosen = chosen / chosen.sum(-1, keepdim=True)
        return torch.zeros_like(weights).scatter(-1, index, chosen)

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        *,
        mask: Tensor | None = None,
        key_padding: Tensor | None = None,
        causal: bool = False,
        positions: Positions | None = None,
        expert_weights: Tensor | None = None,
        cache: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None = None,
    ) -> Tensor:
        """Attend with every expert and add up their outputs by weight.

        Args:
            query: (B, Lq, D) tokens.
            key: (B, Lk, Dk) tokens that are attended to; the queries themselves where it is None.
            value: (B, Lk, Dv) tokens whose values are averaged; the keys where it is None.
            mask: (Lq, Lk), (B, Lq, Lk) or (B, 1 or H, Lq, Lk): boolean with True where a query may see a key, or floating point
                that is added to the logits. All experts see the same.
            key_padding: (B, Lk) boolean, True where the key is padding, as in `nn.MultiheadAttention`.
            causal: Whether a query sees the keys up to its own place only. With more keys than queries the queries are the last
                places.
            positions: Rotary positions, a function of queries (B, heads, Lq, head_dim) and keys (B, key heads, Lk, head_dim). A
                Llama's are `lambda q, k: apply_rotary_pos_emb(q, k, cos, sin)`.
            expert_weights: (B, Lq, N) weights instead of the router's, for uniform, random or known weights; or None.
            cache: Takes the keys and values of these tokens, (B, heads, Lk, head_dim) each, after the positions, and gives those of all
                tokens so far; or None. With shared keys and values there are no more heads than in one dense attention.

        Returns:
            (B, Lq, O). A query that sees no key gets only the weighted output bias.

        Raises:
            InvalidInput: A shape does not fit.
        """
        key = query if key is None else key
        value = key if value is None else value
        self._check_tokens(query, key, value)
        weights = self.expert_weights(query) if expert_weights is None else expert_weights
        if weights.shape != (*query.shape[:2], self.experts):
            raise InvalidInput(f"expert_weights must be {(*query.shape[:2], self.experts)}, found {shape_of(weights)}")
        q = split_heads(_joint(query, self.q, self.q_bias), self.experts * self.heads)
        k = split_heads(_joint(key, self.k, self.k_bias), len(self.k) * self.kv_heads)
        v = split_heads(_joint(value, self.v, self.v_bias), len(self.v) * self.kv_heads)
        if self.key_values == "shared":
            q = self._by_key_head(q)
        if positions is not None:
            q, k = positions(q, k)
        if cache is not None:
            k, v = cache(k, v)
            key = key.new_empty(len(key), k.shape[2], 0)  # masks are as long as all keys
        y = self._attend(q, k, v, query, key, mask=mask, key_padding=key_padding, causal=causal)
        if self.key_values == "shared":
            y = self._by_expert(y)
        # (B, N * H, Lq, head_dim) -> (B, Lq, N, H * head_dim), each expert times its weight
        grouped = y.transpose(1, 2).unflatten(2, (self.experts, self.heads)).flatten(3)
        mixed = (grouped * weights[..., None]).to(grouped.dtype).flatten(2)
        out = F.linear(mixed, self.o.transpose(0, 1).flatten(1))
        return out if self.o_bias is None else out + (weights.to(out.dtype) @ self.o_bias.to(out.dtype))

    def _attend(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        query: Tensor,
        key: Tensor,
        *,
        mask: Tensor | None,
        key_padding: Tensor | None,
        causal: bool,
    ) -> Tensor:
        """One fused call for all heads of all experts. A square causal attention needs no mask, which is faster."""
        plain = causal and mask is None and key_padding is None and query.shape[1] == key.shape[1]
        seen = None if plain else visible(query, key, mask=mask, key_padding=key_padding, causal=causal)
        if seen is not None:
            seen = self._mask_of_heads(seen)
            seen = seen if seen.dtype == torch.bool else seen.to(q.dtype)
        dropout = self.dropout if self.training else 0.0
        grouped = q.shape[1] != k.shape[1]
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=seen, dropout_p=dropout, is_causal=plain, scale=self.scale, enable_gqa=grouped
        )

    def _mask_of_heads(self, seen: Tensor) -> Tensor:
        """Repeat a mask that differs between heads for every expert, in the order of the fused heads."""
        if seen.shape[1] == 1:
            return seen
        require(seen.shape[1] == self.heads, f"an attention mask must be for 1 or {self.heads} heads, found {shape_of(seen)}")
        repeated = seen.repeat(1, self.experts, 1, 1)
        return self._by_key_head(repeated) if self.key_values == "shared" else repeated

    def _by_key_head(self, x: Tensor) -> Tensor:
        """Heads from the order (expert, key head, group) to (key head, expert, group), which grouped-query attention needs."""
        return x.unflatten(1, (self.experts, self.kv_heads, -1)).transpose(1, 2).flatten(1, 3)

    def _by_expert(self, x: Tensor) -> Tensor:
        """Undo `_by_key_head`."""
        return x.unflatten(1, (self.kv_heads, self.experts, -1)).transpose(1, 2).flatten(1, 3)

    def _check_tokens(self, query: Tensor, key: Tensor, value: Tensor) -> None:
        for name, tokens, width in (("query", query, self.q), ("key", key, self.k), ("value", value, self.v)):
            if tokens.ndim != 3 or tokens.shape[2] != width.shape[2] or len(tokens) != len(query):
                raise InvalidInput(
                    f"{name} must be ({len(query) if query.ndim else 'B'}, length, {width.shape[2]}), batch first, found "
                    f"{shape_of(tokens)}"
                )
        require(key.shape[1] == value.shape[1], f"keys and values differ in length: {shape_of(key)} and {shape_of(value)}")

    def extra_repr(self) -> str:
        """Describe the mixture in one line.

        Returns:
            Numbers of experts and heads, and the options.
        """
        return (
            f"experts={self.experts}, heads={self.heads}, kv_heads={self.kv_heads}, head_dim={self.head_dim}, "
            f"key_values={self.key_values!r}, top_k={self.top_k}, renormalize={self.renormalize}"
        )


def share_key_values(experts: Sequence[DenseAttention]) -> list[DenseAttention]:
    """Replace key and value maps by their mean, as "shared" does: the reference for that form.

    Args:
        experts: Attentions of the same shapes.

    Returns:
        The attentions with their own query and output maps.

    Raises:
        InvalidInput: The experts differ in shape.
    """
    _checked(experts)

    def mean(read: Callable[[DenseAttention], Tensor | None]) -> Tensor | None:
        own = [tensor for expert in experts if (tensor := read(expert)) is not None]
        return _mean(torch.stack(own))[0] if own else None

    k, v = _mean(torch.stack([e.k for e in experts]))[0], _mean(torch.stack([e.v for e in experts]))[0]
    k_bias, v_bias = mean(lambda e: e.k_bias), mean(lambda e: e.v_bias)
    return [replace(expert, k=k, v=v, k_bias=k_bias, v_bias=v_bias) for expert in experts]


def _mean(stacked: Tensor) -> Tensor:
    """Mean over the experts, as the first one plus the mean difference from it: equal experts give exactly themselves."""
    first = stacked[:1].double()
    return (first + (stacked.double() - first).mean(0, keepdim=True)).to(stacked.dtype)


def _joint(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """All experts' maps of the same tokens in one product: (B, L, D) -> (B, L, N * out)."""
    return F.linear(x, weight.flatten(0, 1), None if bias is None else bias.flatten())


def _checked(experts: Sequence[DenseAttention]) -> DenseAttention:
    """The first expert, after a check that the others have its shapes."""
    require(len(experts) >= 1, "a mixture of attentions needs at least one expert, found none")
    first = experts[0]
    layout = (first.heads, first.kv_heads, first.head_dim, first.scale)
    for i, expert in enumerate(experts):
        own = (expert.heads, expert.kv_heads, expert.head_dim, expert.scale)
        if own != layout:
            raise InvalidInput(f"expert {i} has (heads, kv_heads, head_dim, scale) {own}, expert 0 has {layout}; they must agree")
        mine, theirs = expert.tensors(), first.tensors()
        if mine.keys() != theirs.keys():
            raise InvalidInput(
                f"expert {i} has the tensors {', '.join(mine)}, expert 0 has {', '.join(theirs)}; give those without a bias one of zeros"
            )
        for name, tensor in mine.items():
            like = theirs[name]
            if (tensor.shape, tensor.dtype, tensor.device) != (like.shape, like.dtype, like.device):
                raise InvalidInput(
                    f"{name} of expert {i} is {shape_of(tensor)} on {tensor.device}, of expert 0 {shape_of(like)} on {like.device}; "
                    "experts come from models of one architecture"
                )
    return first
