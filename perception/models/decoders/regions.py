"""What second stages share: which proposals they train on, and the layers of their heads (OpenPCDet ``roi_head_template.py``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ...boxes import rotate_z
from ...structures import Labels
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
