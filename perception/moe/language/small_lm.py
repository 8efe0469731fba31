"""A small decoder of text with Llama's parts, to try upcycling on without any download: RMS norm, rotary positions, gated FFN.

Its blocks have *parallel* attention (attention and FFN read the same normalized tokens, and both outputs are added), as in the BAM paper,
or *sequential* attention, as in Llama. Names and calls of its parts are those of Hugging Face's Llama, so everything that works here
works there. Read next: `text_training.py`, which trains either.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts
from ....core.tensor_value import shape_of
from ..attention.attention_calls import rotary

BlockLayout = Literal["parallel", "sequential"]


@dataclass(frozen=True, kw_only=True)
class SmallLmConfig:
    """Sizes of a small decoder."""

    vocabulary: int = 256
    """Number of tokens; 256 reads bytes."""
    width: int = 64
    """Width of the tokens; a multiple of twice the number of heads."""
    hidden: int = 128
    """Hidden width of the gated FFN."""
    layers: int = 3
    """Number of blocks."""
    heads: int = 4
    """Number of query heads."""
    kv_heads: int = 4
    """Number of key heads; it divides `heads`."""
    layout: BlockLayout = "parallel"
    """`parallel` as in the BAM paper, `sequential` as in Llama."""
    base: float = 10_000.0
    """Base of the rotary angles."""

    def __post_init__(self) -> None:
        require_counts("SmallLmConfig", vocabulary=self.vocabulary, width=self.width, hidden=self.hidden, layers=self.layers)
        require_counts("SmallLmConfig", heads=self.heads, kv_heads=self.kv_heads)
        require(self.layout in get_args(BlockLayout), f"SmallLmConfig.layout: parallel or sequential, found {self.layout!r}")
        require(
            self.width % (2 * self.heads) == 0 and self.heads % self.kv_heads == 0,
            f"width {self.width} must be a multiple of 2 x {self.heads} heads, and {self.kv_heads} key heads must divide them",
        )

    def build(self, seed: int) -> SmallLm:
        """Make the model.

        Args:
            seed: Number that the weights depend on.

        Returns:
            The model with random weights.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return SmallLm(self)


class RmsNorm(nn.Module):
    """Divides tokens by their root mean square."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        """Normalize.

        Args:
            x: (..., D).

        Returns:
            The same shape.
        """
        return F.rms_norm(x, (x.shape[-1],), self.weight, 1e-5)


class CausalAttention(nn.Module):
    """Grouped-query attention with rotary positions, called as Hugging Face's attentions are."""

    is_causal = True

    def __init__(self, config: SmallLmConfig) -> None:
        super().__init__()
        self.head_dim = config.width // config.heads
        self.num_heads, self.kv_heads, self.scaling = config.heads, config.kv_heads, self.head_dim**-0.5
        keys = config.kv_heads * self.head_dim
        self.q_proj, self.o_proj = (nn.Linear(config.width, config.width, bias=False) for _ in range(2))
        self.k_proj, self.v_proj = (nn.Linear(config.width, keys, bias=False) for _ in range(2))

    def forward(
        self, hidden_states: Tensor, position_embeddings: tuple[Tensor, Tensor], attention_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """Attend.

        Args:
            hidden_states: (B, L, D) tokens.
            position_embeddings: Cosines and sines, each (1 or B, L, head_dim).
            attention_mask: Additive or boolean mask of four dimensions; causal where it is None.

        Returns:
            (B, L, D), and None.
        """
        q, k, v = (
            m(hidden_states).unflatten(-1, (-1, self.head_dim)).transpose(1, 2) for m in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotary(*position_embeddings)(q, k)
        grouped = self.kv_heads != self.num_heads
        causal = attention_mask is None
        y = F.scaled_dot_product_attention(
            q, k, v, attn_mask=attention_mask, is_causal=causal, scale=self.scaling, enable_gqa=grouped
        )
        return self.o_proj(y.transpose(1, 2).flatten(2)), None


class GatedFfn(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the FFN.

        Args:
            x: (..., D).

        Returns:
            The same shape.
        """
        out: Tensor = self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class SmallLmBlock(nn.Module):
    """One block, parallel or sequential."""

    def __init__(self, config: SmallLmConfig) -> None:
        super().__init__()
        self.layout = config.layout
        self.input_layernorm = RmsNorm(config.width)
        self.self_attn: nn.Module = CausalAttention(config)
        self.post_attention_layernorm = None if config.layout == "parallel" else RmsNorm(config.width)
        self.mlp: nn.Module = GatedFfn(config.width, config.hidden)

    def forward(self, x: Tensor, position_embeddings: tuple[Tensor, Tensor]) -> Tensor:
        """Compute the block.

        Args:
            x: (B, L, D) tokens.
            position_embeddings: Cosines and sines.

        Returns:
            (B, L, D).
        """
        read = self.input_layernorm(x)
        attended: Tensor = self.self_attn(hidden_states=read, position_embeddings=position_embeddings)[0]
        if self.post_attention_layernorm is None:
            return x + attended + self.mlp(read)
        x = x + attended
        return x + self.mlp(self.post_attention_layernorm(x))

    def extra_repr(self) -> str:
        """Describe the block, for `print`.

        Returns:
            Its layout.
        """
        return f"layout={self.layout}"


@dataclass(frozen=True, kw_only=True, eq=False)
class LmOutput:
    """What a decoder returns; the name of the field is Hugging Face's."""

    logits: Tensor
    """(B, L, V) logits of the next token."""


class SmallLm(nn.Module):
    """A decoder: `model(ids).logits`.

    Example:
        model = SmallLmConfig(layers=2).build(seed=0)
        logits = model(torch.tensor([[72, 105]])).logits  # (1, 2, 256)
    """

    def __init__(self, config: SmallLmConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocabulary, config.width)
        self.layers = nn.ModuleList(SmallLmBlock(config) for _ in range(config.layers))
        self.norm = RmsNorm(config.width)
        self.lm_head = nn.Linear(config.width, config.vocabulary, bias=False)
        nn.init.normal_(self.embed_tokens.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> LmOutput:
        """Compute the logits of the next tokens.

        Args:
            input_ids: (B, L) int64 tokens.

        Returns:
            The logits.

        Raises:
            InvalidInput: The tokens have another shape.
        """
        if input_ids.ndim != 2:
            raise InvalidInput(f"a decoder takes tokens of shape (B, L), found {shape_of(input_ids)}")
        x = self.embed_tokens(input_ids)
        positions = self._angles(input_ids.shape[1], x)
        for layer in self.layers:
            x = layer(x, positions)
        return LmOutput(logits=self.lm_head(self.norm(x)))

    def _angles(self, length: int, like: Tensor) -> tuple[Tensor, Tensor]:
        head = self.config.width // self.config.heads
        steps = self.config.base ** (-torch.arange(0, head, 2, device=like.device, dtype=torch.float32) / head)
        angle = torch.outer(torch.arange(length, device=like.device, dtype=torch.float32), steps)[None]
        angle = torch.cat([angle, angle], -1)
        return angle.cos().to(like.dtype), angle.sin().to(like.dtype)
