"""Non-maximum suppression of rotated boxes: of boxes on the same object, seen from above, keep the best-scored.

Greedy: take the best remaining box, drop the rest whose BEV IoU with it is above the threshold, repeat.
Source: OpenPCDet ``iou3d_nms_utils.nms_gpu`` and ``model_nms_utils.class_agnostic_nms`` / ``multi_classes_nms``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .iou3d import box_table, iou_bev_reference, suppress


def nms_rotated(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, pre_max: int | None = None, post_max: int | None = None
) -> Tensor:
    """Rows of ``boxes`` (N, 7) that survive, best first: (K,) int64.

    scores: (N,), any scale; of equal scores the lower row comes first. A box with BEV IoU above ``iou_threshold`` with a better
    kept one is dropped. pre_max: consider only that many best boxes; post_max: keep at most that many. None: no limit.
    Raises ValueError for wrong shapes, non-finite boxes, NaN scores, a threshold outside 0..1 or a negative limit.
    """
    if boxes.device.type != "cpu":
        return nms_rotated_reference(boxes, scores, iou_threshold, pre_max=pre_max, post_max=post_max)
    order = _best_first(boxes, scores, iou_threshold, pre_max, post_max)
    limit = len(order) if post_max is None else post_max
    return order[torch.from_numpy(suppress(box_table(boxes[order]).numpy(), float(iou_threshold), limit))]


def nms_rotated_per_class(
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    iou_threshold: float,
    *,
    pre_max: int | None = None,
    post_max: int | None = None,
) -> Tensor:
    """``nms_rotated`` among boxes of the same class (N,) only; survivors of all classes, best first: (K,) int64.

    The limits hold for each class.
    """
    if classes.shape != scores.shape:
        raise ValueError(f"nms: a class for every score: {tuple(classes.shape)} classes, {tuple(scores.shape)} scores")
    kept = [torch.empty(0, dtype=torch.int64, device=boxes.device)]
    for value in classes.unique():
        rows = (classes == value).nonzero().squeeze(1)
        kept.append(rows[nms_rotated(boxes[rows], scores[rows], iou_threshold, pre_max=pre_max, post_max=post_max)])
    rows = torch.cat(kept).sort().values
    return rows[scores[rows].sort(descending=True, stable=True).indices]


def nms_rotated_reference(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, pre_max: int | None = None, post_max: int | None = None
) -> Tensor:
    """``nms_rotated`` the obvious way, on any device: the full IoU matrix, then one box after the other."""
    order = _best_first(boxes, scores, iou_threshold, pre_max, post_max)
    overlaps = (iou_bev_reference(boxes[order], boxes[order]) > iou_threshold).cpu()
    suppressed = torch.zeros(len(order), dtype=torch.bool)
    kept = []
    for row in range(len(order)):
        if not suppressed[row]:
            kept.append(row)
            suppressed |= overlaps[row]
    return order[torch.tensor(kept[:post_max], dtype=torch.int64, device=order.device)]


def _best_first(boxes: Tensor, scores: Tensor, iou_threshold: float, pre_max: int | None, post_max: int | None) -> Tensor:
    """Check the arguments; the rows to consider, best first."""
    if boxes.ndim != 2 or boxes.shape[1] != 7 or scores.shape != boxes.shape[:1]:
        raise ValueError(f"nms: boxes must be (N, 7) and scores (N,), got {tuple(boxes.shape)} and {tuple(scores.shape)}")
    bad = int((~torch.isfinite(boxes).all(1) | torch.isnan(scores)).sum())
    if bad:
        raise ValueError(f"nms: {bad} of {len(boxes)} boxes have a non-finite value or a NaN score; remove them first")
    if not 0 <= iou_threshold <= 1:
        raise ValueError(f"nms: iou_threshold must lie in 0..1, got {iou_threshold}")
    if (pre_max is not None and pre_max < 0) or (post_max is not None and post_max < 0):
        raise ValueError(f"nms: a limit is negative: pre_max {pre_max}, post_max {post_max}")
    return scores.detach().sort(descending=True, stable=True).indices[:pre_max]
