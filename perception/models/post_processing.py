"""From raw outputs to boxes: decoding, proposals, final detections. Pure functions of one scene or a batch, no gradient."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.boxes import decode_residuals, rotate_z, wrap_angle
from ...core.structures import Boxes3D, Predictions
from ...ops.nms import nms_rotated
from .targets import DIRECTION_OFFSET, at_origin


@dataclass(frozen=True, kw_only=True)
class ProposalNms:
    """Proposals of a scene: the ``pre`` best anchors, rotated NMS at ``iou``, the first ``post``."""

    pre: int
    iou: float
    post: int


@dataclass(frozen=True, kw_only=True)
class FinalNms:
    """Detections of a scene: scores of at least ``score``, class-agnostic rotated NMS at ``iou``."""

    score: float = 0.1
    iou: float = 0.01
    pre: int = 4096
    post: int = 500


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Regions of interest of a batch, padded: boxes (B, R, 7), classes (B, R) int64, logits (B, R), valid (B, R) bool."""

    boxes: Tensor
    classes: Tensor
    logits: Tensor
    valid: Tensor


def decode_boxes(codes: Tensor, direction_logits: Tensor, anchors: Tensor) -> Tensor:
    """Box codes (..., 7) and direction logits (..., 2) on anchors (..., 7) -> boxes (..., 7).

    The yaw is folded into one half turn, then the direction classifier picks the half. As in the reference the result is not
    wrapped to one period.
    """
    boxes = decode_residuals(codes.float(), anchors)
    folded = torch.remainder(boxes[..., 6] - DIRECTION_OFFSET, math.pi)
    yaw = folded + DIRECTION_OFFSET + math.pi * direction_logits.argmax(-1)
    return torch.cat([boxes[..., :6], yaw[..., None]], -1)


def decode_regions(codes: Tensor, regions: Tensor) -> Tensor:
    """Box codes (..., 7) in the frames of regions (..., 7) -> boxes (..., 7); the inverse of ``targets.encode_regions``."""
    local = decode_residuals(codes, at_origin(regions))
    center = rotate_z(local[..., :3], regions[..., 6]) + regions[..., :3]
    return torch.cat([center, local[..., 3:6], local[..., 6:] + regions[..., 6:]], -1)


def propose(class_logits: Tensor, box_codes: Tensor, direction_logits: Tensor, anchors: Tensor, nms: ProposalNms) -> Proposals:
    """The best anchors of every scene after NMS. Only the ``pre`` best anchors are decoded. anchors: (A, 7)."""
    batch = class_logits.shape[0]
    boxes = class_logits.new_zeros(batch, nms.post, 7, dtype=torch.float32)
    classes = torch.zeros(batch, nms.post, dtype=torch.int64, device=boxes.device)
    logits = boxes.new_full((batch, nms.post), -torch.inf)
    valid = torch.zeros(batch, nms.post, dtype=torch.bool, device=boxes.device)
    for b in range(batch):
        score, label = class_logits[b].float().max(1)
        top, rows = score.topk(min(nms.pre, score.numel()))
        decoded = decode_boxes(box_codes[b, rows], direction_logits[b, rows], anchors[rows])
        keep = nms_rotated(decoded, top, nms.iou, post_max=nms.post)
        n = len(keep)
        boxes[b, :n], classes[b, :n], logits[b, :n], valid[b, :n] = decoded[keep], label[rows][keep], top[keep], True
    return Proposals(boxes=boxes, classes=classes, logits=logits, valid=valid)


def select_detections(boxes: Tensor, classes: Tensor, scores: Tensor, class_scores: Tensor, nms: FinalNms) -> Predictions:
    """Final detections of one scene. boxes (R, 7), classes (R,), scores (R,) ranked by, class_scores (R,)."""
    keep = (scores >= nms.score).nonzero().squeeze(1)
    keep = keep[nms_rotated(boxes[keep], scores[keep], nms.iou, pre_max=nms.pre, post_max=nms.post)]
    kept = torch.cat([boxes[keep, :6], wrap_angle(boxes[keep, 6:])], 1)
    return Predictions(
        boxes=Boxes3D(data=kept),
        classes=classes[keep],
        scores=scores[keep],
        class_scores=class_scores[keep],
        iou_scores=scores[keep],
    )
