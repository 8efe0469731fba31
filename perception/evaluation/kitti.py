"""KITTI's average precision on the CPU, by the rules of the benchmark's own program (devkit, `cpp/evaluate_object.cpp`, 2017).

Where the program and its Python descendants (kitti-object-eval-python, OpenPCDet's `eval.py`) differ or surprise, this was chosen:

- Four metrics: overlap of 2D boxes (bbox), on the ground (bev), in space (3d), and bbox weighted by orientation (aos). An overlap
  must be *above* the minimum: 0.7 for Car, 0.5 for Pedestrian and Cyclist, in all metrics. All in double precision.
- bev and 3d overlap are computed in the rectified camera frame: polygons in x-z, height along y.
- An object counts if its 2D box is *taller than* 40/25/25 px, occlusion <= 0/1/2 and truncation <= 0.15/0.30/0.50
  (easy/moderate/hard). Copies of the program from before 2017 also count an object of exactly that height.
- A detection lower than that limit (height cut to whole pixels) is ignored, in all metrics, *whatever its class*: a small
  Pedestrian may take a Car's place, and neither is then right or wrong.
- Other objects of the class, and neighbors (Van for Car, Person_sitting for Pedestrian), may take a detection without reward.
- Detections in DontCare regions (intersection over the *detection's* area above the minimum) are not wrong. That concerns 2D
  only: DontCare has no 3D box, in bev and 3d nothing overlaps it. (A DontCare line of KITTI's *tracking* labels has sizes of
  -1000; the program would draw a square kilometre for it and forgive everything in bev.)
- Class names are compared without regard to case; file order decides ties.
- Pass 1 gives an object its best *scored* detection; the true positives' scores make the (at most 41) thresholds. Pass 2 counts,
  for each threshold, with the best *overlapping* detection. Precision is made monotone by the maximum to the right.
- R40 is the mean of samples 1..40 (the benchmark since 2019-10), R11 of every fourth of the 41 (before).
- aos only if no detection of any class has alpha -10 (the Python versions look at the first one only); else None.
- A class without ground truth has AP 0 in the program. `ClassResult.percent` gives None where nothing counted, and
  `accounts.py` says why. Where a threshold leaves neither a true nor a false positive, precision is 0; the program divides by zero.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...datasets.kitti_text import MAX_OCCLUSION, MAX_TRUNCATION, MIN_HEIGHT, NEIGHBORS, KittiObjects, read_objects
from ...ops.iou3d import iou_3d_aligned, iou_bev_aligned
from .class_translation import did_you_mean
from .kitti_matching import SAMPLES, count_matches, recall_thresholds, true_positive_scores

DIFFICULTIES = ("easy", "moderate", "hard")
METRICS = ("3d", "bev", "bbox")
ALL_METRICS = (*METRICS, "aos")
BOX_METRICS = ("3d", "bev")
"""The metrics that mean something without a camera."""


@dataclass(frozen=True, kw_only=True)
class MinOverlap:
    """The overlap, 0 to 1, above which a detection is correct."""

    bbox: float
    """For 2D boxes in the picture."""
    bev: float
    """For boxes in BEV."""
    box_3d: float
    """For boxes in space."""

    def of(self, metric: str) -> float:
        """Minimum overlap of a metric.

        Args:
            metric: `bbox`, `bev` or `3d`.

        Returns:
            The overlap.
        """
        return {"bbox": self.bbox, "bev": self.bev, "3d": self.box_3d}[metric]


OFFICIAL: Mapping[str, MinOverlap] = {
    "Car": MinOverlap(bbox=0.7, bev=0.7, box_3d=0.7),
    "Pedestrian": MinOverlap(bbox=0.5, bev=0.5, box_3d=0.5),
    "Cyclist": MinOverlap(bbox=0.5, bev=0.5, box_3d=0.5),
}
# The loose set of kitti-object-eval-python and OpenPCDet, printed beside the official one ("Car AP@0.70, 0.50, 0.50").
LOOSE: Mapping[str, MinOverlap] = {
    "Car": MinOverlap(bbox=0.7, bev=0.5, box_3d=0.5),
    "Pedestrian": MinOverlap(bbox=0.5, bev=0.25, box_3d=0.25),
    "Cyclist": MinOverlap(bbox=0.5, bev=0.25, box_3d=0.25),
}


@dataclass(frozen=True, kw_only=True)
class PrecisionSamples:
    """Monotone precision (or orientation similarity) at the 41 recall positions."""

    samples: Tensor
    """(3, 41) in 0 to 1, rows easy, moderate, hard."""

    @property
    def r40(self) -> tuple[float, float, float]:
        """AP in percent, easy, moderate, hard, over the recall positions 1/40 .. 40/40."""
        easy, moderate, hard = (self.samples[:, 1:].mean(1) * 100).tolist()
        return easy, moderate, hard

    @property
    def r11(self) -> tuple[float, float, float]:
        """AP in percent over the eleven recall positions 0, 0.1 .. 1."""
        easy, moderate, hard = (self.samples[:, ::4].mean(1) * 100).tolist()
        return easy, moderate, hard


@dataclass(frozen=True, kw_only=True)
class ClassResult:
    """The metrics of one class."""

    box_3d: PrecisionSamples
    """Overlap in space."""
    bev: PrecisionSamples
    """Overlap in BEV."""
    bbox: PrecisionSamples
    """Overlap of 2D boxes."""
    aos: PrecisionSamples | None
    """2D boxes weighted by orientation; None without orientation."""
    ground_truths: tuple[int, int, int]
    """How many objects counted: easy, moderate, hard."""
    labels: int
    """Objects of the class in the label files, those that are ignored included."""
    labels_without_2d_box: int
    """Objects of the class whose 2D box has no height, so that no difficulty counts them."""
    detections: int
    """Detections of the class."""
    detections_without_2d_box: int
    """Detections of the class whose 2D box has no height, so that the rules ignore them."""

    def countable(self, difficulty: int) -> bool:
        """Whether AP says anything: some object counts, and not every detection is ignored for lack of a 2D box.

        Args:
            difficulty: 0 easy, 1 moderate, 2 hard.

        Returns:
            False where AP is not a measurement.
        """
        ignored = self.detections and self.detections_without_2d_box == self.detections
        return self.ground_truths[difficulty] > 0 and not ignored

    def percent(self, values: tuple[float, float, float]) -> tuple[float | None, float | None, float | None]:
        """Leave out the values where nothing counted.

        Args:
            values: AP of easy, moderate and hard, such as `box_3d.r40`.

        Returns:
            The same values, None where `countable` is False.
        """
        easy, moderate, hard = (value if self.countable(d) else None for d, value in enumerate(values))
        return easy, moderate, hard

    def to_json(self) -> dict[str, Any]:
        """AP by metric, recall positions and difficulty, None where nothing counted."""

        def metric(samples: PrecisionSamples | None) -> dict[str, dict[str, float | None]] | None:
            if samples is None:
                return None
            tables = {"R40": self.percent(samples.r40), "R11": self.percent(samples.r11)}
            return {name: dict(zip(DIFFICULTIES, values)) for name, values in tables.items()}

        return {"3d": metric(self.box_3d), "bev": metric(self.bev), "bbox": metric(self.bbox), "aos": metric(self.aos)}


@dataclass(frozen=True, kw_only=True)
class KittiResult:
    """The result of KITTI's protocol."""

    classes: Mapping[str, ClassResult]
    """Metrics by class name, in the order that was asked for."""
    frames: int
    """Number of frames."""
    min_overlaps: Mapping[str, MinOverlap]
    """The minimum overlaps that were used, by class."""
    metrics: tuple[str, ...] = ALL_METRICS
    """The metrics that mean something; `BOX_METRICS` where no camera gave 2D boxes."""

    def to_json(self) -> dict[str, dict[str, Any]]:
        """Give AP in percent by class, metric, recall positions and difficulty.

        Returns:
            {class: {"3d" | "bev" | "bbox" | "aos": {"R40" | "R11": {"easy" | "moderate" | "hard": percent}}}}; only `metrics` are there,
            "aos" may be None, and a percent is None where no object counts.
        """
        return {name: {m: v for m, v in c.to_json().items() if m in self.metrics} for name, c in self.classes.items()}


