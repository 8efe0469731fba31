"""Scans of a full turn: how many voxels each preset loses, and what the loss and the range cost in AP.

    python benchmarks/studies/full_turn.py cells --data SAMPLES --out runs/full_turn
    python benchmarks/studies/full_turn.py accuracy --out runs/full_turn

`cells` counts on real scans, whose folders under SAMPLES stand in `REAL`. "Worst part" is the largest share of its voxels that a sector
of 30 degrees or a ring of 10 m loses in a scan, with the voxels kept in file order as version 0.1 did, and evenly as now. `accuracy`
trains on simulated scans of a full turn, one training at a time, and scores the trained detectors on all cars within 51.2 m, and on those
in the front half-field of the preset `small`. A rule in brackets is the one over the voxel limit: "file order" keeps the voxels whose
points come first. Finished trainings and scores are not repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import numpy as np
import torch
from torch import Tensor

from upcycle3d.core.frame import Frame
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.datasets.simulation.simulate import SimulatedDataset
from upcycle3d.ops.voxelize import voxelize
from upcycle3d.perception.evaluation.kitti import LOOSE
from upcycle3d.perception.evaluation.protocols import LabeledDetections, detect_labeled, score_cross_dataset
from upcycle3d.perception.evaluation.score import kitti_scores
from upcycle3d.perception.models.encoders.encoder import Encoder
from upcycle3d.perception.recipes.job_folder import RunOptions
from upcycle3d.perception.recipes.pipeline import train_source_model
from upcycle3d.perception.recipes.presets import PRESETS, Preset
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table, write_json

Rule = Literal["even", "file order"]
REAL = {
    "KITTI": ("kitti/training/velodyne", 4, 1.73),
    "nuScenes": ("nuscenes/samples/LIDAR_TOP", 5, 1.84),
    "Waymo": ("waymo/points_unlabelled", 5, 0.0),
    "Lyft": ("lyft/lidar", 5, 1.8),
}
"""Folder, columns and mounting height of the real scans."""
COUNTED = ("small", "kitti_small", "kitti_second_iou", "cross_dataset_second_iou", "full_turn_small", "full_turn_second_iou")
LIMIT = 15_000
"""A voxel limit that scans of a full turn exceed by far."""
ALL_AROUND, FRONT = (-51.2, -51.2, 51.2, 51.2), (0.0, -25.6, 51.2, 25.6)


# ---- voxels of real scans


def cells(data: Path, out: Path) -> None:
    rows = []
    for name, (folder, columns, height) in REAL.items():
        files = sorted((data / folder).glob("*.bin"))
        if not files:
            print(f"no scans of {name} in {data / folder}")
            continue
        scans = [torch.from_numpy(np.fromfile(file, np.float32).reshape(-1, columns)[:, :3]) for file in files]
        for preset in COUNTED:
            encoder = PRESETS[preset].detector.encoder
            shift = (
                height if encoder.grid.range[2] > -3 else 0.0
            )  # presets whose range begins at -3 m expect the sensor's own frame
            found = [_losses(scan + torch.tensor([0, 0, shift]), encoder) for scan in scans]
            occupied = [f[0] for f in found]
            lost = sum(f[1] for f in found) / sum(occupied)
            worst = [max(f[k] for f in found) for k in (2, 3)]
            shares = (f"{lost:.1%}", *(f"{share:.0%}" for share in worst)) if lost else ("-", "-", "-")
            middle = f"{statistics.median(occupied):,.0f}"
            rows.append((f"{len(scans)} of {name}", preset, f"{encoder.max_voxels:,}", middle, f"{max(occupied):,}", *shares))
    header = (
        "scans",
        "preset",
        "limit",
        "median voxels",
        "most voxels",
        "lost",
        "worst part, file order",
        "worst part, even",
    )
    print_table("Occupied voxels of real scans of a full turn", header, rows)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "cells.json", {"header": list(header), "rows": [list(row) for row in rows]})


def _losses(points: Tensor, config: object) -> tuple[int, int, float, float]:
    """Occupied voxels, lost voxels, and the largest share that a part of the scan loses by file order and by the even rule."""
    grid = {"point_range": config.grid.range, "voxel_size": config.grid.voxel_size, "max_points": 1}
    everything, kept = (voxelize(points, max_voxels=limit, **grid) for limit in (len(points), config.max_voxels))
    before = _by_part(everything.coords, config)
    shares = [
        ((before - _by_part(coords, config))[before >= 100] / before[before >= 100]).max().item()
        for coords in (everything.coords[: config.max_voxels], kept.coords)
    ]
    return everything.counts.cells, kept.counts.cells_over_limit, shares[0], shares[1]


def _by_part(coords: Tensor, config: object) -> Tensor:
    x = (coords[:, 2] + 0.5) * config.grid.voxel_size[0] + config.grid.range[0]
    y = (coords[:, 1] + 0.5) * config.grid.voxel_size[1] + config.grid.range[1]
    sector = ((torch.atan2(y, x) + math.pi) / (math.pi / 6)).long().clamp(0, 11)
    ring = (torch.hypot(x, y) / 10).long()
    return torch.cat([torch.bincount(sector, minlength=12), torch.bincount(ring, minlength=12)]).double()


# ---- accuracy on simulated scans


class FullTurns:
    """Simulated full turns of one place, the road at z = 0, with the cars within 51.2 m."""

    def __init__(self, place: str, seed: int, frames: int) -> None:
        self.simulated = SimulatedDataset(domain=domain(place), seed=seed, num_frames=frames, view="full", classes=("Car",))
        self.rig = RigSpec(z_shift=domain(place).sensor.height)

    def __len__(self) -> int:
        return len(self.simulated)

    def __getitem__(self, index: int) -> Frame:
        frame = self.simulated[index]
        assert frame.labels is not None
        labels = replace(frame.labels, boxes=self.rig.from_sensor(frame.labels.boxes))
        labels = labels.select(_inside(labels.boxes.data, ALL_AROUND))
        return replace(frame, points=self.rig.from_sensor(frame.points), labels=labels, rig=self.rig, calibration=None)


def _inside(boxes: Tensor, area: tuple[float, float, float, float]) -> Tensor:
    x0, y0, x1, y1 = area
    return (boxes[:, 0] >= x0) & (boxes[:, 0] < x1) & (boxes[:, 1] >= y0) & (boxes[:, 1] < y1)


@contextmanager
def rule_over_limit(rule: Rule) -> Iterator[None]:
    """Give every encoder the points of the voxels that come first in file order, if the rule is that of version 0.1."""
    original = Encoder.forward

    def first_cells(encoder: Encoder, cloud: PointCloud) -> PointCloud:
        grid, limit = encoder.config.grid, encoder.config.max_voxels
        start, size = (cloud.xyz.new_tensor(v) for v in (grid.range[:3], grid.voxel_size))
        index = ((cloud.xyz - start) / size).floor().long()
        nz, ny, nx = grid.shape
        inside = ((index >= 0) & (index < torch.tensor([nx, ny, nz]))).all(1)
        key = ((index[:, 2] * ny + index[:, 1]) * nx + index[:, 0])[inside].numpy()
        _, first, number = np.unique(key, return_index=True, return_inverse=True)
        early = first.argsort().argsort()[number] < limit
        return cloud.select(inside.nonzero()[:, 0][torch.from_numpy(early)])

    def forward(self: Encoder, points: Sequence[PointCloud]) -> object:
        return original(self, [first_cells(self, cloud) for cloud in points])

    Encoder.forward = forward if rule == "file order" else original
    try:
        yield
    finally:
        Encoder.forward = original


def accuracy(out: Path, *, place: str, seed: int, train: int, validation: int, steps: int, train_limited: bool) -> None:
    torch.set_num_threads(1)
    source, folder = FullTurns(place, 3000 + seed, train + validation), out / f"{place}{seed}"
    ids = tuple(f"{i:06d}" for i in range(len(source)))
    prepare(source, ids, folder / "data", splits={"train": ids[:train], "val": ids[train:]}, classes=("Car",), workers=1)
    scored = folder / f"scores_{steps}.json"
    found: dict[str, list[float]] = json.loads(scored.read_text()) if scored.exists() else {}

    def step(name: str, work: Callable[[], list[float]]) -> None:
        if name not in found:
            found[name] = work()
            write_json(scored, found)
            print(name, [round(v, 1) for v in found[name]], flush=True)

    def run(preset: str, rule: Rule, *, limit: int | None = None, scored_by: Rule | None = None) -> list[float]:
        """Train with a rule and score, with the same rule or with `LIMIT` and another rule."""
        chosen = _with_limit(PRESETS[preset], limit)
        chosen = replace(chosen, train=replace(chosen.train, loop=_with_steps(chosen, steps)))
        run_folder = folder / "_".join([preset, str(limit or ""), rule, str(steps)]).replace(" ", "_")
        with rule_over_limit(rule):
            split = DataSplit(root=folder / "data", name="train")
            train_source_model(run_folder, split, chosen, seed=seed, options=RunOptions(progress=False))
        detector = load_detector(run_folder)
        if scored_by is not None:
            weights, rule = detector.state_dict(), scored_by
            detector = _with_limit(chosen, LIMIT).detector.build().eval()
            detector.load_state_dict(weights)
        with rule_over_limit(rule):
            frames = DataSplit(root=folder / "data", name="val").open()
            return _scores(detect_labeled(detector, frames, label_classes=frames.classes))

    rules: tuple[Rule, Rule] = ("file order", "even")
    step("full_turn_small", lambda: run("full_turn_small", "even"))
    for rule in rules:
        step(
            f"full_turn_small, scored with a limit of {LIMIT:,} ({rule})",
            lambda r=rule: run("full_turn_small", "even", scored_by=r),
        )
    for rule in rules:
        step(f"small, limit 16,000 ({rule})", lambda r=rule: run("small", r))
    if train_limited:
        for rule in rules:
            step(f"full_turn_small, limit {LIMIT:,} ({rule})", lambda r=rule: run("full_turn_small", r, limit=LIMIT))
    header = ("detector", "3D 0.7", "BEV 0.7", "3D 0.5", "BEV 0.5", "front: BEV 0.7", "front: BEV 0.5")
    title = f"Simulated full turns of {place}, {train} training and {validation} validation frames, {steps} steps: Car AP, R40"
    print_table(title, header, [(name, *(f"{v:.1f}" for v in values)) for name, values in found.items()])


def _with_limit(preset: Preset, limit: int | None) -> Preset:
    if limit is None:
        return preset
    detector = preset.detector
    return replace(preset, detector=replace(detector, encoder=replace(detector.encoder, max_voxels=limit)))


def _with_steps(preset: Preset, steps: int) -> object:
    loop = preset.train.loop
    return replace(loop, optim=replace(loop.optim, total_steps=steps))


def _scores(found: LabeledDetections) -> list[float]:
    """3D and BEV at 0.7 and at 0.5 on all cars, then BEV at 0.7 and at 0.5 on cars and detections in the front half-field."""
    front = replace(
        found,
        labels=tuple(labels.select(_inside(labels.boxes.data, FRONT)) for labels in found.labels),
        predictions=tuple(boxes.select(_inside(boxes.boxes.data, FRONT)) for boxes in found.predictions),
    )
    everywhere, ahead = (
        list(kitti_scores(score_cross_dataset(part), score_cross_dataset(part, min_overlaps=LOOSE)).values())
        for part in (found, front)
    )
    return [*everywhere, ahead[1], ahead[3]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("cells", "accuracy"))
    parser.add_argument("--data", type=Path, help="folder of the real scans, for `cells`")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--place", default="kitti")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--train", type=int, default=100)
    parser.add_argument("--validation", type=int, default=60)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument(
        "--train-limited", action="store_true", help="also train the full-turn preset with a limit that is exceeded"
    )
    a = parser.parse_args()
    if a.what == "cells":
        cells(a.data, a.out)
        return
    sizes = {"train": a.train, "validation": a.validation, "steps": a.steps}
    accuracy(a.out, place=a.place, seed=a.seed, **sizes, train_limited=a.train_limited)


if __name__ == "__main__":
    main()
