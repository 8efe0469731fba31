"""`upcycle3d moe bam`: train specialists of a Hugging Face Llama, and mix them with their attentions to a mixture of experts.

Read next: `perception/moe/language/language_upcycling.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from ..core.errors import InvalidInput
from ..perception.moe.attention.soft_attention import KeyValues
from ..perception.moe.language.language_models import LanguageModel, load_language_model, named_texts, score_texts
from ..perception.moe.language.language_upcycling import (
    FfnRouting,
    MixOptions,
    TextPhase,
    held_out,
    mix_bam,
    read_specialists,
    token_domains,
    train_on,
    train_specialists,
    write_model,
)
from ..perception.moe.language.text_training import TextTraining, TokenDomains, router_loss_text
from ..perception.moe.report import report_on
from .console import console, print_warning, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class MoeBam:
    """Mix a Llama and its specialists: FFNs by choice, attentions by weight. Specialists are given, or trained on texts. Resumable."""

    seed_model: tyro.conf.Positional[Path]
    """Hugging Face folder of the dense model, the seed of all specialists. Nothing is downloaded."""
    out: Path
    """Folder of the job: `specialists/NAME` (Hugging Face folders) and `model`."""
    specialists: tuple[Path, ...] = ()
    """Folders of models that were trained further from the seed. Without them, specialists are trained on the texts."""
    texts: tuple[str, ...] = ()
    """Domains as NAME=FILE. They train specialists and the mixture, and their last tenth measures both."""
    general: str | None = None
    """Name of the text of which a tenth is mixed into every specialist, against forgetting. It gets no specialist: the seed is its expert."""
    key_values: KeyValues = "expert"
    """Whether attention experts keep their own key and value maps, or share the mean: one cache instead of N, and slightly worse."""
    ffn: FfnRouting = "top1"
    """How FFN experts are chosen. `soft` computes all of them; it is the strongest and the most expensive."""
    uncorrected: bool = False
    """Do not multiply a top-1 FFN by the number of experts. The paper does not, and the mixture then starts much worse than the seed."""
    only: tuple[str, ...] = ()
    """Names or patterns of the parts to replace, such as `model.layers.2?.*`; all by default."""
    specialist_steps: int = 200
    """Steps of each specialist."""
    specialist_lr: float = 1e-4
    """Learning rate of the specialists."""
    mix_steps: int = 200
    """Steps of the mixture on all texts in equal shares; 0 only builds it."""
    mix_lr: float = 1e-4
    """Learning rate of the mixture."""
    batch: int = 4
    """Rows per step."""
    length: int = 256
    """Tokens per row."""
    seed: int = 0
    """Decides routers and batches."""
    json: Path | None = None
    """Also write the scores to this file as JSON."""


def command(config: MoeBam) -> None:
    """Mix a Llama and its specialists: upcycle3d moe bam LLAMA --texts code=a.txt law=b.txt --out DIR."""
    if not config.specialists and not config.texts:
        raise InvalidInput(
            "there is nothing to mix: give --specialists FOLDER ..., or --texts NAME=FILE ... to train specialists on"
        )
    source = load_language_model(config.seed_model)
    train, tests = _texts(config, source)
    folders = list(config.specialists)
    if not folders and train is not None:
        phase = TextPhase(
            steps=config.specialist_steps, lr=config.specialist_lr, batch=config.batch, length=config.length, seed=config.seed
        )
        folders = train_specialists(source, train, phase, config.out / "specialists", general=config.general, say=console.print)
    options = MixOptions(ffn=config.ffn, only=config.only, corrected=not config.uncorrected, seed=config.seed)
    made = mix_bam(source, read_specialists(folders), options, key_values=config.key_values)
    console.print(f"{made.plan}\n{made.attentions}\n{made.account}")
    scores = {}
    if tests:
        start = report_on(made.model, score_texts(tests), dense=source.model)
        console.print("before the joint training:\n" + str(start))
        scores["before"] = {s.domain: s.score for s in start.scores}
        for warning in start.warnings:
            print_warning(warning)
    if train is not None and config.mix_steps:
        console.print(router_loss_text(made.model, TextTraining(steps=config.mix_steps)), soft_wrap=True)
        phase = TextPhase(
            steps=config.mix_steps, lr=config.mix_lr, batch=config.batch, length=config.length, seed=config.seed + 1
        )
        record = train_on(made.model, train, dict.fromkeys(train.tokens, 1.0), phase)
        console.print(f"mixture: loss {record.losses[0]:.3f} -> {record.losses[-1]:.3f} in {record.cpu_seconds:.0f} CPU-s")
        after = report_on(made.model, score_texts(tests), dense=source.model)
        console.print("after it:\n" + str(after))
        scores["after"] = {s.domain: s.score for s in after.scores}
        scores["dense"] = {s.domain: float(s.dense or 0) for s in after.scores}
    note = (
        f"BAM of {len(folders)} specialists and their seed, {config.mix_steps} steps together; perplexity {scores.get('after')}"
    )
    console.print(write_model(config.out / "model", made, source, "mixture", note=note), soft_wrap=True)
    console.print(
        f"compare it: upcycle3d moe baseline btx {config.seed_model} --ffn soft --specialists ... --texts ... --out OTHER",
        soft_wrap=True,
    )
    write_json(config.json, scores)


def _texts(config: MoeBam, source: LanguageModel) -> tuple[TokenDomains | None, dict[str, torch.Tensor]]:
    if not config.texts:
        return None, {}
    domains = token_domains(source, named_texts(config.texts))
    if config.general is not None and config.general not in domains.tokens:
        raise InvalidInput(f"--general names {config.general!r}, and the texts are {', '.join(domains.tokens)}")
    return held_out(domains)


if __name__ == "__main__":
    sys.exit(run_command(command))
