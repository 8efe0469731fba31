"""The pre-gate: a small causal decoder beside the model that chooses the expert of each token before the model runs.

It reads the tokens themselves, so one decision serves all layers, and a runtime knows the experts of all waiting tokens. It has the parts
of the published program (Read-ME): an embedding of its own, one block with rotary positions and RMS norms, and a head with one logit per
expert. Attention logits are divided by the square root of the head's width, which that program leaves out.

The chosen expert is not weighted, so the loss of a language model gives this router no gradient: `distillation.py` trains it.

| router | knows | decides |
|---|---|---|
| `PreGate` | the tokens until now | before the model runs |
| `PreGate` with `context=False` | the current token only: a control | before the model runs |
| `LayerRouter`, one in each layer | the layer's input: a baseline | when the layer is reached |
| `OracleRouter` (`layers/control_routers.py`) | the true domain: an upper bound | before the model runs |
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts
from ....core.tensor_value import shape_of
from ..layers.routers import Router
from ..layers.routing import Routing, TokenPlaces

EmbeddingStart = Literal["columns", "directions"]


@dataclass(frozen=True, kw_only=True)
class PreGateConfig:
    """Sizes of a pre-gate. The paper's has width 512 and 18 million parameters beside a model of 7 billion."""

    vocabulary: int
    """Number of tokens."""
    experts: int
    """Number of experts, N."""
    width: int = 128
    """Width of embedding, block and hidden layer; a multiple of twice `heads`."""
    heads: int = 4
    """Number of attention heads."""
    blocks: int = 1
    """Number of blocks."""
    context: bool = True
    """Whether it sees the tokens before the current one. False makes the context-free control: no attention."""
    base: float = 10_000.0
    """Base of the rotary angles."""

    def __post_init__(self) -> None:
        require_counts("PreGateConfig", most=2**24, vocabulary=self.vocabulary)
        require_counts("PreGateConfig", experts=self.experts, width=self.width, heads=self.heads, blocks=self.blocks)
        require(
            self.width % (2 * self.heads) == 0,
            f"PreGateConfig.width must be a multiple of 2 x {self.heads} heads, found {self.width}",
        )
        require(1 < self.base < 1e12, f"PreGateConfig.base must be above 1, found {self.base}")

    def build(self, seed: int, *, embedding: Tensor | None = None) -> PreGate:
        """Make the pre-gate.

        Args:
            seed: Number that the weights depend on.
            embedding: (V, width) first embedding, as from `embedding_start`; None draws one.

        Returns:
            The pre-gate.

        Raises:
            InvalidInput: The embedding has another shape.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            gate = PreGate(self)
        if embedding is not None:
            if tuple(embedding.shape) != (self.vocabulary, self.width):
                raise InvalidInput(f"the embedding must be ({self.vocabulary}, {self.width}), found {shape_of(embedding)}")
            with torch.no_grad():
                gate.embed.weight.copy_(embedding)
        return gate


def embedding_start(weight: Tensor, width: int, how: EmbeddingStart = "directions") -> Tensor:
    """Make the first embedding of a pre-gate from the model's.

    Args:
        weight: (V, D) embedding of the model.
        width: Width of the pre-gate, at most D.
        how: `directions` keeps the leading directions of the tokens, which hold most of what tells them apart; `columns` keeps the first
            columns, as the published program does.

    Returns:
        (V, width), scaled to a mean square of 1.

    Raises:
        InvalidInput: The model's embedding is narrower.
    """
    if weight.ndim != 2 or weight.shape[1] < width:
        raise InvalidInput(f"an embedding of {width} columns cannot be made of {shape_of(weight)}; lower the pre-gate's width")
    rows = weight.detach().double()
    if how == "directions":
        centered = rows - rows.mean(0)
        _, vectors = torch.linalg.eigh(centered.T @ centered)
        rows = centered @ vectors[:, -width:].flip(1)
    rows = rows[:, :width]
    return (rows / rows.square().mean().sqrt().clamp_min(1e-12)).to(weight.dtype)


@dataclass(frozen=True, kw_only=True, eq=False)
class PreGateCache:
    """Keys and values of the tokens until now, so that a new token costs one step. A value: extending it makes a new one."""

    keys: tuple[Tensor, ...]
    """For each block (B, heads, L, head width)."""
    values: tuple[Tensor, ...]
    """For each block (B, heads, L, head width)."""
    padding: Tensor
    """(B, L) bool, True for padding."""

    @property
    def positions(self) -> Tensor:
        """(B,) int64 number of tokens until now, without padding."""
        return (~self.padding).sum(1)

    def rows(self, take: Tensor) -> PreGateCache:
        """Keep some sequences, in any order: what a runtime does when requests end.

        Args:
            take: (M,) int64 sequences.

        Returns:
            Their cache.
        """
        return PreGateCache(
            keys=tuple(keys[take] for keys in self.keys),
            values=tuple(values[take] for values in self.values),
            padding=self.padding[take],
        )


@dataclass(frozen=True, kw_only=True, eq=False)
class PreGateOutput:
    """Logits of a pre-gate, and what the next tokens need."""

    logits: Tensor
    """(B, L, N) logits; 0 for padding."""
    cache: PreGateCache
    """Keys and values of all tokens until now."""

    @property
    def decision(self) -> Routing:
        """The decision for the B * L tokens, in the order of the flattened batch."""
        return top1_decision(self.logits.flatten(0, 1))


def top1_decision(logits: Tensor) -> Routing:
    """Choose the expert with the largest logit, with the weight 1. Of equal logits the smaller number wins.

    Args:
        logits: (T, N).

    Returns:
        The decision. Its probabilities are the softmax of the logits.
    """
    index = logits.argmax(1, keepdim=True)
    return Routing(logits=logits, probs=logits.softmax(1), index=index, weight=torch.ones_like(index, dtype=logits.dtype))


class _Block(nn.Module):
    """RMS norm, attention, RMS norm and a plain FFN, each beside a residual connection."""

    def __init__(self, config: PreGateConfig) -> None:
        super().__init__()
        width = config.width
        self.heads = config.heads
        self.context = config.context
        if self.context:
            self.norm1 = nn.RMSNorm(width, eps=1e-6)
            self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm2 = nn.RMSNorm(width, eps=1e-6)
        self.up, self.down = nn.Linear(width, width), nn.Linear(width, width)

    def forward(
        self, x: Tensor, angles: tuple[Tensor, Tensor], mask: Tensor, past: tuple[Tensor, Tensor]
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        if self.context:
            read = self.norm1(x)
            q, k, v = (m(read).unflatten(-1, (self.heads, -1)).transpose(1, 2) for m in (self.q, self.k, self.v))
            q, k = _turned(q, *angles), _turned(k, *angles)
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past = k, v
            y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # divides by the square root of the head's width
            x = x + self.o(y.transpose(1, 2).flatten(2))
        return x + self.down(F.silu(self.up(self.norm2(x)))), past


class PreGate(nn.Module):
    """Chooses the expert of each token from the tokens until now.

    Example:
        gate = PreGateConfig(vocabulary=256, experts=4).build(seed=0)
        with given_routing(model, gate.decide(ids)):
            logits = model(ids).logits
        step = gate(prompt)
        step = gate(new_ids, cache=step.cache)  # costs only the new tokens
    """

    def __init__(self, config: PreGateConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocabulary, config.width)
        self.blocks = nn.ModuleList(_Block(config) for _ in range(config.blocks))
        self.norm = nn.RMSNorm(config.width, eps=1e-6)
        self.head = nn.Linear(config.width, config.experts)

    def forward(self, ids: Tensor, *, padding: Tensor | None = None, cache: PreGateCache | None = None) -> PreGateOutput:
        """Compute the logits of new tokens.

        Args:
            ids: (B, L) int64 tokens; with a cache those that follow the ones it knows.
            padding: (B, L) bool, True for padding, which may stand on either side; None where there is none.
            cache: What an earlier call returned for the same sequences.

        Returns:
            The logits, and the cache for the next call.

        Raises:
            InvalidInput: Shapes that do not fit, or a token outside of the vocabulary.
        """
        ids, padding = self._checked(ids, padding, cache)
        batch, length = ids.shape
        if cache is None:
            cache = self._empty(batch)
        seen = cache.padding.shape[1]
        known = torch.cat([cache.padding, padding], 1)
        angles = self._angles(cache.positions[:, None] + (~padding).cumsum(1) - 1)
        mask = self._mask(known, seen, length)
        x = self.embed(ids)
        keys, values = [], []
        for block, past in zip(self.blocks, zip(cache.keys, cache.values)):
            x, (k, v) = block(x, angles, mask, past)
            keys.append(k)
            values.append(v)
        logits = self.head(self.norm(x))
        logits = logits.masked_fill(padding[..., None], 0.0)
        return PreGateOutput(logits=logits, cache=PreGateCache(keys=tuple(keys), values=tuple(values), padding=known))

    @torch.no_grad()
    def decide(self, ids: Tensor, *, padding: Tensor | None = None) -> Routing:
        """Choose the experts of whole sequences, without gradients.

        Args:
            ids: (B, L) int64 tokens.
            padding: (B, L) bool, True for padding.

        Returns:
            The decision for the B * L tokens; it is expert 0 for padding.
        """
        return self(ids, padding=padding).decision

    def extra_repr(self) -> str:
        """Describe the pre-gate, for `print`.

        Returns:
            Its sizes.
        """
        return f"{self.config.vocabulary} tokens -> {self.config.experts} experts, context={self.config.context}"

    def _checked(self, ids: Tensor, padding: Tensor | None, cache: PreGateCache | None) -> tuple[Tensor, Tensor]:
        if ids.ndim != 2 or ids.is_floating_point() or ids.dtype == torch.bool:
            raise InvalidInput(f"a pre-gate takes tokens (B, L), found {shape_of(ids)}")
        if padding is None:
            padding = torch.zeros(ids.shape, dtype=torch.bool, device=ids.device)
        if padding.shape != ids.shape or padding.dtype != torch.bool:
            raise InvalidInput(
                f"padding must be bool of shape {tuple(ids.shape)}, True for padding, found {shape_of(padding)}; an attention mask with "
                "1 for tokens is its opposite: pass attention_mask == 0"
            )
        ids = ids.masked_fill(padding, 0)
        if ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < self.config.vocabulary:
            raise InvalidInput(
                f"tokens lie in {int(ids.min())}..{int(ids.max())}, and the pre-gate knows 0..{self.config.vocabulary - 1}; was it made "
                "for another tokenizer?"
            )
        if cache is not None and (len(cache.padding) != len(ids) or len(cache.keys) != len(self.blocks)):
            raise InvalidInput(
                f"the cache belongs to {len(cache.padding)} sequences and {len(cache.keys)} blocks, found {len(ids)} sequences and "
                f"{len(self.blocks)} blocks"
            )
        return ids, padding

    def _empty(self, batch: int) -> PreGateCache:
        weight = self.embed.weight
        empty = weight.new_zeros(batch, self.config.heads, 0, self.config.width // self.config.heads)
        none = torch.zeros(batch, 0, dtype=torch.bool, device=weight.device)
        return PreGateCache(keys=(empty,) * self.config.blocks, values=(empty,) * self.config.blocks, padding=none)

    def _angles(self, position: Tensor) -> tuple[Tensor, Tensor]:
        """(B, 1, L, head width) cosines and sines; computed in float32, in float64 for float64 weights."""
        head = self.config.width // self.config.heads
        weight = self.embed.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        speed = torch.exp(-math.log(self.config.base) * torch.arange(0, head, 2, device=weight.device, dtype=dtype) / head)
        angle = (position.clamp_min(0).to(dtype)[..., None] * speed).repeat(1, 1, 2)[:, None]
        return angle.cos().to(weight.dtype), angle.sin().to(weight.dtype)

    def _mask(self, padding: Tensor, seen: int, length: int) -> Tensor:
        """(B, 1, L, seen + L) bool, True where a new token may look: at earlier tokens that are no padding, and always at itself."""
        place = torch.arange(seen + length, device=padding.device)
        now = place[seen:, None]
        return ((place <= now) & ~padding[:, None, None, :]) | (place == now)


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class LayerRouter(Router):
    """A linear router of one layer that chooses one expert with the weight 1: the baseline that a pre-gate is compared with.

    The decision gives the layer's input no gradient. `distillation.py` trains it from its logits.
    """

    def __init__(self, width: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.linear = nn.Linear(width, num_experts)

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Choose the expert of each token, in float32 whatever autocast says.

        Args:
            x: (T, D) tokens.
            places: Not used.

        Returns:
            The decision.

        Raises:
            InvalidInput: The tokens have another width.
        """
        if x.ndim != 2 or x.shape[1] != self.linear.in_features:
            raise InvalidInput(f"the router takes tokens of shape (T, {self.linear.in_features}), found {shape_of(x)}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
        with torch.autocast(x.device.type, enabled=False):
            logits = F.linear(x.detach().to(dtype), self.linear.weight.to(dtype), self.linear.bias.to(dtype))
        return top1_decision(logits)
