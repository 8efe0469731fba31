"""UpCycling against its baselines on simulated domains, over seeds: mean, spread and closed gap.

    python benchmarks/claim.py --source waymo --target lyft --seeds 0 1 --out runs/claim_dev         # development: may be tuned on
    python benchmarks/claim.py --source waymo --target kitti --seeds 10 11 12 --out runs/claim       # reported: run once, after freezing

Every finished method leaves a result file, so the benchmark can be stopped and started again. The last step's student is the result.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

from upcycle3d.datasets.simulation.places import domain
from upcycle3d.perception.main_job import MainJob, MainJobConfig, MethodResult, closed_gap
from upcycle3d.perception.presets import PRESETS, Preset
from upcycle3d.perception.training.run_folder import describe_environment
from upcycle3d.tools.console import print_table, write_json

METHODS = "source_only source_continued pseudo_label upcycling oracle_frozen oracle_full"
METRICS = ("ap_3d", "ap_bev", "ap_3d_50", "ap_bev_50")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="waymo")
    parser.add_argument("--target", default="lyft")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--methods", nargs="+", default=METHODS.split())
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--labelled", type=int, default=100)
    parser.add_argument("--fleet", type=int, default=200)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--lr", type=float, help="upcycling's peak learning rate instead of the preset's")
    parser.add_argument("--steps", type=int, help="upcycling steps instead of the preset's")
    parser.add_argument("--max-objects", type=int, help="cars F-GT fills a scene up to, instead of the preset's")
    parser.add_argument("--unlabelled-batch", type=int, help="smashed scenes a step instead of the preset's")
    parser.add_argument("--teacher-box-weight", type=float, help="box regression towards teacher boxes instead of the preset's")
    parser.add_argument(
        "--share", type=Path, help="the --out of a finished run that differs in upcycling settings only: use its data and source"
    )
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    results: dict[int, dict[str, MethodResult]] = {}
    for seed in arguments.seeds:
        config = MainJobConfig(
            source=domain(arguments.source),
            target=domain(arguments.target),
            labelled=arguments.labelled,
            fleet=arguments.fleet,
            validation=arguments.validation,
            seed=seed,
            preset=varied(PRESETS[arguments.preset], arguments),
        )
        job = MainJob(
            config=config, folder=arguments.out / f"seed{seed}", say=lambda text, s=seed: print(f"seed {s}: {text}", flush=True)
        )
        if arguments.share:
            job.share(arguments.share / f"seed{seed}")
        job.data()
        job.train_source()
        job.extract_fleet()
        results[seed] = job.run_methods(arguments.methods)
    report(arguments, results)


def varied(preset: Preset, arguments: argparse.Namespace) -> Preset:
    """The preset with the asked-for upcycling settings; every variant needs a folder of its own."""
    up = preset.upcycle
    optim = up.loop.optim
    optim = replace(optim, lr=arguments.lr or optim.lr, total_steps=arguments.steps or optim.total_steps)
    weight = up.teacher_box_weight if arguments.teacher_box_weight is None else arguments.teacher_box_weight
    f_gt = up.f_gt if arguments.max_objects is None else replace(up.f_gt, max_objects=(arguments.max_objects,))
    batch = arguments.unlabelled_batch or up.unlabelled_batch
    loop = replace(up.loop, optim=optim)
    return replace(preset, upcycle=replace(up, loop=loop, f_gt=f_gt, unlabelled_batch=batch, teacher_box_weight=weight))


def report(arguments: argparse.Namespace, results: dict[int, dict[str, MethodResult]]) -> None:
    """Print and write mean and standard deviation over seeds of student and EMA, and the closed gaps of the means."""
    summary: dict[str, object] = {}
    for who in ("student", "teacher"):
        rows, means = [], {}
        for name in arguments.methods:
            values = {m: [getattr(getattr(r[name], who), m) for r in results.values()] for m in METRICS}
            means[name] = {m: (statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for m, v in values.items()}
            rows.append((name, *(f"{mean:.1f} ± {sd:.1f}" for mean, sd in means[name].values())))
        print_table(
            f"Car AP, moderate, R40, {who}, {len(results)} seeds", ("method", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5"), rows
        )
        summary[who] = means
        for other in ("source_continued", "pseudo_label"):
            if {"upcycling", other} <= means.keys():
                for metric in METRICS[:2]:
                    by_seed = [
                        getattr(getattr(r["upcycling"], who), metric) - getattr(getattr(r[other], who), metric)
                        for r in results.values()
                    ]
                    summary[f"upcycling_minus_{other}_{metric}_{who}"] = by_seed
                    print(
                        f"{who}: UpCycling minus {other}, {metric}: {statistics.fmean(by_seed):+.1f} points ({', '.join(f'{d:+.1f}' for d in by_seed)})"
                    )
        for oracle in ("oracle_frozen", "oracle_full"):
            if {"source_only", "upcycling", oracle} <= means.keys():
                for metric in ("ap_3d", "ap_bev"):
                    spread = max(means[n][metric][1] for n in ("source_only", oracle))
                    gap = closed_gap(*(means[n][metric][0] for n in ("source_only", "upcycling", oracle)), spread=spread)
                    summary[f"closed_gap_{metric}_{oracle}_{who}"] = gap
                    print(
                        f"{who}: closed gap of UpCycling, {metric}, against {oracle}: {'null' if gap is None else f'{gap:.0f} %'}"
                    )
    summary["per_seed"] = {seed: {name: asdict(r) for name, r in by_name.items()} for seed, by_name in results.items()}
    summary["environment"] = describe_environment(command=sys.argv, seed=arguments.seeds[0])
    summary["arguments"] = {k: str(v) for k, v in vars(arguments).items()}
    write_json(arguments.json or arguments.out / "summary.json", json.loads(json.dumps(summary)))


if __name__ == "__main__":
    main()
