"""Detections of one scan as JSON: what `predict` writes, and what `view` reads again.

Read next: `structures.py`, whose `Predictions` they are.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from .errors import InvalidInput
from .foreign_text import is_one_name, shown
from .strict_json import read_json
from .structures import Boxes3D, Predictions

MOST_DETECTIONS = 100_000
"""Boxes of the largest file that is read. `predict` writes at most some hundred."""

_BOX = ("x", "y", "z", "dx", "dy", "dz", "yaw")
_REMEDY = "give a file that `upcycle3d predict` wrote"


def boxes_json(found: Predictions, class_names: tuple[str, ...]) -> list[dict[str, object]]:
    """Detections as JSON values.

    Args:
        found: Detections of one scan.
        class_names: Names of the class numbers.

    Returns:
        One record per box: class, score, x y z of the center, dx dy dz, yaw; meters and radians, in the frame of the boxes.
    """
    return [
        {"class": class_names[c], "score": round(s, 4)} | {n: round(v, 3) for n, v in zip(_BOX, box, strict=True)}
        for box, c, s in zip(found.boxes.data.tolist(), found.classes.tolist(), found.scores.tolist(), strict=True)
    ]


def read_boxes_json(path: Path | str) -> tuple[Predictions, tuple[str, ...]]:
    """Read what `boxes_json` gave.

    Args:
        path: The file. Each record needs the entries that `boxes_json` writes; others are not looked at.

    Returns:
        The detections in the order of the file, with the score as all three scores; and the names of their classes, in the order in which
        they occur.

    Raises:
        InvalidInput: The file is missing or damaged, or a record lacks an entry or holds a value that cannot be; the message names it.
    """
    records = read_json(path, "detections", remedy=_REMEDY, kind=list)
    if len(records) > MOST_DETECTIONS:
        raise InvalidInput(
            f"{path} (detections) holds {len(records):,} boxes, more than the {MOST_DETECTIONS:,} that are read; {_REMEDY}"
        )
    rows, scores, names = [], [], []
    for number, record in enumerate(records):
        where = f"{path} (detections), box {number}"
        name = record.get("class") if isinstance(record, dict) else None
        if not isinstance(name, str) or not is_one_name(name):
            raise InvalidInput(
                f"{where} must be an object with the name of a class as `class`, found {shown(record, most=80)}; {_REMEDY}"
            )
        names.append(name)
        rows.append([_number(record, entry, where) for entry in _BOX])
        scores.append(_number(record, "score", where))
        if min(rows[-1][3:6]) <= 0 or not 0 <= scores[-1] <= 1:
            raise InvalidInput(f"{where} has a size that is not above 0, or a score outside 0..1; {_REMEDY}")
    classes = tuple(dict.fromkeys(names))
    score = torch.tensor(scores)
    found = Predictions(
        boxes=Boxes3D(data=torch.tensor(rows).reshape(-1, 7)),
        classes=torch.tensor(_numbers(names, classes), dtype=torch.int64),
        scores=score,
        class_scores=score,
        iou_scores=score,
    )
    return found, classes


def _number(record: dict[str, Any], entry: str, where: str) -> float:
    value = record.get(entry)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or abs(value) > 1e9:
        raise InvalidInput(f"{where} must have a number as `{entry}`, found {shown(value, most=80)}; {_REMEDY}")
    return float(value)


def _numbers(names: Sequence[str], classes: Sequence[str]) -> list[int]:
    number = {name: i for i, name in enumerate(classes)}
    return [number[name] for name in names]
