"""`upcycle3d moe bam`: train specialists of a Hugging Face Llama, and mix them with their attentions to a mixture of experts.

Read next: `perception/moe/language/language_upcycling.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput, require
from ..perception.moe.attention.soft_attention import KeyValues
from ..perception.moe.language.language_models import load_language_model, score_texts
from ..perception.moe.language.language_upcycling import FfnRouting, MixOptions, mix_bam, write_model
from ..perception.moe.report import report_on
from .console import console, print_warning, run_command, write_json
from .language_options import LanguageOption, LanguageOptions, working_folder


@dataclass(frozen=True, kw_only=True)
class MoeBam:
    """Mix a Llama and its specialists: FFNs by choice, attentions by weight. Specialists are given, or trained on texts. Resumable."""

    seed_model: tyro.conf.Positional[Path]
    """Hugging Face folder of the dense model, the seed of all specialists. Nothing is downloaded."""
    out: Path
    """Folder of the job: `specialists/NAME` (Hugging Face folders) and `model`."""
    key_values: KeyValues = "expert"
    """Whether attention experts keep their own key and value maps, or share the mean: one cache instead of N, and slightly worse."""
    ffn: FfnRouting = "top1"
    """How FFN experts are chosen. `soft` computes all of them; it is the strongest and the most expensive."""
    uncorrected: bool = False
    """Do not multiply a top-1 FFN by the number of experts. The paper does not, and the mixture then starts much worse than the seed."""
    language: LanguageOption = LanguageOptions()
    """Texts, specialists and training."""
    json: Path | None = None
    """Also write the scores to this file as JSON."""


def command(config: MoeBam) -> None:
    """Mix a Llama and its specialists: upcycle3d moe bam LLAMA --texts code=a.txt law=b.txt --out DIR."""
    options = config.language
    if not options.specialists and not options.texts:
        raise InvalidInput(
            "there is nothing to mix: give --specialists FOLDER ..., or --texts NAME=FILE ... to train specialists on"
        )
    require(
        not config.uncorrected or config.ffn == "top1",
        f"--uncorrected changes nothing with --ffn {config.ffn}: only top1 is corrected; leave it out",
    )
    with working_folder(config.out):
        _make(config)


def _make(config: MoeBam) -> None:
    options = config.language
    source = load_language_model(config.seed_model)
    train, tests = options.read_texts(source)
    specialists = options.specialist_models(source, train, config.out / "specialists")
    mix = MixOptions(ffn=config.ffn, only=options.only, corrected=not config.uncorrected, seed=options.seed)
    made = mix_bam(source, specialists, mix, key_values=config.key_values)
    console.print(f"{made.plan}\n{made.attentions}\n{made.account}")
    scores = {}
    if tests:
        start = report_on(made.model, score_texts(tests), dense=source.model)
        console.print("before the joint training:\n" + str(start))
        scores["before"] = {s.domain: s.score for s in start.scores}
        for warning in start.warnings:
            print_warning(warning)
    steps = options.train_result(made.model, train)
    if steps:
        after = report_on(made.model, score_texts(tests), dense=source.model)
        console.print("after it:\n" + str(after))
        scores["after"] = {s.domain: s.score for s in after.scores}
        scores["dense"] = {s.domain: float(s.dense or 0) for s in after.scores}
    note = f"BAM of {len(specialists)} specialists and their seed, {steps} steps together; perplexity {scores.get('after')}"
    console.print(write_model(config.out / "model", made, source, "mixture", note=note), soft_wrap=True)
    console.print(
        f"compare it: upcycle3d moe baseline btx {config.seed_model} --ffn soft --specialists ... --texts ... --out OTHER",
        soft_wrap=True,
    )
    write_json(config.json, scores)


if __name__ == "__main__":
    sys.exit(run_command(command))
