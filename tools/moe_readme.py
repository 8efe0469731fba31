"""`upcycle3d moe readme`: carve experts for domains out of a Hugging Face Llama, and teach a router that decides before the model runs.

Read next: `perception/moe/serving/language_carving.py`.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import tyro

from ..core.errors import InvalidInput
from ..core.new_folder import new_folder, require_empty
from ..core.short_numbers import score_text
from ..perception.moe.carving.alternating import AlternatingConfig
from ..perception.moe.carving.units import units_of_ratio
from ..perception.moe.checkpoints.carved_models import LoadedCarved, save_carved
from ..perception.moe.checkpoints.checkpoint import BaseModel
from ..perception.moe.language.language_models import (
    LanguageModel,
    copy_tokenizer,
    load_language_model,
    named_texts,
    require_model_folder,
)
from ..perception.moe.language.phases import held_out, token_domains
from ..perception.moe.layers.precision import Precision
from ..perception.moe.serving.language_carving import LanguageCarving, carve_language
from ..perception.moe.serving.llama_backbone import LlamaShape
from ..perception.moe.serving.served_models import write_served
from ..perception.moe.surgery.replacement import plan_replacement
from .console import console, print_table, run_command, write_json
from .language_options import working_folder
from .language_tables import finite

CARVED_NAME = "carved.safetensors"
"""Name of the file with the carved model in its form to train."""


@dataclass(frozen=True, kw_only=True)
class MoeReadme:
    """Carve a Llama into an expert for each text: measure activity, split, train the pre-gate, recover, compare with pooled pruning."""

    seed_model: tyro.conf.Positional[Path]
    """Hugging Face folder of the dense Llama or Mistral. Nothing is downloaded."""
    texts: tuple[str, ...]
    """Domains as NAME=FILE, two or more. The last tenth of each measures the result."""
    out: Path
    """Folder of the job. `model` holds the files to serve, the carved model and the tokenizer."""
    ratio: float = 0.5
    """Share of each FFN's units that a token uses."""
    gate_steps: int = 200
    """Steps of the pre-gate in each round."""
    rounds: int = 1
    """Rounds of alternating training. The paper sees no gain for the router after two."""
    expert_steps: int = 0
    """Recovery steps of each round, for the carved model and for pooled pruning alike; 0 keeps the dense model's weights."""
    gate_lr: float = 5e-3
    """Learning rate of the pre-gate."""
    expert_lr: float = 5e-5
    """Learning rate of the recovery."""
    gate_width: int = 128
    """Width of the pre-gate."""
    rows: int = 16
    """Rows of each text from which activity is measured."""
    batch: int = 4
    """Rows per step."""
    length: int = 256
    """Tokens per row."""
    precision: Precision = "float32"
    """Type of the matrix products in training. `bfloat16` is faster on processors with units for it. Scores are in float32."""
    seed: int = 0
    """Decides router and batches."""
    plan_only: bool = False
    """Say what would be carved, and stop."""
    json: Path | None = None
    """Also write the numbers to this file as JSON."""


def command(config: MoeReadme) -> None:
    """Carve experts out of a Llama: upcycle3d moe readme LLAMA --texts code=a.txt law=b.txt --ratio 0.5 --out DIR."""
    files = named_texts(config.texts)
    if len(files) < 2:
        raise InvalidInput("experts for domains need two texts or more: --texts NAME=FILE NAME=FILE")
    training = AlternatingConfig(
        rounds=config.rounds,
        router_steps=config.gate_steps,
        expert_steps=config.expert_steps,
        router_lr=config.gate_lr,
        expert_lr=config.expert_lr,
        precision=config.precision,
        seed=config.seed,
    )
    carving = LanguageCarving(
        ratio=config.ratio,
        rows=config.rows,
        gate_width=config.gate_width,
        length=config.length,
        batch=config.batch,
        training=training,
    )
    require_model_folder(config.seed_model)
    if not config.plan_only:
        require_empty(config.out / "model")  # before anything is loaded
    source = load_language_model(config.seed_model)
    LlamaShape.of(source.model)
    if config.plan_only:
        console.print(_plan(source, config, list(files)), soft_wrap=True)
        return
    with working_folder(config.out):
        _carve(config, carving, source)


def _plan(source: LanguageModel, config: MoeReadme, names: list[str]) -> str:
    plan = plan_replacement(source.model, experts=len(names), active=1)
    widths = sorted({site.width_hidden for site in plan.sites})
    kept = ", ".join(f"{units_of_ratio(width, config.ratio)} of {width}" for width in widths)
    dense = sum(plan.site_parameters)
    return "\n".join(
        [
            f"{len(plan.sites)} FFNs with {dense:,} of the model's {plan.model_parameters:,} parameters are carved into "
            f"{len(names)} experts: {', '.join(names)}",
            f"a token uses {kept} units of each FFN; which of them all experts share depends on the texts",
            f"{config.rounds} rounds of {config.gate_steps} steps of the pre-gate and {config.expert_steps} of recovery, "
            f"{config.batch} rows of {config.length} tokens each",
            "--plan-only: nothing was measured, trained or written",
        ]
    )


def _carve(config: MoeReadme, carving: LanguageCarving, source: LanguageModel) -> None:
    train, tests = held_out(token_domains(source, named_texts(config.texts)))
    made = carve_language(source, train, carving, say=lambda text: console.print(text, soft_wrap=True))
    scores = made.perplexities(source.model, tests)
    arms = ("dense", "pooled", "carved")
    print_table(
        "perplexity on the last tenth of each text",
        ("domain", *arms),
        [(name, *(score_text(found[arm]) for arm in arms)) for name, found in scores.items()],
    )
    said = ", ".join(
        f"{name} {score_text(found['carved'])} (dense {score_text(found['dense'])})" for name, found in scores.items()
    )
    note = f"Read-ME, {config.rounds} rounds of {config.gate_steps} and {config.expert_steps} steps; perplexity: {said}"
    model: Any = source.model
    base = BaseModel(
        library="transformers", model_class=type(source.model).__name__, config=model.config.to_json_string(use_diff=False)
    )
    with new_folder(config.out / "model") as folder:
        told = save_carved(folder / CARVED_NAME, made.model, made.carving, pre_gate=made.gate, base=base, note=note)
        loaded = LoadedCarved(model=made.model, carving=made.carving, pre_gate=made.gate, description=told)
        served = write_served(folder, loaded, name=config.seed_model.resolve().name or "model")
        copy_tokenizer(source.folder, folder)
    console.print(f"written to {config.out / 'model'}: {served}", soft_wrap=True)
    console.print(f"serve it: upcycle3d moe serve {config.out / 'model'} --budget 200MB", soft_wrap=True)
    write_json(
        config.json,
        {
            "perplexity": finite(scores),
            "parameters": {
                "dense": made.carving.dense_parameters,
                "unique": made.carving.unique_parameters,
                "active": made.carving.active_parameters,
                "shared": made.carving.shared_parameters,
                "experts": list(made.carving.expert_parameters),
            },
            "phases": [asdict(phase) for phase in made.record.phases],
        },
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
