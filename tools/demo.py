"""`upcycle3d demo`: the whole story on simulated data in a few minutes on two cores, ending in a table and a report."""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..perception.recipes.demo import run_demo
from ..perception.recipes.demo_report import write_report
from ..perception.recipes.experiment_data import SimulationSize
from ..perception.recipes.presets import DEMO, DEMO_PV_RCNN
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train on a few labeled scans of one domain, extract smashed scenes from a fleet in another, learn from them, compare."""

    out: Path = Path("demo")
    """Folder to write. A demo that was stopped goes on there."""
    source: Literal["kitti", "waymo", "lyft"] = "waymo"
    """Simulated domain with labels."""
    target: Literal["kitti", "waymo", "lyft"] = "lyft"
    """Simulated domain of the fleet."""
    detector: Literal["second_iou", "pv_rcnn"] = "second_iou"
    """Detector. With PV-RCNN the vehicles send keypoints in addition to the voxels."""
    labeled: int = 100
    """Labeled frames of the source domain."""
    fleet: int = 140
    """Unlabeled frames of the target domain."""
    validation: int = 60
    """Frames of the target domain to score on."""
    seed: int = 0
    """Seed of the simulated data and of every training."""
    json: Path | None = None
    """Also write the result to this file. It is always in OUT/result.json."""


def command(config: Demo) -> None:
    """Run the pipeline on simulated data, in about eight minutes on two cores. Open OUT/report.html at the end."""
    start = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - start:5.0f} s] {text}")

    demo = run_demo(
        config.out,
        config.source,
        config.target,
        preset=DEMO_PV_RCNN if config.detector == "pv_rcnn" else DEMO,
        size=SimulationSize(labeled=config.labeled, fleet=config.fleet, validation=config.validation),
        seed=config.seed,
        say=say,
    )
    write_report(config.out / "report.html", demo)
    for path in (config.out / "result.json", config.json):
        write_json(path, demo.to_json())
    metrics = list(demo.results["upcycling"].student)
    rows = [(name, *(r.student[m] for m in metrics), *(r.teacher[m] for m in metrics[:2])) for name, r in demo.results.items()]
    header = ("method", *metrics, *(f"EMA {m}" for m in metrics[:2]))
    print_table(f"AP (moderate, R40, %) on {config.validation} frames of simulated {config.target}", header, rows)
    console.print(f"{demo.seconds:.0f} s, {demo.peak_memory_gb:.1f} GB; report: {config.out / 'report.html'}")


if __name__ == "__main__":
    sys.exit(run_command(command))
