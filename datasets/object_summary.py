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

from ..core.foreign_text import shown
from ..core.scan_comparison import FEWEST_ODD_HEIGHTS, ODD_COUNT, ODD_HEIGHT, ODD_INTENSITY
from ..core.structures import PointCloud
from ..core.trained_on import estimate_road_height
from .box_poses import MOST_BOXES, LabelMistake, count_poses, joined, judge_poses
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
_AGREE = 0.6  # share of the boxes of a class that must lie alike above the road before their height says anything
_UNEVEN = 0.9  # m between the roads of scans from which they are not one mounting
_FEWEST_BEHIND = 10  # boxes from which it is no chance that nearly all of them lie behind the sensor
_MOST_BEHIND = 0.9  # share of the boxes that lie behind the sensor, from which a warning follows
_FEWEST_NEAR = 10  # boxes near the sensor from which few points in them say something
_FEWEST_POINTS = 5  # median points in a box near the sensor below which a warning follows
_NEARNESS = 12.0  # a box is near up to this multiple of the root of its side's area: a car up to 30 m, a pedestrian up to 14 m


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
    look = _look(frames)
    summaries, findings = [], []
    for number, name in enumerate(frames.classes):
        own = boxes[classes == number]
        lift = look.lifts[look.classes == number]
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
        remedies = _Remedies.of_layout(frames.origin.layout)
        findings += _about_sizes(summary, remedies)
        findings += [] if look.uneven else _about_height(summary, lift, look.pose, remedies)
    if look.uneven is not None:
        findings.append(look.uneven)
    if look.pose is not None and not _is_said(look.pose[0], findings, look.uneven):
        findings.append(look.pose[1])
    if look.reach > _FARTHEST:
        findings.append(
            f"half of the points lie farther than {look.reach:,.0f} m from the sensor; scans must be in meters, and these are perhaps in "
            "millimeters or centimeters"
        )
    findings += look.odd
    findings += _about_copies(frames)
    findings += _about_degrees(frames, boxes)
    behind = int((boxes[:, 0] < 0).sum())
    if len(boxes) >= _FEWEST_BEHIND and behind > _MOST_BEHIND * len(boxes):
        findings.append(
            f"{behind} of {len(boxes)} labeled boxes lie behind the sensor (x < 0), and x must point forward; "
            f"{_Remedies.of_layout(frames.origin.layout).backward}"
        )
    return tuple(summaries), tuple(findings + ([] if look.pose else _about_points(boxes, counts))), look.road


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


@dataclass(frozen=True, kw_only=True)
class _Look:
    """What a few scans say about boxes."""

    lifts: NDArray[np.float64]
    """Heights of the boxes' bottoms above the road near them, in m."""
    classes: NDArray[np.int64]
    """Their class numbers."""
    reach: float
    """Median distance of points in m."""
    road: float | None
    """Median height of the road in m; None where none was found."""
    uneven: str | None
    """A sentence where the road lies at other heights in some scans than in others."""
    odd: tuple[str, ...]
    """Sentences about a few scans that are unlike the others."""
    pose: tuple[LabelMistake, str] | None
    """The pose in which the boxes hold clearly more points, and a sentence about it."""


