"""Waymo's 3D detection metrics on the CPU: AP and APH at LEVEL_1 and LEVEL_2, per class and range, without TensorFlow.

By the rules of the official program (waymo-open-dataset, `metrics/`: `compute_detection_metrics_main.cc` sets what counts,
`detection_metrics.cc`, `matcher.cc` and `metrics_utils.cc` count). What it does, surprises included:

- 3D overlap of upright boxes *at least* 0.7 for Vehicle, 0.5 for the others, as float32; a side of at most 1 cm overlaps nothing.
- 101 score cutoffs 0, 0.01, .., 1; a detection takes part at a cutoff if its score is not below. For each cutoff, frame and
  class anew, the matching with the largest summed overlap (Hungarian, in steps of a millionth), not the best scored first.
- Range, [0, 30), [30, 50), [50, inf) m, is the distance of the box center from the vehicle's origin, height included. Objects and
  detections are both sorted into ranges before matching: a detection at 30.1 m cannot find an object at 29.9 m.
- An object without LiDAR points does not exist; up to 5 points make it LEVEL_2, unless the labels say which level it has.
- LEVEL_1 and LEVEL_2 share one matching. At LEVEL_1 a LEVEL_2 object that is missed does not count, but one that is *found* is a
  true positive, in precision and in recall. (Often described as neither right nor wrong; the program does not do that.)
- A detection that overlaps a no-label zone is never a false positive; matched to an object it is a true positive.
- APH weighs a true positive by 1 - |yaw error| / pi in precision only; recall is that of AP.
- AP: precision made monotone by the maximum to the right, recall samples at most 0.05 apart filled in, trapezoids between them;
  a recall of 0 has the precision of the sample next to it.

Differences: without an object at or below the level the program reports 0, we None. Equal overlaps are decided by score, then
file order; the program goes by the order of its search. It sums in float32.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Self, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import InvalidInput, require
from ...core.structures import Boxes3D, Labels, Predictions
from ...core.tensor_value import TensorValue, shape_of
from ...datasets.waymo_geometry import MOST_POINTS_LEVEL_2
from .box_pairs import box_pairs
from .waymo_matching import FP, HEADING, TP, TP_LEVEL_1, count_by_cutoff

WAYMO_MIN_OVERLAPS: Mapping[str, float] = {"Vehicle": 0.7, "Pedestrian": 0.5, "Sign": 0.5, "Cyclist": 0.5}  # minimum 3D overlap
# To Waymo's names, those of other datasets where they mean the same.
WAYMO_NAMES: Mapping[str, str] = {name: name for name in WAYMO_MIN_OVERLAPS} | {
    "Car": "Vehicle",
    "car": "Vehicle",
    "pedestrian": "Pedestrian",
}
WAYMO_RANGES: Mapping[str, tuple[float, float]] = {
    "all": (0.0, math.inf),
    "[0, 30)": (0.0, 30.0),
    "[30, 50)": (30.0, 50.0),
    "[50, inf)": (50.0, math.inf),
}
LEVELS = ("LEVEL_1", "LEVEL_2")
SCORE_CUTOFFS = np.array([i * 0.01 for i in range(100)] + [1.0], dtype=np.float32)

_Number = TypeVar("_Number", bound=np.generic)
_SMALLEST_SIDE = 0.01  # m
_RECALL_STEP = 0.05


@dataclass(frozen=True, kw_only=True, repr=False)
class WaymoTruth(TensorValue):
    """The labeled objects of one frame, in Waymo's vehicle frame."""

    boxes: Boxes3D
    """(N, 7) boxes."""
    classes: Tensor
    """(N,) int64 class numbers; a negative one takes no part."""
    levels: Tensor
    """(N,) int64, 1 or 2."""

    def __post_init__(self) -> None:
        for name in ("classes", "levels"):
            column = getattr(self, name)
            require(
                column.shape == (len(self.boxes),), f"WaymoTruth.{name} must be ({len(self.boxes)},), found {shape_of(column)}"
            )
        require(bool(((self.levels == 1) | (self.levels == 2)).all()), "WaymoTruth.levels must be 1 or 2")

    @classmethod
    def from_labels(cls, labels: Labels, *, difficulty_is_level: bool = False) -> Self:
        """The objects with at least one LiDAR point; those with at most five are LEVEL_2.

        Args:
            labels: Labels with point counts.
            difficulty_is_level: Whether `labels.difficulty` holds Waymo's own level, 1 or 2, where the labeler gave one.

        Returns:
            The objects.

        Raises:
            InvalidInput: The number of points of an object is unknown.
        """
        if bool((labels.num_points < 0).any()):
            raise InvalidInput(
                "Waymo's levels follow from the LiDAR points of each object, but some labels do not say how many; prepare the "
                "dataset with point counts"
            )
        by_points = torch.where(labels.num_points <= MOST_POINTS_LEVEL_2, 2, 1)
        given = (labels.difficulty == 1) | (labels.difficulty == 2)
        levels = torch.where(given, labels.difficulty, by_points) if difficulty_is_level else by_points
        seen = labels.num_points > 0
        return cls(boxes=Boxes3D(data=labels.boxes.data[seen]), classes=labels.classes[seen], levels=levels[seen])


