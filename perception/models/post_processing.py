"""From raw outputs to boxes: decoding, proposals, final detections. Pure functions of one scene or a batch.

Both decoders use them; `targets.py` is the way back, from labels to what the outputs should be.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.boxes import decode_residuals, rotate_z, wrap_angle
from ...core.errors import NonFiniteValue, require_counts, require_numbers
from ...core.structures import Boxes3D, Predictions
from ...ops.nms import nms_rotated
from .targets import DIRECTION_OFFSET, at_origin


@dataclass(frozen=True, kw_only=True)
class ProposalNms:
    """How the anchors of a scene become proposals: the best ones, then rotated NMS over all classes."""

    pre: int
    """Number of best anchors that are decoded and enter NMS. Fewer is faster."""
    iou: float
    """BEV IoU above which the worse of two anchors is dropped."""
    post: int
    """Maximum number of proposals per scene; the second stage computes features for each."""

    def __post_init__(self) -> None:
        require_counts("ProposalNms", most=1_000_000, pre=self.pre, post=self.post)
        require_numbers("ProposalNms", least=0, most=1, iou=self.iou)


@dataclass(frozen=True, kw_only=True)
class FinalNms:
    """How the scored boxes of a scene become detections: a score limit, then rotated NMS over all classes."""

    score: float = 0.1
    """Minimum score of a detection. Lower it to trade precision for recall; AP needs it low."""
    iou: float = 0.01
    """BEV IoU above which the worse of two boxes is dropped. Raise it where objects may overlap."""
    pre: int = 4096
    """Maximum number of boxes that enter NMS."""
    post: int = 500
    """Maximum number of detections per scene."""

    def __post_init__(self) -> None:
        require_counts("FinalNms", most=1_000_000, pre=self.pre, post=self.post)
        require_numbers("FinalNms", least=0, most=1, score=self.score, iou=self.iou)


@dataclass(frozen=True, kw_only=True)
class Proposals:
    """Proposals of a batch, padded to the same number per scene. Whatever stands where `valid` is False means nothing."""

    boxes: Tensor
    """(B, R, 7) boxes."""
    classes: Tensor
    """(B, R) int64, the class of the anchor."""
    logits: Tensor
    """(B, R) float32, the anchor head's logit for that class."""
    valid: Tensor
    """(B, R) bool, False for padding."""


def decode_boxes(codes: Tensor, direction_logits: Tensor, anchors: Tensor, direction_offset: float = DIRECTION_OFFSET) -> Tensor:
    """Turn the anchor head's outputs into boxes.

    The yaw is folded into one half turn, then the direction classifier picks the half. The same as in OpenPCDet, the result is
    not wrapped to one period.

    Args:
        codes: (..., 7) residuals.
        direction_logits: (..., 2) for the two half turns.
        anchors: (..., 7) boxes.
        direction_offset: where the first half turn begins, in radians.

    Returns:
        (..., 7) boxes.
    """
    boxes = decode_residuals(codes.float(), anchors)
    folded = torch.remainder(boxes[..., 6] - direction_offset, math.pi)
    yaw = folded + direction_offset + math.pi * direction_logits.argmax(-1)
    return torch.cat([boxes[..., :6], yaw[..., None]], -1)


def decode_regions(codes: Tensor, regions: Tensor) -> Tensor:
    """Turn the residuals of a second stage into boxes: the inverse of `targets.encode_regions`.

    Args:
        codes: (..., 7) residuals in the frames of the proposals.
        regions: (..., 7) the proposals.

    Returns:
        (..., 7) refined boxes.
    """
    local = decode_residuals(codes, at_origin(regions))
    center = rotate_z(local[..., :3], regions[..., 6]) + regions[..., :3]
    return torch.cat([center, local[..., 3:6], local[..., 6:] + regions[..., 6:]], -1)


def propose(
    class_logits: Tensor,
    box_codes: Tensor,
    direction_logits: Tensor,
    anchors: Tensor,
    nms: ProposalNms,
    direction_offset: float = DIRECTION_OFFSET,
) -> Proposals:
    """Choose the best anchors of every scene. Only the `nms.pre` best are decoded.

    Args:
        class_logits: (B, A, C) for every anchor and class; the class of an anchor is its best one.
        box_codes: (B, A, 7) residuals.
        direction_logits: (B, A, 2) for the two half turns.
        anchors: (A, 7) boxes.
        nms: how many are looked at and kept.
        direction_offset: where the first half turn begins, in radians.

    Returns:
        Proposals padded to `nms.post` per scene, the best first.
    """
    batch = class_logits.shape[0]
    boxes = class_logits.new_zeros(batch, nms.post, 7, dtype=torch.float32)
    classes = torch.zeros(batch, nms.post, dtype=torch.int64, device=boxes.device)
    logits = boxes.new_full((batch, nms.post), -torch.inf)
    valid = torch.zeros(batch, nms.post, dtype=torch.bool, device=boxes.device)
    for b in range(batch):
        score, label = class_logits[b].float().max(1)
        top, rows = score.topk(min(nms.pre, score.numel()))
        decoded = decode_boxes(box_codes[b, rows], direction_logits[b, rows], anchors[rows], direction_offset)
        keep = nms_rotated(decoded, top, nms.iou, post_max=nms.post)
        n = len(keep)
        boxes[b, :n], classes[b, :n], logits[b, :n], valid[b, :n] = decoded[keep], label[rows][keep], top[keep], True
    return Proposals(boxes=boxes, classes=classes, logits=logits, valid=valid)


def select_detections(boxes: Tensor, classes: Tensor, scores: Tensor, class_scores: Tensor, nms: FinalNms) -> Predictions:
    """Choose the final detections of one scene.

    Args:
        boxes: (R, 7) boxes.
        classes: (R,) int64.
        scores: (R,) 0..1 by which boxes are ranked: the predicted overlap or quality.
        class_scores: (R,) 0..1 the first stage's probability of the class; kept, but not used for the choice.
        nms: which boxes are kept.

    Returns:
        Detections, the best first, with yaw in [-pi, pi).

    Raises:
        NonFiniteValue: A score is NaN, or a box whose score is high enough is not finite.
    """
    if bool(scores.isnan().any()):  # NaN is below every limit, so such a scene would silently have no detection
        raise NonFiniteValue(f"{int(scores.isnan().sum())} of {len(scores)} proposals have a score that is NaN")
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
