"""``upcycle3d demo``: the whole story on simulated data in a few minutes on two cores, ending in a table and a report."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..perception.recipes.demo_report import CAR_3D, CAR_BEV, write_report
from ..perception.recipes.experiments import Size, simulated_adaptation
from ..perception.recipes.pipeline import Pipeline, PipelineConfig, RunOptions, Trial, TrialResult, closed_gap
from ..perception.recipes.presets import DEMO, DEMO_PV_RCNN
from .console import console, print_table, run_command, write_json

STAGES = ("simulate and prepare", "train source", "extract", "ingest", "trials")
METHODS = ("source_only", "source_continued", "pseudo_label", "upcycling", "oracle_frozen", "oracle_full")


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train on a few labelled scans of one place, extract smashed scenes from a fleet at another, learn from them, compare."""

    out: Path = Path("demo")
    """folder to write; a demo that was stopped goes on there"""
    source: Literal["kitti", "waymo", "lyft"] = "waymo"
    """simulated domain with labels"""
    target: Literal["kitti", "waymo", "lyft"] = "lyft"
    """simulated domain of the fleet"""
    detector: Literal["second_iou", "pv_rcnn"] = "second_iou"
    """PV-RCNN's vehicles send keypoints beside the voxels"""
    labeled: int = 100
    """labelled source frames"""
    fleet: int = 140
    """unlabelled target frames"""
    validation: int = 60
    """target frames to score on"""
    seed: int = 0
    """of the data and of every training"""
    json: Path | None = None
    """also write the result here (it is always in OUT/result.json)"""


def command(config: Demo) -> None:
    """The main job on simulated data: about five minutes on two cores. Open OUT/report.html at the end."""
    start, preset = time.perf_counter(), DEMO_PV_RCNN if config.detector == "pv_rcnn" else DEMO

    def say(text: str) -> None:
        console.print(f"[{time.perf_counter() - start:5.0f} s] {text}", markup=False)

    say(f"simulating and preparing {config.source} with labels and {config.target} with a fleet")
    size = Size(labeled=config.labeled, fleet=config.fleet, validation=config.validation)
    data = simulated_adaptation(
        config.out, config.source, config.target, size=size, seed=config.seed, classes=preset.detector.class_names
    )
    simulated = time.perf_counter() - start
    job = Pipeline(
        config=PipelineConfig(
            labeled=data.labeled,
            fleet=data.fleet,
            validation=data.validation,
            protocol="kitti",
            preset=preset,
            seed=config.seed,
        ),
        folder=config.out,
        options=RunOptions(say=say),
    )
    job.add_seconds("simulate and prepare", simulated)
    job.train_source()
    extraction = job.extract_fleet()
    results = dict(job.results({name: Trial(method=name, upcycle=preset.upcycle) for name in METHODS}))
    results = {name: results[name] for name in METHODS}
    seconds = sum(v for stage, v in job.seconds.items() if stage in STAGES)  # also of an earlier start of the same demo
    summary = result_json(results, extraction, seconds)
    write_report(config.out / "report.html", job, (config.source, config.target), results, summary)
    write_json(config.out / "result.json", summary)
    write_json(config.json, summary)
    metrics = list(results["upcycling"].student)
    rows = [(name, *(r.student[m] for m in metrics), *(r.teacher[m] for m in metrics[:2])) for name, r in results.items()]
    header = ("method", *metrics, *(f"EMA {m}" for m in metrics[:2]))
    print_table(f"AP (moderate, R40, %) on {config.validation} frames of simulated {config.target}", header, rows)
    console.print(f"{seconds:.0f} s, {summary['peak_memory_gb']:.1f} GB; report: {config.out / 'report.html'}")


def result_json(results: dict[str, TrialResult], extraction: dict[str, float], seconds: float) -> dict[str, object]:
    """What ``result.json`` holds: AP by method, the closed gaps, bytes, seconds and memory."""

    def gap(metric: str, oracle: str) -> float | None:
        source, own, best = (results[name].student[metric] for name in ("source_only", "upcycling", oracle))
        return closed_gap(source, own, best)

    return {
        **{name: r.student for name, r in results.items()},
        "closed_gap": {oracle: {m: gap(m, oracle) for m in (CAR_3D, CAR_BEV)} for oracle in ("oracle_frozen", "oracle_full")},
        "teacher": {name: r.teacher for name, r in results.items()},
        **extraction,
        "seconds": seconds,
        "peak_memory_gb": _peak_memory_gb(),
        "cores": os.cpu_count(),
    }


def _peak_memory_gb() -> float:
    """An upper bound: this process and two children, each as large as the largest was."""
    own, child = (resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + 2 * child


if __name__ == "__main__":
    sys.exit(run_command(command))
