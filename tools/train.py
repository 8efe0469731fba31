"""`upcycle3d train PRESET`: supervised training of a detector on a prepared dataset. Read next: `perception/recipes/jobs.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..perception.recipes.jobs import train_preset
from ..perception.recipes.presets import PRESETS, Preset
from .console import console, print_table, run_command, write_json
from .data_option import DataOption
from .next_step import scoring_command


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a detector on a labeled split. The run folder holds everything that is needed to resume and to describe the run."""

    preset: Preset
    """Detector and training. Override any field, as in `--preset.train.loop.optim.lr 0.001`."""
    data: DataOption
    """Labeled split of a prepared dataset; `train` where no split is named."""
    out: Path
    """Run folder to write."""
    seed: int = 0
    """Decides the initial weights, the order of the frames and the augmentation."""
    resume: bool = False
    """Go on with a run that was stopped."""
    workers: int = 1
    """Processes that prepare batches. The result does not depend on their number."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def preset_choices(make: type) -> dict[str, object]:
    """One subcommand per preset, with its fields as defaults.

    Args:
        make: The options class of a command that has `preset`, `data` and `out`.

    Returns:
        An instance by name of the preset.
    """
    return {name: make(preset=preset, data=tyro.MISSING, out=tyro.MISSING) for name, preset in PRESETS.items()}


ARGUMENTS = tyro.extras.subcommand_type_from_defaults(preset_choices(Train), prefix_names=False)


def command(config: Train) -> None:
    """Train a detector on labeled frames: upcycle3d train PRESET --data DIR:SPLIT --out RUN."""
    outcome = train_preset(
        config.preset,
        config.data,
        config.out,
        seed=config.seed,
        resume=config.resume,
        workers=config.workers,
        device=config.device,
    )
    if not outcome.is_main:  # torchrun: one process of several reports
        return
    print_table(
        "trained detector",
        ("steps", "frames", "seconds", *outcome.loss),
        [(outcome.steps, outcome.frames, outcome.seconds, *outcome.loss.values())],
    )
    console.print(f"next: {scoring_command(config.out, config.data)}", soft_wrap=True)
    report = {"steps": outcome.steps, "seconds": outcome.seconds, "loss": dict(outcome.loss), "run": str(config.out)}
    write_json(config.json, report)


if __name__ == "__main__":
    sys.exit(run_command(command, parsed_as=ARGUMENTS))
