"""The phases of training of a language mixture: which texts, how long, and the tokens that are kept for tests.

Read next: `text_training.py`, the steps of a phase.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ....core.config_json import Json, config_to_json
from ....core.errors import require_counts, require_numbers
from ....core.tensor_file import content_digest
from ..layers.precision import Precision
from ..upcycling.upcyclers import saved_tensors
from .language_models import LanguageModel
from .phase_file import PhaseFile
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
    model: nn.Module,
    domains: TokenDomains,
    shares: Mapping[str, float],
    phase: TextPhase,
    *,
    decay: float = 0.1,
    say: Callable[[str], None] | None = None,
    kept_at: Path | None = None,
) -> PhaseRecord:
    """Train a language model on a mixture of domains.

    Args:
        model: The model. It is changed, and in evaluation mode afterwards.
        domains: Tokens by domain.
        shares: Share of each.
        phase: Steps, rate and rows.
        decay: Weight decay.
        say: Gets a line after every tenth of the steps.
        kept_at: File of the phase, with which a phase that was stopped goes on; None begins again. Delete it when the model is written.

    Returns:
        Losses and CPU time.

    Raises:
        InvalidInput: The loss is no longer finite, or the file belongs to another phase.
    """

    def batch(step: int) -> Tensor:
        return domains.batch(shares, count=phase.batch, length=phase.length, seed=phase.seed, step=step)

    def loss(m: nn.Module, ids: Tensor) -> Tensor:
        return next_token_loss(m(ids).logits, ids)

    config = TextTraining(steps=phase.steps, lr=phase.lr, weight_decay=decay, precision=phase.precision)
    file = None if kept_at is None else PhaseFile(kept_at, _depends(model, domains, shares, phase, decay))
    # dropout must not depend on what ran before: a job that is continued gives the same model
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(phase.seed)
        record = train_phase(model, batch, loss, config, say=say, file=file)
    model.eval()
    return record


def speaker(say: Callable[[str], None], who: str) -> Callable[[str], None]:
    """Put a name in front of lines.

    Args:
        say: Gets the lines.
        who: Whose lines they are, such as "specialist code".

    Returns:
        What takes lines without the name.
    """

    def tell(text: str) -> None:
        say(f"{who}: {text}")

    return tell


def _depends(
    model: nn.Module, domains: TokenDomains, shares: Mapping[str, float], phase: TextPhase, decay: float
) -> dict[str, Json]:
    """All that decides the result of a phase."""
    return {
        "model": content_digest(saved_tensors(model)),
        "texts": {name: content_digest({name: domains.tokens[name]}) for name in shares},
        "shares": list(shares.items()),  # the batches depend on the order
        "training": config_to_json(phase),
        "decay": decay,
    }


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
        Tokens to train on, and tokens to test. A text of a few tokens is both.
    """
    cut = {name: max(2, round(len(tokens) * (1 - share))) for name, tokens in domains.tokens.items()}
    tests = {name: tokens[cut[name] :] if len(tokens) - cut[name] > 1 else tokens for name, tokens in domains.tokens.items()}
    return TokenDomains({name: tokens[: cut[name]] for name, tokens in domains.tokens.items()}), tests


def scored_part(test: Tensor, whole: Tensor, rows: Sequence[Tensor]) -> str:
    """Say which part of a text a score is of.

    Args:
        test: (t,) tokens that are scored.
        whole: (T,) tokens of the whole text.
        rows: The rows that are scored, from `text_rows`.

    Returns:
        Words such as "2 rows of 64 tokens out of the last 130 of 1300".
    """
    part = f"the last {len(test)} of {len(whole)}" if len(test) < len(whole) else f"all {len(whole)}"
    return f"{len(rows)} {'row' if len(rows) == 1 else 'rows'} of {rows[0].shape[-1]} tokens out of {part}"
