"""What defences cost and what they hide: AP after UpCycling over seeds, and the attacks of the audit, on simulated domains.

    python benchmarks/studies/defences.py OUT --scenario waymo_lyft --seeds 0 1 2 3 4 --attack-seeds 0 \\
        --settings int8=none@int8 region=region@int8

Every seed has its own frames and its own source model; each setting starts from that model, and its fleet uploads by that setting. The
attacker has the fleet's kind of vehicle: he learns from the fleet's frames and is scored on the validation frames. Results are stored one
by one, so the command can be stopped and given again. `waymo_lyft` is for choosing, the others are for reporting. docs/results.md has
the numbers.
"""

from __future__ import annotations

import argparse
import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from upcycle3d.core.files import write_atomically
from upcycle3d.core.provenance import provenance_of_process
from upcycle3d.perception.recipes.audit import Audit
from upcycle3d.perception.recipes.audit_cells import AttackName
from upcycle3d.perception.recipes.audit_plan import AuditBudget, AuditPlan, AuditSetting, AuditUse
from upcycle3d.perception.recipes.audit_report import SettingSummary, write_audit_report
from upcycle3d.perception.recipes.audit_tables import summarize_audit
from upcycle3d.perception.recipes.experiment_data import SimulationSize, simulated_adaptation
from upcycle3d.perception.recipes.job_folder import PipelineConfig, RunOptions
from upcycle3d.perception.recipes.method_run import MethodRun
from upcycle3d.perception.recipes.pipeline import Pipeline
from upcycle3d.perception.recipes.presets import DEMO, DEMO_PV_RCNN, Preset
from upcycle3d.perception.recipes.upcycling_experiment import SCENARIOS, Scenario, protocol_for
from upcycle3d.tools.audit import parse_setting

DETECTORS = {"second_iou": DEMO, "pv_rcnn": DEMO_PV_RCNN}


@dataclass(frozen=True, kw_only=True)
class Study:
    """What all seeds share."""

    out: Path
    """Folder of the study."""
    scenario: Scenario
    """Where the labels are and where the fleet drives."""
    preset: Preset
    """Detector and training."""
    settings: tuple[AuditSetting, ...]
    """Ways of uploading besides the undefended one."""
    budget: AuditBudget
    """How much work attackers put in."""


class SeedResult(NamedTuple):
    """What was measured with one seed."""

    rows: list[SettingSummary]
    """One row per setting."""
    others: dict[str, dict[str, Mapping[str, float]]]
    """AP of further methods on the same uploads: setting, method, metric."""


def run_seed(study: Study, seed: int, attacks: tuple[AttackName, ...], methods: Sequence[str]) -> SeedResult:
    """Measure what is missing of one seed: a source model, then AP and attacks of each setting."""
    scenario, size = study.scenario, SimulationSize()
    data = simulated_adaptation(
        study.out / "data" / f"seed{seed}", scenario.source, scenario.target, size=size, seed=seed, classes=("Car",), workers=1
    )
    protocol = protocol_for(scenario, data.validation.open())
    config = PipelineConfig(
        labeled=data.labeled, fleet=data.fleet, validation=data.validation, protocol=protocol, preset=study.preset, seed=seed
    )
    say = lambda text: print(f"seed {seed}: {text}", flush=True)  # noqa: E731
    source = Pipeline(config, study.out / "source" / f"seed{seed}", RunOptions(say=say, processes=1)).train_source_model()
    plan = AuditPlan(
        detector=source,
        labeled=data.labeled,
        attacker=data.fleet,
        victims=data.validation,
        settings=study.settings,
        attacks=attacks,
        budget=study.budget,
        seed=seed,
    )
    use = AuditUse(
        preset=study.preset,
        labeled=data.labeled,
        fleet=data.fleet,
        validation=data.validation,
        seeds=(seed,),
        protocol=protocol,
    )
    audit = Audit(plan, study.out / "audit" / f"seed{seed}", use=use, say=say)
    results = list(audit.results())
    write_audit_report(audit, results, made_by=provenance_of_process())
    runs = {name: MethodRun(method=name, upcycle=study.preset.upcycle) for name in methods}
    others = {}
    for setting in audit.plan.settings if runs else ():
        others[setting.name] = {name: found.student for name, found in audit.pipeline(setting, seed).results(runs)}
    return SeedResult(summarize_audit(results), others)


