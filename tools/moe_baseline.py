"""`upcycle3d moe baseline`: the models that a mixture must be compared with, made and trained by the same code.

Read next: `perception/moe/language/language_upcycling.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.errors import require
from ..perception.moe.checkpoints.mixtral import MixtralLayout
from ..perception.moe.language.language_models import load_language_model, perplexity
from ..perception.moe.language.language_upcycling import (
    BaselineMethod,
    FfnRouting,
    MixOptions,
    ModelFormat,
    make_baseline,
    write_model,
)
from .console import console, print_table, print_warning, run_command, write_json
from .language_options import LanguageOption, LanguageOptions, working_folder


@dataclass(frozen=True, kw_only=True)
class MoeBaseline:
    """Make a baseline of a Llama: sparse upcycling, Drop-upcycling, clusters, BTX, soup, a wider or a continued dense model, FlexOlmo."""

    method: tyro.conf.Positional[BaselineMethod]
    """`sparse`: copies; `drop`: copies with half of their units drawn again; `cluster`: copies that follow clusters of tokens; `btx`:
    specialists as experts; `soup`: the average; `wide`: dense, as wide as the active experts; `continued`: the dense model, trained on;
    `flexolmo`: experts trained apart, joined without joint training."""
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
    """Also write the scores to this file as JSON."""


def _require_effect(config: MoeBaseline) -> None:
    """Refuse options that would change nothing, and forms that the result cannot have, before anything is computed."""
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
    require(
        config.format != "mixtral" or (method != "wide" and config.ffn == "top2"),
        f"{method} with --ffn {config.ffn} is no Mixtral, whose blocks choose 2 experts; leave out --format, or take --ffn top2",
    )


def command(config: MoeBaseline) -> None:
    """Make a baseline: upcycle3d moe baseline sparse LLAMA --out DIR."""
    _require_effect(config)
    with working_folder(config.out):
        _make(config)


def _make(config: MoeBaseline) -> None:
    options = config.language
    source = load_language_model(config.seed_model)
    train, tests = options.read_texts(source)
    specialists = options.specialist_models(source, train, config.out / "specialists") if config.method in ("btx", "soup") else []
    mix = MixOptions(ffn=config.ffn, only=options.only, seed=options.seed)
    owner = options.specialist_phase()
    made = make_baseline(config.method, source, specialists, mix, experts=config.experts, domains=train, owner=owner)
    console.print(f"{made.plan or 'dense'}\n{made.account}")
    dense = {name: perplexity(source.model, tokens) for name, tokens in tests.items()}
    before = {name: perplexity(made.model, tokens) for name, tokens in tests.items()}
    for name, value in before.items():
        if not value <= 2 * dense[name]:  # NaN is worse than anything
            print_warning(f"perplexity of {name} is {value:.4g} before training, and {dense[name]:.4g} for the dense model")
    steps = 0 if config.method in ("soup", "flexolmo") else options.train_result(made.model, train)
    after = {name: perplexity(made.model, tokens) for name, tokens in tests.items()}
    rows = [(name, f"{dense[name]:.3f}", f"{before[name]:.3f}", f"{after[name]:.3f}") for name in tests]
    if rows:
        print_table("perplexity", ("domain", "dense", "before training", "after"), rows)
    note = f"baseline {config.method}, experts chosen by {config.ffn}, {steps} steps; perplexity {after}"
    console.print(write_model(config.out / "model", made, source, config.format, layout=config.layout, note=note), soft_wrap=True)
    write_json(config.json, {"dense": dense, "before": before, "after": after})


if __name__ == "__main__":
    sys.exit(run_command(command))
