"""``upcycle3d evaluate``: AP by KITTI's own protocol, of detection files or of a trained detector."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..datasets.kitti import KittiDataset, read_ids
from ..datasets.kitti_text import write_objects
from ..datasets.prepared import PreparedDataset
from ..perception.evaluation.detect import evaluate_detector
from ..perception.evaluation.kitti import LOOSE, OFFICIAL, KittiResult, MinOverlap, evaluate_kitti_folders
from ..perception.structures import InvalidInput
from ..perception.training.detector_files import load_detector
from .console import console, device, print_table, run_command, write_json

OVERLAPS: Mapping[str, Mapping[str, MinOverlap]] = {"official": OFFICIAL, "loose": LOOSE}


@dataclass(frozen=True, kw_only=True)
class Kitti:
    """Detections in KITTI's text format against KITTI labels. An empty file means no detections; a missing one is an error."""

    labels: Path
    """folder of label files ID.txt"""
    detections: Path
    """folder of detection files ID.txt"""
    ids: Path
    """file of frame ids, one a line"""
    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist")
    """classes to score"""
    overlaps: Literal["official", "loose"] = "official"
    """official: 0.7 for cars, 0.5 for others; loose: 0.5 and 0.25 for 3D and BEV"""
    json: Path | None = None
    """also write the result for machines"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained detector on a split of a prepared KITTI-layout dataset."""

    detector: Path
    """run folder, or a detector.safetensors or teacher.safetensors"""
    data: Path
    """prepared dataset; its labels are read from the KITTI folder it was made from"""
    split: str = "val"
    """split to score on"""
    detections: Path | None = None
    """also write the detections here, in KITTI's text format"""
    overlaps: Literal["official", "loose"] = "official"
    """official: 0.7 for cars, 0.5 for others; loose: 0.5 and 0.25 for 3D and BEV"""
    device: str = "cpu"
    """cpu or cuda"""
    json: Path | None = None
    """also write the result for machines"""


def command(what: Annotated[Kitti, tyro.conf.subcommand("kitti")] | Annotated[Run, tyro.conf.subcommand("run")]) -> None:
    """AP by KITTI's protocol on the CPU: 2D, BEV, 3D and orientation, R40 and R11, easy, moderate and hard."""
    overlaps = OVERLAPS[what.overlaps]
    if isinstance(what, Kitti):
        ids = read_ids(what.ids)
        result = evaluate_kitti_folders(what.labels, what.detections, ids, classes=what.classes, min_overlaps=overlaps)
    else:
        result = _evaluate_run(what, overlaps)
    print_result(result, overlaps)
    write_json(what.json, result.to_json())


def _evaluate_run(what: Run, overlaps: Mapping[str, MinOverlap]) -> KittiResult:
    frames = PreparedDataset(what.data, what.split)
    if frames.notes.get("layout") != "kitti":
        raise InvalidInput(
            f"{what.data} was not prepared from a KITTI-layout folder, so it has no label files for KITTI's protocol"
        )
    raw = KittiDataset(str(frames.notes["root"]), frames.ids)
    target = device(what.device)
    detector, _ = load_detector(what.detector)
    result, detections = evaluate_detector(detector.to(target), frames, raw.frame_objects, min_overlaps=overlaps)
    if what.detections is not None:
        for frame_id, objects in detections.items():
            write_objects(what.detections / f"{frame_id}.txt", objects)
    return result


def print_result(result: KittiResult, overlaps: Mapping[str, MinOverlap]) -> None:
    """One row per class and metric: R40 and R11, easy, moderate, hard."""
    rows = []
    for name, scores in result.classes.items():
        for metric, value in (("3d", scores.box_3d), ("bev", scores.bev), ("bbox", scores.bbox), ("aos", scores.aos)):
            if value is not None:
                rows.append((name, metric, *value.r40, *value.r11))
    header = ("class", "metric", *(f"R40 {d}" for d in ("easy", "mod.", "hard")), *(f"R11 {d}" for d in ("easy", "mod.", "hard")))
    print_table("AP in percent", header, rows)
    counts = ", ".join(
        f"{n}: {c.ground_truths[0]} / {c.ground_truths[1]} / {c.ground_truths[2]}" for n, c in result.classes.items()
    )
    limits = ", ".join(f"{n} {overlaps[n].box_3d}" for n in result.classes)
    console.print(f"{result.frames} frames; ground truths easy / moderate / hard: {counts}; 3D overlap needed: {limits}")


if __name__ == "__main__":
    sys.exit(run_command(command))
