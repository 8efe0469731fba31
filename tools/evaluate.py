"""`upcycle3d evaluate`: AP by the protocols of KITTI, Waymo, Lyft and ST3D, of detection files or of a trained detector.

Read next: `perception/evaluation/score.py`.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..core.detection_json import boxes_json
from ..core.device import find_device
from ..core.errors import InvalidInput
from ..core.files import write_atomically
from ..core.foreign_text import check_name
from ..core.ledger import Ledger
from ..core.ledger_rules import warnings_of
from ..datasets.kitti import read_ids
from ..datasets.kitti_text import write_objects
from ..perception.evaluation.accounts import Account, account_of_kitti, extra_files, extra_files_warning
from ..perception.evaluation.class_translation import spelled
from ..perception.evaluation.cross_dataset import without_camera
from ..perception.evaluation.kitti import (
    BOX_METRICS,
    LOOSE,
    OFFICIAL,
    KittiResult,
    MinOverlap,
    evaluate_kitti,
    extended_overlaps,
    overlaps_of,
    read_kitti_folders,
)
from ..perception.evaluation.lyft import LYFT_CLASSES, LyftResult, account_of_lyft, evaluate_lyft, read_lyft_boxes
from ..perception.evaluation.protocols import waymo_objects
from ..perception.evaluation.score import EvaluationReport, Protocol, own_protocol
from ..perception.evaluation.waymo import WAYMO_MIN_OVERLAPS, WaymoResult
from ..perception.evaluation.waymo_json import read_waymo_folders
from ..perception.evaluation.waymo_objects import write_waymo_objects
from ..perception.recipes.scored_split import score_split
from ..perception.training.detector_files import load_detector
from .console import console, print_table, print_warning, run_command, settle, write_json
from .data_option import DataOption
from .expert_use import print_expert_use
from .overlap_option import OverlapOption, parse_overlaps

OVERLAPS: Mapping[str, Mapping[str, MinOverlap]] = {"official": OFFICIAL, "loose": LOOSE}


@dataclass(frozen=True, kw_only=True)
class KittiFiles:
    """Score detections in KITTI's text format against KITTI labels. An empty file means no detections; a missing one is an error."""

    labels: Path
    """Folder of label files ID.txt."""
    detections: Path
    """Folder of detection files ID.txt."""
    ids: Path
    """File with one frame id per line."""
    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist")
    """Classes to score."""
    overlaps: Literal["official", "loose"] = "official"
    """Minimum overlaps. `official`: 0.7 for cars, 0.5 for others; `loose`: 0.5 for cars and 0.25 for others in 3D and BEV."""
    overlap: OverlapOption = ()
    """Minimum overlaps of your own as CLASS VALUE pairs: `--overlap Van 0.7 Truck 0.5`. These classes are scored too."""
    rules: Literal["kitti", "st3d"] = "kitti"
    """`st3d` scores boxes in BEV and 3D only: labels and detections need no 2D boxes, and every object counts."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


@dataclass(frozen=True, kw_only=True)
class WaymoFiles:
    """Score detections against labels by Waymo's protocol. Each frame is one JSON file, as `predict` writes them.

    A label has "level" (1 or 2) or "num_points" instead of "score". A label file may also be {"objects": [..],
    "no_label_zones": [polygon, ..], "context_name": "..", "timestamp_micros": ..}.
    """

    labels: Path
    """Folder of label files ID.json."""
    detections: Path
    """Folder of detection files ID.json. `[]` means no detections; a missing file is an error."""
    ids: Path | None = None
    """File with one frame id per line; all label files by default."""
    classes: tuple[str, ...] = ("Vehicle", "Pedestrian", "Cyclist")
    """Classes to score."""
    objects: Path | None = None
    """Also write the detections for Waymo's own programs. The label files must name context and time."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


