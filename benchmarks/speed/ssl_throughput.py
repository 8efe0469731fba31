"""How many unlabeled scenes per second the server trains on: UpCycling compared with methods that train on raw scans.

    OMP_NUM_THREADS=1 python benchmarks/speed/ssl_throughput.py [--preset small] [--rounds 3] [--steps 8] [--json FILE]

The methods take turns with the same source model, labeled batches and batch sizes, so that a busy machine slows all of them. The labeled
half of a step is the same for all methods and included. The last column is what an unlabeled scene costs beyond it: the difference to
`source_continued`, which has no unlabeled half.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch

from upcycle3d.perception.recipes.assembly import labeled_batches, unlabeled_batches
from upcycle3d.perception.recipes.experiment_data import SimulationSize, simulated_adaptation
from upcycle3d.perception.recipes.job_folder import JobFolder, PipelineConfig
from upcycle3d.perception.recipes.labeled_half import LabeledHalf
from upcycle3d.perception.recipes.pipeline import Pipeline
from upcycle3d.perception.recipes.presets import PRESETS, Preset
from upcycle3d.perception.server.methods import METHODS
from upcycle3d.perception.server.trainer import upcycle
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.training.environment import describe_environment
from upcycle3d.perception.training.loop import LoopConfig
from upcycle3d.tools.console import print_table, write_json

COMPARED = ("source_continued", "upcycling", "hybrid", "iou_match", "mean_teacher")


def shortened(loop: LoopConfig, steps: int) -> LoopConfig:
    """The loop with `steps` steps."""
    return replace(loop, optim=replace(loop.optim, total_steps=steps))


def step_times(job: JobFolder, preset: Preset, name: str, steps: int) -> list[float]:
    """Seconds of each step after the first two."""
    method, c, ends = METHODS[name], job.config, [0.0]
    detector = load_detector(job.source_model)
    batch = preset.upcycle.unlabeled_batch
    labeled = labeled_batches(preset, c.labeled, batch_size=preset.upcycle.labeled_batch, seed=0)
    pasted = LabeledHalf(data=c.labeled).objects_to_paste(
        job.objects_folder(preset.upcycle.f_gt), detector, preset.upcycle, codec=c.codec
    )
    upcycle(
        detector,
        method=method,
        labeled=labeled,
        store=job.store(detector),
        pasted_objects=pasted,
        scans=unlabeled_batches(preset, c.fleet.open(), batch_size=batch, seed=0),
        config=replace(preset.upcycle, loop=shortened(preset.upcycle.loop, steps)),
        codec=c.codec,
        after_step=lambda step, student: ends.append(time.perf_counter()),
        progress=False,
    )
    return [end - start for start, end in pairwise(ends[2:])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    preset = PRESETS[arguments.preset]
    # A source model good enough to find cars: F-GT and the second stage cost what they cost in a run.
    trained = replace(preset, train=replace(preset.train, loop=shortened(preset.train.loop, 60)))
    times: dict[str, list[float]] = {name: [] for name in COMPARED}
    with tempfile.TemporaryDirectory() as folder:
        size, classes = SimulationSize(labeled=16, fleet=16, validation=1), preset.detector.class_names
        data = simulated_adaptation(Path(folder), "waymo", "lyft", size=size, seed=0, classes=classes)
        config = PipelineConfig(
            labeled=data.labeled, fleet=data.fleet, validation=data.validation, protocol="kitti", preset=trained, seed=0
        )
        pipeline = Pipeline(config, Path(folder) / "job")
        pipeline.train_source_model()
        pipeline.extract_fleet()
        for _ in range(arguments.rounds):
            for name in COMPARED:
                times[name] += step_times(pipeline.job, preset, name, arguments.steps)
    batch, base = preset.upcycle.unlabeled_batch, statistics.median(times["source_continued"])
    median = {name: statistics.median(values) for name, values in times.items()}
    rate = {name: batch / median[name] for name in COMPARED[1:]}
    cost = {name: (median[name] - base) / batch for name in COMPARED[1:]}
    rows = [
        (name, f"{median[name]:.3f}", f"{rate[name]:.2f}", f"{rate[name] / rate['iou_match']:.2f}", f"{1e3 * cost[name]:.0f}")
        for name in COMPARED[1:]
    ]
    header = ("method", "s per step", "unlabeled scenes/s", "of iou_match's", "ms per scene above source_continued")
    print_table(f"{arguments.preset}: {preset.upcycle.labeled_batch} labeled + {batch} unlabeled per step", header, rows)
    print(f"source_continued: {base:.3f} s per step; {arguments.threads} threads, load {os.getloadavg()[0]:.1f}")
    environment = describe_environment(command=["benchmarks/speed/ssl_throughput.py"], seed=0)
    write_json(arguments.json, {"seconds": median, "scenes_per_s": rate, "cost": cost, "environment": environment})


if __name__ == "__main__":
    main()
