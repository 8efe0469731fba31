"""The rule that turns a teacher's detections into pseudo labels. To try a rule of your own, write a `LabelRule` like those below.

UpCycling's *hybrid* pseudo labels, in our reading (the body of the paper was not available to us, only its abstract): each kind of
label trains only the heads that it is good enough for. Teacher boxes supervise dense classification and direction, and box regression as far as
`UpcycleConfig.teacher_box_weight` says. They are marked inexact and the scene incomplete, so that the head that predicts the IoU
does not take them for the truth. Objects pasted by F-GT are exact and supervise every head. Detections that are too weak for a label
but too strong for background are ignored. 3DIoUMatch (Wang et al., CVPR 2021) routes its losses in the same way: its unlabeled
scenes train the classification and the boxes, but not the head that scores regions nor the one that segments points.

The rule of a method is `Method.label_rule`, so a new one needs no change here:

    def cars_only(predictions: Predictions, config: UpcycleConfig) -> Labels:
        return hybrid_labels(predictions.select(predictions.classes == 0), config)

    method = replace(METHODS["upcycling"], label_rule=cars_only)

Read next: `unlabeled_half.py`, which calls the rule; `pseudo_label_monitor.py`, which logs how good the labels are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ...core.cut import VoxelGrid
from ...core.structures import Labels, Predictions
from .upcycle_config import ScoreThresholds, UpcycleConfig

LabelRule = Callable[[Predictions, UpcycleConfig], Labels]
"""Makes the pseudo labels of one unlabeled scene from what the teacher detects in it. It may return no label at all."""


def hybrid_labels(predictions: Predictions, config: UpcycleConfig) -> Labels:
    """Make hybrid pseudo labels, which supervise only the losses that they are good enough for.

    Args:
        predictions: The teacher's detections in one scene.
        config: `thresholds` and `teacher_box_weight` are used.

    Returns:
        Inexact labels of an incomplete scene. `box_weight` is `teacher_box_weight`; `weight` is 1 for a label, 0 for an ignored box.
    """
    return _labels(predictions, config.thresholds, exact=False, box_weight=config.teacher_box_weight)


def trusted_labels(predictions: Predictions, config: UpcycleConfig) -> Labels:
    """Make plain pseudo labels, which every loss takes for the truth: the baseline of hybrid labels.

    Args:
        predictions: The teacher's detections in one scene.
        config: `thresholds` is used.

    Returns:
        Exact labels of a complete scene; `weight` is 1 for a label, 0 for an ignored box.
    """
    return _labels(predictions, config.thresholds, exact=True, box_weight=1.0)


def apply_thresholds(predictions: Predictions, thresholds: Sequence[ScoreThresholds]) -> tuple[Tensor, Tensor]:
    """Compare detections with the thresholds of their classes.

    Args:
        predictions: N detections.
        thresholds: One entry per class.

    Returns:
        Two masks (N,) bool: detections that become labels, and detections to keep, which are the labels and the ignored boxes.
    """
    table = predictions.scores.new_tensor([[t.iou_score, t.class_score, t.ignore] for t in thresholds])
    iou_score, class_score, ignore = table[predictions.classes].unbind(1)
    label = (predictions.iou_scores >= iou_score) & (predictions.class_scores >= class_score)
    return label, label | (predictions.iou_scores >= ignore)


def _labels(predictions: Predictions, thresholds: Sequence[ScoreThresholds], *, exact: bool, box_weight: float) -> Labels:
    label, keep = apply_thresholds(predictions, thresholds)
    return Labels.make(
        predictions.boxes.data[keep],
        predictions.classes[keep],
        weight=label[keep].float(),
        exact=exact,
        box_weight=torch.full_like(predictions.scores[keep], box_weight),
        complete=exact,
    )


def labels_in_range(labels: Labels, grid: VoxelGrid) -> Labels:
    """Keep the objects that a detector can see.

    Args:
        labels: Objects of one scene, in the frame of the grid.
        grid: The detector's input grid.

    Returns:
        The labels whose center lies in the grid's x and y range.
    """
    x0, y0, _, x1, y1, _ = grid.range
    x, y = labels.boxes.data[:, 0], labels.boxes.data[:, 1]
    return labels.select((x >= x0) & (x < x1) & (y >= y0) & (y < y1))
