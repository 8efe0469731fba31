"""How the next token is chosen from logits: the best one, or a draw from a generator that belongs to one request.

A request draws from a generator with its own seed, so its text does not depend on what else is computed in the same batch.
Read next: `text_stream.py`, which turns tokens into text.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ....core.errors import NonFiniteValue, require_counts, require_numbers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are chosen."""

    temperature: float = 1.0
    """Divides the logits; 0 takes the best token."""
    top_p: float = 1.0
    """Keeps the most probable tokens whose probabilities reach this sum, at least one."""
    seed: int = 0
    """Decides all draws of the request."""

    def __post_init__(self) -> None:
        require_numbers("Sampling", least=0.0, most=100.0, temperature=self.temperature)
        require_numbers("Sampling", least=1e-6, most=1.0, top_p=self.top_p)
        require_counts("Sampling", least=0, most=2**63 - 1, seed=self.seed)


class Sampler:
    """Chooses the tokens of one request."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._generator = torch.Generator().manual_seed(sampling.seed)

    def choose(self, logits: Tensor) -> int:
        """Choose the next token.

        Args:
            logits: (V,) logits.

        Returns:
            The token. Of equal best logits the smaller number wins.

        Raises:
            NonFiniteValue: A logit is NaN or infinite.
        """
        if not bool(logits.isfinite().all()):
            raise NonFiniteValue(
                "the model computed NaN or infinite logits; its weights are damaged, or the numbers too small for it"
            )
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        probs = (logits.double().cpu() / self.sampling.temperature).softmax(0)
        if self.sampling.top_p < 1:
            probs = nucleus(probs, self.sampling.top_p)
        return int(torch.multinomial(probs, 1, generator=self._generator))


def nucleus(probs: Tensor, top_p: float) -> Tensor:
    """Set improbable tokens to 0: keep the most probable ones whose probabilities reach a sum.

    Args:
        probs: (V,) probabilities.
        top_p: The sum.

    Returns:
        (V,) probabilities of the kept tokens, which sum to 1.
    """
    ordered, order = probs.sort(descending=True, stable=True)
    before = ordered.cumsum(0) - ordered
    kept = torch.zeros_like(probs).scatter(0, order, ordered * (before < top_p))
    return kept / kept.sum()