def evaluate_kitti(
    ground_truths: Sequence[KittiObjects],
    detections: Sequence[KittiObjects],
    *,
    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist"),
    min_overlaps: Mapping[str, MinOverlap] = OFFICIAL,
) -> KittiResult:
    """Compute KITTI's AP.

    Args:
        ground_truths: Content of each frame's label file, DontCare lines included.
        detections: Detections of the same frames.
        classes: Classes to score.
        min_overlaps: Minimum overlap by class: `OFFICIAL`, `LOOSE` or your own.

    Returns:
        The metrics per class.

    Raises:
        InvalidInput: The numbers of frames differ, detections have no scores, or a class has no minimum overlap.

    Example:
        result = evaluate_kitti(labels, detections, classes=("Car",))
        print(result.classes["Car"].box_3d.r40)  # easy, moderate, hard in percent
    """
    if len(ground_truths) != len(detections):
        raise InvalidInput(
            f"evaluation needs detections of every frame: {len(ground_truths)} frames of labels, {len(detections)} of detections"
        )
    for i, frame in enumerate(detections):
        if len(frame) and frame.scores is None:
            raise InvalidInput(f"the detections of frame number {i} have no scores: expected 16 columns, found a label file's 15")
    overlaps = overlaps_of(classes, min_overlaps)
    gts, dets = _flatten(ground_truths), _flatten(detections)
    with_orientation = not bool((dets.alpha == -10).any())
    results = {c: _evaluate_class(gts, dets, len(detections), c, overlaps[c], with_orientation) for c in classes}
    return KittiResult(classes=results, frames=len(detections), min_overlaps=overlaps)


