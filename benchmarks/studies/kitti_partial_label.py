"""UpCycling on a sample of real KITTI frames, by the commands that a user would type: few labeled frames, many smashed ones.

    python benchmarks/studies/kitti_partial_label.py --root KITTI_SAMPLE --out runs/kitti --seeds 0 1 2

For each list of splits and each seed: train on the labeled frames, extract smashed scenes from the unlabeled ones, upcycle, score on
val. The list `all` takes the splits as they are; `disjoint` leaves the drives of the fleet out of train and val. The fleet's labels only
measure the pseudo labels. Finished steps are skipped, so the script can be stopped and started again. Two jobs run at a time with one
thread each.

KITTI_SAMPLE is a folder in KITTI's layout with ImageSets/{train,val}{,_disjoint}.txt and unlabelled.txt, and with `velodyne_reduced`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from upcycle3d.core.config_json import Json
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.kitti import KittiDataset, read_ids
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.perception.evaluation.detect import detect_frames, kitti_detections
from upcycle3d.perception.evaluation.kitti import evaluate_kitti
from upcycle3d.perception.recipes.result_cache import ResultCache
from upcycle3d.perception.recipes.result_summary import standard_deviation
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table, write_json

METHODS = ("source_only", "source_continued", "pseudo_label", "upcycling")
LISTS = {"all": "", "disjoint": "_disjoint"}
OVERLAPS = ("official", "loose")
METRICS = ("3d", "bev")


def run(*arguments: object) -> None:
    """One upcycle3d command in a process of its own, with one thread."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "upcycle3d.tools.main", *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")


class Job:
    """One list of splits with one seed."""

    def __init__(self, preset: str, root: Path, out: Path, name: str, seed: int) -> None:
        self.preset, self.root, self.name, self.seed = preset, root, name, seed
        self.data, self.folder = out / f"data_{name}", out / f"{name}_seed{seed}"
        self.train_split, self.val_split = (f"{self.data}:{split}{LISTS[name]}" for split in ("train", "val"))

    def results(self, cache: ResultCache) -> dict[str, Json]:
        """Scores of every method."""
        found = {}
        for method in METHODS:
            found[method] = cache.read_or_make(method, self.seed, lambda m=method: self.score(m))  # type: ignore[misc]
            shown = {m: round(found[method]["official"][m], 1) for m in METRICS}
            print(self.name, "seed", self.seed, method, shown, flush=True)
        return found

    def score(self, method: str) -> dict[str, dict[str, float]]:
        """Car AP, moderate, R40, of a method: by minimum overlaps, 3D and BEV."""
        folder, found = self.upcycle(method), {}
        with tempfile.TemporaryDirectory() as scratch:
            for overlaps in OVERLAPS:
                file = Path(scratch) / f"{overlaps}.json"
                run("evaluate", "run", "--detector", folder, "--data", self.val_split, "--overlaps", overlaps, "--json", file)
                car = json.loads(file.read_text())["Car"]
                found[overlaps] = {metric: car[metric]["R40"]["moderate"] for metric in METRICS}
        return found

    def upcycle(self, method: str) -> Path:
        """The run folder of a method."""
        folder, store = self.folder / method, self.fleet()
        if method != "source_only" and not (folder / "detector.safetensors").exists():
            inputs = ("--data", self.train_split, "--detector", self.source_model(), "--store", store, "--method", method)
            truth = ("--truth", self.folder / "receipts.json", self.data)
            run("upcycle", self.preset, *inputs, *truth, "--out", folder, "--seed", self.seed, "--workers", 0, "--resume")
        return folder

    def source_model(self) -> Path:
        """The run folder of the source model, which is also the method `source_only`."""
        folder = self.folder / "source_only"
        if not (folder / "detector.safetensors").exists():
            inputs = ("--data", self.train_split, "--out", folder, "--seed", self.seed)
            run("train", self.preset, *inputs, "--workers", 0, "--resume")
        return folder

    def fleet(self) -> Path:
        """The store of the fleet's scenes."""
        store, shards, source = self.folder / "store", self.folder / "shards", self.source_model()
        if not (store / "catalogue.parquet").exists():
            shutil.rmtree(shards, ignore_errors=True)  # of a run that was stopped
            scans = ("--scans", self.root / "training" / "velodyne_reduced", "--ids", self.root / "ImageSets" / "unlabelled.txt")
            run("extract", "--detector", source, *scans, "--out", shards, "--receipts", self.folder / "receipts.json")
            run("ingest", shards, "--store", store, "--detector", source)
        return store


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
    return {m: (whole[k], *(float(q) for q in np.quantile(drawn[:, k], (0.05, 0.95)))) for k, m in enumerate(METRICS)}


