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
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...core.strict_json import read_json
from ...core.structures import Boxes3D, Labels, Predictions
from .accounts import Account, account_of_types, extra_files, extra_files_warning
from .class_translation import did_you_mean, spelled, translate
from .waymo import WAYMO_NAMES, WaymoResult, WaymoTruth, evaluate_waymo, overlaps_zones
from .waymo_objects import WaymoDetections

_BOX = ("x", "y", "z", "dx", "dy", "dz", "yaw")
_MOST_YAW = 4 * math.pi
_FARTHEST = 1e6  # m; a place or a size beyond is damage, and its products leave float32
_MOST_ZONE_CORNERS = 1_000_000


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
    types: Mapping[str, int]
    """Objects by type, as spelled in the file."""


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
        known = isinstance(level, int) and level in (1, 2)
        if not known and not (level == -1 and type(count) is int and 0 <= count < 2**31):
            raise InvalidInput(f"{path}, object {i}: expected a level of 1 or 2, or num_points from 0, found {shown(record)}")
        levels.append(level if known else -1)
        points.append(1 if known and not (type(count) is int and 0 <= count < 2**31) else count)
    labels = Labels.make(boxes, numbers, num_points=torch.tensor(points).long(), difficulty=torch.tensor(levels).long())
    context, time = header.get("context_name"), header.get("timestamp_micros")
    if not isinstance(context, str | None) or not (time is None or (type(time) is int and 0 <= time < 2**63)):
        raise InvalidInput(
            f"{path}: context_name must be text and timestamp_micros a whole number, found {shown(repr(context))}, {shown(repr(time))}"
        )
    return WaymoLabelFile(
        truth=WaymoTruth.from_labels(labels, difficulty_is_level=True),
        zones=_zones(path, header.get("no_label_zones", [])),
        context_name=context,
        timestamp_micros=time,
        types=Counter(record["class"] for record in records),
    )


def _zones(path: Path | str, zones: object) -> tuple[Tensor, ...]:
    def is_corner(corner: object) -> bool:
        return isinstance(corner, list) and len(corner) == 2 and all(_is_number(v) and abs(v) < _FARTHEST for v in corner)

    good = isinstance(zones, list) and all(isinstance(zone, list) and all(map(is_corner, zone)) and zone for zone in zones)
    if not good or not isinstance(zones, list) or sum(map(len, zones)) > _MOST_ZONE_CORNERS:
        raise InvalidInput(f"{path}: no_label_zones must be a list of polygons [[x, y], ..], found {shown(zones, most=80)}")
    return tuple(torch.tensor(zone, dtype=torch.float64) for zone in zones)


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
    return _detections(path, classes)[0]


def _detections(path: Path | str, classes: tuple[str, ...]) -> tuple[Predictions, Counter[str]]:
    boxes, numbers, records = _records(path, _read(path), classes)
    scores = []
    for i, record in enumerate(records):
        score = record.get("score")
        if not _is_number(score) or not 0 <= score <= 1:
            raise InvalidInput(f"{path}, object {i}: expected a score from 0 to 1, found {shown(repr(score))}")
        scores.append(score)
    values = torch.tensor(scores, dtype=torch.float32)
    found = Predictions(
        boxes=Boxes3D(data=boxes), classes=numbers, scores=values, class_scores=values, iou_scores=torch.ones_like(values)
    )
    return found.select(numbers >= 0), Counter(record["class"] for record in records)


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
    detected_types: Mapping[str, int]
    """Detections by type, as spelled in the files."""
    extra_files: tuple[str, ...] = field(default=())
    """Names of detection files that belong to no frame."""

    def account(self) -> Account:
        """What the files hold, what of it is scored, and why the rest is not."""
        labels = sum((Counter(f.types) for f in self.labels), Counter[str]())
        wanted = {kind: translate(kind, WAYMO_NAMES) for kind in (*labels, *self.detected_types)}
        scored = {kind: name for kind, name in wanted.items() if name in self.classes}
        account = account_of_types(
            labels=labels,
            detections=self.detected_types,
            label_classes=scored,
            detection_classes=scored,
            classes=self.classes,
            frames=len(self.ids),
            frames_without_detections=sum(not len(found) for found in self.detections),
            neighbors=tuple(WAYMO_NAMES),
        )
        unseen = sum(labels.values()) - sum(len(f.truth.boxes) for f in self.labels)
        notes = (
            [f"{unseen} of {sum(labels.values())} labels have no LiDAR point, so Waymo's rules leave them out"] if unseen else []
        )
        skipped = {"detections of a frame that is not scored": len(self.extra_files)} if self.extra_files else {}
        return account.told(ledger=Ledger(files_skipped=skipped), warnings=extra_files_warning(self.extra_files), notes=notes)

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
    classes = spelled(classes, WAYMO_NAMES, "Waymo")
    ids = tuple(sorted(p.stem for p in labels.glob("*.json") if not p.name.startswith("."))) if ids is None else ids
    if not ids:
        raise InvalidInput(f"no label files ID.json in {labels}; check the folder")
    files = tuple(read_waymo_labels(labels / f"{i}.json", classes=classes) for i in ids)
    read = [_detections(detections / f"{i}.json", classes) for i in ids]
    return WaymoFolders(
        ids=ids,
        labels=files,
        detections=tuple(found for found, _ in read),
        in_zone=tuple(overlaps_zones(found.boxes.data, frame.zones) for (found, _), frame in zip(read, files, strict=True)),
        classes=classes,
        detected_types=sum((types for _, types in read), Counter[str]()),
        extra_files=extra_files(detections, ids, ".json"),
    )


def _read(path: Path | str) -> Any:
    return read_json(path, "the boxes of a frame", remedy="write [] for a frame without any", kind=object)


def _records(path: Path | str, content: object, classes: tuple[str, ...]) -> tuple[Tensor, Tensor, list[dict[str, Any]]]:
    """Boxes (N, 7), class numbers (N,), -1 for those not asked for, and the records."""
    if not isinstance(content, list):
        raise InvalidInput(f"{path} must hold a list of boxes, found {type(content).__name__}")
    rows, numbers = [], []
    for i, record in enumerate(content):
        found = [record.get(name) for name in _BOX] if isinstance(record, dict) else []
        values = [float(v) for v in found if _is_number(v) and abs(v) < _FARTHEST]
        if len(values) != len(_BOX) or min(values[3:6]) <= 0:
            raise InvalidInput(
                f"{path}, object {i}: expected numbers {', '.join(_BOX)} below {_FARTHEST:g} and positive sizes, found {shown(record)}"
            )
        if abs(values[6]) > _MOST_YAW:
            raise InvalidInput(
                f"{path}, object {i}: the yaw {values[6]:g} is more than two turns; angles must be in radians, and these look like degrees"
            )
        kind = record.get("class")
        name = translate(kind, WAYMO_NAMES) if isinstance(kind, str) else None
        if name is None:
            raise InvalidInput(
                f"{path}, object {i}: unknown class {shown(repr(kind))}; known are {', '.join(WAYMO_NAMES)}"
                f"{did_you_mean(kind, WAYMO_NAMES) if isinstance(kind, str) else ''}"
            )
        rows.append(values)
        numbers.append(classes.index(name) if name in classes else -1)
    return torch.tensor(rows, dtype=torch.float32).reshape(-1, 7), torch.tensor(numbers, dtype=torch.int64), content


def _is_number(value: object) -> TypeGuard[int | float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300