def print_prices(rows: dict[int, list[SettingSummary]]) -> None:
    """AP of every setting and its paired differences from the undefended one."""
    names = [row.name for row in next(iter(rows.values()))]
    metrics = list(next(iter(rows.values()))[0].ap)
    print(f"\nAP after UpCycling, seeds {' '.join(map(str, rows))}: mean ± sd, and the paired difference from undefended")
    for name in names:
        own = [next(row for row in rows[seed] if row.name == name) for seed in rows]
        plain = [rows[seed][0] for seed in rows]
        parts = []
        for metric in metrics:
            values = np.array([row.ap[metric][0] for row in own])
            change = values - np.array([row.ap[metric][0] for row in plain])
            parts.append(f"{metric} {_spread(values)} ({_spread(change)})")
        share = np.mean([row.bytes_per_frame / base.bytes_per_frame for row, base in zip(own, plain, strict=True)])
        size = np.mean([row.bytes_per_frame for row in own]) / 1000
        print(f"{name:16} {size:6.1f} kB {share:5.2f}   {'   '.join(parts)}")


def print_others(found: dict[int, SeedResult]) -> None:
    """AP of further methods on the same uploads, and the paired difference from UpCycling on them."""
    first = next(iter(found.values()))
    for setting, methods in first.others.items():
        for method, metrics in methods.items():
            parts = []
            for metric in metrics:
                values = np.array([result.others[setting][method][metric] for result in found.values()])
                own = [next(row for row in result.rows if row.name == setting).ap[metric][0] for result in found.values()]
                parts.append(f"{metric} {_spread(values)} ({_spread(values - np.array(own))})")
            print(f"{setting:16} {method:18}  {'   '.join(parts)}")


def print_leaks(rows: dict[int, list[SettingSummary]]) -> None:
    """What the strongest attack rebuilt, for each attacked seed."""
    print("\nOccupancy attack at matched density: F@0.2 m, leak share, above the road, cars, bits per voxel")
    for seed, settings in rows.items():
        for row in settings:
            if row.f_scene is None:
                continue
            cars = next(iter(row.f_objects.values()), None)
            numbers = (row.f_scene, row.leak, row.f_above_road, cars, row.bits_per_voxel)
            print(f"seed {seed} {row.name:16} " + "  ".join("  -  " if v is None else f"{v:5.3f}" for v in numbers))


def write_table(path: Path, found: dict[int, SeedResult]) -> None:
    """All numbers as CSV, one row per seed and setting."""
    metrics = list(next(iter(found.values())).rows[0].ap)
    header = [
        "seed",
        "setting",
        "what",
        "bytes",
        "f_20cm",
        "leak_share",
        "above_road",
        "car",
        "bits_per_voxel",
        "exact",
        *metrics,
    ]
    lines = []
    for seed, result in found.items():
        for row in result.rows:
            car = next(iter(row.f_objects.values()), None)
            numbers = (row.bytes_per_frame, row.f_scene, row.leak, row.f_above_road, car, row.bits_per_voxel, row.exact_per_scan)
            numbers += tuple(row.ap[metric][0] for metric in metrics)
            lines.append([seed, row.name, row.what, *("" if value is None else f"{value:.4f}" for value in numbers)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *lines])
    write_atomically(path, text.getvalue().encode())


def _spread(values: Sequence[float] | np.ndarray) -> str:
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def main() -> None:
    """Run what is missing and print AP and leaks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenario", choices=[name for name in SCENARIOS if not SCENARIOS[name].partial], default="waymo_lyft")
    parser.add_argument("--detector", choices=DETECTORS, default="second_iou")
    parser.add_argument("--settings", nargs="*", default=[], help="NAME=DEFENCE+DEFENCE@CODEC, as for upcycle3d audit")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--attack-seeds", type=int, nargs="*", default=[0])
    parser.add_argument("--attacks", nargs="+", default=["nothing", "coordinates", "occupancy"])
    parser.add_argument(
        "--methods",
        nargs="*",
        default=[],
        help="further methods to train on the same uploads, such as hybrid and source_continued",
    )
    parser.add_argument("--steps", type=int, default=800, help="optimizer steps of the occupancy attack")
    parser.add_argument("--victims", type=int, default=30, help="frames that are attacked")
    options = parser.parse_args()
    study = Study(
        out=options.out / f"{options.scenario}_{options.detector}",
        scenario=SCENARIOS[options.scenario],
        preset=DETECTORS[options.detector],
        settings=tuple(parse_setting(text) for text in options.settings),
        budget=AuditBudget(steps=options.steps, victim_frames=options.victims),
    )
    found: dict[int, SeedResult] = {}
    for seed in options.seeds:
        attacks = tuple(options.attacks) if seed in options.attack_seeds else ()
        found[seed] = run_seed(study, seed, attacks, options.methods)
        rows = {number: result.rows for number, result in found.items()}
        print_prices(rows)
        print_others(found)
        print_leaks(rows)
        write_table(study.out / "table.csv", found)


if __name__ == "__main__":
    main()
