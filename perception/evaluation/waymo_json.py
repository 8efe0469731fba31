"""Waymo evaluation from plain files: one JSON file per frame, with detections as `upcycle3d predict` writes them.

A detection file is a list of records {"class", "score", "x", "y", "z", "dx", "dy", "dz", "yaw"} in meters and radians, in the vehicle frame, with the
center of the box. A label file is a list of the same without "score" but with "level" (1 or 2) or "num_points" (LiDAR points inside, from which
the level follows), or an object that holds that list as "objects" and may add

    "no_label_zones": [[[x, y], [x, y], ..], ..]    polygons, m
    "context_name": "1024..", "timestamp_micros": 1550083467346370    Waymo's names of the frame, for `waymo_objects.py`

Read next: `waymo.py` for the rules.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.strict_json import read_json
from ...core.structures import Boxes3D, Labels, Predictions
from .waymo import WAYMO_NAMES, WaymoResult, WaymoTruth, evaluate_waymo, overlaps_zones
from .waymo_objects import WaymoDetections

_BOX = ("x", "y", "z", "dx", "dy", "dz", "yaw")


@dataclass(frozen=True, kw_only=True)
class WaymoLabelFile:
    """Content of a label file."""

    truth: WaymoTruth
    """The objects."""
    zones: tuple[Tensor, ...]
    """No-label zones, polygons (K, 2) in m."""
    context_name: str | None
    """Waymo's name of the segment; None where the file does not say."""
    timestamp_micros: int | None
    """Waymo's time of the frame; None where the file does not say."""


def read_waymo_labels(path: Path | str, *, classes: tuple[str, ...]) -> WaymoLabelFile:
    """Read a label file. Objects of Waymo's other classes get the number -1 and take no part.

    Args:
        path: The file.
        classes: Names of the class numbers.

    Returns:
        Its content.

    Raises:
        InvalidInput: The file is not JSON, a field is missing or has the wrong form, or a class is unknown; the message names file and record.
    """
    content = _read(path)
    header: Mapping[str, Any] = content if isinstance(content, dict) else {"objects": content}
    boxes, numbers, records = _records(path, header.get("objects"), classes)
    levels, points = [], []
    for i, record in enumerate(records):
        level, count = record.get("level", -1), record.get("num_points", -1)
        if level not in (1, 2) and not (level == -1 and isinstance(count, int) and count >= 0):
            raise InvalidInput(f"{path}, object {i}: expected a level of 1 or 2, or num_points from 0, found {record}")
        levels.append(level)
        points.append(1 if count == -1 else count)
    labels = Labels.make(boxes, numbers, num_points=torch.tensor(points).long(), difficulty=torch.tensor(levels).long())
    try:
        zones = tuple(torch.tensor(zone, dtype=torch.float64).reshape(-1, 2) for zone in header.get("no_label_zones", ()))
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(f"{path}: no_label_zones must be a list of polygons [[x, y], ..]: {error}") from error
    context, time = header.get("context_name"), header.get("timestamp_micros")
    if not isinstance(context, str | None) or not isinstance(time, int | None):
        raise InvalidInput(f"{path}: context_name must be text and timestamp_micros a whole number, found {context!r}, {time!r}")
    truth = WaymoTruth.from_labels(labels, difficulty_is_level=True)
    return WaymoLabelFile(truth=truth, zones=zones, context_name=context, timestamp_micros=time)


def read_waymo_detections(path: Path | str, *, classes: tuple[str, ...]) -> Predictions:
    """Read a detection file. Detections of Waymo's other classes are left out.

    Args:
        path: The file.
        classes: Names of the class numbers.

    Returns:
        The detections.

    Raises:
        InvalidInput: As for `read_waymo_labels`.
    """
    boxes, numbers, records = _records(path, _read(path), classes)
    scores = []
    for i, record in enumerate(records):
        score = record.get("score")
        if not isinstance(score, int | float) or not 0 <= score <= 1:
            raise InvalidInput(f"{path}, object {i}: expected a score from 0 to 1, found {score!r}")
        scores.append(score)
    values = torch.tensor(scores, dtype=torch.float32)
    found = Predictions(
        boxes=Boxes3D(data=boxes), classes=numbers, scores=values, class_scores=values, iou_scores=torch.ones_like(values)
    )
    return found.select(numbers >= 0)


