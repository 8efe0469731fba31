"""Score a language model on texts: its perplexity in rows of equal length.

Read next: `phases.py`, which keeps the end of every text for this.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from ....core.errors import require, require_counts
from .text_training import mean_loss, next_token_loss

_ROW = 512


def score_texts(
    tests: Mapping[str, Tensor], *, length: int | None = None, most: int = 16
) -> dict[str, Callable[[nn.Module], float]]:
    """Make what measures a model on texts, as `report_on` takes it.

    Args:
        tests: (T,) tokens of each domain.
        length: As for `perplexity`.
        most: As for `perplexity`.

    Returns:
        For each domain, what gives a model's perplexity.
    """

    def one(tokens: Tensor) -> Callable[[nn.Module], float]:
        return lambda model: perplexity(model, tokens, length=length, most=most)

    return {name: one(tokens) for name, tokens in tests.items()}


def longest_row(model: nn.Module) -> int:
    """Find the largest number of tokens in a row that a model was made for.

    Args:
        model: The model.

    Returns:
        The number of positions in its configuration; 2**24 where it names none.
    """
    return int(getattr(getattr(model, "config", None), "max_position_embeddings", None) or 2**24)


def check_row(model: nn.Module, length: int) -> None:
    """Refuse rows that are longer than a model was made for: learned positions end there, and computed ones give silently worse results.

    Args:
        model: The model.
        length: Tokens per row.

    Raises:
        InvalidInput: The rows are too long.
    """
    longest = longest_row(model)
    require(
        length <= longest, f"rows of {length} tokens are longer than the model's {longest} positions; lower the length (--length)"
    )


def perplexity(model: nn.Module, tokens: Tensor, *, length: int | None = None, most: int = 16) -> float:
    """Compute the perplexity of a text in rows of equal length, each read from its own start.

    Args:
        model: The model.
        tokens: (T,) tokens.
        length: Tokens per row; a shorter text is one row. None takes 512, or as many as the model has positions.
        most: Largest number of rows, spread over the text.

    Returns:
        Exponential of the mean loss per predicted token.

    Raises:
        InvalidInput: A row has fewer than two tokens or more than the model has positions, or there is none.
    """
    rows = text_rows(model, tokens, length=length, most=most)
    loss = mean_loss(model, rows, lambda m, ids: next_token_loss(m(ids).logits, ids))
    return float(torch.tensor(loss, dtype=torch.float64).exp())  # infinite or NaN for a wrecked model, where math.exp raises


def text_rows(model: nn.Module, tokens: Tensor, *, length: int | None = None, most: int = 16) -> list[Tensor]:
    """Cut the rows out of a text on which `perplexity` scores a model.

    Args:
        model: The model.
        tokens: (T,) tokens.
        length: As for `perplexity`.
        most: As for `perplexity`.

    Returns:
        Rows of (1, L) tokens.

    Raises:
        InvalidInput: As for `perplexity`.
    """
    length = min(_ROW, longest_row(model)) if length is None else length
    check_row(model, length)
    require_counts("perplexity", least=2, most=2**24, length=length, tokens=len(tokens))
    require_counts("perplexity", most=2**24, rows=most)
    length = min(length, len(tokens))
    count = max(1, min(most, len(tokens) // length))
    starts = torch.linspace(0, len(tokens) - length, count).long()
    return [tokens[start : start + length][None] for start in starts]
