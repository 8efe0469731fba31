"""What it costs PV-RCNN that its keypoints are voxel centers instead of raw points: AP in the domain of the training, over seeds.

    python benchmarks/studies/keypoint_source.py --domain waymo --seeds 0 1 2 --out runs/keypoints

Both kinds are trained on the same labeled frames from the same initial weights and scored on frames of the same domain. A detector trained
with raw points is also scored with voxel centers, because that is how imported weights run in a fleet that may not send points. Two
trainings run at a time with one thread each; a finished one is not repeated.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch

from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.kitti import KittiDataset, read_ids
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.perception.evaluation.detect import evaluate_detector
from upcycle3d.perception.evaluation.kitti import LOOSE, OFFICIAL
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.pv_rcnn import PvRcnnDetectorConfig
from upcycle3d.perception.recipes.architectures import SMALL_PV_RCNN_PUBLISHED_DETECTOR
from upcycle3d.perception.recipes.assembly import labeled_batches
from upcycle3d.perception.recipes.presets import SMALL_PV_RCNN
from upcycle3d.perception.training.detector_files import load_detector, save_run_detector
from upcycle3d.perception.training.environment import describe_environment
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.training.supervised import train_supervised
from upcycle3d.tools.console import print_table, write_json

Kind = Literal["voxel_centers", "raw_points"]
KINDS: tuple[Kind, ...] = ("raw_points", "voxel_centers")


def with_keypoints(kind: Kind) -> PvRcnnDetectorConfig:
    detector = SMALL_PV_RCNN_PUBLISHED_DETECTOR
    return replace(detector, encoder=replace(detector.encoder, keypoint_source=kind))


def data(folder: Path, name: str, seed: int, train: int, validation: int) -> None:
    """Simulate and prepare `train` labeled and `validation` scored frames."""
    where, raw = domain(name), folder / "raw"
    write_kitti_layout(
        raw, where, num_frames=train + validation, seed=2000 + seed, view="camera", splits={"train": train, "val": validation}
    )
    ids = {split: read_ids(raw / "ImageSets" / f"{split}.txt") for split in ("train", "val")}
    every, z_shift = ids["train"] + ids["val"], where.sensor.height
    source = KittiDataset(raw, every, classes=("Car",), z_shift=z_shift)
    prepare(source, every, folder / "data", splits=ids, classes=("Car",), workers=2)
    DataSplit(root=folder / "data", name="train").ensure_gt_database()


def train(folder: Path, kind: Kind, seed: int) -> None:
    """Supervised training with one kind of keypoints."""
    torch.set_num_threads(1)
    out, preset = folder / kind, replace(SMALL_PV_RCNN, detector=with_keypoints(kind))
    if (out / "detector.safetensors").exists():
        return
    torch.manual_seed(seed)
    detector = with_keypoints(kind).build()
    data = DataSplit(root=folder / "data", name="train")
    labeled = labeled_batches(preset, data, batch_size=preset.train.batch_size, seed=seed)
    config = replace(preset.train, loop=replace(preset.train.loop, seed=seed))
    run = RunFolder.create(out, config, seed=seed, resume=True)
    train_supervised(detector, labeled, config.loop, run=run, progress=False)
    save_run_detector(out, detector)


def scores(detector: Detector, folder: Path) -> list[float]:
    """Car AP, moderate, R40: 3D and BEV at IoU 0.7, then at 0.5."""
    frames = PreparedDataset(folder / "data", "val")
    truth = KittiDataset(folder / "raw", frames.ids).kitti_objects
    values = []
    for overlaps in (OFFICIAL, LOOSE):
        car = evaluate_detector(detector, frames, truth, min_overlaps=overlaps)[0].classes["Car"]
        values += [car.box_3d.r40[1], car.bev.r40[1]]
    return values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--domain", default="waymo")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--validation", type=int, default=100)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    found: dict[str, list[list[float]]] = {}
    folders = {seed: arguments.out / f"seed{seed}" for seed in arguments.seeds}
    for seed, folder in folders.items():
        data(folder, arguments.domain, seed, arguments.train, arguments.validation)
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("spawn")) as pool:
        jobs = [pool.submit(train, folder, kind, seed) for seed, folder in folders.items() for kind in KINDS]
        for job in jobs:
            job.result()
    for folder in folders.values():
        for kind in KINDS:
            detector = load_detector(folder / kind)
            found.setdefault(f"trained and scored with {kind}", []).append(scores(detector, folder))
        other = with_keypoints("voxel_centers").build().eval()
        other.load_state_dict(load_detector(folder / "raw_points").state_dict())
        found.setdefault("trained with raw_points, scored with voxel_centers", []).append(scores(other, folder))
    rows = []
    for name, by_seed in found.items():
        cells = [(statistics.fmean(v), statistics.stdev(v) if len(v) > 1 else 0.0) for v in zip(*by_seed, strict=True)]
        rows.append((name, *(f"{mean:.1f} ± {sd:.1f}" for mean, sd in cells)))
    title = f"PV-RCNN, small, simulated {arguments.domain}: Car AP, moderate, R40, {len(arguments.seeds)} seeds"
    print_table(title, ("keypoints", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5"), rows)
    environment = describe_environment(command=sys.argv, seed=arguments.seeds[0])
    write_json(arguments.out / "summary.json", json.loads(json.dumps({"ap": found, "environment": environment})))


if __name__ == "__main__":
    main()