def extended_overlaps(base: Mapping[str, MinOverlap], given: Mapping[str, float]) -> dict[str, MinOverlap]:
    """Add minimum overlaps of one's own to a set.

    Args:
        base: `OFFICIAL` or `LOOSE`.
        given: Minimum overlap of all metrics by class. A class of `base`, in any case, gets the new value.

    Returns:
        The set with the given values.
    """
    spelled = {name.casefold(): name for name in base}
    own = {spelled.get(name.casefold(), name): MinOverlap(bbox=v, bev=v, box_3d=v) for name, v in given.items()}
    return {**base, **own}


def overlaps_of(classes: Sequence[str], min_overlaps: Mapping[str, MinOverlap]) -> dict[str, MinOverlap]:
    """Find the minimum overlap of every class; case does not matter.

    Args:
        classes: Classes to score.
        min_overlaps: Minimum overlaps by class.

    Returns:
        The minimum overlap of each class, in the order of `classes`.

    Raises:
        InvalidInput: No class is given, one is given twice, or classes have no minimum overlap; the message names all of them.
    """
    known = {name.casefold(): overlap for name, overlap in min_overlaps.items()}
    missing = [c for c in classes if c.casefold() not in known]
    if missing:
        raise InvalidInput(
            f"there is no minimum overlap for {', '.join(map(shown, missing))}{did_you_mean(missing[0], min_overlaps)}; KITTI's rules have "
            f"one for {', '.join(min_overlaps)}. Give your own, such as --overlap {shown(missing[0])} 0.7 (in Python: min_overlaps)"
        )
    if not classes or len({c.casefold() for c in classes}) < len(classes):
        raise InvalidInput(
            f"name at least one class to score, and each only once; found {' '.join(map(shown, classes)) or 'none'}"
        )
    return {c: known[c.casefold()] for c in classes}


def evaluate_kitti_folders(
    labels_dir: Path | str,
    detections_dir: Path | str,
    ids: Sequence[str],
    *,
    classes: tuple[str, ...] = ("Car", "Pedestrian", "Cyclist"),
    min_overlaps: Mapping[str, MinOverlap] = OFFICIAL,
) -> KittiResult:
    """Compute KITTI's AP of the files `ID.txt` of two folders. An empty file means no detections.

    Args:
        labels_dir: Folder of label files.
        detections_dir: Folder of detection files.
        ids: Frame ids.
        classes: Classes to score.
        min_overlaps: Minimum overlap by class.

    Returns:
        The metrics per class.

    Raises:
        InvalidInput: A file is missing (the message names the frame) or broken (the message names file and line).

    Example:
        result = evaluate_kitti_folders("KITTI/training/label_2", "boxes", ["000008"], classes=("Car",))
    """
    truths, found = read_kitti_folders(labels_dir, detections_dir, ids)
    return evaluate_kitti(truths, found, classes=classes, min_overlaps=min_overlaps)