@dataclass(frozen=True, kw_only=True)
class WaymoScore:
    """AP and APH of one class, range and level."""

    ap: float | None
    """AP in percent; None without an object."""
    aph: float | None
    """APH in percent; None without an object."""
    ground_truths: int
    """Objects at or below the level."""


@dataclass(frozen=True, kw_only=True)
class WaymoResult:
    """The result of Waymo's protocol."""

    classes: Mapping[str, Mapping[str, Mapping[str, WaymoScore]]]
    """Scores by class, range ("all", "[0, 30)", ..) and level ("LEVEL_1", "LEVEL_2")."""
    frames: int
    """Number of frames."""

    def to_json(self) -> dict[str, dict[str, dict[str, dict[str, float | int | None]]]]:
        """All values as JSON."""
        return {
            name: {r: {level: dict(vars(score)) for level, score in levels.items()} for r, levels in ranges.items()}
            for name, ranges in self.classes.items()
        }


def evaluate_waymo(
    truths: Sequence[WaymoTruth],
    predictions: Sequence[Predictions],
    *,
    classes: tuple[str, ...],
    min_overlaps: Mapping[str, float] = WAYMO_MIN_OVERLAPS,
    ignored: Sequence[Tensor] | None = None,
) -> WaymoResult:
    """Compute AP and APH. Boxes are in Waymo's vehicle frame.

    Args:
        truths: Objects per frame.
        predictions: Detections of the same frames.
        classes: Names of the class numbers of both; boxes with other numbers take no part.
        min_overlaps: Minimum 3D overlap by class.
        ignored: (N,) bool per frame, detections in a no-label zone (`overlaps_zones`).

    Returns:
        Scores per class, range and level.

    Raises:
        InvalidInput: Numbers of frames or detections differ, a class has no minimum overlap, or a box or score is not finite.
    """
    zones = [torch.zeros(len(p), dtype=torch.bool) for p in predictions] if ignored is None else ignored
    if not len(truths) == len(predictions) == len(zones):
        raise InvalidInput(
            f"evaluation needs detections of every frame: {len(truths)} frames of labels, {len(predictions)} of detections, "
            f"{len(zones)} of no-label zones"
        )
    uneven = [i for i, (p, z) in enumerate(zip(predictions, zones)) if z.shape != (len(p),)]
    if uneven:
        raise InvalidInput(
            f"frame number {uneven[0]} has {len(predictions[uneven[0]])} detections, no-label zones for another number"
        )
    missing = [c for c in classes if c not in min_overlaps]
    if missing or not classes:
        raise InvalidInput(
            f"no minimum overlap for {missing or 'no class'}; Waymo's classes are {', '.join(min_overlaps)}; give your own min_overlaps"
        )
    truth = _Boxes.flatten([t.boxes for t in truths], [t.classes for t in truths])
    found = _Boxes.flatten([p.boxes for p in predictions], [p.classes for p in predictions])
    levels = _joined([t.levels for t in truths], np.int64)
    scores = _joined([p.scores for p in predictions], np.float32)
    in_zone = _joined(zones, np.bool_)
    if not bool(np.isfinite(scores).all()):
        raise InvalidInput("some detections have a score that is not a finite number; remove them first")
    best_first = np.lexsort((-scores, found.frame))  # stable: file order decides among equals
    results: dict[str, dict[str, dict[str, WaymoScore]]] = {}
    for number, name in enumerate(classes):
        results[name] = {}
        for label, (nearest, farthest) in WAYMO_RANGES.items():
            t = np.flatnonzero((truth.kind == number) & (truth.distance >= nearest) & (truth.distance < farthest))
            here = (found.kind == number) & (found.distance >= nearest) & (found.distance < farthest)
            d = best_first[here[best_first]]
            counts = _counts(found.at(d), scores[d], in_zone[d], truth.at(t), levels[t], min_overlaps[name])
            results[name][label] = {level: _score(counts, levels[t], k) for k, level in enumerate(LEVELS, start=1)}
    return WaymoResult(classes=results, frames=len(truths))


def average_precision(recall: NDArray[np.float64], precision: NDArray[np.float64]) -> float:
    """Area under the precision curve, by Waymo's rules.

    Args:
        recall: (K,) recall at each cutoff, 0 to 1.
        precision: (K,) precision at each cutoff.

    Returns:
        AP, 0 to 1.
    """
    best = {0.0: 1.0}
    for r, p in zip(recall.tolist(), precision.tolist()):
        best[r] = max(best.get(r, 0.0), p)
    curve: list[tuple[float, float]] = []  # from high recall to low
    highest = 0.0
    for r in sorted(best, reverse=True):
        while curve and curve[-1][0] - r > _RECALL_STEP + 1e-6:
            curve.append((curve[-1][0] - _RECALL_STEP, highest))
        highest = max(highest, best[r])
        curve.append((r, highest))
    if len(curve) == 1:
        return 0.0
    curve[-1] = (0.0, curve[-2][1])
    return sum((a[0] - b[0]) * (a[1] + b[1]) / 2 for a, b in pairwise(curve))


