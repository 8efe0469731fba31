"""Keys and values of the tokens that a request has computed, in memory that is taken once and never grows.

A cache has room for a whole request, prompt and new tokens, so a request that was admitted cannot run out of memory in its middle. The
bytes of all open requests together are bounded by a `KeyValueBudget`, which refuses a request when it is sent.
Read next: `llama_decoder.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.errors import InvalidInput, require, require_counts
from ..runtime.requests import QueueFull


@dataclass(frozen=True, kw_only=True)
class KeyValueShape:
    """Sizes of the keys and values of a network."""

    layers: int
    """Number of layers with attention."""
    heads: int
    """Number of key heads."""
    head_dim: int
    """Width of a head."""
    itemsize: int
    """Bytes of a number."""

    def __post_init__(self) -> None:
        require_counts("KeyValueShape", layers=self.layers, heads=self.heads, head_dim=self.head_dim, itemsize=self.itemsize)

    def bytes_of(self, length: int) -> int:
        """Count the bytes of a cache.

        Args:
            length: Number of tokens.

        Returns:
            Bytes of keys and values in all layers.
        """
        return 2 * self.layers * self.heads * self.head_dim * self.itemsize * length


class KeyValueCache:
    """Keys and values of one request."""

    def __init__(self, shape: KeyValueShape, length: int, like: Tensor) -> None:
        """Take the memory.

        Args:
            shape: Sizes of the network's keys and values.
            length: Largest number of tokens.
            like: A tensor of the type and on the device that the cache gets.
        """
        size = (shape.layers, shape.heads, length, shape.head_dim)
        self.keys, self.values = like.new_empty(size), like.new_empty(size)
        self.length, self.used = length, 0

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        return self.keys.nbytes + self.values.nbytes

    def advance(self, tokens: int) -> None:
        """Count tokens whose keys and values were written in all layers.

        Args:
            tokens: Their number.
        """
        self.used += tokens


@dataclass(frozen=True, kw_only=True, eq=False)
class CacheSpan:
    """Neighboring tokens of a batch that belong to one request and follow what its cache holds."""

    cache: KeyValueCache
    """The cache of the request."""
    first: int
    """Place of the first token in the batch."""
    count: int
    """Number of tokens."""

    def __post_init__(self) -> None:
        cache = self.cache
        if cache.used + self.count > cache.length:
            raise InvalidInput(f"a cache for {cache.length} tokens holds {cache.used}, and {self.count} more do not fit")


def positions_of(spans: Sequence[CacheSpan], device: torch.device) -> Tensor:
    """Number the tokens of a batch in their texts.

    Args:
        spans: Spans that cover the batch in order.
        device: Where the result goes.

    Returns:
        (T,) int64 positions.
    """
    parts = [torch.arange(s.cache.used, s.cache.used + s.count, device=device) for s in spans]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64, device=device)


def rotary_angles(positions: Tensor, speeds: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """Compute the rotary angles of tokens.

    Args:
        positions: (T,) positions.
        speeds: (W / 2,) angle per position; the angles are computed in its type.
        dtype: Type of the result.
        scale: Factor of cosines and sines.

    Returns:
        (T, 1, W) cosines and sines.
    """
    angle = (positions.to(speeds.dtype)[:, None] * speeds).repeat(1, 2)[:, None]
    return (angle.cos() * scale).to(dtype), (angle.sin() * scale).to(dtype)


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Turn queries or keys by the angles of their positions.

    Args:
        x: (T, H, W).
        cos: (T, 1, W).
        sin: (T, 1, W).

    Returns:
        (T, H, W).
    """
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


def attend(q: Tensor, k: Tensor, v: Tensor, spans: Sequence[CacheSpan], layer: int) -> Tensor:
    """Write keys and values into the caches, and let every token attend to the tokens of its own request until itself.

    Args:
        q: (T, H, W) queries, turned already.
        k: (T, K, W) keys, turned already; K divides H, and each key head serves H / K query heads in a row.
        v: (T, K, W) values.
        spans: Spans that cover the T tokens in order.
        layer: Layer of the caches.

    Returns:
        (T, H * W).
    """
    outputs = []
    for span in spans:
        take = slice(span.first, span.first + span.count)
        begin, end = span.cache.used, span.cache.used + span.count
        keys, values = span.cache.keys[layer, :, :end], span.cache.values[layer, :, :end]
        keys[:, begin:] = k[take].transpose(0, 1)
        values[:, begin:] = v[take].transpose(0, 1)
        outputs.append(_attended(q[take], keys, values))
    if len(outputs) == 1:
        return outputs[0]
    return torch.cat(outputs) if outputs else q.flatten(1)


def _attended(q: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """(n, H * W) of the last n of `end` tokens; `keys` and `values` are (K, end, W)."""
    count, heads, width = q.shape
    groups, end = keys.shape[:2]
    if count == 1:  # the query heads of a group are rows that see all tokens, so no key is repeated
        y = F.scaled_dot_product_attention(q.view(groups, heads // groups, width)[None], keys[None], values[None])
        return y.reshape(1, -1)
    mask = None
    if count != end:
        mask = torch.ones(count, end, dtype=torch.bool, device=q.device).tril(end - count)
    y = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], keys[None], values[None], attn_mask=mask, is_causal=mask is None, enable_gqa=groups != heads
    )
    return y[0].transpose(0, 1).flatten(1)


class KeyValueBudget:
    """Bytes of the caches of all open requests together. Any thread may use it."""

    def __init__(self, most_bytes: int) -> None:
        """Reserve nothing yet.

        Args:
            most_bytes: Largest number of bytes.
        """
        require_counts("KeyValueBudget", most=2**60, most_bytes=most_bytes)
        self.most_bytes = most_bytes
        self._lock = Lock()
        self._reserved: dict[str, int] = {}

    @property
    def reserved(self) -> int:
        """Bytes that are reserved now."""
        with self._lock:
            return sum(self._reserved.values())

    def reserve(self, id: str, size: int) -> None:
        """Reserve the bytes of a request.

        Args:
            id: Name of the request.
            size: Bytes of its caches.

        Raises:
            InvalidInput: They would not fit even alone, or the request has reserved already.
            QueueFull: They do not fit now; the message says the bound.
        """
        require(
            size <= self.most_bytes,
            f"request {id!r} needs {size:,} bytes of keys and values, and all requests together have {self.most_bytes:,}; shorten it, "
            "or raise the bound",
        )
        with self._lock:
            require(id not in self._reserved, f"a request {id!r} is open already; give every request its own id")
            taken = sum(self._reserved.values())
            if taken + size > self.most_bytes:
                raise QueueFull(
                    f"request {id!r} is refused: it needs {size:,} bytes of keys and values, {taken:,} are in use, and the bound is "
                    f"{self.most_bytes:,}; try again later, or raise the bound"
                )
            self._reserved[id] = size

    def release(self, id: str) -> None:
        """Give back the bytes of a request; nothing happens if it has none.

        Args:
            id: Name of the request.
        """
        with self._lock:
            self._reserved.pop(id, None)
