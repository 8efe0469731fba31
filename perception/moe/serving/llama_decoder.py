"""A Llama that computes the new tokens of several requests in one batch: linear maps over all tokens together, attention per request.

What the experts add is handed over, so the same code computes with experts that come and go, layer by layer or as a whole.

With the tokens x of a batch, in every layer:

    x = x + out(attention(norm1(x)))
    h = norm2(x)
    x = x + shared(h) + own(layer, h)

Read next: `llama_engine.py`, which hands over the experts.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.tensor_value import shape_of
from ..carving.pre_gate import PreGate, top1_decision
from .key_values import CacheSpan, KeyValueCache, KeyValueShape, attend, positions_of, rotary_angles, turned
from .llama_backbone import LlamaBackbone

AddOwn = Callable[[int, Tensor, Tensor], None]
"""Adds what the experts of a layer compute: gets the number of the layer, the (T, D) tokens, and the (T, D) sum to add to in place."""


class LlamaDecoder:
    """Computes with a backbone. It keeps nothing between two calls; the caches do.

    Example:
        decoder = LlamaDecoder(backbone)
        cache = decoder.new_cache(64)
        hidden = decoder.forward(prompt, [CacheSpan(cache=cache, first=0, count=len(prompt))], experts)
        logits = decoder.logits(hidden[-1:])
    """

    def __init__(self, backbone: LlamaBackbone) -> None:
        self.backbone = backbone
        self.key_values = backbone.shape.key_values(backbone.embed.dtype)

    def new_cache(self, length: int) -> KeyValueCache:
        """Make the cache of a request.

        Args:
            length: Largest number of its tokens.

        Returns:
            An empty cache.
        """
        return KeyValueCache(self.key_values, length, self.backbone.embed)

    @torch.inference_mode()
    def forward(self, ids: Tensor, spans: Sequence[CacheSpan], add_own: AddOwn) -> Tensor:
        """Compute new tokens, and add them to their caches.

        Args:
            ids: (T,) int64 tokens.
            spans: Spans that cover them in order.
            add_own: Adds what the experts compute.

        Returns:
            (T, D) tokens after the last norm.

        Raises:
            InvalidInput: The spans do not cover the tokens.
        """
        if ids.ndim != 1 or sum(span.count for span in spans) != len(ids):
            raise InvalidInput(f"spans of {[span.count for span in spans]} tokens do not cover {shape_of(ids)}")
        b, s = self.backbone, self.backbone.shape
        angles = rotary_angles(positions_of(spans, ids.device), b.speeds, b.embed.dtype, s.rotary_scale)
        sizes = [(s.heads + s.kv_heads) * s.head_dim, s.kv_heads * s.head_dim]
        x = F.embedding(ids, b.embed)
        for number, layer in enumerate(b.layers):
            read = F.rms_norm(x, (s.width,), layer.norm1, s.eps)
            parts = F.linear(read, layer.qkv, layer.qkv_bias).split(sizes, -1)
            qk, v = (part.unflatten(-1, (-1, s.head_dim)) for part in parts)
            q, k = turned(qk, *angles).split(
                [s.heads, s.kv_heads], 1
            )  # both in one call: at one token, calls cost more than numbers
            attended = attend(q, k, v, spans, number)
            x = x + F.linear(attended, layer.out, layer.out_bias)
            read = F.rms_norm(x, (s.width,), layer.norm2, s.eps)
            y = torch.zeros_like(x) if layer.shared is None else layer.shared.apply(read)
            add_own(number, read, y)
            x = x + y
        for span in spans:
            span.cache.advance(span.count)
        return F.rms_norm(x, (s.width,), b.norm, s.eps)

    @torch.inference_mode()
    def logits(self, hidden: Tensor) -> Tensor:
        """Compute the logits of the tokens that follow.

        Args:
            hidden: (N, D) from `forward`; only what is needed, because the vocabulary is large.

        Returns:
            (N, V).
        """
        return F.linear(hidden, self.backbone.head)


class PreGateDecoder:
    """Runs a pre-gate on the new tokens of several requests in one batch, with preallocated caches. It decides as `PreGate` does."""

    def __init__(self, gate: PreGate) -> None:
        self.gate = gate
        config, weight = gate.config, gate.embed.weight
        head = config.width // config.heads
        self.key_values = KeyValueShape(layers=config.blocks, heads=config.heads, head_dim=head, itemsize=weight.dtype.itemsize)
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        steps = torch.arange(0, head, 2, device=weight.device, dtype=dtype) / head
        self._speeds = torch.exp(-torch.log(torch.tensor(config.base, dtype=torch.float64)).item() * steps)

    def new_cache(self, length: int) -> KeyValueCache:
        """Make the cache of a request.

        Args:
            length: Largest number of its tokens.

        Returns:
            An empty cache.
        """
        return KeyValueCache(self.key_values, length, self.gate.embed.weight.detach())

    @torch.inference_mode()
    def decide(self, ids: Tensor, spans: Sequence[CacheSpan]) -> list[int]:
        """Choose the experts of new tokens.

        Args:
            ids: (T,) int64 tokens.
            spans: Spans that cover them in order.

        Returns:
            The expert of each token.
        """
        gate = self.gate
        angles = rotary_angles(positions_of(spans, ids.device), self._speeds, gate.embed.weight.dtype)
        x = gate.embed(ids)
        for number, block in enumerate(gate.blocks):
            x = self._block(block, x, angles, spans, number)
        for span in spans:
            span.cache.advance(span.count)
        chosen = top1_decision(gate.head(gate.norm(x))).index
        return [] if chosen is None else chosen[:, 0].tolist()

    def _block(
        self, block: torch.nn.Module, x: Tensor, angles: tuple[Tensor, Tensor], spans: Sequence[CacheSpan], number: int
    ) -> Tensor:
        parts = {name: module for name, module in block.named_children()}
        if self.gate.config.context:
            read = parts["norm1"](x)
            q, k, v = (parts[name](read).unflatten(-1, (self.gate.config.heads, -1)) for name in "qkv")
            attended = attend(turned(q, *angles), turned(k, *angles), v, spans, number)
            x = x + parts["o"](attended)
        made: Tensor = x + parts["down"](F.silu(parts["up"](parts["norm2"](x))))
        return made
