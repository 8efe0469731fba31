"""What each anchor and each proposal should predict, from the labels of one scene. Pure functions, no gradient.

Sources: OpenPCDet `axis_aligned_target_assigner.py` and `proposal_target_layer.py`. Beyond them, labels may be
* ignored (weight 0): anchors and proposals on them teach nothing, neither object nor background;
* inexact or incomplete (a teacher's boxes): see `match_rois`.

`losses.py` compares these targets with the outputs, `post_processing.py` turns outputs into boxes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.boxes import encode_residuals, rotate_z
from ...core.errors import InvalidInput, require_counts, require_numbers
from ...core.structures import Labels
from ...ops.iou3d import iou_3d, iou_bev_nearest
from .anchors import AnchorClass

REFINE_IOU = 0.55  # OpenPCDet's REG_FG_THRESH
DIRECTION_OFFSET = 0.78539  # OpenPCDet's rounded pi / 4: headings near 0 and near pi / 2 stay away from the bin edges


@dataclass(frozen=True, kw_only=True)
class AnchorTargets:
    """Targets of all A anchors of one scene, in the anchors' flat order. A positive anchor's class is the class of the anchor."""

    class_weight: Tensor
    """(A,) 1 where the class head learns, 0 where the anchor is ignored or out of sight. It is 1 for every positive anchor."""
    positive: Tensor
    """(A,) bool, the anchor stands for an object."""
    box_codes: Tensor
    """(A, 7) residuals from the anchor to its object; 0 where the anchor is not positive."""
    direction: Tensor
    """(A,) int64 half turn of the object's heading; 0 where the anchor is not positive."""
    box_weight: Tensor
    """(A,) weight of the box losses, which is that of the matched label; 0 where the anchor is not positive."""


def direction_bin(yaw: Tensor, offset: float = DIRECTION_OFFSET) -> Tensor:
    """Tell which half turn a heading lies in.

    Args:
        yaw: headings in radians, any shape.
        offset: where the first half turn begins, in radians.

    Returns:
        0 or 1, int64, of the same shape.
    """
    turned = torch.remainder(yaw - offset, 2 * math.pi)
    return (turned / math.pi).floor().long().clamp(0, 1)


def assign_anchors(
    anchors: Tensor, classes: tuple[AnchorClass, ...], labels: Labels, direction_offset: float = DIRECTION_OFFSET
) -> AnchorTargets:
    """Match anchors with the labels of one scene.

    It is done per class, by axis-aligned BEV overlap: an anchor is positive from `matched` on, background below `unmatched` and
    ignored in between. The best anchor of every object is positive in any case.

    Args:
        anchors: (H, W, 2 * classes, 7) what `make_anchors` returned.
        classes: the anchor of each class, with its limits.
        labels: labels of the scene.
        direction_offset: where the first half turn begins, in radians.

    Returns:
        Targets of the A = H * W * 2 * classes anchors.

    Raises:
        InvalidInput: A label has a class without an anchor. An object that takes no part has the weight 0, not another class.
    """
    shape = anchors.shape[:3]
    positive = torch.zeros(shape, dtype=torch.bool, device=anchors.device)
    weight = torch.ones(shape, device=anchors.device)
    codes = torch.zeros(anchors.shape, device=anchors.device)
    direction = torch.zeros(shape, dtype=torch.int64, device=anchors.device)
    box_weight = torch.zeros(shape, device=anchors.device)
    known = 0
    for index, anchor_class in enumerate(classes):
        slots = slice(2 * index, 2 * index + 2)
        own = labels.select(labels.classes == index)
        known += len(own)
        if len(own) == 0:
            continue
        flat = anchors[:, :, slots].reshape(-1, 7)
        overlap = iou_bev_nearest(flat, own.boxes.data)  # (a, n)
        best, match = overlap.max(1)
        best_of_object = overlap.amax(0)
        forced = ((overlap == best_of_object) & (best_of_object > 0)).any(1)
        taken = forced | (best >= anchor_class.matched)
        learnt = own.weight[match] > 0
        # An anchor on an ignored object that is not clearly background teaches nothing.
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
        bins[rows] = direction_bin(target[:, 6], direction_offset)
        direction[:, :, slots] = bins.view(*shape[:2], 2)
    if labels.seen is not None:  # an object out of sight teaches nothing, and neither does empty space there
        shown = labels.seen[:, :, None].expand(shape)
        weight, box_weight, positive = weight * shown, box_weight * shown, positive & shown
    if known != len(labels):  # counted on the way, because asking a GPU for the largest class would make every step wait
        raise InvalidInput(
            f"{len(labels) - known} of {len(labels)} labels have a class outside 0..{len(classes) - 1}, the classes of the detector "
            f"({', '.join(c.name for c in classes)}); train with a dataset that was prepared with these classes"
        )
    return AnchorTargets(
        class_weight=weight.flatten(),
        positive=positive.flatten(),
        box_codes=codes.view(-1, 7),
        direction=direction.flatten(),
        box_weight=box_weight.flatten(),
    )


