"""The partial-label scenario on the real KITTI sample, by the commands a user would type: few labelled frames, many smashed ones.

    python benchmarks/studies/kitti_partial_label.py --root ../shared/data/kitti --out runs/kitti --seeds 0 1 2

For each list of splits (as given, and with the fleet's four drives taken out of train and val) and each seed: train on the
labelled frames, extract smashed scenes from the unlabelled ones, upcycle, score on val. The fleet's labels are read for one thing:
to log how good pseudo labels are. Finished steps are skipped, so it can be stopped and started again. Two jobs run at a time with
one thread each.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from upcycle3d.datasets.kitti import KittiDataset
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.evaluation.detect import detect_frames, kitti_detections
from upcycle3d.perception.evaluation.kitti import evaluate_kitti
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table, write_json

METHODS = ("source_continued", "pseudo_label", "upcycling")
LISTS = {"all": "", "disjoint": "_disjoint"}


def run(*arguments: object) -> None:
    """One upcycle3d command in a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "upcycle3d.tools.main", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


def one_job(preset: str, root: Path, out: Path, name: str, suffix: str, seed: int) -> dict[str, dict[str, object]]:
    """AP of every method for one list of splits and one seed."""
    data, job = out / f"data_{name}", out / f"{name}_seed{seed}"
    source, store = job / "source_only", job / "store"
    if not (source / "detector.safetensors").exists():
        run(
            "train",
            preset,
            "--data",
            f"{data}:train{suffix}",
            "--out",
            source,
            "--seed",
            seed,
            "--workers",
            0,
            "--resume",
        )
    if not (store / "catalogue.parquet").exists():
        shutil.rmtree(job / "shards", ignore_errors=True)  # of a run that was stopped
        scans, ids = root / "training" / "velodyne_reduced", root / "ImageSets" / "unlabelled.txt"
        run(
            "extract",
            "--detector",
            source,
            "--scans",
            scans,
            "--ids",
            ids,
            "--out",
            job / "shards",
            "--receipts",
            job / "receipts.json",
            "--json",
            job / "extract.json",
        )
        run("ingest", job / "shards", "--store", store, "--detector", source)
    results = {}
    for method in ("source_only", *METHODS):
        folder = job / method
        if not (folder / "detector.safetensors").exists():
            run("upcycle", preset, "--data", f"{data}:train{suffix}", "--detector", source, "--store", store, "--method", method,
                "--truth", job / "receipts.json", data, "--out", folder, "--seed", seed, "--workers", 0, "--resume")  # fmt: skip
        for overlaps in ("official", "loose"):
            result = folder / f"{overlaps}.json"
            if not result.exists():
                run(
                    "evaluate",
                    "run",
                    "--detector",
                    folder,
                    "--data",
                    f"{data}:val{suffix}",
                    "--overlaps",
                    overlaps,
                    "--json",
                    result,
                )
        results[method] = {o: json.loads((folder / f"{o}.json").read_text()) for o in ("official", "loose")}
        print(
            name,
            "seed",
            seed,
            method,
            {m: round(results[method]["official"]["Car"][m]["R40"]["moderate"], 1) for m in ("3d", "bev")},
            flush=True,
        )
    return results


def bootstrap(out: Path, name: str, seeds: list[int], *, rounds: int = 500) -> dict[str, tuple[float, float, float]]:
    """UpCycling minus source_continued, Car AP at IoU 0.7, moderate, R40: mean over seeds, and 5 % and 95 % over resampled frames.

    The same frames are drawn for both methods and all seeds, so the interval is about the choice of frames alone.
    """
    frames = PreparedDataset(out / f"data_{name}", f"val{LISTS[name]}")
    found = {
        (method, seed): [
            kitti_detections(frame, p, ("Car",))
            for frame, p in detect_frames(load_detector(out / f"{name}_seed{seed}" / method), frames)
        ]
        for method in ("upcycling", "source_continued")
        for seed in seeds
    }
    truths = [frames.kitti_objects(i) for i in frames.ids]

    def gain(rows: list[int]) -> tuple[float, float]:
        ap = {}
        for key, detections in found.items():
            car = evaluate_kitti([truths[i] for i in rows], [detections[i] for i in rows], classes=("Car",)).classes["Car"]
            ap[key] = (car.box_3d.r40[1], car.bev.r40[1])
        gains = [[ap["upcycling", s][m] - ap["source_continued", s][m] for s in seeds] for m in (0, 1)]
        return statistics.fmean(gains[0]), statistics.fmean(gains[1])

    rng = np.random.default_rng(0)
    all_rows = list(range(len(truths)))
    drawn = np.array([gain(rng.choice(all_rows, len(all_rows)).tolist()) for _ in range(rounds)])
    whole = gain(all_rows)
    return {m: (whole[k], *(float(q) for q in np.quantile(drawn[:, k], (0.05, 0.95)))) for k, m in enumerate(("3d", "bev"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="kitti_small", help="kitti_small (SECOND-IoU) or kitti_small_pv_rcnn")
    parser.add_argument("--lists", nargs="+", default=list(LISTS), choices=LISTS)
    arguments = parser.parse_args()
    for name in arguments.lists:
        train, val = f"train{LISTS[name]}", f"val{LISTS[name]}"
        run(
            "prepare",
            "kitti",
            arguments.root,
            "--out",
            arguments.out / f"data_{name}",
            "--splits",
            train,
            val,
            "unlabelled",
            "--labeled",
            train,
            "--classes",
            "Car",
        )
        ids = (arguments.root / "ImageSets" / f"{val}.txt").read_text().split()
        cars = [KittiDataset(arguments.root, ids).kitti_objects(i) for i in ids]
        moderate = sum(
            int(((o.difficulty() >= 0) & (o.difficulty() <= 1))[k]) for o in cars for k, t in enumerate(o.types) if t == "Car"
        )
        print(f"{name} lists: {len(ids)} validation frames, {moderate} moderate cars")
    jobs = [(name, LISTS[name], seed) for seed in arguments.seeds for name in arguments.lists]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: one_job(arguments.preset, arguments.root, arguments.out, *job), jobs))
    summary: dict[str, object] = {}
    for name in arguments.lists:
        rows = []
        for method in ("source_only", *METHODS):
            cells = []
            for overlaps in ("official", "loose"):
                for metric in ("3d", "bev"):
                    values = [
                        r[method][overlaps]["Car"][metric]["R40"]["moderate"]
                        for (n, _, _), r in zip(jobs, found, strict=True)
                        if n == name
                    ]  # type: ignore[index]
                    spread = statistics.stdev(values) if len(values) > 1 else 0.0
                    cells.append(f"{statistics.fmean(values):.1f} ± {spread:.1f}")
                    summary[f"{name}/{method}/{overlaps}/{metric}"] = values
            rows.append((method, *cells))
        print_table(
            f"KITTI sample, {name} lists, Car, moderate, R40, {len(arguments.seeds)} seeds",
            ("method", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5"),
            rows,
        )
        for metric, (mean, low, high) in bootstrap(arguments.out, name, arguments.seeds).items():
            summary[f"{name}/bootstrap/{metric}"] = (mean, low, high)
            print(
                f"{name}: UpCycling minus source_continued, {metric}: {mean:+.1f}, bootstrap by frame 90 %: {low:+.1f} to {high:+.1f}"
            )
    write_json(arguments.out / "summary.json", summary)


if __name__ == "__main__":
    main()
