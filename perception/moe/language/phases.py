"""The phases of training of a language mixture: which texts, how long, and the tokens that are kept for tests.

Read next: `text_training.py`, the steps of a phase.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ....core.errors import require_counts, require_numbers
from ..layers.precision import Precision
from .language_models import LanguageModel
from .text_training import PhaseRecord, TextTraining, TokenDomains, next_token_loss, train_phase


@dataclass(frozen=True, kw_only=True)
class TextPhase:
    """Data and length of a phase of training."""

    steps: int
    """Number of steps."""
    lr: float = 1e-4
    """Learning rate."""
    batch: int = 4
    """Rows per step."""
    length: int = 256
    """Tokens per row."""
    precision: Precision = "float32"
    """Type of the matrix products."""
    seed: int = 0
    """Number that the batches depend on."""

    def __post_init__(self) -> None:
        require_counts("TextPhase", least=0, most=10**9, steps=self.steps)
        require_counts("TextPhase", batch=self.batch)
        require_counts("TextPhase", least=2, length=self.length)
        require_numbers("TextPhase", least=0.0, most=1e6, lr=self.lr)


def train_on(
    model: nn.Module, domains: TokenDomains, shares: Mapping[str, float], phase: TextPhase, *, decay: float = 0.1
) -> PhaseRecord:
    """Train a language model on a mixture of domains.

    Args:
        model: The model. It is changed, and in evaluation mode afterwards.
        domains: Tokens by domain.
        shares: Share of each.
        phase: Steps, rate and rows.
        decay: Weight decay.

    Returns:
        Losses and CPU time.
    """

    def batch(step: int) -> Tensor:
        return domains.batch(shares, count=phase.batch, length=phase.length, seed=phase.seed, step=step)

    def loss(m: nn.Module, ids: Tensor) -> Tensor:
        return next_token_loss(m(ids).logits, ids)

    config = TextTraining(steps=phase.steps, lr=phase.lr, weight_decay=decay, precision=phase.precision)
    # dropout must not depend on what ran before: a job that is continued gives the same model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(phase.seed)
        record = train_phase(model, batch, loss, config)
    model.eval()
    return record


def token_domains(source: LanguageModel, texts: Mapping[str, Path]) -> TokenDomains:
    """Read texts as tokens of domains.

    Args:
        source: The model whose tokenizer reads them.
        texts: File of each domain.

    Returns:
        The tokens.
    """
    return TokenDomains({name: source.tokens(path) for name, path in texts.items()})


def held_out(domains: TokenDomains, share: float = 0.1) -> tuple[TokenDomains, dict[str, Tensor]]:
    """Keep the end of every text for tests.

    Args:
        domains: Tokens by domain.
        share: Share that is kept.

    Returns:
        Tokens to train on, and tokens to test.
    """
    cut = {name: max(2, round(len(tokens) * (1 - share))) for name, tokens in domains.tokens.items()}
    tests = {name: tokens[cut[name] :] if len(tokens) - cut[name] > 1 else tokens for name, tokens in domains.tokens.items()}
    return TokenDomains({name: tokens[: cut[name]] for name, tokens in domains.tokens.items()}), tests
