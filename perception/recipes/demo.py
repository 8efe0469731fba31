"""The demo: the pipeline on two simulated domains, with the numbers that its table and its report show.

Read next: `pipeline.py` for the stages, and `demo_report.py` for the report.
"""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import Json, config_to_json
from .audit import Audit
from .audit_plan import AuditBudget, AuditPlan
from .audit_report import write_audit_report
from .audit_summary import SettingSummary
from .audit_tables import summarize_audit
from .experiment_data import DatasetName, SimulationSize, simulated_adaptation
from .job_folder import JobFolder, PipelineConfig, RunOptions
from .method_run import MethodResult, MethodRun
from .pipeline import Pipeline
from .presets import Preset
from .result_summary import closed_gap

DEMO_METHODS = ("source_only", "source_continued", "pseudo_label", "upcycling", "oracle_frozen", "oracle_full")
CAR_3D, CAR_BEV = "Car 3D 0.7", "Car BEV 0.7"
_STAGES = ("simulate and prepare", "train source", "extract", "ingest", "trials", "audit")
DEMO_BUDGET = AuditBudget(attacker_frames=60, victim_frames=8, steps=200)
"""Attackers of the demo work for a minute; they find less than there is."""


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """A finished demo."""

    job: JobFolder
    """The job, with its folder and its seconds by stage."""
    source: DatasetName
    """The simulated domain with labels."""
    target: DatasetName
    """The simulated domain of the fleet."""
    results: Mapping[str, MethodResult]
    """Results by method, in the order of `DEMO_METHODS`."""
    extraction: Mapping[str, float]
    """Bytes and milliseconds per frame; see `fleet_extraction.extract_fleet`."""
    leak: SettingSummary
    """What an attacker rebuilt from uploads like those of the fleet."""
    seconds: float
    """Duration of all stages, earlier starts of the same demo included."""
    peak_memory_gb: float
    """Upper bound of the memory: the main process and twice its largest child."""

    def closed_gap(self, metric: str, oracle: str) -> float | None:
        """The gap that UpCycling closes.

        Args:
            metric: Name of the score.
            oracle: The oracle.

        Returns:
            Percent, or None; see `result_summary.closed_gap`.
        """
        source, own, best = (self.results[name].student[metric] for name in ("source_only", "upcycling", oracle))
        return closed_gap(source, own, best)

    def to_json(self) -> dict[str, Json]:
        """What `result.json` holds: AP by method, closed gaps, bytes, milliseconds, seconds and memory."""
        gaps = {oracle: {m: self.closed_gap(m, oracle) for m in (CAR_3D, CAR_BEV)} for oracle in ("oracle_frozen", "oracle_full")}
        return {
            **{name: dict(r.student) for name, r in self.results.items()},
            "closed_gap": gaps,
            "teacher": {name: dict(r.teacher) for name, r in self.results.items()},
            **self.extraction,
            "leak": config_to_json(self.leak),
            "seconds": self.seconds,
            "peak_memory_gb": self.peak_memory_gb,
            "cores": os.cpu_count(),
        }


def run_demo(
    folder: Path,
    source: DatasetName,
    target: DatasetName,
    *,
    preset: Preset,
    size: SimulationSize,
    seed: int,
    say: Callable[[str], None] = print,
) -> DemoResult:
    """Simulate two domains, train on the labeled one, extract the fleet at the other, run every method of the demo and score it.

    Args:
        folder: Folder of the demo. A demo that was stopped goes on there.
        source: The simulated domain with labels.
        target: The simulated domain of the fleet.
        preset: Detector and settings.
        size: Numbers of frames.
        seed: Seed of the simulated data and of every training.
        say: Called with one line per stage.

    Returns:
        Results and costs.
    """
    start = time.perf_counter()
    say(f"simulating and preparing {source} with labels and {target} with a fleet")
    data = simulated_adaptation(folder, source, target, size=size, seed=seed, classes=preset.detector.class_names)
    simulated = time.perf_counter() - start
    config = PipelineConfig(
        labeled=data.labeled, fleet=data.fleet, validation=data.validation, protocol="kitti", preset=preset, seed=seed
    )
    pipeline = Pipeline(config, folder, RunOptions(say=say))
    pipeline.job.add_seconds("simulate and prepare", simulated)
    pipeline.train_source_model()
    extraction = pipeline.extract_fleet()
    results = dict(pipeline.results({name: MethodRun(method=name, upcycle=preset.upcycle) for name in DEMO_METHODS}))
    say("attacking uploads like those of the fleet")
    with pipeline.job.timed("audit"):
        leak = _audit(pipeline.job, preset)
    return DemoResult(
        job=pipeline.job,
        source=source,
        target=target,
        results={name: results[name] for name in DEMO_METHODS},
        extraction=extraction,
        leak=leak,
        seconds=sum(v for stage, v in pipeline.job.seconds.items() if stage in _STAGES),
        peak_memory_gb=_peak_memory_gb(),
    )


def _audit(job: JobFolder, preset: Preset) -> SettingSummary:
    """A first look at what undefended uploads give away: the attacker has the fleet's kind of vehicle, the victims' frames are new."""
    config = job.config
    plan = AuditPlan(
        detector=job.source_model,
        labeled=config.labeled,
        attacker=config.fleet,
        victims=config.validation,
        attacks=("nothing", "occupancy"),
        budget=DEMO_BUDGET,
        seed=config.seed,
    )
    audit = Audit(plan, job.folder / "audit", say=lambda text: None)
    results = list(audit.results())
    write_audit_report(audit, results)
    return summarize_audit(results)[0]


def _peak_memory_gb() -> float:
    """An upper bound: this process and two children, each as large as the largest one was."""
    own, child = (resource.getrusage(who).ru_maxrss / 2**20 for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return own + 2 * child
