"""How near a rebuilt scan comes to the true one: distances, F-scores, occupancy, and what share of the leak a defence leaves.

    F-score at t: precision is the share of the rebuilt points of a region that have a true point within t meters, recall the share of
    the true points of the region that have a rebuilt point within t. F is their harmonic mean. The nearest point may lie on the other
    side of the region's border.

A frame counts for a region where the truth has a point in it; where the attack rebuilt none there, F is 0. Points that an attack
invents in an empty region cost precision in the whole scene. Chamfer and Hausdorff distance count the frames where both scans
have a point, occupancy IoU those where one of them has. Every mean says how many frames it counts.

More points buy recall, so a rebuilt scan is scored at two operating points. "best" keeps the points above a threshold that was chosen
on a development set (`choose_best`). "matched" keeps the surest points, as many as the truth has occupied voxels. The leak share is
computed at "matched".

Read next: `true_scan.py` for the regions, `leak_share.py`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from ...core.errors import require
from .frames import Rebuilt
from .mean_score import MeanScore
from .true_scan import Mask, Points, TrueScan, finite_points, occupied_cells

F_DISTANCES = (0.1, 0.2, 0.5)
"""Meters within which a point counts as found."""


@dataclass(frozen=True, kw_only=True)
class OperatingPoint:
    """Which points of a rebuilt scan are scored."""

    threshold: float | None = None
    """Points with at least this score are kept. None ("matched"): the surest points, as many as the truth has occupied voxels; of points
    with equal scores those that come first."""

    @property
    def name(self) -> str:
        """The word for it in tables: "matched" or "best"."""
        return "matched" if self.threshold is None else "best"

    def select(self, rebuilt: Rebuilt, truth: TrueScan) -> Points:
        """Select the points to score.

        Args:
            rebuilt: A rebuilt scan.
            truth: The true scan.

        Returns:
            (N, 3) x, y, z in meters.

        Raises:
            InvalidInput: A point or a score is not a number.
        """
        points, score = finite_points(rebuilt.xyz, "the rebuilt scan"), _scores(rebuilt)
        if self.threshold is not None:
            return points[score >= self.threshold]
        return points[np.argsort(-score, kind="stable")[: len(truth.cells)]]


MATCHED = OperatingPoint()
"""The operating point that needs no development set."""


@dataclass(frozen=True, kw_only=True)
class FScores:
    """F-scores of one region, each between 0 and 1."""

    f_10cm: MeanScore = MeanScore()
    """F-score at 0.1 m."""
    f_20cm: MeanScore = MeanScore()
    """F-score at 0.2 m."""
    f_50cm: MeanScore = MeanScore()
    """F-score at 0.5 m."""
    precision_20cm: MeanScore = MeanScore()
    """Share of the rebuilt points that have a true point within 0.2 m; 0 where nothing was rebuilt."""
    recall_20cm: MeanScore = MeanScore()
    """Share of the true points that have a rebuilt point within 0.2 m."""

    def __add__(self, other: FScores) -> FScores:
        return FScores(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(FScores)})


@dataclass(frozen=True, kw_only=True)
class ClassFScores:
    """F-scores inside the objects of one class."""

    name: str
    """Name of the class."""
    scores: FScores
    """The scores over the frames that hold a point of such an object."""


@dataclass(frozen=True, kw_only=True)
class GeometryScores:
    """How near rebuilt scans come to the true ones, as means over frames. Two of them add up."""

    chamfer: MeanScore = MeanScore()
    """Meters: the mean of two means, of the distances from rebuilt points to the truth and of those from true points to the rebuilt."""
    hausdorff: MeanScore = MeanScore()
    """Meters: the largest distance from a point of one scan to the other scan."""
    scene: FScores = FScores()
    """All points."""
    background: FScores = FScores()
    """Points outside the labeled boxes. Frames without labels do not count."""
    background_above_road: FScores = FScores()
    """Background over the road, by `RegionRules.above_road`. Frames without labels do not count."""
    voxels: FScores = FScores()
    """All points, with the centers of the truth's occupied voxels as the truth, so that near ground counts less."""
    objects: tuple[ClassFScores, ...] = ()
    """Points in the enlarged boxes of each class."""
    iou: MeanScore = MeanScore()
    """Voxels of the input grid that both scans occupy, divided by those that one of them occupies."""
    points_per_voxel: MeanScore = MeanScore()
    """Rebuilt points that are scored, divided by the truth's occupied voxels."""

    def __add__(self, other: GeometryScores) -> GeometryScores:
        sums = {f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(GeometryScores) if f.name != "objects"}
        both = {a.name: a for a in other.objects}
        objects = [
            ClassFScores(name=a.name, scores=a.scores + b.scores) if (b := both.pop(a.name, None)) else a for a in self.objects
        ]
        return GeometryScores(**sums, objects=(*objects, *both.values()))


