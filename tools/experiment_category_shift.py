"""`upcycle3d experiment category-shift`: GLC on a detector's proposals where the target has other classes, over seeds; resumable."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from ..perception.recipes.category_shift import SHIFTS, CategoryShiftComparison, run_category_shift
from ..perception.recipes.category_shift_report import category_shift_results, category_shift_rows, category_shift_tables
from ..perception.recipes.experiment_data import DatasetName
from ..perception.recipes.job_folder import RunOptions
from ..perception.recipes.presets import SMALL_THREE_CLASSES
from ..perception.recipes.result_csv import publish
from .console import console, print_table, run_command


@dataclass(frozen=True, kw_only=True)
class CategoryShiftExperiment:
    """Compare how proposals are classified as known or unknown. Each result is stored as soon as it is known."""

    out: Path
    """Folder for data, detectors, results and `results.csv`. Take one for each target."""
    source: DatasetName = "waymo"
    """Simulated source domain."""
    target: DatasetName = "lyft"
    """Simulated target domain. Choose settings on lyft only; run kitti once, with frozen settings."""
    scenarios: tuple[Literal[SHIFTS], ...] = SHIFTS  # type: ignore[valid-type]
    """What the target has: the same classes, one less, four more, or both."""
    seeds: tuple[int, ...] = (0,)
    """Seeds of streets, detector, classifier and adaptation. Each seed has a detector of its own."""
    source_frames: int = 700
    """Labeled frames of the source domain."""
    target_frames: int = 250
    """Frames of the target domain."""
    steps: int = SMALL_THREE_CLASSES.train.loop.total_steps
    """Steps of the detector's training."""
    workers: int = 2
    """Processes that simulate and prepare frames."""


def command(config: CategoryShiftExperiment) -> None:
    """Run the missing results of a comparison, then print its tables and write OUT/results.csv."""
    torch.set_num_threads(1)
    start, train = time.perf_counter(), SMALL_THREE_CLASSES.train
    loop = replace(train.loop, optim=replace(train.loop.optim, total_steps=config.steps))
    comparison = CategoryShiftComparison(
        source=config.source,
        target=config.target,
        source_frames=config.source_frames,
        target_frames=config.target_frames,
        preset=replace(SMALL_THREE_CLASSES, train=replace(train, loop=loop)),
    )

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - start:5.0f} s] {text}")

    results, options = config.out / "results", RunOptions(say=say)
    for seed in config.seeds:
        run_category_shift(
            comparison, config.scenarios, seed, jobs=config.out, results=results, options=options, data_workers=config.workers
        )
    cache = comparison.cache(results)
    for table in category_shift_tables(category_shift_results(cache)):
        print_table(table.caption, table.header, table.rows)
    console.print(f"results: {publish(config.out, cache, category_shift_rows)}")


if __name__ == "__main__":
    sys.exit(run_command(command))
