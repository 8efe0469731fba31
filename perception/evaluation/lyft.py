"""The mAP of Lyft's 3D detection challenge on the CPU, as Lyft's SDK computes it (`eval/detection/mAP_evaluation.py`, 2019-11).

For each class and each of the ten minimum overlaps 0.5, 0.55, .., 0.95: detections of all frames, best scored first, file order among
equals; each looks at the object of its frame and class with the largest 3D overlap, and is right if that overlap is *above* the
minimum and no better scored detection has taken the object; it never tries the second best. AP is the area under the precision
made monotone, over all recall values. The result is the mean over classes with objects; a class without detections has AP 0.
The SDK gives one minimum at a time; the challenge, like COCO, takes the mean of the ten.

The SDK's releases before 2019-11 turned every box the wrong way (pull request 64), so older numbers are of mirrored headings.
Boxes may be given in any frame with z up, the world's or the LiDAR's, as long as objects and detections share it.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.strict_json import read_json
from ...core.tensor_value import shape_of
from .accounts import Account, account_of_types
from .box_pairs import box_pairs

MIN_OVERLAPS = tuple(round(0.5 + 0.05 * i, 2) for i in range(10))
LYFT_CLASSES = ("animal", "bicycle", "bus", "car", "emergency_vehicle", "motorcycle", "other_vehicle", "pedestrian", "truck")
_FARTHEST = 1e9  # m; a coordinate beyond is damage

# To Lyft's names, those of other datasets where they mean nearly the same.
LYFT_NAMES: Mapping[str, str] = {name: name for name in LYFT_CLASSES} | {
    "Car": "car",
    "Vehicle": "car",
    "Pedestrian": "pedestrian",
    "Cyclist": "bicycle",
}


@dataclass(frozen=True, kw_only=True)
class LyftBoxes:
    """The objects or detections of all frames, in file order."""

    frames: tuple[str, ...]
    """N frame ids (Lyft's sample tokens)."""
    names: tuple[str, ...]
    """N class names."""
    boxes: Tensor
    """(N, 7), see `core/boxes.py`; float64 where the coordinates are the world's, kilometers from its origin."""
    scores: Tensor | None = None
    """(N,) scores; None for objects."""

    def __post_init__(self) -> None:
        n = len(self.frames)
        scored = self.scores is None or self.scores.shape == (n,)
        if len(self.names) != n or self.boxes.shape != (n, 7) or not scored:
            raise InvalidInput(
                f"LyftBoxes of {n} frame ids must have as many names, boxes and scores, found {len(self.names)} names, boxes "
                f"{shape_of(self.boxes)}, scores {None if self.scores is None else shape_of(self.scores)}"
            )


@dataclass(frozen=True, kw_only=True)
class LyftResult:
    """AP in percent."""

    classes: Mapping[str, tuple[float, ...] | None]
    """AP at each minimum overlap by class; None for a class without an object."""
    ground_truths: Mapping[str, int]
    """Number of objects by class."""
    min_overlaps: tuple[float, ...]
    """The minimum overlaps."""

    def class_ap(self, name: str) -> float | None:
        """Mean over the minimum overlaps.

        Args:
            name: Class name.

        Returns:
            Percent, or None without an object.
        """
        values = self.classes[name]
        return None if values is None else sum(values) / len(values)

    @property
    def mean_ap(self) -> float | None:
        """The challenge's number: the mean over minimum overlaps and classes; None if no class has an object."""
        known = [ap for ap in map(self.class_ap, self.classes) if ap is not None]
        return sum(known) / len(known) if known else None

    def to_json(self) -> dict[str, object]:
        """All values as JSON."""
        return {
            "mAP": self.mean_ap,
            "min_overlaps": list(self.min_overlaps),
            "classes": {
                name: {"AP": self.class_ap(name), "by_overlap": values, "ground_truths": self.ground_truths[name]}
                for name, values in self.classes.items()
            },
        }


def evaluate_lyft(
    truths: LyftBoxes,
    detections: LyftBoxes,
    *,
    classes: Sequence[str] | None = None,
    min_overlaps: tuple[float, ...] = MIN_OVERLAPS,
) -> LyftResult:
    """Compute AP per class and minimum overlap.

    Args:
        truths: The objects of all frames.
        detections: The detections, with scores.
        classes: Classes to score; those of the objects, sorted, by default, as in the SDK.
        min_overlaps: An overlap must be above it.

    Returns:
        AP in percent.

    Raises:
        InvalidInput: Detections have no scores, or a score or box is not finite.
    """
    if detections.scores is None:
        raise InvalidInput("the detections have no scores; every record needs one")
    if not bool(torch.isfinite(detections.scores).all()):
        raise InvalidInput("some detections have a score that is not a finite number; remove them first")
    numbers = {frame: i for i, frame in enumerate(dict.fromkeys(truths.frames + detections.frames))}
    truth_frames, found_frames = (np.array([numbers[f] for f in b.frames], dtype=np.int64) for b in (truths, detections))
    truth_names, found_names = (np.array([n.casefold() for n in b.names], dtype=np.str_) for b in (truths, detections))
    truth_boxes, found_boxes = truths.boxes.double().numpy(), detections.boxes.double().numpy()
    best_first = np.argsort(-detections.scores.double().numpy(), kind="stable")
    results: dict[str, tuple[float, ...] | None] = {}
    counts: dict[str, int] = {}
    for name in _one_spelling(truths.names) if classes is None else classes:
        t = np.flatnonzero(truth_names == name.casefold())
        d = best_first[found_names[best_first] == name.casefold()]
        counts[name] = len(t)
        pairs = box_pairs(found_boxes[d], found_frames[d], truth_boxes[t], truth_frames[t])
        target, overlap = _best_of_each(pairs.start, pairs.truth, pairs.iou)
        results[name] = tuple(_average_precision(target, overlap, m, len(t)) for m in min_overlaps) if len(t) else None
    return LyftResult(classes=results, ground_truths=counts, min_overlaps=min_overlaps)


def account_of_lyft(result: LyftResult, truths: LyftBoxes, detections: LyftBoxes) -> Account:
    """Say what of two files is scored, and why the rest is not.

    Args:
        result: The result.
        truths: The objects of all frames.
        detections: The detections.

    Returns:
        The account. A frame without objects and detections is in neither file, so it is not counted.
    """
    classes = {name.casefold(): name for name in result.classes}
    labels, found = Counter(truths.names), Counter(detections.names)
    scored = {kind: classes[kind.casefold()] for kind in (*labels, *found) if kind.casefold() in classes}
    frames, seen = set(truths.frames), set(detections.frames)
    account = account_of_types(
        labels=labels,
        detections=found,
        label_classes=scored,
        detection_classes=scored,
        classes=tuple(result.classes),
        frames=len(frames),
        frames_without_detections=len(frames - seen),
        neighbors=LYFT_CLASSES,
    )
    foreign = len(seen - frames)
    if foreign and not frames & seen:
        text = f"none of the {foreign} frames of the detections is a frame of the {len(frames)} in the labels; do both files belong together?"
        return account.told(warnings=[text])
    return account.told(
        notes=[f"{foreign} frames have detections and no label; their detections count as wrong"] if foreign else ()
    )


def _one_spelling(names: Sequence[str]) -> list[str]:
    """The classes that occur, sorted; of several spellings that differ in case only the first in the alphabet."""
    spellings: dict[str, str] = {}
    for name in sorted(set(names)):
        spellings.setdefault(name.casefold(), name)
    return sorted(spellings.values())


def read_lyft_boxes(path: Path | str, *, scored: bool) -> LyftBoxes:
    """Read a JSON file of Lyft's SDK.

    It is a list of records with sample_token, translation, size (width, length, height), rotation (w, x, y, z), name and, for detections, score.

    Args:
        path: The file.
        scored: Whether every record needs a score.

    Returns:
        The boxes.

    Raises:
        InvalidInput: The file is not JSON, or a record lacks a field or has one of the wrong form; the message names both.
    """
    records = read_json(path, "a list of boxes", remedy="write the file again", kind=list, max_bytes=1 << 30, allow_nan=True)
    rows: list[list[float]] = []
    for number, record in enumerate(records):
        try:
            row = _row(record, scored=scored)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            reason = f"{shown(error.args[0])} is missing" if isinstance(error, KeyError) else shown(error)
            raise InvalidInput(
                f"{path}, record {number}: expected sample_token, translation (3), size (3, positive), rotation (4), name"
                f"{' and score' if scored else ''}, all finite: {reason}"
            ) from error
        rows.append(row)
    table = torch.tensor(rows, dtype=torch.float64).reshape(-1, 8)
    return LyftBoxes(
        frames=tuple(r["sample_token"] for r in records),
        names=tuple(r["name"] for r in records),
        boxes=table[:, :7],
        scores=table[:, 7] if scored else None,
    )


def _row(record: Mapping[str, object], *, scored: bool) -> list[float]:
    """x y z dx dy dz yaw score of a record. The SDK's boxes stand upright: of a rotation only the heading is used."""

    def numbers(name: str, count: int) -> list[float]:
        value = record[name]
        good = isinstance(value, list) and len(value) == count
        if not good or any(isinstance(v, bool) or not isinstance(v, int | float) for v in value):  # type: ignore[attr-defined]
            raise ValueError(f"{name} is {shown(value)}")
        return [float(v) for v in value]  # type: ignore[attr-defined]

    if not isinstance(record, dict):
        raise TypeError(f"it is {shown(record)}")
    if not isinstance(record["sample_token"], str) or not isinstance(record["name"], str):
        raise TypeError("sample_token and name must be text")
    width, length, height = numbers("size", 3)
    w, x, y, z = numbers("rotation", 4)
    yaw = math.atan2(2 * (w * z + x * y), w * w + x * x - y * y - z * z)  # of a quaternion of any length
    score = record["score"] if scored else 0.0
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise TypeError(f"score is {shown(score)}")
    row = [*numbers("translation", 3), length, width, height, yaw, float(score)]
    if not all(map(math.isfinite, row)) or min(row[3:6]) <= 0 or w == x == y == z == 0:
        raise ValueError("a value is not finite, a size not positive or the rotation zero")
    if max(map(abs, row[:6])) > _FARTHEST:
        raise ValueError(f"a place or a size is larger than {_FARTHEST:g} m")
    return row


def _best_of_each(
    start: NDArray[np.int64], truth: NDArray[np.int64], iou: NDArray[np.float32]
) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """For each detection the object it overlaps most, the first among equals, and how much: (N,), (N,); -1 and 0 for none."""
    target, overlap = np.full(len(start) - 1, -1, dtype=np.int64), np.zeros(len(start) - 1, dtype=np.float32)
    row = np.repeat(np.arange(len(target)), np.diff(start))
    order = np.lexsort((-truth, iou, row))  # the largest overlap of a row comes last, and of equal ones the first object
    last = order[start[1:][np.diff(start) > 0] - 1]
    target[row[last]], overlap[row[last]] = truth[last], iou[last]
    return target, overlap


def _average_precision(target: NDArray[np.int64], overlap: NDArray[np.float32], minimum: float, objects: int) -> float:
    """Percent, of detections that come best first."""
    enough = np.flatnonzero(overlap > minimum)
    right = np.zeros(len(target))
    right[enough[np.unique(target[enough], return_index=True)[1]]] = 1  # the best scored detection of each object
    found = np.cumsum(right)
    recall = np.concatenate([[0.0], found / objects])
    precision = found / np.arange(1, len(target) + 1)
    monotone = np.maximum.accumulate(precision[::-1])[::-1]
    return float(100 * (np.diff(recall) * monotone).sum())