def read_kitti_folders(
    labels_dir: Path | str, detections_dir: Path | str, ids: Sequence[str]
) -> tuple[list[KittiObjects], list[KittiObjects]]:
    """Read the files `ID.txt` of two folders.

    Args:
        labels_dir: Folder of label files.
        detections_dir: Folder of detection files; an empty file means no detections.
        ids: Frame ids.

    Returns:
        Labels and detections per frame.

    Raises:
        InvalidInput: A file is missing (the message names the frame) or broken (the message names file and line).
    """
    loaded: list[list[KittiObjects]] = []
    for what, folder, hint in (
        ("labels", Path(labels_dir), "check the folder and the ids"),
        ("detections", Path(detections_dir), "write an empty file if nothing was found"),
    ):
        absent = [i for i in ids if not (folder / f"{i}.txt").is_file()]
        if absent:
            raise InvalidInput(
                f"frame {absent[0]}: no {what} {folder / absent[0]}.txt ({len(absent)} of {len(ids)} missing); {hint}"
            )
        loaded.append([read_objects(folder / f"{i}.txt") for i in ids])
    for i, frame in zip(ids, loaded[1]):
        if len(frame) and frame.scores is None:
            raise InvalidInput(f"frame {i}: {Path(detections_dir) / i}.txt has no scores: expected 16 columns, found 15")
    return loaded[0], loaded[1]


@dataclass(frozen=True, kw_only=True)
class _Objects:
    """The objects of all frames, in order. boxes: (N, 7) with camera x, z, -y in the roles of x, y, z, so that overlap needs no new code."""

    frame: NDArray[np.int64]
    types: NDArray[np.str_]
    truncated: NDArray[np.float64]
    occluded: NDArray[np.int64]
    alpha: NDArray[np.float64]
    bbox: NDArray[np.float64]
    height: NDArray[np.float64]
    boxes: NDArray[np.float64]
    scores: NDArray[np.float64]

    def select(self, mask: NDArray[np.bool_]) -> _Objects:
        return _Objects(**{name: value[mask] for name, value in vars(self).items()})

    def starts(self, frames: int) -> NDArray[np.int64]:
        """(frames + 1,): where each frame begins, and the end."""
        return np.concatenate([[0], np.cumsum(np.bincount(self.frame, minlength=frames))]).astype(np.int64)


def _flatten(frames: Sequence[KittiObjects]) -> _Objects:
    def joined(name: str, width: int | None = None) -> NDArray[np.float64]:
        empty = torch.zeros(0, dtype=torch.float64) if width is None else torch.zeros(0, width, dtype=torch.float64)
        return torch.cat([empty, *(getattr(f, name).double() for f in frames)]).numpy()

    location, dimensions, bbox = joined("location", 3), joined("dimensions", 3), joined("bbox", 4)
    h, w, length = dimensions.T
    x, y, z = location.T
    unscored = torch.zeros(0, dtype=torch.float64)
    return _Objects(
        frame=np.repeat(np.arange(len(frames)), [len(f) for f in frames]).astype(np.int64),
        types=np.array([t.lower() for f in frames for t in f.types], dtype=np.str_),
        truncated=joined("truncated"),
        occluded=joined("occluded").astype(np.int64),
        alpha=joined("alpha"),
        bbox=bbox,
        height=bbox[:, 3] - bbox[:, 1],
        boxes=np.stack([x, z, h / 2 - y, length, w, h, -joined("rotation_y")], axis=1),
        scores=torch.cat(
            [unscored, *(torch.zeros(len(f)).double() if f.scores is None else f.scores.double() for f in frames)]
        ).numpy(),
    )