def _look(frames: PreparedDataset) -> _Look:
    lifts, classes, reach, roads, poses = [np.zeros(0)], [np.zeros(0, np.int64)], [], [], []
    seen: list[tuple[str, float, float, float]] = []
    looked_at = _spread(len(frames), _MOST_SCANS)
    for index in looked_at:
        frame = frames[index]
        if len(frame.points):
            reach.append(float(torch.linalg.vector_norm(frame.points.xyz, dim=1).median()))
        road = estimate_road_height(frame.points)
        if not math.isnan(road):
            roads.append(road)
        seen.append((frame.id, road, _mean_intensity(frame.points), reach[-1] if len(frame.points) else math.nan))
        if frame.labels is None:
            continue
        labels = frame.labels.select(frame.labels.weight > 0)
        box = labels.boxes.data.double().numpy()
        poses.append(count_poses(frame.points.xyz.double().numpy(), box, max(MOST_BOXES // len(looked_at), 1)))
        if math.isnan(road):
            continue
        distance = np.hypot(box[:, 0], box[:, 1])
        near = (distance > _NEAR) & (distance < _FAR)
        lifts.append((box[:, 2] - box[:, 5] / 2 - road)[near])
        classes.append(labels.classes.numpy()[near])
    uneven = _uneven(roads)
    return _Look(
        lifts=np.concatenate(lifts),
        classes=np.concatenate(classes),
        reach=float(np.median(reach)) if reach else 0.0,
        road=float(np.median(roads)) if roads else None,
        uneven=uneven,
        odd=_odd(seen, heights=uneven is None),
        pose=judge_poses(joined(poses)),
    )


def _uneven(roads: Sequence[float]) -> str | None:
    """A sentence where scans fall into two groups, whose roads lie at clearly different heights."""
    if len(roads) < _FEWEST:
        return None
    heights = np.sort(roads)
    gap = int(np.diff(heights).argmax()) + 1
    low, high = heights[:gap], heights[gap:]
    if min(len(low), len(high)) < max(2, len(heights) // 5) or high[0] - low[-1] < _UNEVEN:
        return None
    return (
        f"the road lies at about {np.median(low):+.2f} m in {len(low)} of {len(heights)} scans and at {np.median(high):+.2f} m in the others; "
        "these are perhaps scans of two mounting heights, or scans to which the height was added and others: prepare them apart, each with "
        "its own --z-shift"
    )


def _mean_intensity(points: PointCloud) -> float:
    if "intensity" not in points.feature_names or not len(points):
        return math.nan
    return float(points.features[:, points.feature_names.index("intensity")].mean())


def _odd(seen: Sequence[tuple[str, float, float, float]], *, heights: bool) -> tuple[str, ...]:
    """Sentences about scans whose road, mean intensity or reach is unlike that of most of the scans that were looked at."""
    if len(seen) < _FEWEST:
        return ()
    names, table = [row[0] for row in seen], np.array([row[1:] for row in seen])
    with np.errstate(all="ignore"):
        usual = np.array([np.median(column[~np.isnan(column)]) if not np.isnan(column).all() else np.nan for column in table.T])
        ratio = table / usual
        odd = np.stack(
            [
                np.abs(table[:, 0] - usual[0]) > ODD_HEIGHT,
                (ratio[:, 1] > ODD_INTENSITY) | (ratio[:, 1] < 1 / ODD_INTENSITY),
                (ratio[:, 2] > ODD_COUNT) | (ratio[:, 2] < 1 / ODD_COUNT),
            ]
        )
    said = []
    for rows, what, cause, fewest in zip(
        odd,
        ("the road at another height", "another mean intensity", "points ten times farther or nearer"),
        ("another mounting height (--z-shift)", "another intensity scale (--intensity-scale)", "another unit than meters"),
        (FEWEST_ODD_HEIGHTS if heights else len(seen) + 1, 1, 1),
    ):
        if rows.sum() >= fewest:
            listed = [shown(name) for name, is_odd in zip(names, rows) if is_odd]
            said.append(
                f"{rows.sum()} of {len(rows)} scans that were looked at ({', '.join(listed[:3])}{' …' if len(listed) > 3 else ''}) have {what} "
                f"compared with the others; a likely cause is {cause}: prepare such scans apart"
            )
    return tuple(said)


def _about_copies(frames: PreparedDataset) -> list[str]:
    """A sentence where labels are written twice: two equal boxes of one class in one frame."""
    copies, total, where = 0, 0, list[str]()
    for index in _spread(len(frames), _MOST_LABELED):
        labels = frames.labels(index)
        if labels is None:
            continue
        rows = np.concatenate([labels.classes[:, None].double().numpy(), labels.boxes.data.double().numpy()], 1)
        twice = len(rows) - len(np.unique(rows, axis=0))
        total, copies = total + len(rows), copies + twice
        where += [frames.ids[index]] if twice else []
    if not copies:
        return []
    return [
        f"{copies} of {total} labeled boxes are written twice, with the same numbers and class, in {len(where)} frames "
        f"({', '.join(map(shown, where[:3]))}{' …' if len(where) > 3 else ''}); each counts as an object of its own, in training and in scores: "
        "remove the copies"
    ]


def _about_degrees(frames: PreparedDataset, boxes: NDArray[np.float32]) -> list[str]:
    """A sentence where angles that were read as degrees are so small that they are perhaps radians."""
    if dict(frames.origin.options).get("yaw") != "degrees" or len(boxes) < _FEWEST_BEHIND:
        return []
    quarter = np.pi / 2  # other axes turn all boxes by quarters
    if (np.abs(boxes[:, 6] - quarter * np.round(boxes[:, 6] / quarter)) > math.radians(math.pi) + 1e-4).any():
        return []
    return [
        f"all {len(boxes)} yaws that were read as degrees (--yaw degrees) lie within {math.pi:.2f} of the axes; they are perhaps in radians: "
        "leave --yaw out"
    ]


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
    def backward(self) -> str:
        options = "other axes (--axes)" if self.folder else "a wrong calibration or sensor pose"
        return f"{options} are a likely cause. Boxes that are turned together with their scans hold their points, so nothing else shows it"

    @property
    def lifted(self) -> str:
        options = (
            "other axes (--axes), another origin of the boxes (--origin)" if self.folder else "a wrong calibration or sensor pose"
        )
        return f"{options}, or labels with a mounting height that the scans do not have are likely causes"


def _is_said(pose: LabelMistake, findings: Sequence[str], uneven: str | None) -> bool:
    """Whether another sentence names the cause already: swapped sizes are a quarter turn as well."""
    return (pose.name == "quarter turn" and any("perhaps swapped" in text for text in findings)) or (
        pose.name == "lowered" and uneven is not None
    )


def _about_sizes(summary: ObjectSummary, remedies: _Remedies) -> list[str]:
    """A sentence about the mean size of a class that is far from the usual."""
    if summary.size is None or summary.usual is None or summary.boxes < _FEWEST:
        return []
    text = _about_size(summary.name, summary.size, summary.usual, remedies)
    return [text] if text else []


def _about_height(
    summary: ObjectSummary, lifts: NDArray[np.float64], pose: tuple[LabelMistake, str] | None, remedies: _Remedies
) -> list[str]:
    """A sentence about boxes of a class that do not stand on the road."""
    if summary.size is None or summary.above_road is None:
        return []
    height, lift = summary.size[2], summary.above_road
    alike = float((np.abs(lifts - lift) < 0.25 * height + 0.1).mean()) >= _AGREE
    if alike and -0.8 * height < lift < -_LIFT * 0.8 * height and -3.0 < lift < -0.25:
        return [f"the boxes of {summary.name} lie {-lift:.2f} m below the road, about half of their height; {remedies.bottom}"]
    if alike and 0.25 < lift < 3.0 and _LIFT * 0.8 * height < lift < 0.8 * height:
        if pose is not None and pose[0].name == "lowered":
            return []  # the points say the same
        return [
            f"the boxes of {summary.name} lie {lift:.2f} m above the road, about half of their height; the labels perhaps give the center "
            "of the box where the middle of its bottom is expected. For a folder leave --origin bottom out; in KITTI's labels x y z is the "
            "middle of the bottom, so add half of the height to y"
        ]
    if abs(lift) > 1.0 and abs(lift) > _LIFT * height:
        return [f"the bottoms of the boxes of {summary.name} lie {lift:+.2f} m from the road; {remedies.lifted}"]
    return []


def _about_points(boxes: NDArray[np.float32], counts: NDArray[np.int64]) -> list[str]:
    """A sentence about boxes near the sensor that hold hardly a point."""
    distance = np.hypot(boxes[:, 0], boxes[:, 1])
    near = counts[distance < np.minimum(_NEARNESS * np.sqrt(np.maximum(boxes[:, 3], boxes[:, 4]) * boxes[:, 5]), _FAR)]
    if len(near) < _FEWEST_NEAR or np.median(near) >= _FEWEST_POINTS:
        return []
    return [
        f"half of the {len(near)} labeled boxes near the sensor hold fewer than {_FEWEST_POINTS} points (median {np.median(near):.0f}), where "
        "scans of a vehicle's LiDAR have dozens; likely causes are labels of other scans, other axes of labels or scans (--axes), a heading "
        "in degrees (--yaw degrees), or a wrong calibration"
    ]


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
