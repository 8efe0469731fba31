"""`upcycle3d train PRESET`: supervised training of a detector on a prepared dataset. Read next: `perception/recipes/jobs.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..datasets.data_split import DataSplit
from ..perception.recipes.job_start import JobStart
from ..perception.recipes.jobs import train_preset
from ..perception.recipes.presets import PRESETS, Preset
from ..perception.recipes.validation import Validation
from ..perception.training.trackers import TrackerName
from .config_file import print_config
from .console import console, print_table, print_warning, run_command, settle, warnings_so_far, write_json
from .data_option import DataOption
from .next_step import scoring_command, what_lies_in


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a detector on a labeled split. The run folder holds everything that is needed to resume and to describe the run."""

    preset: Preset
    """Detector and training. Override any field, as in `--preset.train.loop.optim.lr 0.001`."""
    data: DataOption
    """Labeled split of a prepared dataset; `train` where no split is named."""
    out: Path
    """Run folder to write."""
    classes: tuple[str, ...] = ()
    """Classes to find, the same that the dataset was prepared for. Each gets an anchor of its mean size in the split; other settings per
    class are those of the preset's class of the most similar size. By default the preset's classes."""
    init: Path | None = None
    """Start from these weights: a run folder, a detector file, or a checkpoint such as RUN/checkpoints/step_00000100. With other classes, the
    parts of the detector that belong to classes start fresh."""
    steps: int | None = None
    """Steps of the whole run; by default the preset's. With `--resume`, a finished or stopped run goes on to this number, and its remaining
    steps are a new cycle of the learning rate."""
    validate: DataOption | None = None
    """Labeled split to score on the way, `val` where no split is named. The result stays the detector of the last step; the best one is kept
    as best.safetensors, with a record that it was chosen on this split."""
    validate_every: int | None = None
    """Steps between two scores, with `--validate`; by default a tenth of all steps."""
    seed: int = 0
    """Decides the initial weights, the order of the frames and the augmentation."""
    resume: bool = False
    """Go on with a run that was stopped. Its data may have been moved: give the new place."""
    workers: int = 1
    """Processes that prepare batches. The result does not depend on their number."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    log: TrackerName = "tensorboard"
    """Where metrics are shown besides `metrics.jsonl`, which has all of them (docs/training.md). It may change when a run is resumed."""
    json: Path | None = None
    """Also write the result to this file as JSON."""
    config: Path | None = None
    """YAML or JSON file with options, as `--print-config` writes it; options on the command line win. Where it holds a whole preset, none is
    named before the options."""
    print_config: bool = False
    """Print all options as YAML, the whole preset included, and stop."""


def chosen_validation(data: DataSplit | None, every: int | None) -> Validation | None:
    """Make the validation of the options `--validate` and `--validate-every`.

    Args:
        data: The split to score on, if any.
        every: Steps between two scores, if given.

    Returns:
        What is scored on the way; None where nothing is.

    Raises:
        InvalidInput: There is a number of steps and no split.
    """
    if data is None:
        if every is not None:
            raise InvalidInput("--validate-every needs a split to score on; add --validate DIR[:SPLIT], or leave it out")
        return None
    return Validation(data=data.or_split("val"), every=every)


def settle_start(start: JobStart) -> None:
    """Print what a job is about to read and to start from, and stop where nothing of it could be learned.

    Args:
        start: What is known before the first step.

    Raises:
        UpcycleError: A rule of `core/ledger_rules.py` stops the job.
    """
    for note in start.notes:
        print_warning(note)
    if start.weights is not None:
        print_table(f"weights of {start.weights.source}", ("", "tensors", "parts"), start.weights.rows())
    if start.stores:
        rows = [(shown(str(one.store)), str(one.rig), f"{one.scenes:,}", f"{one.share:.1%}") for one in start.stores]
        print_table("unlabeled scenes, drawn in proportion to their number", ("store", "rig", "scenes", "share"), rows)
    settle(start.ledger, "data of the training (a sample of the frames)")


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
    if config.print_config:
        print_config(config)
        return
    outcome = train_preset(
        config.preset,
        config.data,
        config.out,
        classes=config.classes or None,
        init=config.init,
        validate=chosen_validation(config.validate, config.validate_every),
        seed=config.seed,
        steps=config.steps,
        resume=config.resume,
        workers=config.workers,
        device=config.device,
        tracker=config.log,
        on_start=settle_start,
    )
    if not outcome.is_main:  # torchrun: one process of several reports
        return
    print_table(
        "trained detector",
        ("steps", "frames", "seconds", *outcome.loss),
        [(outcome.steps, outcome.frames, outcome.seconds, *outcome.loss.values())],
    )
    console.print(what_lies_in(config.out, outcome.seconds), soft_wrap=True)
    console.print(f"next: {scoring_command(config.out, config.data)}", soft_wrap=True)
    if outcome.best is not None:
        console.print(
            f"best on {config.validate}: {shown(outcome.best)}, chosen on that split, so its score there is too good to report"
        )
    ledger = outcome.survey.ledger.to_json() if outcome.survey is not None else {}
    report = {
        "steps": outcome.steps,
        "seconds": outcome.seconds,
        "loss": dict(outcome.loss),
        "run": str(config.out),
        "ledger": ledger,
        "warnings": warnings_so_far(),
        "init": None if outcome.weights is None else {"fresh": outcome.weights.fresh, "unused": outcome.weights.unused},
    }
    write_json(config.json, report)


if __name__ == "__main__":
    sys.exit(run_command(command, parsed_as=ARGUMENTS))
