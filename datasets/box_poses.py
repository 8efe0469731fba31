"""Whether labeled boxes hold clearly more points in another pose: turned, mirrored or lowered boxes show here.

A heading that is counted from another axis or in the other direction leaves every size and every height as usual, and only the points
in the boxes say that it is wrong. For a few boxes near the sensor the points are counted in the labeled pose and in the poses that usual
mistakes would have come from. Good labels hold the most points as they are.

Points in the lowest part of a box are not counted: they belong to the road, of which a turned box covers other parts.

Read next: `object_summary.py`, which asks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Boxes = NDArray[np.float64]
"""(M, 7) x, y, z, length, width, height in meters and yaw in radians."""

MOST_BOXES = 200
"""Boxes that are looked at in all."""
_FEWEST = 10  # boxes with a known answer from which a warning follows
_FEWEST_ALIKE = 5  # the same where all of them give one answer
_POINTS = 10  # points in one of two poses from which a box has an answer
_CLEARLY = 1.3  # times as many points in another pose
_MAJORITY = 2 / 3  # share of the boxes that hold more points in the other pose
_ROAD = 0.15  # share of a box's height in which points of the road may lie
_FARTHEST = 60.0  # m


@dataclass(frozen=True, kw_only=True)
class LabelMistake:
    """One usual mistake: how a labeled box is moved to undo it."""

    name: str
    """A word for programs."""
    undo: Callable[[Boxes], Boxes]
    """Boxes as labeled -> boxes as they would be right."""
    matters: Callable[[Boxes], NDArray[np.bool_]]
    """Whether the move changes a box enough to say anything."""
    cause: str
    """What the labels perhaps have wrong, and what to do. It follows "hold more points when"."""


def _all(boxes: Boxes) -> NDArray[np.bool_]:
    return np.ones(len(boxes), bool)


def _long(boxes: Boxes) -> NDArray[np.bool_]:
    found: NDArray[np.bool_] = np.maximum(boxes[:, 3], boxes[:, 4]) > 1.3 * np.minimum(boxes[:, 3], boxes[:, 4])
    return found


def _oblique(boxes: Boxes) -> NDArray[np.bool_]:
    return _long(boxes) & (np.abs(np.sin(2 * boxes[:, 6])) > 0.25)


def _moved(matrix: tuple[tuple[float, float], tuple[float, float]]) -> Callable[[Boxes], Boxes]:
    """Turns or mirrors the whole frame of the labels in BEV."""
    turn = np.array(matrix)

    def undo(boxes: Boxes) -> Boxes:
        moved = boxes.copy()
        moved[:, :2] = boxes[:, :2] @ turn.T
        heading = np.stack([np.cos(boxes[:, 6]), np.sin(boxes[:, 6])], 1) @ turn.T
        moved[:, 6] = np.arctan2(heading[:, 1], heading[:, 0])
        return moved

    return undo


def _shifted(column: int, amount: Callable[[Boxes], NDArray[np.float64] | float]) -> Callable[[Boxes], Boxes]:
    def undo(boxes: Boxes) -> Boxes:
        moved = boxes.copy()
        moved[:, column] += amount(boxes)
        return moved

    return undo


_FRAME = "labels and scans have different axes; write both with x forward, y left and z up (--axes turns a folder's scans and labels alike)"
POSES: tuple[LabelMistake, ...] = (
    LabelMistake(
        name="quarter turn",
        undo=_shifted(6, lambda boxes: math.pi / 2),
        matters=_long,
        cause="they are turned by 90 degrees: their heading is perhaps counted from another axis, or length and width are swapped "
        "(--size-order for a folder). The yaw of a folder's labels is 0 along x and grows toward y, in radians (--yaw degrees for degrees); "
        "KITTI's rotation_y is 0 along the camera's x axis, to the right, and grows clockwise in BEV",
    ),
    LabelMistake(
        name="mirrored heading",
        undo=_shifted(6, lambda boxes: -2 * boxes[:, 6]),
        matters=_oblique,
        cause="the sign of their heading changes: it is perhaps counted in the other direction. The yaw of a folder's labels grows from x "
        "toward y, counterclockwise in BEV, in radians (--yaw degrees for degrees); KITTI's rotation_y grows clockwise. Change its sign in "
        "the labels",
    ),
    LabelMistake(
        name="lowered",
        undo=_shifted(2, lambda boxes: -boxes[:, 5] / 2),
        matters=_all,
        cause="they are lowered by half of their height: the labels perhaps give the center of the box where the middle of its bottom is "
        "expected. For a folder leave --origin bottom out; in KITTI's labels x y z is the middle of the bottom, so add half of the height to y",
    ),
    LabelMistake(
        name="y mirrored", undo=_moved(((1, 0), (0, -1))), matters=_all, cause=f"the sign of their y and yaw changes: {_FRAME}"
    ),
    LabelMistake(name="x mirrored", undo=_moved(((-1, 0), (0, 1))), matters=_all, cause=f"the sign of their x changes: {_FRAME}"),
    LabelMistake(
        name="half turn", undo=_moved(((-1, 0), (0, -1))), matters=_all, cause=f"the signs of their x and y change: {_FRAME}"
    ),
    LabelMistake(name="turn left", undo=_moved(((0, -1), (1, 0))), matters=_all, cause=f"x becomes y and y becomes -x: {_FRAME}"),
    LabelMistake(
        name="turn right", undo=_moved(((0, 1), (-1, 0))), matters=_all, cause=f"x becomes -y and y becomes x: {_FRAME}"
    ),
    LabelMistake(name="swapped", undo=_moved(((0, 1), (1, 0))), matters=_all, cause=f"their x and y are swapped: {_FRAME}"),
)
"""Usual mistakes of labels that sizes and heights do not show."""


def count_poses(xyz: NDArray[np.float64], boxes: Boxes, most: int) -> NDArray[np.int64]:
    """Count points in boxes as they are labeled and as they would be without each usual mistake.

    Args:
        xyz: (N, 3) points in meters.
        boxes: Boxes of the same scan.
        most: Number of boxes to look at, the nearest first.

    Returns:
        (K, 1 + P) points as labeled and in each of `POSES`; -1 where the pose changes nothing.
    """
    distance = np.hypot(boxes[:, 0], boxes[:, 1])
    boxes = boxes[np.argsort(distance, kind="stable")[:most]]
    boxes = boxes[np.hypot(boxes[:, 0], boxes[:, 1]) < _FARTHEST]
    xyz = xyz[np.argsort(xyz[:, 0], kind="stable")]
    counts = [_count(xyz, boxes)]
    for pose in POSES:
        counts.append(np.where(pose.matters(boxes), _count(xyz, pose.undo(boxes)), -1))
    return np.stack(counts, 1)


def judge_poses(counts: NDArray[np.int64]) -> tuple[LabelMistake, str] | None:
    """Say which usual mistake the boxes have.

    Args:
        counts: From `count_poses`, of all scans.

    Returns:
        The pose in which clearly more points lie in the boxes, and a sentence with its likely cause; None for good boxes.
    """
    best: tuple[float, LabelMistake, str] | None = None
    for pose, column in zip(POSES, counts[:, 1:].T):
        known = (column >= 0) & (np.maximum(counts[:, 0], column) >= _POINTS)
        own, other = counts[known, 0], column[known]
        fewest = _FEWEST_ALIKE if (other > own).all() else _FEWEST
        if len(own) < fewest or other.sum() <= _CLEARLY * own.sum() or (other > own).mean() <= _MAJORITY:
            continue
        if best is None or other.sum() - own.sum() > best[0]:
            more = f"{other.sum():,} instead of {own.sum():,}"
            text = f"{int((other > own).sum())} of {len(own)} boxes hold more points ({more}) when {pose.cause}"
            best = (float(other.sum() - own.sum()), pose, text)
    return None if best is None else best[1:]


def _count(xyz: NDArray[np.float64], boxes: Boxes) -> NDArray[np.int64]:
    """Points in each box above its lowest part; `xyz` is sorted by x."""
    found = np.zeros(len(boxes), np.int64)
    reach = np.hypot(boxes[:, 3], boxes[:, 4]) / 2
    first = np.searchsorted(xyz[:, 0], boxes[:, 0] - reach)
    last = np.searchsorted(xyz[:, 0], boxes[:, 0] + reach)
    for k, (x, y, z, length, width, height, yaw) in enumerate(boxes.tolist()):
        near = xyz[first[k] : last[k]] - (x, y, z)
        near = near[np.abs(near[:, 1]) <= reach[k]]
        along = near[:, 0] * math.cos(yaw) + near[:, 1] * math.sin(yaw)
        across = near[:, 1] * math.cos(yaw) - near[:, 0] * math.sin(yaw)
        inside = (np.abs(along) <= length / 2) & (np.abs(across) <= width / 2)
        inside &= (near[:, 2] <= height / 2) & (near[:, 2] >= (_ROAD - 0.5) * height)
        found[k] = int(inside.sum())
    return found


def joined(parts: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Put the counts of scans together.

    Args:
        parts: From `count_poses`, one per scan.

    Returns:
        (K, 1 + P) all rows.
    """
    return np.concatenate([np.zeros((0, 1 + len(POSES)), np.int64), *parts])