@dataclass(frozen=True, kw_only=True)
class RoiSampling:
    """Which proposals of a scene train the second stage. Defaults are OpenPCDet's numbers."""

    count: int = 128
    """Number of proposals per scene. Lower it to save time and memory."""
    foreground_share: float = 0.5
    """Maximum share of the sampled proposals that lie on objects; it does not count where all proposals do."""
    foreground_iou: float = 0.55
    """3D IoU with an object from which a proposal lies on it."""
    easy_background_iou: float = 0.1
    """3D IoU below which a proposal is easy background; between the two it is hard background."""
    hard_background_share: float = 0.8
    """Maximum share of the background that is hard."""

    def __post_init__(self) -> None:
        require_counts("RoiSampling", count=self.count)
        require_numbers(
            "RoiSampling",
            least=0,
            most=1,
            foreground_share=self.foreground_share,
            foreground_iou=self.foreground_iou,
            easy_background_iou=self.easy_background_iou,
            hard_background_share=self.hard_background_share,
        )


@dataclass(frozen=True, kw_only=True)
class RoiTargets:
    """For R proposals of one scene: the best object of the same class, and what a second stage may learn from the pair."""

    iou: Tensor
    """(R,) 3D IoU with that object, 0 where there is none."""
    match: Tensor
    """(R,) int64 row of the labels, 0 where there is none."""
    weight: Tensor
    """(R,) 1 or 0, for a head that predicts the overlap."""
    box_weight: Tensor
    """(R,) for a head that refines the box: that of the matched label, 0 where they overlap too little."""


def match_rois(rois: Tensor, roi_classes: Tensor, labels: Labels) -> RoiTargets:
    """Find the best object of every proposal, and decide what a second stage may learn from the pair.

    In a completely labeled scene a quality head learns from every proposal except those on ignored objects. In a pseudo-labeled
    scene it learns only from proposals whose best match is an exact box (a pasted one): a teacher's box does not tell the true
    overlap, and what the teacher did not find is not background. A box is refined from an overlap above `REFINE_IOU` on.

    Args:
        rois: (R, 7) proposals.
        roi_classes: (R,) int64; a proposal matches objects of its own class only.
        labels: labels of the scene.

    Returns:
        Match and weights of every proposal.
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
    """Compute the residuals that a box head should predict: boxes in the frames of their proposals, relative to their size.

    Opposite headings are the same box, so the turn is folded into [-pi/2, pi/2].

    Args:
        boxes: (N, 7) true boxes.
        regions: (N, 7) the proposal of each.

    Returns:
        (N, 7) residuals; `post_processing.decode_regions` is the inverse.
    """
    local = rotate_z(boxes[:, :3] - regions[:, :3], -regions[:, 6])
    turn = torch.remainder(boxes[:, 6] - regions[:, 6] + math.pi / 2, math.pi) - math.pi / 2
    return encode_residuals(torch.cat([local, boxes[:, 3:6], turn[:, None]], 1), at_origin(regions))


def at_origin(regions: Tensor) -> Tensor:
    """Move boxes into their own frame.

    Args:
        regions: (..., 7) boxes.

    Returns:
        (..., 7) boxes of the same size at 0, heading along x.
    """
    return F.pad(regions[..., 3:6], (3, 1))


def sample_rois(iou: Tensor, sampling: RoiSampling) -> Tensor:
    """Draw the proposals that train the second stage: some on objects, the rest background, hard background preferred.

    It draws from torch's global generator, which the training loop seeds for every step. Background is drawn with replacement.

    Args:
        iou: (R,) overlap of each proposal with its best object.
        sampling: how many are drawn, and the shares.

    Returns:
        (sampling.count,) int64 rows of `iou`; empty without a proposal.
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
    """Turn an overlap into the target of a quality head.

    Args:
        iou: overlaps, any shape.
        low: overlap that counts as 0.
        high: overlap that counts as 1. With 0 and 1 the target is the overlap itself (ST3D).

    Returns:
        Targets 0..1 of the same shape, linear between the two.
    """
    return ((iou - low) / (high - low)).clamp(0, 1)
