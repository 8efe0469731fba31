"""Non-maximum suppression of rotated boxes: of several boxes on one object, keep the one with the best score.

Greedy: take the best remaining box, drop the rest whose BEV IoU with it is above the threshold, repeat.
Source: OpenPCDet, `iou3d_nms_utils.nms_gpu` and `model_nms_utils.class_agnostic_nms`. Read next: `suppress` in `cpu/iou3d.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core.errors import InvalidInput, NonFiniteValue
from ..core.tensor_value import shape_of
from .cpu.iou3d import suppress
from .dispatch import dispatch
from .iou3d import box_table, iou_bev_reference


def nms_rotated(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, pre_max: int | None = None, post_max: int | None = None
) -> Tensor:
    """Choose the boxes that survive non-maximum suppression, regardless of class.

    Args:
        boxes: (N, 7) boxes.
        scores: (N,) scores on any scale. Of equal scores the lower row comes first.
        iou_threshold: A box is dropped if its BEV IoU with a better kept box is above this, in 0..1.
        pre_max: Consider only this number of best boxes. None considers all.
        post_max: Keep at most this number of boxes. None sets no limit.

    Returns:
        (K,) int64 rows of the boxes kept, best first.

    Raises:
        InvalidInput: Shapes do not fit, or a limit is out of range.
        NonFiniteValue: A box is not finite, or a score is NaN.

    Example:
        >>> boxes = torch.tensor([[0.0, 0, 0, 4, 2, 1.5, 0], [0.5, 0, 0, 4, 2, 1.5, 0], [9, 0, 0, 4, 2, 1.5, 0]])
        >>> nms_rotated(boxes, torch.tensor([0.6, 0.9, 0.3]), iou_threshold=0.3)
        tensor([1, 2])
    """
    implementation = dispatch((boxes, scores), nms_rotated_reference, cpu=_nms_on_cpu)
    return implementation(boxes, scores, iou_threshold, pre_max=pre_max, post_max=post_max)


def nms_rotated_reference(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, pre_max: int | None = None, post_max: int | None = None
) -> Tensor:
    """Compute `nms_rotated` the obvious way, on any device: the full IoU matrix, then box after box.

    Args:
        boxes: (N, 7) boxes.
        scores: (N,) scores.
        iou_threshold: Largest BEV IoU of two kept boxes.
        pre_max: Number of best boxes to consider.
        post_max: Largest number of boxes to keep.

    Returns:
        (K,) int64 rows of the boxes kept, best first.
    """
    order = _best_first(boxes, scores, iou_threshold, pre_max, post_max)
    overlaps = (iou_bev_reference(boxes[order], boxes[order]) > iou_threshold).cpu()
    suppressed = torch.zeros(len(order), dtype=torch.bool)
    kept = []
    for row in range(len(order)):
        if not suppressed[row]:
            kept.append(row)
            suppressed |= overlaps[row]
    return order[torch.tensor(kept[:post_max], dtype=torch.int64, device=order.device)]


def _nms_on_cpu(
    boxes: Tensor, scores: Tensor, iou_threshold: float, *, pre_max: int | None = None, post_max: int | None = None
) -> Tensor:
    order = _best_first(boxes, scores, iou_threshold, pre_max, post_max)
    limit = len(order) if post_max is None else post_max
    return order[torch.from_numpy(suppress(box_table(boxes[order]).numpy(), float(iou_threshold), limit))]


def _best_first(boxes: Tensor, scores: Tensor, iou_threshold: float, pre_max: int | None, post_max: int | None) -> Tensor:
    """Check the arguments, and give the rows to consider, best first."""
    if boxes.ndim != 2 or boxes.shape[1] != 7 or scores.shape != boxes.shape[:1]:
        raise InvalidInput(f"nms_rotated: boxes must be (N, 7) and scores (N,), found {shape_of(boxes)} and {shape_of(scores)}")
    bad = int((~torch.isfinite(boxes).all(1) | torch.isnan(scores)).sum())
    if bad:
        raise NonFiniteValue(
            f"nms_rotated: {bad} of {len(boxes)} boxes have a non-finite value or a NaN score; remove them first"
        )
    if not 0 <= iou_threshold <= 1:
        raise InvalidInput(f"nms_rotated: iou_threshold must lie in 0..1, found {iou_threshold}")
    if (pre_max is not None and pre_max < 0) or (post_max is not None and post_max < 0):
        raise InvalidInput(f"nms_rotated: a limit must not be negative, found pre_max {pre_max} and post_max {post_max}")
    return scores.detach().sort(descending=True, stable=True).indices[:pre_max]
