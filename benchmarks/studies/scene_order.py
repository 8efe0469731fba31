"""How much of a difference between two trainings is the order of the fleet's scenes alone?

    python benchmarks/studies/scene_order.py --out runs/scene_order

One source model, one store, one seed: only the order in which UpCycling sees the scenes differs. Before stores ordered their scenes by content, two
extractions of one fleet differed by this much. Settings and data are those of `upcycle3d demo`. The first row repeats the store's own
order twice, from two extractions, and must be equal. A finished training is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import numpy as np
import torch

from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.perception.evaluation.score import score_detector
from upcycle3d.perception.recipes.assembly import labeled_batches
from upcycle3d.perception.recipes.experiment_data import SimulationSize, simulated_adaptation
from upcycle3d.perception.recipes.job_folder import PipelineConfig, RunOptions
from upcycle3d.perception.recipes.labeled_half import LabeledHalf
from upcycle3d.perception.recipes.pipeline import Pipeline
from upcycle3d.perception.recipes.presets import DEMO
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.store import SmashedStore
from upcycle3d.perception.server.trainer import upcycle
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table, write_json

METRICS = ("Car 3D 0.7", "Car BEV 0.7", "Car 3D 0.5", "Car BEV 0.5")


class Reordered(SmashedStore):
    """The scenes of a store in another order."""

    def __init__(self, store: Path, order: int) -> None:
        super().__init__(store)
        self.places = np.random.default_rng([order, 77]).permutation(super().__len__()) if order else range(super().__len__())

    def __getitem__(self, index: int) -> SmashedScene:
        return super().__getitem__(int(self.places[index]))


def scores(pipeline: Pipeline, order: int) -> list[float]:
    """Train by UpCycling with one order, and score the student."""
    job, c = pipeline.job, pipeline.job.config
    detector = load_detector(job.source_model)
    config = replace(c.preset.upcycle, loop=replace(c.preset.upcycle.loop, seed=c.seed))
    c.labeled.ensure_gt_database()
    upcycle(
        detector,
        method=METHODS["upcycling"],
        labeled=labeled_batches(c.preset, c.labeled, batch_size=config.labeled_batch, seed=c.seed),
        store=Reordered(job.folder / "store", order),
        pasted_objects=LabeledHalf(data=c.labeled).objects_to_paste(
            job.objects_folder(config.f_gt), detector, config, codec=c.codec
        ),
        config=config,
        codec=c.codec,
        progress=False,
    )
    found = score_detector(detector, c.validation.open(), c.protocol).headline()
    return [found[name] for name in METRICS]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--orders", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--frames", type=int, nargs=3, default=(100, 140, 60), help="labeled, fleet, validation")
    a = parser.parse_args()
    torch.set_num_threads(1)
    labeled, fleet, validation = a.frames
    size = SimulationSize(labeled=labeled, fleet=fleet, validation=validation)
    data = simulated_adaptation(a.out, "waymo", "lyft", size=size, seed=a.seed, classes=("Car",), workers=1)
    config = PipelineConfig(
        labeled=data.labeled, fleet=data.fleet, validation=data.validation, protocol="kitti", preset=DEMO, seed=a.seed
    )
    pipeline = Pipeline(config, a.out, RunOptions())
    pipeline.train_source_model()
    stored = a.out / "scores.json"
    found: dict[str, list[float]] = json.loads(stored.read_text()) if stored.exists() else {}

    def step(name: str, order: int) -> None:
        if name not in found:
            found[name] = scores(pipeline, order)
            write_json(stored, found)
            print(name, [round(v, 2) for v in found[name]], flush=True)

    if "own order" not in found:
        pipeline.extract_fleet()
        step("own order", 0)
        for leftover in ("extraction.json", "shards", "store"):
            path = a.out / leftover
            path.unlink() if path.is_file() else shutil.rmtree(path)
    pipeline.extract_fleet()
    step("own order, extracted again", 0)
    for order in range(1, a.orders + 1):
        step(f"order {order}", order)
    rows = [(name, *(f"{v:.1f}" for v in values)) for name, values in found.items()]
    values = list(zip(*(v for name, v in found.items() if name != "own order, extracted again"), strict=True))
    rows += [
        (what, *(f"{f(v):.1f}" for v in values)) for what, f in (("mean", statistics.fmean), ("deviation", statistics.stdev))
    ]
    rows += [("largest minus smallest", *(f"{max(v) - min(v):.1f}" for v in values))]
    print_table(f"UpCycling with {a.orders + 1} orders of the same {fleet} scenes, seed {a.seed}", ("order", *METRICS), rows)


if __name__ == "__main__":
    main()