def prepare(root: Path, out: Path, name: str) -> None:
    """Prepare the splits of a list and print how many cars are scored."""
    train, val = f"train{LISTS[name]}", f"val{LISTS[name]}"
    splits = ("--splits", train, val, "unlabelled", "--labeled", train)
    run("prepare", "kitti", root, "--out", out / f"data_{name}", *splits, "--classes", "Car")
    ids = read_ids(root / "ImageSets" / f"{val}.txt")
    raw = KittiDataset(root, ids)
    frames = [raw.kitti_objects(i) for i in ids]
    levels = [int(o.difficulty()[k]) for o in frames for k, kind in enumerate(o.types) if kind == "Car"]
    print(f"{name} lists: {len(ids)} validation frames, {sum(0 <= level <= 1 for level in levels)} moderate cars")


def results_of(out: Path, name: str, preset: str) -> ResultCache:
    """The stored results of a list of splits."""
    splits = (f"train{LISTS[name]}", f"val{LISTS[name]}", "unlabelled")
    frames = {split: DataSplit(root=out / f"data_{name}", name=split).summary() for split in splits}
    return ResultCache(out / f"results_{name}", {"preset": preset, **frames})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, required=True, help="folder in KITTI's layout")
    parser.add_argument("--out", type=Path, required=True, help="folder for data, runs and results")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="kitti_small", help="kitti_small (SECOND-IoU) or kitti_small_pv_rcnn")
    parser.add_argument("--lists", nargs="+", default=list(LISTS), choices=LISTS)
    arguments = parser.parse_args()
    for name in arguments.lists:
        prepare(arguments.root, arguments.out, name)
    caches = {name: results_of(arguments.out, name, arguments.preset) for name in arguments.lists}
    jobs = [
        Job(arguments.preset, arguments.root, arguments.out, name, seed) for seed in arguments.seeds for name in arguments.lists
    ]
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda job: job.results(caches[job.name]), jobs))
    summary: dict[str, object] = {}
    for name in arguments.lists:
        of_list = [results for job, results in zip(jobs, found, strict=True) if job.name == name]
        rows = []
        for method in METHODS:
            scores = {f"{o}/{m}": [results[method][o][m] for results in of_list] for o in OVERLAPS for m in METRICS}
            summary |= {f"{name}/{method}/{key}": values for key, values in scores.items()}
            rows.append((method, *(f"{statistics.fmean(v):.1f} ± {standard_deviation(v):.1f}" for v in scores.values())))
        title = f"KITTI sample, {name} lists, Car, moderate, R40, {len(arguments.seeds)} seeds"
        print_table(title, ("method", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5"), rows)
        for metric, (mean, low, high) in bootstrap(arguments.out, name, arguments.seeds).items():
            summary[f"{name}/bootstrap/{metric}"] = (mean, low, high)
            interval = f"90 % of a bootstrap over frames: {low:+.1f} to {high:+.1f}"
            print(f"{name}: UpCycling minus source_continued, {metric}: {mean:+.1f}, {interval}")
    write_json(arguments.out / "summary.json", summary)


if __name__ == "__main__":
    main()
