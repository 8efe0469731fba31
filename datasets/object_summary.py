"""What the labeled objects of a prepared dataset look like, beside the usual: swapped sizes, other units and lifted boxes show here.

Usual sizes are the means of KITTI's, Waymo's and nuScenes' labels as published (OpenPCDet and mmdetection3d use them as anchors):
Car 3.9 x 1.6 x 1.56 to 4.7 x 2.1 x 1.7 m, Pedestrian 0.8 x 0.6 x 1.73 to 0.9 x 0.9 x 1.8, Cyclist 1.76 x 0.6 x 1.73 to 1.8 x 0.8 x 1.7,
Truck 6.9 x 2.5 x 2.8 to 10.1 x 2.6 x 3.2, Bus 10.5 to 12.3 x 2.9 x 3.4, Van 5.1 x 1.9 x 2.2.

Read next: `prepared.py`; `tools/prepare.py`, which prints the table.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.trained_on import estimate_road_height
from .prepared import PreparedDataset

Size = tuple[float, float, float]
"""Length, width and height in meters."""
USUAL_SIZES: Mapping[str, Size] = {
    "car": (4.3, 1.8, 1.6),
    "vehicle": (4.7, 2.1, 1.8),
    "van": (5.1, 1.9, 2.2),
    "truck": (8.0, 2.6, 3.0),
    "bus": (11.0, 2.9, 3.4),
    "pedestrian": (0.8, 0.7, 1.75),
    "cyclist": (1.8, 0.7, 1.7),
    "motorcyclist": (2.1, 0.8, 1.6),
}
"""Mean length, width and height of common classes, in meters, by name in small letters."""
_FACTOR = 1.6  # by which the mean of a class may differ from the usual
_MOST_LABELED = 2000  # frames whose labels are looked at, evenly spread
_MOST_SCANS = 30  # frames whose points are looked at
_FEWEST = 4  # boxes from which a mean says something
_NEAR, _FAR = 5.0, 30.0  # m; where the height of the road is known
_LIFT = 0.45  # share of a box's height between its bottom and the road from which a warning follows
_FARTHEST = 400.0  # m; no LiDAR of a vehicle sees farther


@dataclass(frozen=True, kw_only=True)
class ObjectSummary:
    """The labeled objects of one class."""

    name: str
    """Name of the class."""
    boxes: int
    """Number of boxes that were looked at, ignored ones left out."""
    size: Size | None
    """Mean length, width and height in meters; None without a box."""
    usual: Size | None
    """The usual size of this class; None for an uncommon one."""
    points: float | None
    """Median number of points in a box."""
    distance: tuple[float, float] | None
    """Smallest and largest distance of a box from the sensor in BEV, in meters."""
    above_road: float | None
    """Median height of the boxes' bottoms above the road in meters; None where no road was found."""


def summarize_objects(frames: PreparedDataset) -> tuple[tuple[ObjectSummary, ...], tuple[str, ...], float | None]:
    """Summarize the labeled objects and compare them with the usual.

    Args:
        frames: A prepared dataset.

    Returns:
        One summary per class, a sentence for everything that is far off, with its likely cause, and the median height of the road in
        meters (None where no road was found).
    """
    boxes, classes, counts = _labels(frames)
    lifts, lift_classes, reach, road = _lifts(frames)
    summaries, findings = [], []
    for number, name in enumerate(frames.classes):
        own = boxes[classes == number]
        lift = lifts[lift_classes == number]
        distance = np.hypot(own[:, 0], own[:, 1])
        summary = ObjectSummary(
            name=name,
            boxes=len(own),
            size=(float(own[:, 3].mean()), float(own[:, 4].mean()), float(own[:, 5].mean())) if len(own) else None,
            usual=USUAL_SIZES.get(name.casefold()),
            points=float(np.median(counts[classes == number])) if len(own) else None,
            distance=(float(distance.min()), float(distance.max())) if len(own) else None,
            above_road=float(np.median(lift)) if len(lift) >= _FEWEST else None,
        )
        summaries.append(summary)
        findings += _findings(summary, _Remedies.of_layout(frames.origin.layout))
    if reach > _FARTHEST:
        findings.append(
            f"half of the points lie farther than {reach:,.0f} m from the sensor; scans must be in meters, and these are perhaps in "
            "millimeters or centimeters"
        )
    return tuple(summaries), tuple(findings), road


def _labels(frames: PreparedDataset) -> tuple[NDArray[np.float32], NDArray[np.int64], NDArray[np.int64]]:
    """(M, 7) boxes of learned objects, their class numbers and their points, of evenly spread frames."""
    boxes, classes, counts = [np.zeros((0, 7), np.float32)], [np.zeros(0, np.int64)], [np.zeros(0, np.int64)]
    for index in _spread(len(frames), _MOST_LABELED):
        labels = frames.labels(index)
        if labels is not None:
            labels = labels.select(labels.weight > 0)
            boxes.append(labels.boxes.data.numpy())
            classes.append(labels.classes.numpy())
            counts.append(labels.num_points.numpy())
    return np.concatenate(boxes), np.concatenate(classes), np.concatenate(counts)


