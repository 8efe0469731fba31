"""`upcycle3d moe baseline`: the models that a mixture must be compared with, made and trained by the same code.

Read next: `perception/moe/language/language_upcycling.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import nn

from ..core.config_json import config_to_json
from ..core.errors import require
from ..perception.moe.checkpoints.mixtral import MixtralLayout
from ..perception.moe.language.language_models import LanguageModel, require_model_folder
from ..perception.moe.language.language_plans import (
    BaselineMethod,
    FfnRouting,
    LanguagePlan,
    MixOptions,
    ModelFormat,
    check_experts,
    plan_baseline,
)
from ..perception.moe.language.language_upcycling import make_baseline
from ..perception.moe.language.text_training import TokenDomains
from ..perception.moe.upcycling.upcyclers import Upcycled
from .console import console, run_command
from .language_job import LanguageJob, run_job
from .language_options import LanguageOption, LanguageOptions


@dataclass(frozen=True, kw_only=True)
class MoeBaseline:
    """Make a baseline of a Llama: sparse upcycling, Drop-upcycling, clusters, BTX, soup, a wider or a continued dense model, FlexOlmo."""

    method: tyro.conf.Positional[BaselineMethod]
    """`sparse`: copies; `drop`: copies with half of their units drawn again; `cluster`: copies that follow clusters of tokens; `btx`:
    the seed and its specialists as experts; `soup`: the average of the seed and its specialists; `wide`: dense, as wide as the active
    experts; `continued`: the dense model, trained on; `flexolmo`: experts trained apart, joined with the seed's without joint training."""
    seed_model: tyro.conf.Positional[Path]
    """Hugging Face folder of the dense model. Nothing is downloaded."""
    out: Path
    """Folder of the job: `specialists/NAME` and `model`, as a Hugging Face Mixtral where the model is one."""
    ffn: FfnRouting = "top2"
    """How experts are chosen. Only `top2` can be written as a Mixtral. `soft` with `btx` is the control that BAM must beat."""
    experts: int = 4
    """Number of experts of `sparse`, `drop` and `cluster`."""
    language: LanguageOption = LanguageOptions()
    """Texts, specialists and training. `sparse`, `drop`, `cluster`, `wide` and `continued` need no specialists."""
    format: ModelFormat = "auto"
    """Form of the result: a Hugging Face `mixtral`, our own `mixture`, or what fits."""
    layout: MixtralLayout = "per_expert"
    """Names of a Mixtral's experts in its files: `per_expert` is what most programs read, `fused` what transformers 5 keeps in memory."""
    json: Path | None = None
    """Also write method, settings, steps, costs and perplexities to this file as JSON."""


def _require_effect(config: MoeBaseline) -> None:
    """Refuse options that would change nothing, and those that do not fit together, before anything is loaded."""
    method, options = config.method, config.language
    mixes, dense = method in ("btx", "soup"), method in ("soup", "continued")
    copies = method in ("sparse", "drop", "cluster") or (method == "wide" and config.ffn == "soft")
    for option, given, used in (
        ("--ffn", config.ffn != "top2", not dense and method != "flexolmo"),
        ("--experts", config.experts != 4, copies),
        ("--specialists", bool(options.specialists), mixes),
        ("--general", options.general is not None, mixes and not options.specialists),
        ("--only", bool(options.only), not dense),
        ("--format", config.format != "auto", not dense),
        ("--layout", config.layout != "per_expert", not dense and method != "wide" and config.format != "mixture"),
    ):
        require(used or not given, f"{option} changes nothing for {method} with these options; leave it out")
    if config.format == "mixtral":
        require(method != "wide", "wide is no Mixtral: it has one expert per block; give --format mixture")
        require(
            config.ffn == "top2",
            f"{method} with --ffn {config.ffn} is no Mixtral, whose blocks choose 2 experts; give --format mixture, or take --ffn top2",
        )
    if copies:
        check_experts(config.experts, config.ffn)
    require(
        method != "cluster" or config.ffn != "soft",
        "cluster sends each token to its cluster, so --ffn soft does not fit; use --ffn top1 or --ffn top2",
    )


def command(config: MoeBaseline) -> None:
    """Make a baseline: upcycle3d moe baseline sparse LLAMA --out DIR."""
    method, options = config.method, config.language
    _require_effect(config)
    mixes, owners = method in ("btx", "soup"), method == "flexolmo"
    files = options.check(method, mixes=mixes, trains=method not in ("soup", "flexolmo"), owners=owners)
    require(bool(files) or method not in ("cluster", "flexolmo"), f"{method} looks at texts: give --texts NAME=FILE ...")
    require_model_folder(config.seed_model)
    mix = MixOptions(ffn=config.ffn, only=options.only, seed=options.seed)

    def plan(model: nn.Module, others: int) -> LanguagePlan:
        return plan_baseline(method, model, mix, others + 1 if mixes or owners else config.experts, form=config.format)

    def make(source: LanguageModel, specialists: Sequence[nn.Module], train: TokenDomains | None) -> Upcycled:
        owner = options.specialist_phase()
        return make_baseline(
            method, source, specialists, mix, experts=config.experts, domains=train, owner=owner, say=console.print
        )

    run_job(
        LanguageJob(
            method=method,
            mixes=mixes,
            trains=method not in ("soup", "flexolmo"),
            owners=owners,
            seed_model=config.seed_model,
            out=config.out,
            options=options,
            plan=plan,
            make=make,
            form=config.format,
            layout=config.layout,
            settings=config_to_json(config),
            json=config.json,
        ),
        files,
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
