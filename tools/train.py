"""``upcycle3d train PRESET``: supervised training of a detector on a prepared dataset."""

from __future__ import annotations

import sys
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import tyro

from ..perception.recipes.assembly import labeled_batches
from ..perception.recipes.presets import PRESETS, Preset
from ..perception.training.detector_files import save_run_detector
from ..perception.training.distributed import init_distributed, per_rank
from ..perception.training.loop import create_run
from ..perception.training.supervised import train_supervised
from .console import console, device, print_table, run_command, write_json
from .data_option import DataOption


@dataclass(frozen=True, kw_only=True)
class Train:
    """Train a detector on a labelled split. The run folder holds everything to resume it and to say what it was."""

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
    """One subcommand per preset, its fields as defaults."""
    return {name: make(preset=preset, data=tyro.MISSING, out=tyro.MISSING) for name, preset in PRESETS.items()}


ARGUMENTS = tyro.extras.subcommand_type_from_defaults(preset_choices(Train), prefix_names=False)


def _what_decides(config: Train) -> Train:
    """The configuration without what does not change the result: a run may be resumed with other workers, and may be moved."""
    return replace(config, data=config.data.resolved(), out=Path("."), resume=False, workers=0, device="", json=None)


def command(config: Train) -> None:
    """Train a detector on labelled frames: upcycle3d train PRESET --data PREPARED --out RUN."""
    config = replace(config, data=config.data.or_split("train"))
    train = replace(config.preset.train, loop=replace(config.preset.train.loop, seed=config.seed))
    preset = replace(config.preset, train=train)
    labeled = labeled_batches(preset, config.data, batch_size=train.batch_size, seed=config.seed)
    context = init_distributed()  # torchrun -m upcycle3d.tools.train …: every rank takes its own batches
    torch.manual_seed(config.seed)
    detector = preset.detector.build().to(context.device if context.world_size > 1 else device(config.device))
    recorded = replace(_what_decides(config), preset=preset)
    run = create_run(config.out, recorded, seed=config.seed, context=context, resume=config.resume)
    own = per_rank(lambda step, rank, ranks: labeled(step * ranks + rank), context)
    result = train_supervised(detector, own, train.loop, run=run, workers=config.workers, context=context)
    context.close()
    if not context.is_main:
        return
    save_run_detector(config.out, detector.cpu(), preset.detector)
    print_table(
        "trained detector",
        ("steps", "frames", "seconds", *result.terms),
        [(result.steps, len(labeled.frames), result.seconds, *result.terms.values())],
    )
    console.print(f"next: upcycle3d evaluate run --detector {config.out} --data {config.data.root}:val")
    write_json(
        config.json, {"steps": result.steps, "seconds": result.seconds, "loss": dict(result.terms), "run": str(config.out)}
    )


if __name__ == "__main__":
    sys.exit(run_command(command, parsed_as=ARGUMENTS))
