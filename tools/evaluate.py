"""``upcycle3d evaluate``: AP by the protocols of KITTI, Waymo, Lyft and ST3D, of detection files or of a trained detector."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import write_atomically
from ..core.structures import Predictions
from ..datasets.kitti import read_ids
from ..datasets.kitti_text import write_objects
from ..datasets.prepared import PreparedDataset
from ..perception.evaluation.detect import evaluate_detector
from ..perception.evaluation.headline import Protocol, kitti_truths, own_protocol
from ..perception.evaluation.kitti import LOOSE, OFFICIAL, KittiResult, MinOverlap, evaluate_kitti_folders
from ..perception.evaluation.lyft import LyftResult, evaluate_lyft, read_lyft_boxes
from ..perception.evaluation.protocols import LabeledDetections, detect_labeled, score_cross_dataset, score_lyft, score_waymo
from ..perception.evaluation.waymo import OFFICIAL as WAYMO_OVERLAPS
from ..perception.evaluation.waymo import WAYMO_NAMES, WaymoResult, evaluate_waymo, overlaps_zones
from ..perception.evaluation.waymo_json import WaymoLabelFile, read_waymo_detections, read_waymo_labels
from ..perception.evaluation.waymo_objects import WaymoDetections, write_waymo_objects
from ..perception.training.detector_files import load_detector
from .console import console, device, print_table, run_command, write_json
from .data_option import DataOption
from .predict import boxes_json

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
class Waymo:
    """Detections against labels by Waymo's protocol, one JSON file a frame, as `predict` writes them.

    A label has "level" (1 or 2) or "num_points" in place of "score". A label file may also be {"objects": [..],
    "no_label_zones": [polygon, ..], "context_name": "..", "timestamp_micros": ..}.
    """

    labels: Path
    """folder of label files ID.json"""
    detections: Path
    """folder of detection files ID.json; [] means no detections, a missing file is an error"""
    ids: Path | None = None
    """file of frame ids, one a line; all label files by default"""
    classes: tuple[str, ...] = ("Vehicle", "Pedestrian", "Cyclist")
    """classes to score"""
    objects: Path | None = None
    """also write the detections for Waymo's own programs; the label files must name context and time"""
    json: Path | None = None
    """also write the result for machines"""


@dataclass(frozen=True, kw_only=True)
class Lyft:
    """Detections against objects by the mAP of Lyft's challenge, both in the JSON form of Lyft's SDK."""

    labels: Path
    """JSON file of the objects"""
    detections: Path
    """JSON file of the detections"""
    classes: tuple[str, ...] = ()
    """classes to score; those of the objects by default"""
    json: Path | None = None
    """also write the result for machines"""


@dataclass(frozen=True, kw_only=True)
class Run:
    """A trained detector on a split of a prepared dataset."""

    detector: Path
    """run folder, or a detector.safetensors or teacher.safetensors"""
    data: DataOption
    """Prepared dataset to score on, `DIR[:SPLIT]`; `val` where no split is named."""
    protocol: Protocol | None = None
    """the dataset's own by default; cross_dataset is ST3D's: KITTI's AP without a camera"""
    detections: Path | None = None
    """also write the detections here, in KITTI's text format, or as JSON if the protocol is not kitti"""
    objects: Path | None = None
    """with Waymo's protocol: also write the detections for Waymo's own programs"""
    overlaps: Literal["official", "loose"] = "official"
    """of KITTI's AP. official: 0.7 for cars, 0.5 for others; loose: 0.5 and 0.25 for 3D and BEV"""
    device: str = "cpu"
    """cpu or cuda"""
    json: Path | None = None
    """also write the result for machines"""


def command(
    what: Annotated[Kitti, tyro.conf.subcommand("kitti")]
    | Annotated[Waymo, tyro.conf.subcommand("waymo")]
    | Annotated[Lyft, tyro.conf.subcommand("lyft")]
    | Annotated[Run, tyro.conf.subcommand("run")],
) -> None:
    """AP on the CPU by the protocols of KITTI (2D, BEV, 3D, orientation), Waymo (AP, APH), Lyft (mAP) and ST3D (cross-dataset)."""
    if isinstance(what, Kitti):
        ids, overlaps = read_ids(what.ids), OVERLAPS[what.overlaps]
        kitti = evaluate_kitti_folders(what.labels, what.detections, ids, classes=what.classes, min_overlaps=overlaps)
        print_result(kitti, overlaps)
        write_json(what.json, kitti.to_json())
    elif isinstance(what, Waymo):
        waymo = _evaluate_waymo(what)
        print_waymo(waymo)
        write_json(what.json, waymo.to_json())
    elif isinstance(what, Lyft):
        truths, found = read_lyft_boxes(what.labels, scored=False), read_lyft_boxes(what.detections, scored=True)
        lyft = evaluate_lyft(truths, found, classes=what.classes or None)
        print_lyft(lyft)
        write_json(what.json, lyft.to_json())
    else:
        _evaluate_run(what)


def _evaluate_waymo(what: Waymo) -> WaymoResult:
    ids = tuple(sorted(p.stem for p in what.labels.glob("*.json"))) if what.ids is None else read_ids(what.ids)
    if not ids:
        raise InvalidInput(f"no label files ID.json in {what.labels}; check the folder")
    labels = [read_waymo_labels(what.labels / f"{i}.json", classes=what.classes) for i in ids]
    found = [read_waymo_detections(what.detections / f"{i}.json", classes=what.classes) for i in ids]
    zones = [overlaps_zones(f.boxes.data, frame.zones) for f, frame in zip(found, labels)]
    result = evaluate_waymo([frame.truth for frame in labels], found, classes=what.classes, ignored=zones)
    if what.objects is not None:
        frames = [_named(i, frame, f, in_zone) for i, frame, f, in_zone in zip(ids, labels, found, zones)]
        write_waymo_objects(what.objects, frames, classes=what.classes)
    return result


