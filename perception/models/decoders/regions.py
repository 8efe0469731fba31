"""What second stages share: which proposals they train on, and the layers of their heads (OpenPCDet ``roi_head_template.py``)."""

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
    """A layer of a region head: (N, c_in, 1) -> (N, c_out, 1), batch norm and ReLU; a 1 x 1 convolution as in the reference."""
    return [nn.Conv1d(c_in, c_out, 1, bias=False), RowBatchNorm(c_out), nn.ReLU()]


def sample_regions(proposals: Proposals, labels: Sequence[Labels], sampling: RoiSampling, *, refine: bool) -> Proposals:
    """Proposals that the second stage trains on: those a quality head may learn from and, with ``refine``, those whose box may be
    refined. A scene with too few has fewer valid ones."""
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


def region_grid(regions: Tensor, size: int) -> Tensor:
    """Centres (N, size^3, 3) m of the cells that cut each region (N, 7) into ``size`` parts along every side, turned with it.

    Flat index (ix * size + iy) * size + iz, ix along the length. Source: OpenPCDet ``pvrcnn_head.py``, ``get_dense_grid_points``.
    """
    steps = (torch.arange(size, device=regions.device, dtype=regions.dtype) + 0.5) / size - 0.5
    unit = torch.cartesian_prod(steps, steps, steps).view(-1, 3)
    local = unit * regions[:, None, 3:6]
    return rotate_z(local, regions[:, None, 6]) + regions[:, None, :3]


@dataclass(frozen=True, kw_only=True)
class ScoredProposals:
    """The proposals of one scene before the final suppression. detections: all of them, in the order of the proposals.

    logits: (R,) of the anchor head for the proposal's class. An anchor learns the logit of its own class alone, so this and the class
    are all that the head says. features: (R, C) the second stage's shared feature, from which it judged the proposal.
    """

    detections: Predictions
    logits: Tensor
    features: Tensor


def scored_proposals(proposals: Proposals, boxes: Tensor, quality_logits: Tensor, features: Tensor) -> list[ScoredProposals]:
    """Scenes apart, from rows of all N valid proposals one scene after the other: boxes (N, 7), logits (N,), features (N, C)."""
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
