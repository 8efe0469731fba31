"""`upcycle3d moe baseline`: the models that a mixture must be compared with, made and trained by the same code.

Read next: `perception/moe/language/language_upcycling.py`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro
from torch import Tensor

from ..core.errors import InvalidInput
from ..perception.moe.checkpoints.mixtral import MixtralLayout
from ..perception.moe.language.language_models import load_language_model, named_texts, perplexity
from ..perception.moe.language.language_upcycling import (
    BaselineMethod,
    FfnRouting,
    MixOptions,
    ModelFormat,
    TextPhase,
    held_out,
    make_baseline,
    read_specialists,
    token_domains,
    train_on,
    train_specialists,
    write_model,
)
from ..perception.moe.language.text_training import TextTraining, TokenDomains, router_loss_text
from .console import console, print_table, print_warning, run_command, write_json


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
    specialists: tuple[Path, ...] = ()
    """Folders of specialists, for `btx` and `soup`. Without them, specialists are trained on the texts."""
    texts: tuple[str, ...] = ()
    """Domains as NAME=FILE, to train on; their last tenth is for measuring."""
    general: str | None = None
    """Name of the text that gets no specialist, and of which a tenth is mixed into every specialist."""
    ffn: FfnRouting = "top2"
    """How experts are chosen. Only `top2` can be written as a Mixtral. `soft` with `btx` is the control that BAM must beat."""
    experts: int = 4
    """Number of experts of `sparse`, `drop` and `cluster`."""
    only: tuple[str, ...] = ()
    """Names or patterns of the FFNs to replace; all by default."""
    specialist_steps: int = 200
    """Steps of each specialist, or of each owner."""
    specialist_lr: float = 1e-4
    """Learning rate of specialists and owners."""
    mix_steps: int = 200
    """Steps on all texts in equal shares; 0 only builds the model."""
    mix_lr: float = 1e-4
    """Learning rate of these steps."""
    batch: int = 4
    """Rows per step."""
    length: int = 256
    """Tokens per row."""
    format: ModelFormat = "auto"
    """Form of the result: a Hugging Face `mixtral`, our own `mixture`, or what fits."""
    layout: MixtralLayout = "per_expert"
    """Names of a Mixtral's experts in its files: `per_expert` is what most programs read, `fused` what transformers 5 keeps in memory."""
    seed: int = 0
    """Decides routers and batches."""
    json: Path | None = None
    """Also write the scores to this file as JSON."""


def command(config: MoeBaseline) -> None:
    """Make a baseline: upcycle3d moe baseline sparse LLAMA --out DIR."""
    source = load_language_model(config.seed_model)
    train: TokenDomains | None = None
    tests: dict[str, Tensor] = {}
    if config.texts:
        train, tests = held_out(token_domains(source, named_texts(config.texts)))
        if config.general is not None and config.general not in train.tokens:
            raise InvalidInput(f"--general names {config.general!r}, and the texts are {', '.join(train.tokens)}")
    phase = TextPhase(
        steps=config.specialist_steps, lr=config.specialist_lr, batch=config.batch, length=config.length, seed=config.seed
    )
    folders = list(config.specialists)
    if not folders and train is not None and config.method in ("btx", "soup"):
        folders = train_specialists(source, train, phase, config.out / "specialists", general=config.general, say=console.print)
    options = MixOptions(ffn=config.ffn, only=config.only, seed=config.seed)
    made = make_baseline(
        config.method, source, read_specialists(folders), options, experts=config.experts, domains=train, owner=phase
    )
    console.print(f"{made.plan or 'dense'}\n{made.account}")
    dense = {name: perplexity(source.model, tokens) for name, tokens in tests.items()}
    before = {name: perplexity(made.model, tokens) for name, tokens in tests.items()}
    for name, value in before.items():
        if value > 2 * dense[name]:
            print_warning(f"perplexity of {name} is {value:.4g} before training, and {dense[name]:.4g} for the dense model")
    if train is not None and config.mix_steps and config.method not in ("soup", "flexolmo"):
        console.print(router_loss_text(made.model, TextTraining(steps=config.mix_steps)), soft_wrap=True)
        mix = TextPhase(steps=config.mix_steps, lr=config.mix_lr, batch=config.batch, length=config.length, seed=config.seed + 1)
        record = train_on(made.model, train, dict.fromkeys(train.tokens, 1.0), mix)
        console.print(f"trained: loss {record.losses[0]:.3f} -> {record.losses[-1]:.3f} in {record.cpu_seconds:.0f} CPU-s")
    after = {name: perplexity(made.model, tokens) for name, tokens in tests.items()}
    rows = [(name, f"{dense[name]:.3f}", f"{before[name]:.3f}", f"{after[name]:.3f}") for name in tests]
    if rows:
        print_table("perplexity", ("domain", "dense", "before training", "after"), rows)
    note = f"baseline {config.method}, experts chosen by {config.ffn}, {config.mix_steps} steps; perplexity {after}"
    console.print(write_model(config.out / "model", made, source, config.format, layout=config.layout, note=note), soft_wrap=True)
    write_json(config.json, {"dense": dense, "before": before, "after": after})


if __name__ == "__main__":
    sys.exit(run_command(command))