@dataclass(frozen=True, kw_only=True)
class WaymoFolders:
    """Labels and detections of several frames, read from two folders of JSON files."""

    ids: tuple[str, ...]
    """Frame ids, the names of the files."""
    labels: tuple[WaymoLabelFile, ...]
    """Content of the label files."""
    detections: tuple[Predictions, ...]
    """Content of the detection files."""
    in_zone: tuple[Tensor, ...]
    """(N,) bool per frame: detections that overlap a no-label zone."""
    classes: tuple[str, ...]
    """Classes to score."""

    def evaluate(self) -> WaymoResult:
        """Score the detections by Waymo's protocol."""
        return evaluate_waymo([f.truth for f in self.labels], self.detections, classes=self.classes, ignored=self.in_zone)

    def as_objects(self) -> list[WaymoDetections]:
        """The detections with Waymo's names of their frames, for Waymo's own programs.

        Raises:
            InvalidInput: A label file does not name its context and time.
        """
        found = []
        for frame_id, frame, boxes, in_zone in zip(self.ids, self.labels, self.detections, self.in_zone, strict=True):
            if frame.context_name is None or frame.timestamp_micros is None:
                raise InvalidInput(
                    f"the label file of frame {frame_id} has no context_name and timestamp_micros, which Waymo's programs need; add them"
                )
            found.append(
                WaymoDetections(
                    context_name=frame.context_name,
                    timestamp_micros=frame.timestamp_micros,
                    predictions=boxes,
                    in_zone=in_zone,
                )
            )
        return found


def read_waymo_folders(
    labels: Path | str, detections: Path | str, *, classes: tuple[str, ...], ids: tuple[str, ...] | None = None
) -> WaymoFolders:
    """Read the files `ID.json` of two folders.

    Args:
        labels: Folder of label files.
        detections: Folder of detection files; `[]` in a file means no detections, and a missing file is an error.
        classes: Classes to score.
        ids: Frame ids; all label files by default.

    Returns:
        What the files hold.

    Raises:
        InvalidInput: There are no label files, or a file is missing or broken; the message names it.
    """
    labels, detections = Path(labels), Path(detections)
    ids = tuple(sorted(p.stem for p in labels.glob("*.json"))) if ids is None else ids
    if not ids:
        raise InvalidInput(f"no label files ID.json in {labels}; check the folder")
    files = tuple(read_waymo_labels(labels / f"{i}.json", classes=classes) for i in ids)
    found = tuple(read_waymo_detections(detections / f"{i}.json", classes=classes) for i in ids)
    zones = tuple(overlaps_zones(f.boxes.data, frame.zones) for f, frame in zip(found, files, strict=True))
    return WaymoFolders(ids=ids, labels=files, detections=found, in_zone=zones, classes=classes)


def _read(path: Path | str) -> Any:
    return read_json(path, "the boxes of a frame", remedy="write [] for a frame without any", kind=object)


def _records(path: Path | str, content: object, classes: tuple[str, ...]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Boxes (N, 7), class numbers (N,), -1 for those not asked for, and the records."""
    if not isinstance(content, list):
        raise InvalidInput(f"{path} must hold a list of boxes, found {type(content).__name__}")
    rows, numbers = [], []
    for i, record in enumerate(content):
        found = [record.get(name) for name in _BOX] if isinstance(record, dict) else []
        values = [float(v) for v in found if isinstance(v, int | float) and math.isfinite(v)]
        if len(values) != len(_BOX) or min(values[3:6]) <= 0:
            raise InvalidInput(f"{path}, object {i}: expected numbers {', '.join(_BOX)} and positive sizes, found {record!r}")
        name = WAYMO_NAMES.get(str(record.get("class")))
        if name is None:
            raise InvalidInput(f"{path}, object {i}: unknown class {record.get('class')!r}; known are {', '.join(WAYMO_NAMES)}")
        rows.append(values)
        numbers.append(classes.index(name) if name in classes else -1)
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 7), torch.tensor(numbers, dtype=torch.int64), content
