"""`upcycle3d upcycle PRESET`: train the server half on labeled frames and smashed scenes. Read next: `perception/recipes/upcycling_job.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..core.foreign_text import shown
from ..perception.recipes.fleet_stores import rigs_of_options
from ..perception.recipes.labeled_half import TargetLabels
from ..perception.recipes.presets import Preset
from ..perception.recipes.upcycling_job import upcycle_preset
from ..perception.server.methods import METHODS
from ..perception.training.detector_files import load_detector
from ..perception.training.trackers import TrackerName
from .config_file import print_config
from .console import console, print_table, run_command, warnings_so_far, write_json
from .data_option import DataOption
from .next_step import scoring_command, what_lies_in
from .train import chosen_validation, preset_choices, settle_start


@dataclass(frozen=True, kw_only=True)
class Upcycle:
    """Learn from unlabeled smashed scenes and a few labeled frames, by UpCycling or by a baseline."""

    preset: Preset
    """Settings. Override any field, as in `--preset.upcycle.loop.optim.lr 0.001`. The detector is that of the source model, whatever the
    preset's is; settings with one entry per class must fit its classes."""
    data: DataOption
    """Labeled split of a prepared dataset, `train` where no split is named. The oracles take it from the target domain."""
    out: Path
    """Run folder to write."""
    detector: Path = Path("runs/source")
    """Run folder of the source model, from which every method starts. The fleet must run its encoder."""
    store: tuple[Path, ...] = ()
    """Store of the fleet's smashed scenes, for the methods that learn from them. Give several for fleets of several kinds of vehicles that
    run one encoder: scenes are drawn in proportion to their number, so one epoch sees every scene once."""
    target_labels: DataOption | None = None
    """A few labeled frames of the target, where drivers gave some (`upcycle3d select` says which to ask for); `train` where no split is
    named. They join the labeled half, and F-GT pastes their objects too."""
    target_share: float = TargetLabels.share
    """Share of the labeled frames of the training that are drawn from `--target-labels`. With 1 no frame of `--data` is drawn; F-GT
    still pastes its objects."""
    raw: DataOption | None = None
    """Raw unlabeled scans, for the methods that learn from them; `unlabelled` where no split is named. Labels are not read."""
    z_shift: tuple[float, ...] = ()
    """The fleet's z shift, where `extract` got another one than the detector's training data: one value for all stores, or one per store in
    the order of `--store`. A store of another kind of rig is refused."""
    intensity_scale: tuple[float, ...] = ()
    """The fleet's intensity scale, where `extract` got another one than the detector's training data: one value, or one per store."""
    method: Literal[tuple(METHODS)] = "upcycling"  # type: ignore[valid-type]
    """Training method. docs/methods.md describes all of them."""
    codec: Literal["fp16", "int8"] | None = None
    """Codec that labeled features pass through, so that they have the rounding errors of stored scenes. By default the store's own."""
    truth: tuple[Path, DataOption] | None = None
    """Two values: the file of `extract --receipts`, then the prepared frames that were extracted, `DIR[:SPLIT]`. Their labels measure
    the pseudo labels and never train."""
    steps: int | None = None
    """Steps of the whole run; by default the preset's. With `--resume`, a finished or stopped run goes on to this number, and its remaining
    steps are a new cycle of the learning rate."""
    validate: DataOption | None = None
    """Labeled split to score on the way, `val` where no split is named. The result stays the student of the last step; the best one is kept
    as best.safetensors, with a record that it was chosen on this split."""
    validate_every: int | None = None
    """Steps between two scores, with `--validate`; by default a tenth of all steps."""
    seed: int = 0
    """Decides the order of frames and scenes, augmentation and pasting."""
    resume: bool = False
    """Continue a run that was stopped. Its data, stores and source model may have been moved: give their new places, and the stores in the
    same order."""
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


ARGUMENTS = tyro.extras.subcommand_type_from_defaults(preset_choices(Upcycle), prefix_names=False)


def command(config: Upcycle) -> None:
    """Train the server half on labeled frames and smashed scenes."""
    if config.print_config:
        print_config(config)
        return
    given = bool(config.z_shift or config.intensity_scale)
    trained = load_detector(config.detector).trained_on if given else None
    outcome = upcycle_preset(
        config.preset,
        config.data,
        config.detector,
        config.out,
        method=config.method,
        target_labels=config.target_labels,
        target_share=config.target_share,
        store=config.store or None,
        raw=config.raw,
        rig=rigs_of_options(config.z_shift, config.intensity_scale, config.store, trained),
        codec=config.codec,
        truth=config.truth,
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
        "upcycled",
        ("method", "labeled frames", "labeled target frames", "unlabeled scenes", "steps"),
        [(config.method, outcome.frames, outcome.target_frames, outcome.scenes, outcome.steps)],
    )
    console.print(what_lies_in(config.out), soft_wrap=True)
    console.print(f"next: {scoring_command(config.out, config.data)}", soft_wrap=True)
    if outcome.best is not None:
        console.print(
            f"best on {config.validate}: {shown(outcome.best)}, chosen on that split, so its score there is too good to report"
        )
    report = {
        "method": config.method,
        "labeled": outcome.frames,
        "target_labels": outcome.target_frames,
        "scenes": outcome.scenes,
        "steps": outcome.steps,
        "run": str(config.out),
        "ledger": outcome.ledger.to_json(),
        "warnings": warnings_so_far(),
    }
    write_json(config.json, report)


if __name__ == "__main__":
    sys.exit(run_command(command, parsed_as=ARGUMENTS))