def _named(frame_id: str, frame: WaymoLabelFile, found: Predictions, in_zone: Tensor) -> WaymoDetections:
    if frame.context_name is None or frame.timestamp_micros is None:
        raise InvalidInput(f"the label file of frame {frame_id} has no context_name and timestamp_micros; --objects needs them")
    return WaymoDetections(
        context_name=frame.context_name, timestamp_micros=frame.timestamp_micros, predictions=found, in_zone=in_zone
    )


def _evaluate_run(what: Run) -> None:
    frames = what.data.or_split("val").open()
    overlaps = OVERLAPS[what.overlaps]
    protocol = what.protocol or own_protocol(frames)
    if what.objects is not None and protocol != "waymo":
        raise InvalidInput(f"--objects is the form of Waymo's programs; the protocol here is {protocol}")
    if protocol == "kitti":
        kitti = _run_on_kitti(what, frames, overlaps)
        print_result(kitti, overlaps)
        write_json(what.json, kitti.to_json())
        return
    detector = load_detector(what.detector).to(device(what.device))
    found = detect_labeled(detector, frames, label_classes=frames.classes)
    _write_detections(what.detections, found)
    if protocol == "waymo":
        waymo = score_waymo(found, difficulty_is_level=frames.origin.layout == "waymo")
        _write_objects(what.objects, found)
        print_waymo(waymo)
        write_json(what.json, waymo.to_json())
    elif protocol == "lyft":
        lyft = score_lyft(found)
        print_lyft(lyft)
        write_json(what.json, lyft.to_json())
    else:
        result = score_cross_dataset(found, min_overlaps=overlaps)
        print_result(result, overlaps, metrics=("3d", "bev"))
        write_json(what.json, result.to_json())


def _run_on_kitti(what: Run, frames: PreparedDataset, overlaps: Mapping[str, MinOverlap]) -> KittiResult:
    truths = kitti_truths(frames)
    target = device(what.device)
    detector = load_detector(what.detector)
    result, detections = evaluate_detector(detector.to(target), frames, truths, min_overlaps=overlaps)
    if what.detections is not None:
        for frame_id, objects in detections.items():
            write_objects(what.detections / f"{frame_id}.txt", objects)
    return result


def _write_detections(folder: Path | None, found: LabeledDetections) -> None:
    if folder is None:
        return
    for frame_id, boxes in zip(found.ids, found.predictions):
        text = json.dumps(boxes_json(boxes, found.detector_classes), indent=1) + "\n"
        write_atomically(folder / f"{frame_id}.json", text.encode())


def _write_objects(path: Path | None, found: LabeledDetections) -> None:
    if path is None:
        return
    frames = []
    for frame_id, boxes in zip(found.ids, found.predictions):
        context, _, time = frame_id.rpartition("_")
        if not (context and time.isdecimal()):
            raise InvalidInput(f"--objects needs frame ids CONTEXT_TIMESTAMP, as `prepare waymo` makes them; found {frame_id!r}")
        frames.append(WaymoDetections(context_name=context, timestamp_micros=int(time), predictions=boxes))
    write_waymo_objects(path, frames, classes=tuple(WAYMO_NAMES.get(c, c) for c in found.detector_classes))


def print_result(
    result: KittiResult, overlaps: Mapping[str, MinOverlap], *, metrics: tuple[str, ...] = ("3d", "bev", "bbox", "aos")
) -> None:
    """One row per class and metric: R40 and R11, easy, moderate, hard."""
    rows = []
    for name, scores in result.classes.items():
        for metric, value in (("3d", scores.box_3d), ("bev", scores.bev), ("bbox", scores.bbox), ("aos", scores.aos)):
            if value is not None and metric in metrics:
                rows.append((name, metric, *value.r40, *value.r11))
    header = ("class", "metric", *(f"R40 {d}" for d in ("easy", "mod.", "hard")), *(f"R11 {d}" for d in ("easy", "mod.", "hard")))
    print_table("AP in percent", header, rows)
    counts = ", ".join(
        f"{n}: {c.ground_truths[0]} / {c.ground_truths[1]} / {c.ground_truths[2]}" for n, c in result.classes.items()
    )
    limits = ", ".join(f"{n} {overlaps[n].box_3d}" for n in result.classes)
    console.print(f"{result.frames} frames; ground truths easy / moderate / hard: {counts}; 3D overlap needed: {limits}")


def print_waymo(result: WaymoResult) -> None:
    """One row per class and range: AP, APH and ground truths at LEVEL_1 and LEVEL_2."""
    rows = []
    for name, ranges in result.classes.items():
        for label, levels in ranges.items():
            first, second = levels["LEVEL_1"], levels["LEVEL_2"]
            scores = [_shown(v) for v in (first.ap, first.aph, second.ap, second.aph)]
            rows.append((name, label, *scores, first.ground_truths, second.ground_truths))
    header = ("class", "range m", "L1 AP", "L1 APH", "L2 AP", "L2 APH", "L1 objects", "L2 objects")
    print_table("Waymo AP and APH in percent", header, rows)
    limits = ", ".join(f"{n} {WAYMO_OVERLAPS[n]}" for n in result.classes)
    console.print(f"{result.frames} frames; 3D overlap needed: {limits}")


def print_lyft(result: LyftResult) -> None:
    """One row per class: AP at the least and the largest overlap and the mean of all; then the mean of the classes."""
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
