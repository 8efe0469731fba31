"""`upcycle3d moe report`: what a mixture of experts does on texts, what it costs, and its perplexity beside the dense model's.

Read next: `perception/moe/report.py`, which also reports on recall and on detectors.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput
from ..perception.moe.language.language_models import load_language_model, named_texts, score_texts
from ..perception.moe.report import report_on
from .console import console, print_table, print_warning, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class MoeReportOptions:
    """Report on a language mixture: use of experts by domain, cost, trainable tensors, perplexity beside the dense model's."""

    model: tyro.conf.Positional[Path]
    """Folder of the mixture: a Hugging Face Mixtral, or one with `mixture.safetensors`."""
    texts: tuple[str, ...]
    """Domains as NAME=FILE."""
    dense: Path | None = None
    """Hugging Face folder of the dense model, to compare with."""
    length: int | None = None
    """Tokens per row; 512 by default, or as many as the model has positions."""
    rows: int = 16
    """Largest number of rows of each text."""
    layers: bool = False
    """Also print every layer."""
    json: Path | None = None
    """Also write the report to this file as JSON."""


def command(config: MoeReportOptions) -> None:
    """Report on a language mixture: upcycle3d moe report DIR --dense LLAMA --texts code=a.txt law=b.txt."""
    texts = named_texts(config.texts)
    if not texts:
        raise InvalidInput("a report needs texts: --texts NAME=FILE ...")
    mixture = load_language_model(config.model)
    dense = None if config.dense is None else load_language_model(config.dense, tokenizer=False)
    if dense is not None and dense.vocabulary != mixture.vocabulary:
        raise InvalidInput(
            f"the mixture knows {mixture.vocabulary} tokens and {config.dense} {dense.vocabulary}; give the model that it was made of"
        )
    tokens = {name: mixture.tokens(path) for name, path in texts.items()}
    report = report_on(
        mixture.model, score_texts(tokens, length=config.length, most=config.rows), dense=None if dense is None else dense.model
    )
    rows = []
    for s in report.scores:
        beside = ("-", "-") if s.dense is None else (f"{s.dense:.3f}", f"{(s.dense_cpu_seconds or 0):.1f}")
        rows.append((s.domain, f"{s.score:.3f}", f"{s.cpu_seconds:.1f}", *beside))
    print_table("perplexity and CPU seconds", ("domain", "mixture", "CPU s", "dense", "CPU s of dense"), rows)
    used = []
    for kind in ("ffn", "attention"):
        found = [layer for layer in report.layers if layer.kind == kind]
        for number, domain in enumerate(texts) if found else ():
            means = [sum(shares) / len(found) for shares in zip(*(layer.shares[number] for layer in found))]
            used.append((kind, domain, *(f"{100 * x:.0f} %" for x in means)))
        if found:
            told = 100 * sum(layer.information for layer in found) / len(found)
            console.print(f"{kind}: {len(found)} mixtures; the domain tells {told:.0f} % of the expert")
    widest = max(len(row) for row in used)
    print_table(
        "use of experts, mean over layers",
        ("part", "domain", *map(str, range(widest - 2))),
        [row + ("",) * (widest - len(row)) for row in used],
    )
    of_dense = "" if report.dense_parameters is None else f" (the dense model has {report.dense_parameters:,})"
    console.print(f"{report.parameters:,} parameters, {report.active:,} active per token{of_dense}")
    console.print(f"trainable: {len(report.trained)} tensors with {report.trained_values:,} values")
    if config.layers:
        console.print(str(report), soft_wrap=True)
    for warning in report.warnings:
        print_warning(warning)
    write_json(config.json, asdict(report))


if __name__ == "__main__":
    sys.exit(run_command(command))
