"""`upcycle3d moe report`: what a language model, dense or a mixture, does on texts, what it costs, and its perplexity beside the dense model's.

Read next: `perception/moe/report.py`, which also reports on recall and on detectors.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput, require
from ..core.short_numbers import score_text, seconds_text
from ..perception.moe.attention.model_cost import model_cost
from ..perception.moe.language.language_models import (
    LanguageModel,
    holds_model,
    load_language_model,
    named_texts,
    require_model_folder,
)
from ..perception.moe.language.language_plans import cost_text
from ..perception.moe.language.phases import held_out, scored_part, token_domains
from ..perception.moe.language.text_scores import score_texts, text_rows
from ..perception.moe.report import MoeReport, report_on
from .console import console, print_table, print_warning, run_command, write_json
from .language_tables import finite, print_use


@dataclass(frozen=True, kw_only=True)
class MoeReportOptions:
    """Report on a language model: perplexity beside the dense model's, cost, trainable tensors, and the use of a mixture's experts."""

    model: tyro.conf.Positional[Path]
    """Folder of the model: a Hugging Face Mixtral, one with `mixture.safetensors`, a dense model, or the folder of a job with `model` in
    it."""
    texts: tuple[str, ...]
    """Domains as NAME=FILE. The last tenth of each is scored, which `moe bam` and `moe baseline` do not train on."""
    whole_texts: bool = False
    """Score the whole texts. Give it only for texts that were never trained on."""
    dense: Path | None = None
    """Hugging Face folder of the dense model, to compare with."""
    length: int | None = None
    """Tokens per row; 512 by default, or as many as the model has positions."""
    rows: int = 16
    """Largest number of rows of each text. They are spread over the part that is scored."""
    layers: bool = False
    """Also print every layer."""
    json: Path | None = None
    """Also write the report to this file as JSON."""


def command(config: MoeReportOptions) -> None:
    """Report on a language model: upcycle3d moe report DIR --dense LLAMA --texts code=a.txt law=b.txt."""
    texts = named_texts(config.texts)
    require(bool(texts), "a report needs texts: --texts NAME=FILE ...")
    require(config.rows >= 1, f"--rows must be 1 or more, found {config.rows}")
    require(
        config.length is None or config.length >= 2,
        f"--length must be 2 or more, found {config.length}: a row of one token has no next token",
    )
    folder = config.model
    if not holds_model(folder) and holds_model(folder / "model"):
        folder = folder / "model"
        console.print(f"{config.model} is the folder of a job; this is a report on {folder}")
    for path in (folder, *([] if config.dense is None else [config.dense])):
        require_model_folder(path)
    found = load_language_model(folder)
    dense = None if config.dense is None else load_language_model(config.dense, tokenizer=False)
    if dense is not None and dense.vocabulary != found.vocabulary:
        raise InvalidInput(
            f"the mixture knows {found.vocabulary} tokens and {config.dense} {dense.vocabulary}; give the model that it was made of"
        )
    domains = token_domains(found, texts)
    tests = domains.tokens if config.whole_texts else held_out(domains)[1]
    parts = {}
    for name, tokens in tests.items():
        rows = text_rows(found.model, tokens, length=config.length, most=config.rows)
        parts[name] = scored_part(tokens, domains.tokens[name], rows)
        console.print(f"{name}: scored on {parts[name]} tokens")
    report = report_on(
        found.model,
        score_texts(tests, length=config.length, most=config.rows),
        dense=None if dense is None else dense.model,
        experts=found.experts,
    )
    _print(report, found, dense, config)
    scores = [finite(asdict(score)) for score in report.scores]
    write_json(config.json, {**asdict(report), "scores": scores, "texts": parts})


def _print(report: MoeReport, found: LanguageModel, dense: LanguageModel | None, config: MoeReportOptions) -> None:
    rows = []
    for s in report.scores:
        beside = () if s.dense is None else (score_text(s.dense), seconds_text(s.dense_cpu_seconds))
        rows.append((s.domain, score_text(s.score), seconds_text(s.cpu_seconds), *beside))
    header = ("domain", "model", "CPU s", "dense", "CPU s of dense")
    print_table("perplexity and CPU seconds", header[: 3 if dense is None else 5], rows)
    print_use(report)
    if report.layers and not report.experts:
        console.print("the model has no names of its experts, so they have numbers")
    if not report.layers:
        console.print("the model is dense: it has no experts whose use could be shown")
    cost = model_cost(found.model)
    console.print(cost_text(cost if dense is None else model_cost(dense.model), cost), soft_wrap=True)
    console.print(f"trainable: {len(report.trained)} tensors with {report.trained_values:,} values")
    if config.layers:
        console.print(str(report), soft_wrap=True)
    for warning in report.warnings:
        print_warning(warning)


if __name__ == "__main__":
    sys.exit(run_command(command))
