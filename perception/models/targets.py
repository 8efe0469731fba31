"""What each anchor and each region of interest should predict, from the labels of one scene. Pure functions, no gradient.

Sources: OpenPCDet ``axis_aligned_target_assigner.py`` and ``proposal_target_layer.py``. Beyond them, labels may be
* ignored (weight 0): anchors and regions on them teach nothing, neither object nor background;
* inexact or incomplete (a teacher's boxes): see ``sample_rois``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.boxes import encode_residuals, rotate_z
from ...core.structures import Labels
from ...ops.iou3d import iou_3d, iou_bev_nearest
from .anchors import AnchorClass

REFINE_IOU = 0.55  # OpenPCDet's REG_FG_THRESH
DIRECTION_OFFSET = 0.78539  # the reference's rounded pi / 4: headings near 0 and near pi / 2 stay away from the bin edges


@dataclass(frozen=True, kw_only=True)
class AnchorTargets:
    """Targets of all A anchors of one scene, in the anchors' flat order.

    class_weight: (A,) 1 learn, 0 ignore. positive: (A,) bool. box_codes: (A, 7), direction: (A,) int64, valid where positive.
    box_weight: (A,) the matched label's, where positive.
    ``positive`` implies class_weight 1; a positive anchor's class is the class of the anchor.
    """

    class_weight: Tensor
    positive: Tensor
    box_codes: Tensor
    direction: Tensor
    box_weight: Tensor


def direction_bin(yaw: Tensor) -> Tensor:
    """Which half turn a heading (rad) lies in: 0 or 1, int64."""
    turned = torch.remainder(yaw - DIRECTION_OFFSET, 2 * math.pi)
    return (turned / math.pi).floor().long().clamp(0, 1)


def assign_anchors(anchors: Tensor, classes: tuple[AnchorClass, ...], labels: Labels) -> AnchorTargets:
    """Match anchors (H, W, 2 * classes, 7) with the labels of one scene.

    Per class, by axis-aligned BEV overlap: at least ``matched`` is positive, below ``unmatched`` is background, between is
    ignored; the best anchor of every object is positive in any case.
    """
    shape = anchors.shape[:3]
    positive = torch.zeros(shape, dtype=torch.bool, device=anchors.device)
    weight = torch.ones(shape, device=anchors.device)
    codes = torch.zeros(anchors.shape, device=anchors.device)
    direction = torch.zeros(shape, dtype=torch.int64, device=anchors.device)
    box_weight = torch.zeros(shape, device=anchors.device)
    for index, anchor_class in enumerate(classes):
        slots = slice(2 * index, 2 * index + 2)
        own = labels.select(labels.classes == index)
        if len(own) == 0:
            continue
        flat = anchors[:, :, slots].reshape(-1, 7)
        overlap = iou_bev_nearest(flat, own.boxes.data)  # (a, n)
        best, match = overlap.max(1)
        best_of_object = overlap.amax(0)
        forced = ((overlap == best_of_object) & (best_of_object > 0)).any(1)
        taken = forced | (best >= anchor_class.matched)
        learnt = own.weight[match] > 0
        # On an ignored object every anchor that is not clearly background teaches nothing.
        ignored = (~learnt & (taken | (best >= anchor_class.unmatched))) | (~taken & (best >= anchor_class.unmatched))
        is_positive = taken & learnt
        weight[:, :, slots] = (~ignored).float().view(*shape[:2], 2)
        positive[:, :, slots] = is_positive.view(*shape[:2], 2)
        box_weight[:, :, slots] = (is_positive * own.box_weight[match]).view(*shape[:2], 2)
        rows = is_positive.nonzero().squeeze(1)
        target = own.boxes.data[match[rows]]
        class_codes = flat.new_zeros(flat.shape)
        class_codes[rows] = encode_residuals(target, flat[rows])
        codes[:, :, slots] = class_codes.view(*shape[:2], 2, 7)
        bins = torch.zeros(flat.shape[0], dtype=torch.int64, device=flat.device)
        bins[rows] = direction_bin(target[:, 6])
        direction[:, :, slots] = bins.view(*shape[:2], 2)
    return AnchorTargets(
        class_weight=weight.flatten(),
        positive=positive.flatten(),
        box_codes=codes.view(-1, 7),
        direction=direction.flatten(),
        box_weight=box_weight.flatten(),
    )


@dataclass(frozen=True, kw_only=True)
class RoiSampling:
    """How many regions of interest a scene trains the second stage with, and which (OpenPCDet's numbers)."""

    count: int = 128
    foreground_share: float = 0.5
    foreground_iou: float = 0.55
    easy_background_iou: float = 0.1
    hard_background_share: float = 0.8


@dataclass(frozen=True, kw_only=True)
class RoiTargets:
    """For R regions of one scene: overlap with their best object of the same class, that object, and whether to learn.

    iou: (R,). match: (R,) int64 row of the labels, 0 where there is none. weight: (R,) 1 or 0, for a head that judges the box.
    box_weight: (R,) for a head that refines the box: the matched label's, 0 where they overlap too little.
    """

    iou: Tensor
    match: Tensor
    weight: Tensor
    box_weight: Tensor


def match_rois(rois: Tensor, roi_classes: Tensor, labels: Labels) -> RoiTargets:
    """Best same-class object of every region (R, 7), and whether a quality head may learn from the pair.

    In a completely labelled scene it learns from every region but those on ignored objects. In a pseudo-labelled scene only
    from regions whose best match is an exact box (pasted): a teacher's box says nothing about true overlap, and what the
    teacher did not find is not background. A box is refined from an overlap above ``REFINE_IOU``.
    """
    if len(labels) == 0 or rois.shape[0] == 0:
        zero = rois.new_zeros(rois.shape[0])
        return RoiTargets(iou=zero, match=zero.long(), weight=zero + float(labels.complete), box_weight=zero)
    overlap = iou_3d(rois, labels.boxes.data) * (roi_classes[:, None] == labels.classes[None])
    iou, match = overlap.max(1)
    learnt = labels.weight[match] > 0
    weight = learnt | (iou < 0.1) if labels.complete else labels.exact[match] & learnt & (iou > 0)
    box_weight = labels.box_weight[match] * (learnt & (iou > REFINE_IOU))
    return RoiTargets(iou=iou, match=match, weight=weight.float(), box_weight=box_weight)


def encode_regions(boxes: Tensor, regions: Tensor) -> Tensor:
    """What a box head should answer (N, 7): boxes (N, 7) in the frames of their regions (N, 7), as residuals of the region's size.

    Opposite headings are the same box, so the turn is folded into [-pi/2, pi/2].
    """
    local = rotate_z(boxes[:, :3] - regions[:, :3], -regions[:, 6])
    turn = torch.remainder(boxes[:, 6] - regions[:, 6] + math.pi / 2, math.pi) - math.pi / 2
    return encode_residuals(torch.cat([local, boxes[:, 3:6], turn[:, None]], 1), at_origin(regions))


def at_origin(regions: Tensor) -> Tensor:
    """Regions (..., 7) in their own frame: at 0, heading along x."""
    return F.pad(regions[..., 3:6], (3, 1))


def sample_rois(iou: Tensor, sampling: RoiSampling) -> Tensor:
    """Rows of ``count`` regions drawn from overlaps (R,): half foreground, the rest background, hard ones preferred.

    Draws from torch's global generator, which the training loop seeds for every step. With no region the result is empty.
    """
    if iou.numel() == 0:
        return torch.zeros(0, dtype=torch.int64, device=iou.device)

    def draw(rows: Tensor, count: int, replace: bool) -> Tensor:
        if replace:
            return rows[torch.randint(len(rows), (count,), device=rows.device)]
        return rows[torch.randperm(len(rows), device=rows.device)[:count]]

    foreground = (iou >= sampling.foreground_iou).nonzero().squeeze(1)
    easy = (iou < sampling.easy_background_iou).nonzero().squeeze(1)
    hard = ((iou < sampling.foreground_iou) & (iou >= sampling.easy_background_iou)).nonzero().squeeze(1)
    if len(easy) + len(hard) == 0:
        return draw(foreground, sampling.count, replace=True)
    picked = draw(foreground, round(sampling.count * sampling.foreground_share), replace=False)
    missing = sampling.count - len(picked)
    n_hard = missing if len(easy) == 0 else min(int(missing * sampling.hard_background_share), len(hard))
    parts = [picked]
    if n_hard:
        parts.append(draw(hard, n_hard, replace=True))
    if missing - n_hard:
        parts.append(draw(easy, missing - n_hard, replace=True))
    return torch.cat(parts)


def iou_quality_target(iou: Tensor, low: float, high: float) -> Tensor:
    """Overlap -> quality target: 0 below ``low``, 1 above ``high``, linear between. (0, 1) keeps the overlap itself (ST3D)."""
    return ((iou - low) / (high - low)).clamp(0, 1)
