"""``upcycle3d demo``: the whole story on simulated data in a few minutes on two cores, ending in a table and a report."""

from __future__ import annotations

import os
import resource
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from ..datasets.simulation.places import domain
from ..perception.demo_report import write_report
from ..perception.main_job import MainJob, MainJobConfig, MethodResult, closed_gap
from ..perception.presets import DEMO, DEMO_PV_RCNN
from .console import console, print_table, run_command, write_json

STAGES = ("simulate", "prepare", "train source", "extract", "ingest", "methods")
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
    labelled: int = 100
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
    start = time.perf_counter()
    job = MainJob(
        config=MainJobConfig(
            source=domain(config.source),
            target=domain(config.target),
            labelled=config.labelled,
            fleet=config.fleet,
            validation=config.validation,
            seed=config.seed,
            preset=DEMO_PV_RCNN if config.detector == "pv_rcnn" else DEMO,
        ),
        folder=config.out,
        say=lambda text: console.print(f"[{time.perf_counter() - start:5.0f} s] {text}", markup=False),
    )
    job.data()
    job.train_source()
    extraction = job.extract_fleet()
    results = job.run_methods(METHODS)
    seconds = sum(v for stage, v in job.seconds.items() if stage in STAGES)  # also of an earlier start of the same demo
    summary = result_json(results, extraction, seconds)
    write_report(config.out / "report.html", job, results, summary)
    write_json(config.out / "result.json", summary)
    write_json(config.json, summary)
    rows = [(name, *asdict(r.student).values(), r.teacher.ap_3d, r.teacher.ap_bev) for name, r in results.items()]
    header = ("method", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5", "EMA 3D 0.7", "EMA BEV 0.7")
    print_table(f"Car AP (moderate, R40, %) on {config.validation} frames of simulated {config.target}", header, rows)
    console.print(f"{seconds:.0f} s, {summary['peak_memory_gb']:.1f} GB; report: {config.out / 'report.html'}")


def result_json(results: dict[str, MethodResult], extraction: dict[str, float], seconds: float) -> dict[str, object]:
    """What ``result.json`` holds: AP by method, the closed gaps, bytes, seconds and memory."""
    scores: dict[str, object] = {name: asdict(r.student) for name, r in results.items()}
    source, upcycled = results["source_only"].student, results["upcycling"].student
    full, frozen = results["oracle_full"].student, results["oracle_frozen"].student
    return scores | {
        "oracle": asdict(full),
        "closed_gap_3d": closed_gap(source.ap_3d, upcycled.ap_3d, full.ap_3d),
        "closed_gap_bev": closed_gap(source.ap_bev, upcycled.ap_bev, full.ap_bev),
        "closed_gap_3d_frozen": closed_gap(source.ap_3d, upcycled.ap_3d, frozen.ap_3d),
        "closed_gap_bev_frozen": closed_gap(source.ap_bev, upcycled.ap_bev, frozen.ap_bev),
        "teacher": {name: asdict(r.teacher) for name, r in results.items()},
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