def _lifts(frames: PreparedDataset) -> tuple[NDArray[np.float64], NDArray[np.int64], float, float | None]:
    """Heights of boxes' bottoms above the road near them, their class numbers, the median distance of points, the median road; in m."""
    lifts, classes, reach, roads = [np.zeros(0)], [np.zeros(0, np.int64)], [], []
    for index in _spread(len(frames), _MOST_SCANS):
        frame = frames[index]
        if len(frame.points):
            reach.append(float(torch.linalg.vector_norm(frame.points.xyz, dim=1).median()))
        road = estimate_road_height(frame.points)
        roads += [] if math.isnan(road) else [road]
        if frame.labels is None or math.isnan(road):
            continue
        labels = frame.labels.select(frame.labels.weight > 0)
        box = labels.boxes.data.double().numpy()
        distance = np.hypot(box[:, 0], box[:, 1])
        near = (distance > _NEAR) & (distance < _FAR)
        lifts.append((box[:, 2] - box[:, 5] / 2 - road)[near])
        classes.append(labels.classes.numpy()[near])
    height = float(np.median(roads)) if roads else None
    return np.concatenate(lifts), np.concatenate(classes), float(np.median(reach)) if reach else 0.0, height


def _spread(count: int, most: int) -> Sequence[int]:
    return range(count) if count <= most else [int(i) for i in np.linspace(0, count - 1, most)]


@dataclass(frozen=True)
class _Remedies:
    """What to advise. Only a folder of the user's own has options for the form of its labels."""

    folder: bool

    @staticmethod
    def of_layout(layout: str) -> _Remedies:
        return _Remedies(folder=layout in ("folder", "own"))

    def swapped(self, letters: Sequence[str]) -> str:
        if self.folder:
            return f"(--size-order {' '.join(letters)})"
        return "in these labels, whose format says another order; no option swaps them, so correct the label files or tables"

    @property
    def bottom(self) -> str:
        if self.folder:
            return "x y z is perhaps the center of the bottom (--origin bottom)"
        return "x y z in the labels is perhaps the center of the bottom, and their format says another point: correct the label files or tables"

    @property
    def lifted(self) -> str:
        options = (
            "other axes (--axes), another origin of the boxes (--origin)" if self.folder else "a wrong calibration or sensor pose"
        )
        return f"{options}, or labels with a mounting height that the scans do not have are likely causes"


def _findings(summary: ObjectSummary, remedies: _Remedies) -> list[str]:
    """Sentences about one class."""
    found = []
    if summary.size is not None and summary.usual is not None and summary.boxes >= _FEWEST:
        text = _about_size(summary.name, summary.size, summary.usual, remedies)
        found += [text] if text else []
    if summary.size is not None and summary.above_road is not None:
        height, lift = summary.size[2], summary.above_road
        if -0.8 * height < lift < -_LIFT * 0.8 * height and -3.0 < lift < -0.25:
            found.append(
                f"the boxes of {summary.name} lie {-lift:.2f} m below the road, about half of their height; {remedies.bottom}"
            )
        elif abs(lift) > 1.0 and abs(lift) > _LIFT * height:
            found.append(f"the bottoms of the boxes of {summary.name} lie {lift:+.2f} m from the road; {remedies.lifted}")
    return found


def _about_size(name: str, size: Size, usual: Size, remedies: _Remedies) -> str | None:
    if _distance(size, usual) <= math.log(_FACTOR):
        if size[0] < size[1] and usual[0] > 1.8 * usual[1]:
            return _swapped(name, size, usual, (1, 0, 2), remedies)
        return None
    found, expected = (" x ".join(f"{v:.3g}" for v in values) for values in (size, usual))
    for factor, unit in ((1000.0, "millimeters"), (100.0, "centimeters"), (1 / 0.3048, "feet")):
        if _distance((size[0] / factor, size[1] / factor, size[2] / factor), usual) <= math.log(_FACTOR):
            return f"the mean size of {name} is {found}, usual are {expected} m; the labels are perhaps in {unit}, and must be in meters"
    best = min(permutations(range(3)), key=lambda order: _distance((size[order[0]], size[order[1]], size[order[2]]), usual))
    if best != (0, 1, 2) and _distance((size[best[0]], size[best[1]], size[best[2]]), usual) < 0.7 * _distance(size, usual):
        return _swapped(name, size, usual, best, remedies)
    return f"the mean size of {name} is {found} m, usual are {expected} m (length, width, height); check order and units of the labels"


def _swapped(name: str, size: Size, usual: Size, order: Sequence[int], remedies: _Remedies) -> str:
    """`order[i]` is the column that holds length, width, height."""
    letters = [""] * 3
    for letter, column in zip("lwh", order):
        letters[column] = letter
    found, expected = (" x ".join(f"{v:.3g}" for v in values) for values in (size, usual))
    what = "length and width are" if tuple(order) == (1, 0, 2) else "the sizes are"
    return (
        f"the mean size of {name} is {found} m, usual are {expected} m (length, width, height); {what} perhaps swapped "
        f"{remedies.swapped(letters)}"
    )


def _distance(size: Sequence[float], usual: Size) -> float:
    """The largest difference of the three logarithms."""
    return max(abs(math.log(a / b)) for a, b in zip(size, usual))