def overlaps_zones(boxes: Tensor, zones: Sequence[Tensor]) -> Tensor:
    """Find the boxes that overlap a no-label zone in BEV.

    Args:
        boxes: (N, 7) boxes.
        zones: Polygons (K, 2) in m.

    Returns:
        (N,) bool.
    """
    b = boxes.double().numpy()
    inside = np.zeros(len(b), dtype=np.bool_)
    cos, sin = np.cos(b[:, 6])[:, None], np.sin(b[:, 6])[:, None]
    for zone in zones:
        offset = zone.double().numpy()[None] - b[:, None, :2]
        x, y = offset[..., 0], offset[..., 1]
        corner = np.stack([x * cos + y * sin, y * cos - x * sin], -1)  # (N, K, 2) in the frame of the box
        step = np.roll(corner, -1, axis=1) - corner
        half = b[:, None, 3:5] / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            enter, leave = (-half - corner) / step, (half - corner) / step
        enter, leave = np.minimum(enter, leave), np.maximum(enter, leave)
        flat, between = step == 0, np.abs(corner) <= half
        enter = np.where(flat, np.where(between, -np.inf, np.inf), enter)
        leave = np.where(flat, np.where(between, np.inf, -np.inf), leave)
        inside |= (np.maximum(enter.max(-1), 0) <= np.minimum(leave.min(-1), 1)).any(1)
        above = corner[..., 1] > 0
        crosses = above != np.roll(above, -1, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            where = corner[..., 0] - corner[..., 1] / step[..., 1] * step[..., 0]
        inside |= (crosses & (where > 0)).sum(1) % 2 == 1
    return torch.from_numpy(inside)


@dataclass(frozen=True, kw_only=True)
class _Boxes:
    """The boxes of all frames. frame, kind: (N,) int64. boxes: (N, 7) float64. distance: (N,) m from the origin."""

    frame: NDArray[np.int64]
    kind: NDArray[np.int64]
    boxes: NDArray[np.float64]
    distance: NDArray[np.float64]

    @staticmethod
    def flatten(frames: Sequence[Boxes3D], classes: Sequence[Tensor]) -> _Boxes:
        boxes = torch.cat([torch.zeros(0, 7).double(), *(f.data.double() for f in frames)]).numpy()
        return _Boxes(
            frame=np.repeat(np.arange(len(frames)), [len(f) for f in frames]).astype(np.int64),
            kind=_joined(classes, np.int64),
            boxes=boxes,
            distance=np.sqrt((boxes[:, :3] ** 2).sum(1)),
        )

    def at(self, index: NDArray[np.int64]) -> _Boxes:
        return _Boxes(frame=self.frame[index], kind=self.kind[index], boxes=self.boxes[index], distance=self.distance[index])


def _joined(parts: Sequence[Tensor], dtype: type[_Number]) -> NDArray[_Number]:
    return np.concatenate([np.zeros(0, dtype), *(p.numpy() for p in parts)]).astype(dtype)


def _counts(
    found: _Boxes,
    scores: NDArray[np.float32],
    in_zone: NDArray[np.bool_],
    truth: _Boxes,
    levels: NDArray[np.int64],
    minimum: float,
) -> NDArray[np.float64]:
    """(101, 4): `count_by_cutoff` of detections that come best first within each frame."""
    pairs = box_pairs(found.boxes, found.frame, truth.boxes, truth.frame).at_least(minimum)
    row = np.repeat(np.arange(len(scores)), np.diff(pairs.start))
    turn = np.abs(found.boxes[row, 6] - truth.boxes[pairs.truth, 6]) % (2 * math.pi)
    tiny = np.minimum(found.boxes[row, 3:6].min(1), truth.boxes[pairs.truth, 3:6].min(1)) <= _SMALLEST_SIDE
    return count_by_cutoff(
        np.searchsorted(SCORE_CUTOFFS, scores, side="right") - 1,
        len(SCORE_CUTOFFS),
        pairs.start,
        pairs.truth,
        np.where(tiny, 0, np.floor(pairs.iou * np.float32(1e6) + 0.5)).astype(np.int64),  # no gain, no match
        1 - np.minimum(turn, 2 * math.pi - turn) / math.pi,
        levels == 1,
        in_zone,
    )


def _score(counts: NDArray[np.float64], levels: NDArray[np.int64], level: int) -> WaymoScore:
    objects = int((levels <= level).sum())
    if objects == 0:
        return WaymoScore(ap=None, aph=None, ground_truths=0)
    right, detections = counts[:, TP], counts[:, TP] + counts[:, FP]
    missed = objects - counts[:, TP_LEVEL_1 if level == 1 else TP]
    recall = right / np.maximum(right + missed, 1)
    plain, weighted = (np.where(recall == 0, 1.0, counts[:, column] / np.maximum(detections, 1)) for column in (TP, HEADING))
    return WaymoScore(
        ap=100 * average_precision(recall, plain), aph=100 * average_precision(recall, weighted), ground_truths=objects
    )
