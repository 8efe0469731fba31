"""Results of OpenPCDet (`result.pkl`) and mmdetection3d (the `.pkl` of its KITTI metric): KITTI's detections, frame by frame.

Both keep the columns of KITTI's text as arrays, with the sizes in the order length, height, width. Nothing is computed on the way, so
AP is the same whoever scores. Text files of detections need no translation: all programs write KITTI's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.foreign_text import is_one_word, shown
from ...datasets.kitti_text import KittiObjects
from .settings import Program

_WIDTHS = {"truncated": 0, "occluded": 0, "alpha": 0, "bbox": 4, "dimensions": 3, "location": 3, "rotation_y": 0, "score": 0}
"""The columns, and how many numbers each has for an object; 0 is one number."""


def results_of(content: Any) -> dict[str, KittiObjects]:
    """Take the detections out of the content of a result file.

    Args:
        content: what `read_plain_pickle` returned.

    Returns:
        The detections of each frame by its id; `000004` for the number 4.

    Raises:
        InvalidInput: It is no such file, or a frame is damaged.
    """
    if not isinstance(content, list) or not content or not all(isinstance(e, Mapping) and "score" in e for e in content):
        raise InvalidInput("the content is no list of detections with name, bbox, location and score, frame by frame")
    found: dict[str, KittiObjects] = {}
    for number, entry in enumerate(content):
        name = _frame_id(entry, number)
        if name in found:
            raise InvalidInput(f"the frame {shown(name)} stands twice in the results")
        columns = {column: _column(entry, column, width, name) for column, width in _WIDTHS.items()}
        types = _types(entry, name)
        if any(len(values) != len(types) for values in columns.values()):
            raise InvalidInput(f"frame {shown(name)} of the results has columns of different lengths")
        length, height, width = columns["dimensions"].unbind(1)
        found[name] = KittiObjects(
            types=types,
            truncated=columns["truncated"],
            occluded=columns["occluded"].long(),
            alpha=columns["alpha"],
            bbox=columns["bbox"],
            dimensions=torch.stack([height, width, length], 1),
            location=columns["location"],
            rotation_y=columns["rotation_y"],
            scores=columns["score"],
        )
    return found


def _frame_id(entry: Mapping[str, Any], number: int) -> str:
    """OpenPCDet names the frame; mmdetection3d repeats its number for every object, so a frame without objects has none."""
    if "frame_id" in entry:
        given = entry["frame_id"]
        return f"{int(given):06d}" if isinstance(given, int | np.integer) else str(given)
    numbers = np.unique(np.asarray(entry.get("sample_idx", [])))
    if len(numbers) != 1:
        raise InvalidInput(
            f"result {number} names no frame (it has no object); keep the text files of the run (submission_prefix), which have a name each"
        )
    return f"{int(numbers[0]):06d}"


def _types(entry: Mapping[str, Any], frame: str) -> tuple[str, ...]:
    """The classes of the detections, which must be one word each, because KITTI's text has columns of words."""
    given = entry.get("name")
    if not isinstance(given, list | tuple | np.ndarray) or np.ndim(given) != 1:
        raise InvalidInput(f"frame {shown(frame)} of the results has no list of classes (name)")
    types = tuple(str(kind) for kind in given)
    if bad := next((kind for kind in types if not is_one_word(kind)), None):
        raise InvalidInput(
            f"frame {shown(frame)} of the results has the class {shown(repr(bad))}, which is no word; rename it in the file"
        )
    return types


def _column(entry: Mapping[str, Any], name: str, width: int, frame: str) -> Tensor:
    try:
        values = np.asarray(entry[name], np.float64).reshape((-1, width) if width else (-1,))
    except (KeyError, TypeError, ValueError) as error:
        raise InvalidInput(f"frame {shown(frame)} of the results has no column {name} of numbers") from error
    if not np.isfinite(values).all():
        raise InvalidInput(f"frame {shown(frame)} of the results has NaN or inf in {name}")
    return torch.from_numpy(values.copy())


def results_to(program: Program, frames: Mapping[str, KittiObjects]) -> list[dict[str, Any]]:
    """Write detections in the form of a result file.

    Args:
        program: whose form.
        frames: detections with scores by frame.

    Returns:
        The content of the file.

    Raises:
        InvalidInput: Detections have no scores, or mmdetection3d is to name a frame that is no number.
    """
    return [_result(program, name, objects) for name, objects in frames.items()]


def _result(program: Program, name: str, objects: KittiObjects) -> dict[str, Any]:
    if objects.scores is None and len(objects):
        raise InvalidInput(f"frame {shown(name)} has labels and no detections: a score is missing")
    scores = torch.zeros(0, dtype=torch.float64) if objects.scores is None else objects.scores
    values: Sequence[Tensor] = (
        objects.truncated,
        objects.occluded,
        objects.alpha,
        objects.bbox,
        objects.dimensions[:, [2, 0, 1]],
        objects.location,
        objects.rotation_y,
        scores,
    )
    types = np.asarray(objects.types, dtype="U") if len(objects) else np.asarray([], "U1")
    entry: dict[str, Any] = {"name": types} | {
        column: value.double().numpy() for column, value in zip(_WIDTHS, values, strict=True)
    }
    if program == "openpcdet":
        return entry | {"frame_id": name}
    if not (name.isdecimal() and name.isascii()):
        raise InvalidInput(f"mmdetection3d numbers its frames, and {shown(name)} is no number; write OpenPCDet's form")
    return entry | {"sample_idx": np.full(len(objects), int(name), np.int64)}
