"""What second stages share: which proposals they train on, the layers of their heads, and proposals with scores.

Source: OpenPCDet `roi_head_template.py`. A *region* is a proposal as the second stage sees it. `second_iou.py` and `pv_rcnn.py`
have the second stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.boxes import rotate_z, wrap_angle
from ....core.structures import Boxes3D, Labels, Predictions
from ..encoders.norm import RowBatchNorm
from ..post_processing import Proposals
from ..targets import RoiSampling, match_rois, sample_rois


def fully_connected(c_in: int, c_out: int) -> list[nn.Module]:
    """Make one layer of a region head, (N, c_in, 1) -> (N, c_out, 1).

    It is a 1 x 1 convolution, as in OpenPCDet, so that weights load by name.

    Args:
        c_in: input channels.
        c_out: output channels.

    Returns:
        Convolution, batch norm and ReLU.
    """
    return [nn.Conv1d(c_in, c_out, 1, bias=False), RowBatchNorm(c_out), nn.ReLU()]


def sample_regions(proposals: Proposals, labels: Sequence[Labels], sampling: RoiSampling, *, refine: bool) -> Proposals:
    """Choose the proposals that the second stage trains on, from those that it may learn from.

    Args:
        proposals: proposals of a batch.
        labels: one per scene; `match_rois` decides what may be learned.
        sampling: how many are chosen per scene, and the shares.
        refine: also choose proposals whose box may be refined although their quality may not be learned.

    Returns:
        `sampling.count` proposals per scene, with repetitions; none is valid in a scene without any to learn from.
    """
    picked = []
    for b, scene in enumerate(labels):
        rows = proposals.valid[b].nonzero().squeeze(1)
        targets = match_rois(proposals.boxes[b, rows], proposals.classes[b, rows], scene)
        usable = targets.weight > 0
        if refine:
            usable = usable | (targets.box_weight > 0)
        picked.append(rows[usable][sample_rois(targets.iou[usable], sampling)])
    index = torch.stack([F.pad(p, (0, sampling.count - len(p))) for p in picked])
    return Proposals(
        boxes=proposals.boxes.gather(1, index[..., None].expand(-1, -1, 7)),
        classes=proposals.classes.gather(1, index),
        logits=proposals.logits.gather(1, index),
        valid=torch.stack([torch.arange(sampling.count, device=index.device) < len(p) for p in picked]),
    )


def padded_regions(regions: Sequence[Tensor]) -> Proposals:
    """Turn given boxes into proposals of a batch.

    Args:
        regions: (R, 7) boxes of each scene.

    Returns:
        The boxes as proposals of class 0 with the logit 0.
    """
    most = max((len(scene) for scene in regions), default=0)
    boxes = torch.stack([F.pad(scene, (0, 0, 0, most - len(scene))) for scene in regions])
    return Proposals(
        boxes=boxes,
        classes=torch.zeros(boxes.shape[:2], dtype=torch.int64, device=boxes.device),
        logits=boxes.new_zeros(boxes.shape[:2]),
        valid=torch.stack([torch.arange(most, device=boxes.device) < len(scene) for scene in regions]),
    )


def region_grid(regions: Tensor, size: int) -> Tensor:
    """Place a grid of points in every region, turned with it: the centers of `size` x `size` x `size` equal cells.

    Source: OpenPCDet `pvrcnn_head.py`, `get_dense_grid_points`.

    Args:
        regions: (N, 7) boxes.
        size: cells along each side.

    Returns:
        (N, size^3, 3) points in meters; the flat index is (ix * size + iy) * size + iz, with ix along the length.
    """
    steps = (torch.arange(size, device=regions.device, dtype=regions.dtype) + 0.5) / size - 0.5
    unit = torch.cartesian_prod(steps, steps, steps).view(-1, 3)
    local = unit * regions[:, None, 3:6]
    return rotate_z(local, regions[:, None, 6]) + regions[:, None, :3]


@dataclass(frozen=True, kw_only=True)
class ScoredProposals:
    """The R proposals of one scene with the second stage's scores, before the final suppression, in the order of the first stage."""

    detections: Predictions
    """All proposals as detections, with refined boxes where the second stage refines."""
    logits: Tensor
    """(R,) the anchor head's logit for the proposal's class. An anchor learns the logit of its own class alone, so this logit and
    the class are all that the head says."""
    features: Tensor
    """(R, C) the second stage's shared features, from which the score is read."""


def scored_by_scene(proposals: Proposals, boxes: Tensor, quality_logits: Tensor, features: Tensor) -> list[ScoredProposals]:
    """Sort what the second stage computed for a batch into scenes.

    Args:
        proposals: proposals of the batch, of which N are valid.
        boxes: (N, 7) final boxes of the valid proposals, scenes in order; so are the other rows.
        quality_logits: (N,) predicted quality or overlap.
        features: (N, C) shared features.

    Returns:
        The scored proposals of every scene.
    """
    quality, found, start = torch.sigmoid(quality_logits.float()), [], 0
    for b, valid in enumerate(proposals.valid):
        rows, logits = slice(start, start := start + int(valid.sum())), proposals.logits[b, valid]
        detections = Predictions(
            boxes=Boxes3D(data=torch.cat([boxes[rows, :6], wrap_angle(boxes[rows, 6:])], 1)),
            classes=proposals.classes[b, valid],
            scores=quality[rows],
            class_scores=torch.sigmoid(logits),
            iou_scores=quality[rows],
        )
        found.append(ScoredProposals(detections=detections, logits=logits, features=features[rows]))
    return found