def score_rebuilt(rebuilt: Rebuilt, truth: TrueScan, point: OperatingPoint = MATCHED) -> GeometryScores:
    """Compare one rebuilt scan with the truth.

    Args:
        rebuilt: What an attack made of the upload.
        truth: The scan that the upload was made from.
        point: Which of the rebuilt points are scored.

    Returns:
        The scores, as means over this frame.

    Raises:
        InvalidInput: A point or a score is not a number.
    """
    points = point.select(rebuilt, truth)
    tree, here, there = cKDTree(points), truth.regions_of(points), truth.regions
    to_truth, to_rebuilt = _nearest(points, truth.tree), _nearest(truth.points, tree)
    both = len(points) > 0 and len(truth.points) > 0
    every = np.ones(len(points), bool), np.ones(len(truth.points), bool)
    objects = tuple(
        ClassFScores(name=name, scores=_f_scores(to_truth, to_rebuilt, here.objects[i], there.objects[i]))
        for i, name in enumerate(truth.rules.classes)
    )
    return GeometryScores(
        chamfer=MeanScore.of((to_truth.mean() + to_rebuilt.mean()) / 2 if both else None),
        hausdorff=MeanScore.of(max(to_truth.max(), to_rebuilt.max()) if both else None),
        scene=_f_scores(to_truth, to_rebuilt, *every),
        background=_f_scores(to_truth, to_rebuilt, here.background, there.background),
        background_above_road=_f_scores(to_truth, to_rebuilt, here.above_road, there.above_road),
        voxels=_f_scores(
            _nearest(points, truth.voxel_tree), _nearest(truth.voxels, tree), every[0], np.ones(len(truth.voxels), bool)
        ),
        objects=objects,
        iou=MeanScore.of(_iou(occupied_cells(points, truth.grid), truth.cells)),
        points_per_voxel=MeanScore.of(len(points) / len(truth.cells) if len(truth.cells) else None),
    )


def score_all(pairs: Iterable[tuple[Rebuilt, TrueScan]], point: OperatingPoint = MATCHED) -> GeometryScores:
    """Compare rebuilt scans with the truth.

    Args:
        pairs: Each rebuilt scan with the truth.
        point: Which of the rebuilt points are scored.

    Returns:
        The means over the frames.
    """
    total = GeometryScores()
    for rebuilt, truth in pairs:
        total = total + score_rebuilt(rebuilt, truth, point)
    return total


def choose_best(development: Sequence[tuple[Rebuilt, TrueScan]], *, candidates: int = 40) -> OperatingPoint:
    """Choose the threshold with the largest mean F-score at 0.2 m over a development set.

    Args:
        development: Rebuilt scans of frames that are not scored afterwards, each with the truth.
        candidates: Number of thresholds that are tried: quantiles of all scores, the lowest score among them.

    Returns:
        The operating point "best". Of equal ones the highest threshold, which keeps the fewest points.

    Raises:
        InvalidInput: There is no frame or no candidate, or a point or a score is not a number.
    """
    require(len(development) > 0 and candidates > 0, "a threshold needs at least one development frame and one candidate")
    scores = np.concatenate([_scores(rebuilt) for rebuilt, _ in development])
    if not len(scores):
        return OperatingPoint(threshold=0.0)
    quantiles = np.linspace(1, 0, candidates + 1)[1:]
    thresholds = np.unique(np.quantile(scores, quantiles, method="lower"))[::-1]
    totals = np.zeros(len(thresholds))
    for rebuilt, truth in development:
        if len(truth.points):
            totals += _f_by_threshold(rebuilt, truth, thresholds)
    return OperatingPoint(threshold=float(thresholds[int(totals.argmax())]))


def _scores(rebuilt: Rebuilt) -> NDArray[np.float64]:
    score = rebuilt.score.detach().cpu().double().numpy()
    require(not bool(np.isnan(score).any()), "the rebuilt scan has scores that are NaN, so its points have no order")
    return score


def _nearest(points: Points, tree: cKDTree) -> NDArray[np.float64]:
    """(N,) meters to the nearest point of the tree; infinite where the tree is empty."""
    if not len(points) or not tree.n:
        return np.full(len(points), np.inf)
    return tree.query(points)[0]


def _f_scores(to_truth: NDArray[np.float64], to_rebuilt: NDArray[np.float64], here: Mask | None, there: Mask | None) -> FScores:
    """Scores of one region: distances of all rebuilt and of all true points, and which of them lie in the region."""
    if here is None or there is None or not there.any():
        return FScores()
    rebuilt, true = to_truth[here], to_rebuilt[there]
    precision = [float((rebuilt <= t).mean()) if len(rebuilt) else 0.0 for t in F_DISTANCES]
    recall = [float((true <= t).mean()) for t in F_DISTANCES]
    f = [MeanScore.of(harmonic_mean(p, r) if len(rebuilt) else 0.0) for p, r in zip(precision, recall)]
    return FScores(
        f_10cm=f[0], f_20cm=f[1], f_50cm=f[2], precision_20cm=MeanScore.of(precision[1]), recall_20cm=MeanScore.of(recall[1])
    )


def harmonic_mean(precision: float, recall: float) -> float:
    """Give the F-score.

    Args:
        precision: Between 0 and 1.
        recall: Between 0 and 1.

    Returns:
        The harmonic mean, 0 where both are 0.
    """
    return 2 * precision * recall / (precision + recall) if precision + recall > 0 else 0.0


def _iou(rebuilt: NDArray[np.int64], true: NDArray[np.int64]) -> float | None:
    union = len(np.unique(np.concatenate([rebuilt, true]), axis=0))
    return (len(rebuilt) + len(true) - union) / union if union else None


def _f_by_threshold(rebuilt: Rebuilt, truth: TrueScan, thresholds: NDArray[np.float64]) -> NDArray[np.float64]:
    """F at 0.2 m of one frame for falling thresholds. Each rebuilt point is indexed once, and a true point is looked up until it is found."""
    points, score = finite_points(rebuilt.xyz, "the rebuilt scan"), _scores(rebuilt)
    right = _nearest(points, truth.tree) <= F_DISTANCES[1]
    missing, kept, correct = truth.points, 0, 0
    found, above = [], np.inf
    for threshold in thresholds:
        new = (score >= threshold) & ((score < above) | (above == np.inf))
        if new.any():
            missing = missing[_nearest(missing, cKDTree(points[new])) > F_DISTANCES[1]]
        kept, correct, above = kept + int(new.sum()), correct + int(right[new].sum()), threshold
        found.append(harmonic_mean(correct / kept if kept else 0.0, 1 - len(missing) / len(truth.points)))
    return np.array(found)