@dataclass(frozen=True, kw_only=True)
class LyftFiles:
    """Score detections against objects by the mAP of Lyft's challenge. Both are JSON files of Lyft's SDK."""

    labels: Path
    """JSON file of the objects."""
    detections: Path
    """JSON file of the detections."""
    classes: tuple[str, ...] = ()
    """Classes to score; those of the objects by default."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """Score a trained detector on a split of a prepared dataset."""

    detector: Path
    """Run folder, `detector.safetensors` or `teacher.safetensors`."""
    data: DataOption
    """Prepared dataset to score on, `DIR[:SPLIT]`; `val` where no split is named."""
    protocol: Protocol | None = None
    """Rules; the dataset's own by default. `cross_dataset` is ST3D's: KITTI's AP without a camera."""
    detections: Path | None = None
    """Also write the detections to this folder, in KITTI's text format, or as JSON for other protocols."""
    objects: Path | None = None
    """Waymo's protocol: also write the detections for Waymo's own programs."""
    overlaps: Literal["official", "loose"] = "official"
    """Minimum overlaps of KITTI's AP. `official`: 0.7 for cars, 0.5 for others; `loose`: 0.5 and 0.25 in 3D and BEV."""
    overlap: OverlapOption = ()
    """KITTI's and ST3D's rules: minimum overlaps of your own as CLASS VALUE pairs, such as `--overlap Van 0.7 Truck 0.5`."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(
    what: Annotated[KittiFiles, tyro.conf.subcommand("kitti")]
    | Annotated[WaymoFiles, tyro.conf.subcommand("waymo")]
    | Annotated[LyftFiles, tyro.conf.subcommand("lyft")]
    | Annotated[Run, tyro.conf.subcommand("run")],
) -> None:
    """Compute AP on the CPU by the protocols of KITTI (2D, BEV, 3D, orientation), Waymo (AP, APH), Lyft (mAP) and ST3D (cross-dataset)."""
    if isinstance(what, KittiFiles):
        _evaluate_kitti(what)
    elif isinstance(what, WaymoFiles):
        named = None if what.ids is None else read_ids(what.ids)
        folders = read_waymo_folders(what.labels, what.detections, classes=what.classes, ids=named)
        waymo = folders.evaluate()
        if what.objects is not None:
            write_waymo_objects(what.objects, folders.as_objects(), classes=folders.classes)
        print_waymo(waymo)
        _close(folders.account(), waymo.to_json(), what.json)
    elif isinstance(what, LyftFiles):
        truths, found = read_lyft_boxes(what.labels, scored=False), read_lyft_boxes(what.detections, scored=True)
        classes = spelled(what.classes, {name: name for name in (*LYFT_CLASSES, *truths.names)}, "Lyft") if what.classes else None
        lyft = evaluate_lyft(truths, found, classes=classes)
        print_lyft(lyft)
        _close(account_of_lyft(lyft, truths, found), lyft.to_json(), what.json)
    else:
        _evaluate_run(what)


def _evaluate_kitti(what: KittiFiles) -> None:
    ids, given = read_ids(what.ids), parse_overlaps(what.overlap)
    overlaps = extended_overlaps(OVERLAPS[what.overlaps], given)
    names = {known.casefold(): known for known in overlaps}
    asked = {name.casefold(): names.get(name.casefold(), name) for name in (*what.classes, *given)}
    classes = tuple(overlaps_of(tuple(asked.values()), overlaps))
    truths, found = read_kitti_folders(what.labels, what.detections, ids)
    if what.rules == "st3d":
        truths, found = [list(map(without_camera, frames)) for frames in (truths, found)]
    result = evaluate_kitti(truths, found, classes=classes, min_overlaps=overlaps)
    if what.rules == "st3d":
        result = replace(result, metrics=BOX_METRICS)
    print_result(result)
    extra = extra_files(what.detections, ids, ".txt")
    skipped = Ledger(files_skipped={"detections of a frame that is not scored": len(extra)} if extra else {})
    account = account_of_kitti(result, truths, found, two_dimensional=what.rules == "kitti")
    _close(account.told(ledger=skipped, warnings=extra_files_warning(extra)), result.to_json(), what.json)


def _evaluate_run(what: Run) -> None:
    frames = what.data.or_split("val").open()
    protocol = what.protocol or own_protocol(frames)
    if what.objects is not None and protocol != "waymo":
        raise InvalidInput(f"--objects writes files for Waymo's programs, but the protocol here is {protocol}; leave it out")
    detector = load_detector(what.detector).to(find_device(what.device))
    report = score_split(detector, frames, protocol, overlaps=parse_overlaps(what.overlap), source=what.detector)
    result = report.loose if what.overlaps == "loose" and report.loose is not None else report.result
    if what.detections is not None:
        _write_detections(what.detections, report)
    if what.objects is not None and report.detections is not None:
        named, classes = waymo_objects(report.detections)
        write_waymo_objects(what.objects, named, classes=classes)
    if isinstance(result, WaymoResult):
        print_waymo(result)
    elif isinstance(result, LyftResult):
        print_lyft(result)
    else:
        print_result(result)
    if report.account is None:
        raise AssertionError("score_split gives an account")
    _close(report.account, {**result.to_json(), **print_expert_use(detector)}, what.json)


def _close(account: Account, result: Mapping[str, object], json_file: Path | None) -> None:
    """Write the result, then say what was scored, what was not, and why."""
    write_json(json_file, {**result, **account.to_json(), "warnings": [*account.warnings, *warnings_of(account.ledger)]})
    print_table("objects by type", ("type", "labels", "detections", "scored as"), account.rows())
    for note in account.notes:
        console.print(f"note: {note}", soft_wrap=True)
    for warning in account.warnings:
        print_warning(warning)
    settle(account.ledger, "what was read")


def _write_detections(folder: Path, report: EvaluationReport) -> None:
    for frame_id in (*report.kitti_files, *(report.detections.ids if report.detections is not None else ())):
        check_name(frame_id, "frame id")
    for frame_id, objects in report.kitti_files.items():
        write_objects(folder / f"{frame_id}.txt", objects)
    if report.detections is not None:
        for frame_id, boxes in zip(report.detections.ids, report.detections.predictions, strict=True):
            text = json.dumps(boxes_json(boxes, report.detections.detector_classes), indent=1) + "\n"
            write_atomically(folder / f"{frame_id}.json", text.encode())


def print_result(result: KittiResult) -> None:
    """Print one row per class and metric: R40 and R11, easy, moderate, hard, and "-" where nothing counted.

    Args:
        result: Result of KITTI's or ST3D's protocol.
    """
    rows: list[tuple[object, ...]] = []
    for name, scores in result.classes.items():
        for metric, value in (("3d", scores.box_3d), ("bev", scores.bev), ("bbox", scores.bbox), ("aos", scores.aos)):
            if value is not None and metric in result.metrics:
                rows.append((name, metric, *map(_shown, scores.percent(value.r40)), *map(_shown, scores.percent(value.r11))))
    header = ("class", "metric", *(f"R40 {d}" for d in ("easy", "mod.", "hard")), *(f"R11 {d}" for d in ("easy", "mod.", "hard")))
    print_table("AP in percent", header, rows)
    counts = ", ".join(
        f"{n}: {c.ground_truths[0]} / {c.ground_truths[1]} / {c.ground_truths[2]}" for n, c in result.classes.items()
    )
    limits = ", ".join(f"{n} {overlap.box_3d:g}" for n, overlap in result.min_overlaps.items())
    console.print(f"{result.frames} frames; ground truths easy / moderate / hard: {counts}; minimum 3D overlap: {limits}")


def print_waymo(result: WaymoResult) -> None:
    """Print one row per class and range: AP, APH and number of objects at LEVEL_1 and LEVEL_2.

    Args:
        result: Result of Waymo's protocol.
    """
    rows = []
    for name, ranges in result.classes.items():
        for label, levels in ranges.items():
            first, second = levels["LEVEL_1"], levels["LEVEL_2"]
            scores = [_shown(v) for v in (first.ap, first.aph, second.ap, second.aph)]
            rows.append((name, label, *scores, first.ground_truths, second.ground_truths))
    header = ("class", "range m", "L1 AP", "L1 APH", "L2 AP", "L2 APH", "L1 objects", "L2 objects")
    print_table("Waymo AP and APH in percent", header, rows)
    limits = ", ".join(f"{n} {WAYMO_MIN_OVERLAPS[n]}" for n in result.classes)
    console.print(f"{result.frames} frames; minimum 3D overlap: {limits}")


def print_lyft(result: LyftResult) -> None:
    """Print one row per class: AP at the smallest and the largest minimum overlap and the mean of all; then the mean of the classes.

    Args:
        result: Result of Lyft's protocol.
    """
    low, high = result.min_overlaps[0], result.min_overlaps[-1]
    rows: list[tuple[object, ...]] = []
    for name, values in result.classes.items():
        ends = (None, None) if values is None else (values[0], values[-1])
        rows.append((name, *map(_shown, ends), _shown(result.class_ap(name)), result.ground_truths[name]))
    rows.append(("mean", "", "", _shown(result.mean_ap), sum(result.ground_truths.values())))
    print_table("Lyft AP in percent", ("class", f"at {low:g}", f"at {high:g}", f"mean {low:g}..{high:g}", "objects"), rows)


def _shown(value: float | None) -> float | str:
    return "-" if value is None else value


if __name__ == "__main__":
    sys.exit(run_command(command))