def _evaluate_class(
    gts: _Objects, dets: _Objects, frames: int, name: str, minimum: MinOverlap, with_orientation: bool
) -> ClassResult:
    neighbors = [n.lower() for known, others in NEIGHBORS.items() if known.lower() == name.lower() for n in others]
    own_gt = gts.types == name.lower()
    dont_care = gts.select(gts.types == "dontcare")
    gt = gts.select(own_gt | np.isin(gts.types, neighbors))
    det_height = np.minimum(np.abs(dets.height), 1e9).astype(np.int64)  # cut to whole pixels, as the program does
    own_det = dets.types == name.lower()
    taking_part = own_det | (det_height < max(MIN_HEIGHT))
    det, det_height = dets.select(taking_part), det_height[taking_part]

    gt_start, det_start = gt.starts(frames), det.starts(frames)
    i, j, pair_start = _pairs(gt_start, det_start)
    overlaps = {"bbox": _bbox_overlap(gt.bbox[i], det.bbox[j], over_second=False), **_box_overlaps(gt.boxes[i], det.boxes[j])}
    nowhere = np.zeros(len(det.scores), dtype=np.bool_)
    in_dont_care = {"bbox": _in_dont_care(dont_care, det, frames, minimum.bbox), "bev": nowhere, "3d": nowhere}

    samples = {metric: np.zeros((3, SAMPLES)) for metric in (*METRICS, "aos")}
    counted = []
    for d in range(3):
        hard = (gt.occluded > MAX_OCCLUSION[d]) | (gt.truncated > MAX_TRUNCATION[d]) | (gt.height <= MIN_HEIGHT[d])
        gt_ignored = ((gt.types != name.lower()) | hard).astype(np.int64)
        det_ignored = np.where(det_height < MIN_HEIGHT[d], 1, np.where(det.types == name.lower(), 0, -1))
        counted.append(int((gt_ignored == 0).sum()))
        for metric in METRICS:
            layout = (gt_start, det_start, pair_start, overlaps[metric], minimum.of(metric), det.scores, gt_ignored, det_ignored)
            thresholds = recall_thresholds(true_positive_scores(*layout), counted[d])
            counts = count_matches(*layout, in_dont_care[metric], gt.alpha, det.alpha, thresholds)
            total = np.maximum(counts[:, 0] + counts[:, 1], 1)
            samples[metric][d, : len(thresholds)] = counts[:, 0] / total
            if metric == "bbox":
                samples["aos"][d, : len(thresholds)] = counts[:, 2] / total
    curves = {
        k: PrecisionSamples(samples=torch.from_numpy(np.maximum.accumulate(v[:, ::-1], 1)[:, ::-1].copy()))
        for k, v in samples.items()
    }
    return ClassResult(
        box_3d=curves["3d"],
        bev=curves["bev"],
        bbox=curves["bbox"],
        aos=curves["aos"] if with_orientation else None,
        ground_truths=(counted[0], counted[1], counted[2]),
        labels=int(own_gt.sum()),
        labels_without_2d_box=int((gts.height[own_gt] <= 0).sum()),
        detections=int(own_det.sum()),
        detections_without_2d_box=int((dets.height[own_det] == 0).sum()),
    )


def _pairs(
    a_start: NDArray[np.int64], b_start: NDArray[np.int64]
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.int64]]:
    """All (a, b) of the same frame: their indices (P,), frame by frame, row by row, and where each frame's pairs begin (frames + 1,)."""
    width = np.diff(b_start)
    sizes = np.diff(a_start) * width
    start = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    frame = np.repeat(np.arange(len(sizes)), sizes)
    within = np.arange(start[-1]) - start[frame]
    return a_start[frame] + within // width[frame], b_start[frame] + within % width[frame], start


def _bbox_overlap(a: NDArray[np.float64], b: NDArray[np.float64], *, over_second: bool) -> NDArray[np.float64]:
    """(P,): common area of 2D boxes a and b (P, 4) over their union, or over the area of b."""
    w = np.minimum(a[:, 2], b[:, 2]) - np.maximum(a[:, 0], b[:, 0])
    h = np.minimum(a[:, 3], b[:, 3]) - np.maximum(a[:, 1], b[:, 1])
    common = np.where((w > 0) & (h > 0), w * h, 0.0)
    area_a, area_b = ((r[:, 2] - r[:, 0]) * (r[:, 3] - r[:, 1]) for r in (a, b))
    whole = area_b if over_second else area_a + area_b - common
    return np.divide(common, whole, out=np.zeros_like(common), where=common > 0)


def _box_overlaps(a: NDArray[np.float64], b: NDArray[np.float64]) -> dict[str, NDArray[np.float64]]:
    """IoU on the ground and in space of boxes a and b (P, 7); only pairs near each other are computed."""
    radius = (np.hypot(a[:, 3], a[:, 4]) + np.hypot(b[:, 3], b[:, 4])) / 2
    near = np.flatnonzero(np.hypot(a[:, 0] - b[:, 0], a[:, 1] - b[:, 1]) < radius)
    near_a, near_b = torch.from_numpy(a[near]), torch.from_numpy(b[near])
    bev, box_3d = np.zeros(len(a)), np.zeros(len(a))
    bev[near] = iou_bev_aligned(near_a, near_b).numpy()
    box_3d[near] = iou_3d_aligned(near_a, near_b).numpy()
    return {"bev": bev, "3d": box_3d}


def _in_dont_care(dont_care: _Objects, det: _Objects, frames: int, minimum: float) -> NDArray[np.bool_]:
    """(N,): detections covered by a DontCare region by more than `minimum` of their own area."""
    i, j, _ = _pairs(dont_care.starts(frames), det.starts(frames))
    inside = np.zeros(len(det.scores), dtype=np.bool_)
    inside[j[_bbox_overlap(dont_care.bbox[i], det.bbox[j], over_second=True) > minimum]] = True
    return inside
