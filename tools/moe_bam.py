"""`upcycle3d moe bam`: train specialists of a Hugging Face Llama, and mix them with their attentions to a mixture of experts.

Read next: `perception/moe/language/language_upcycling.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.config_json import config_to_json
from ..core.errors import require
from ..perception.moe.attention.soft_attention import KeyValues
from ..perception.moe.language.language_models import require_model_folder
from ..perception.moe.language.language_plans import FfnRouting, MixOptions, plan_bam
from ..perception.moe.language.language_upcycling import mix_bam
from .console import console, run_command
from .language_job import LanguageJob, run_job
from .language_options import LanguageOption, LanguageOptions


@dataclass(frozen=True, kw_only=True)
class MoeBam:
    """Mix a Llama (the seed) and its specialists: FFNs by choice, attentions by weight. Specialists are given, or trained on texts. A job
    that was stopped goes on with the same command."""

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
    """Also write method, settings, steps, costs and perplexities to this file as JSON."""


def command(config: MoeBam) -> None:
    """Mix a Llama and its specialists: upcycle3d moe bam LLAMA --texts code=a.txt law=b.txt --out DIR."""
    options = config.language
    files = options.check("bam", mixes=True, trains=True)
    require(
        not config.uncorrected or config.ffn == "top1",
        f"--uncorrected changes nothing with --ffn {config.ffn}: only top1 is corrected; leave it out",
    )
    require_model_folder(config.seed_model)
    mix = MixOptions(ffn=config.ffn, only=options.only, corrected=not config.uncorrected, seed=options.seed)
    run_job(
        LanguageJob(
            method="bam",
            mixes=True,
            trains=True,
            seed_model=config.seed_model,
            out=config.out,
            options=options,
            plan=lambda model, others: plan_bam(model, mix, others + 1, key_values=config.key_values),
            make=lambda source, models, _: mix_bam(source, models, mix, key_values=config.key_values),
            form="mixture",
            settings=config_to_json(config),
            json=config.json,
        ),
        files,
    )
    if not options.plan_only:
        console.print(
            f"compare it: upcycle3d moe baseline btx {config.seed_model} --ffn soft --specialists ... --texts ... --out OTHER",
            soft_wrap=True,
        )


if __name__ == "__main__":
    sys.exit(run_command(command))
