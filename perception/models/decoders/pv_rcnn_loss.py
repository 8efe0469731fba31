"""PV-RCNN's losses beyond the anchors': is a keypoint in an object, how good is a region, and where is its box really.

Sources: OpenPCDet `point_head_template.py` (keypoints), `roi_head_template.py` (regions), `loss_utils.py` (corners). A teacher's
boxes are used where they are good enough, which are the hybrid labels of UpCycling: they refine regions, but neither teach how good
a region is nor label keypoints. `pv_rcnn.py` has the network.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.boxes import corners_3d
from ....core.features import Keypoints
from ....core.structures import Labels, LossTerms
from ....ops.points_in_boxes import points_in_boxes
from ..losses import sigmoid_focal_loss, smooth_l1
from ..post_processing import Proposals, decode_regions
from ..targets import encode_regions, iou_quality_target, match_rois

RING = 0.2  # meters added to each full size of a box: keypoints in the rim are neither object nor background (GT_EXTRA_WIDTH)


def keypoint_targets(xyz: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Tell which keypoints of one scene lie in an object, and which the keypoint head may learn from.

    In a pseudo-labeled scene it learns only from keypoints in exact (pasted) boxes.

    Args:
        xyz: (K, 3) keypoints in meters.
        labels: labels of the scene.

    Returns:
        (K,) 0 or 1 for "in an object", and (K,) 0 or 1 for "learn from it".
    """
    boxes = labels.boxes.data
    owner = points_in_boxes(xyz, boxes)
    inside = owner >= 0
    if len(labels) == 0:
        return inside.float(), torch.full_like(inside, labels.complete, dtype=torch.float32)
    learnt = inside & (labels.weight[owner.clamp_min(0)] > 0)
    if labels.complete:
        near = points_in_boxes(xyz, boxes + boxes.new_tensor([0, 0, 0, RING, RING, RING, 0])) >= 0
        return learnt.float(), (learnt | ~near).float()
    return learnt.float(), (learnt & labels.exact[owner.clamp_min(0)]).float()


def keypoint_loss(keypoints: Keypoints, logits: Tensor, labels: Sequence[Labels]) -> LossTerms:
    """Compute the focal loss of all keypoints of a batch, divided by the number of those in objects.

    Args:
        keypoints: keypoints of the batch.
        logits: (K,) predictions of "in an object".
        labels: one per scene.

    Returns:
        The term `keypoint`.
    """
    pairs = [keypoint_targets(keypoints.xyz[a:b], scene) for a, b, scene in zip(keypoints.starts, keypoints.starts[1:], labels)]
    target, weight = (torch.cat(column) for column in zip(*pairs, strict=True))
    focal = sigmoid_focal_loss(logits, target) * weight
    return LossTerms(terms={"keypoint": focal.sum() / (target * weight).sum().clamp_min(1)})


def corner_loss(boxes: Tensor, targets: Tensor) -> Tensor:
    """Compare boxes by their corners; opposite headings are the same box.

    Args:
        boxes: (N, 7) predicted boxes.
        targets: (N, 7) true boxes.

    Returns:
        (N,) mean over the 8 corners of the smoothed distance in meters.
    """
    corners = corners_3d(boxes)
    turned = targets + targets.new_tensor([0, 0, 0, 0, 0, 0, torch.pi])
    distance = torch.minimum(*((corners - corners_3d(t)).norm(dim=2) for t in (targets, turned)))
    return smooth_l1(distance, beta=1.0).mean(1)


def region_loss(
    proposals: Proposals, quality_logits: Tensor, box_codes: Tensor, labels: Sequence[Labels], quality_target: tuple[float, float]
) -> LossTerms:
    """Compute the losses of the sampled regions of a batch.

    Args:
        proposals: the regions.
        quality_logits: (B, R) predicted quality.
        box_codes: (B, R, 7) predicted residuals.
        labels: one per scene.
        quality_target: overlaps that count as quality 0 and 1.

    Returns:
        Terms `roi_quality`, over the regions that it may be learned from, and `roi_box` and `roi_corner`, over the regions that
        lie on an object.
    """
    quality, weights, box, corner, refined = [], [], [], [], []
    for b, scene in enumerate(labels):
        rois, valid = proposals.boxes[b], proposals.valid[b]
        matched = match_rois(rois, proposals.classes[b], scene)
        target = iou_quality_target(matched.iou, *quality_target)
        quality.append(F.binary_cross_entropy_with_logits(quality_logits[b].float(), target, reduction="none"))
        weights.append(matched.weight * valid)
        rows = ((matched.box_weight > 0) & valid).nonzero().squeeze(1)
        truth, codes, weight = scene.boxes.data[matched.match[rows]], box_codes[b, rows].float(), matched.box_weight[rows]
        box.append(weight * smooth_l1(codes - encode_regions(truth, rois[rows])).sum(1))
        corner.append(weight * corner_loss(decode_regions(codes, rois[rows]), truth))
        refined.append(len(rows))
    weight, number = torch.stack(weights), max(sum(refined), 1)
    return LossTerms(
        terms={
            "roi_quality": (torch.stack(quality) * weight).sum() / weight.sum().clamp_min(1),
            "roi_box": torch.cat(box).sum() / number,
            "roi_corner": torch.cat(corner).sum() / number,
        }
    )
