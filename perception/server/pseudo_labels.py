"""From a teacher's detections to labels for the student, and how good those labels are.

UpCycling's *hybrid* pseudo labels, in our reading (design.md section 5): each kind of label goes where its quality allows.
Teacher boxes supervise dense classification and direction, and box regression as far as ``box_weight`` says; they are marked inexact
and the scene incomplete, so that the head that predicts overlap does not take them for the truth. Objects pasted by feature-level GT sampling are exact and supervise
every head. Detections too weak to be labels but too strong to be background are ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.cut import VoxelGrid
from ...core.structures import Labels, Predictions
from ...ops.iou3d import iou_3d
from .upcycle_config import ScoreThresholds


def apply_thresholds(predictions: Predictions, thresholds: Sequence[ScoreThresholds]) -> tuple[Tensor, Tensor]:
    """Which detections (N,) are good enough for a label, and which are labels or at least ignored. One threshold per class."""
    table = predictions.scores.new_tensor([[t.iou_score, t.class_score, t.ignore] for t in thresholds])
    iou_score, class_score, ignore = table[predictions.classes].unbind(1)
    good = (predictions.iou_scores >= iou_score) & (predictions.class_scores >= class_score)
    return good, good | (predictions.iou_scores >= ignore)


def teacher_labels(
    predictions: Predictions, thresholds: Sequence[ScoreThresholds], *, trusted: bool, box_weight: float = 1.0
) -> Labels:
    """Labels of one unlabelled scene from its teacher's detections; ``thresholds`` holds one entry per class.

    trusted=False gives hybrid labels (inexact, incomplete, with ``box_weight`` for box regression); True treats the teacher's boxes
    as the truth for every head (plain pseudo labels, the baseline). Zero labels are legal.
    """
    good, keep = apply_thresholds(predictions, thresholds)
    return Labels.make(
        predictions.boxes.data[keep],
        predictions.classes[keep],
        weight=good[keep].float(),
        exact=trusted,
        box_weight=torch.full_like(predictions.scores[keep], 1.0 if trusted else box_weight),
        complete=trusted,
    )


def labels_in_range(labels: Labels, grid: VoxelGrid) -> Labels:
    """The labels whose centre the detector can see: inside the grid's range, seen from above."""
    x0, y0, _, x1, y1, _ = grid.range
    x, y = labels.boxes.data[:, 0], labels.boxes.data[:, 1]
    return labels.select((x >= x0) & (x < x1) & (y >= y0) & (y < y1))


@dataclass(frozen=True, kw_only=True)
class PseudoLabelQuality:
    """How a round of pseudo labels compares with the truth. For measurement only: nothing of it reaches training.

    labels: number used. ignored: number in the ignore band. truth: number of true objects (with at least 5 points).
    precision_50, precision_70: share of labels that overlap a true object of their class by IoU 0.5, 0.7 (3D).
    recall_50, recall_70: share of true objects found so. mean_iou: of labels with their best true object.
    """

    labels: int
    ignored: int
    truth: int
    precision_50: float
    precision_70: float
    recall_50: float
    recall_70: float
    mean_iou: float


def pseudo_label_quality(pseudo: Sequence[Labels], truth: Sequence[Labels], *, min_points: int = 5) -> PseudoLabelQuality:
    """Compare scene by scene; a label that meets only an ignored object (weight 0, or fewer points) counts neither way."""
    best_label: list[torch.Tensor] = []
    best_truth: list[torch.Tensor] = []
    ignored = 0
    for found, real in zip(pseudo, truth, strict=True):
        used = found.select(found.weight > 0)
        ignored += len(found) - len(used)
        counted = (real.weight > 0) & (real.num_points >= min_points)
        overlap = iou_3d(used.boxes.data, real.boxes.data) * (used.classes[:, None] == real.classes[None])
        if len(used):
            with_zero = torch.cat([overlap, overlap.new_zeros(len(used), 1)], 1)
            value, row = with_zero.max(1)
            neutral = torch.cat([~counted, counted.new_zeros(1)])[row] & (value >= 0.5)
            best_label.append(value[~neutral].cpu())
        if counted.any():
            column = torch.cat([overlap, overlap.new_zeros(1, len(real))]).amax(0)
            best_truth.append(column[counted].cpu())
    label_iou, truth_iou = torch.cat([*best_label, torch.zeros(0)]), torch.cat([*best_truth, torch.zeros(0)])

    def share(values: torch.Tensor, threshold: float) -> float:
        return float((values >= threshold).float().mean()) if values.numel() else 0.0

    return PseudoLabelQuality(
        labels=label_iou.numel(),
        ignored=ignored,
        truth=truth_iou.numel(),
        precision_50=share(label_iou, 0.5),
        precision_70=share(label_iou, 0.7),
        recall_50=share(truth_iou, 0.5),
        recall_70=share(truth_iou, 0.7),
        mean_iou=float(label_iou.mean()) if label_iou.numel() else 0.0,
    )
