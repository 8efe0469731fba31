"""The tables that `upcycle3d moe bam`, `moe baseline` and `moe report` share: perplexity, use of the experts and cost."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from ..core.short_numbers import score_text, seconds_text
from ..perception.moe.report import MoeReport
from .console import console, print_table


def print_perplexities(
    dense: Mapping[str, float], before: Mapping[str, float], after: Mapping[str, float] | None, title: str
) -> None:
    """Print the perplexity of each domain's held-out part.

    Args:
        dense: Perplexity of the dense model by domain.
        before: Perplexity of the result before it was trained.
        after: Perplexity after that; None where it was not trained, which leaves the column out.
        title: What the result is.
    """
    header = ("domain", "dense", "result") if after is None else ("domain", "dense", "before training", "after training")
    rows = [[name, *(score_text(part[name]) for part in (dense, before, after) if part is not None)] for name in dense]
    print_table(f"perplexity: {title}", header, rows)


def print_specialists(dense: Mapping[str, float], specialists: Mapping[str, Mapping[str, float]]) -> None:
    """Print the perplexity of every specialist on every domain: one that is not best on its own text cannot be trusted.

    Args:
        dense: Perplexity of the seed by domain.
        specialists: The same of each specialist, by its name.
    """
    rows = [[name, score_text(dense[name]), *(score_text(own[name]) for own in specialists.values())] for name in dense]
    print_table("perplexity of specialists", ("domain", "seed", *specialists), rows)


def print_use(report: MoeReport) -> None:
    """Print how the experts are used, as the mean over the layers. A dense model has no such table.

    Args:
        report: The report.
    """
    used: list[list[str]] = []
    for kind in ("ffn", "attention"):
        found = [layer for layer in report.layers if layer.kind == kind]
        for number, score in enumerate(report.scores) if found else ():
            means = [sum(shares) / len(found) for shares in zip(*(layer.shares[number] for layer in found))]
            used.append([kind, score.domain, *(f"{100 * x:.0f} %" for x in means)])
        if found:
            told = 100 * sum(layer.information for layer in found) / len(found)
            console.print(f"{kind}: {len(found)} mixtures; the domain tells {told:.0f} % of the expert")
    if not used:
        return
    widest = max(len(row) for row in used) - 2
    names = report.experts if len(report.experts) == widest else [str(number) for number in range(widest)]
    rows = [row + [""] * (widest + 2 - len(row)) for row in used]
    print_table("use of experts, mean over layers", ("part", "domain", *names), rows)


def seconds_line(specialists: Mapping[str, float | None], making: float, training: float | None) -> str:
    """Say what a job took.

    Args:
        specialists: CPU seconds of each specialist's training; None where nobody stored them.
        making: CPU seconds of making the result, the training of owners included.
        training: CPU seconds of the joint training; None where there was none.

    Returns:
        One line.
    """
    parts: Sequence[str] = [f"{name} {seconds_text(seconds)}" for name, seconds in specialists.items()]
    said = [f"specialists {', '.join(parts)}"] if parts else []
    said += [f"making the result {seconds_text(making)}"]
    said += [] if training is None else [f"training it {seconds_text(training)}"]
    return f"CPU seconds: {'; '.join(said)}"


def finite(value: Any) -> Any:
    """Write infinite numbers and NaN as text, because JSON has neither: a wrecked model has such a perplexity.

    Args:
        value: A number or a dictionary with more of them.

    Returns:
        The same with text in these places.
    """
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value
