"""SECOND-IoU's server half: features at the cut -> bird's-eye view -> anchors -> proposals -> predicted overlap.

    CutFeatures ─ height compression ─ BevBackbone ─┬─ AnchorHead ─ proposals ─┐
                                                      └── (detached) ─ 7 x 7 pooling of every proposal ─ IouHead ─ IoU

The IoU head judges proposals and does not refine them; its gradient never reaches the map (OpenPCDet ``second_head.py``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.cut import CutSpec
from ....core.features import CutFeatures
from ....core.structures import Labels, LossTerms, Predictions
from ....ops.roi_grid import roi_grid_sample
from ..anchors import KITTI_ANCHORS, AnchorClass, make_anchors
from ..post_processing import FinalNms, ProposalNms, Proposals, propose, select_detections
from ..targets import RoiSampling, iou_quality_target, match_rois
from .bev import AnchorHead, BevBackbone, BevBackboneConfig, DenseLossWeights, DenseOutputs, dense_loss, height_compression
from .decoder import Decoder
from .regions import ScoredProposals, fully_connected, sample_regions, scored_proposals


@dataclass(frozen=True, kw_only=True)
class SecondIouConfig:
    """Everything that shapes the server half; defaults are OpenPCDet's ``kitti_models/second_iou.yaml``."""

    anchors: tuple[AnchorClass, ...] = KITTI_ANCHORS
    bev: BevBackboneConfig = BevBackboneConfig()
    head_channels: int = 256
    pool_size: int = 7
    dropout: float = 0.3
    train_proposals: ProposalNms = ProposalNms(pre=9000, iou=0.8, post=512)
    test_proposals: ProposalNms = ProposalNms(pre=1024, iou=0.7, post=100)
    roi_sampling: RoiSampling = RoiSampling()
    iou_target: tuple[float, float] = (0.25, 0.75)
    final: FinalNms = FinalNms()
    dense_weights: DenseLossWeights = DenseLossWeights()
    iou_weight: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SecondIouOutputs:
    """Raw outputs of a batch: the anchor head's, the proposals, and their IoU logits (B, R)."""

    dense: DenseOutputs
    proposals: Proposals
    iou_logits: Tensor


class IouHead(nn.Module):
    """Pooled features of N regions (N, C, G, G) -> IoU logits (N,)."""

    def __init__(self, in_channels: int, pool_size: int, channels: int, dropout: float) -> None:
        super().__init__()
        self.shared_fc_layer = nn.Sequential(
            *fully_connected(in_channels * pool_size**2, channels), nn.Dropout(dropout), *fully_connected(channels, channels)
        )
        self.iou_layers = nn.Sequential(
            *fully_connected(channels, channels),
            nn.Dropout(dropout),
            *fully_connected(channels, channels),
            nn.Conv1d(channels, 1, 1),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.xavier_normal_(module.weight)

    def shared_features(self, pooled: Tensor) -> Tensor:
        """Compute what the head knows about each region.

        Args:
            pooled: (N, C, G, G) patches of the map under N regions.

        Returns:
            (N, head_channels) features that the overlap is read from.
        """
        return self.shared_fc_layer(pooled.flatten(1)[..., None])[..., 0]

    def iou_logits(self, shared: Tensor) -> Tensor:
        """Read the overlap of each region from its features.

        Args:
            shared: (N, head_channels) what `shared_features` returned.

        Returns:
            (N,) logits of the predicted IoU.
        """
        return self.iou_layers(shared[..., None]).view(-1)

    def forward(self, pooled: Tensor) -> Tensor:
        """Compute (N,) IoU logits of (N, C, G, G) pooled features.

        Args:
            pooled: patches of the map under N regions.

        Returns:
            (N,) logits of the predicted IoU.
        """
        return self.iou_logits(self.shared_features(pooled))


class SecondIouDecoder(Decoder):
    """The server half. ``forward`` gives raw outputs, ``loss`` and ``predict`` are functions of them."""

    anchors: Tensor
    openpcdet_parts: ClassVar[Mapping[str, str]] = {
        "bev_backbone": "backbone_2d",
        "anchor_head": "dense_head",
        "roi_head": "roi_head",
    }
    openpcdet_optional: ClassVar[str | None] = "roi_head"  # SECOND has none

    def __init__(self, spec: CutSpec, config: SecondIouConfig) -> None:
        super().__init__()
        self.spec, self.config = spec, config
        self.bev_backbone = BevBackbone(spec.channels * spec.shape[0], config.bev)
        self.anchor_head = AnchorHead(self.bev_backbone.out_channels, len(config.anchors))
        self.roi_head = IouHead(self.bev_backbone.out_channels, config.pool_size, config.head_channels, config.dropout)
        self.register_buffer("anchors", make_anchors(spec, config.anchors), persistent=False)

    def forward(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> SecondIouOutputs:
        """Outputs of a batch. With ``labels`` (training) regions are sampled around them, else the best proposals are judged."""
        bev = self.bev_backbone(height_compression(features.voxels))
        dense = self.anchor_head(bev)
        proposals = self._propose(dense, labels)
        return SecondIouOutputs(dense=dense, proposals=proposals, iou_logits=self._iou_logits(bev.detach(), proposals))

    @torch.no_grad()
    def _propose(self, dense: DenseOutputs, labels: Sequence[Labels] | None) -> Proposals:
        nms = self.config.test_proposals if labels is None else self.config.train_proposals
        proposals = propose(dense.class_logits, dense.box_codes, dense.direction_logits, self.anchors.view(-1, 7), nms)
        return proposals if labels is None else sample_regions(proposals, labels, self.config.roi_sampling, refine=False)

    def _pool(self, bev: Tensor, proposals: Proposals) -> Tensor:
        """(N, C, G, G) patches of the map under the N valid proposals; padding must not enter the head's batch statistics."""
        origin, cell = self.spec.grid.range[:2], self.spec.cell_size()
        pooled = roi_grid_sample(bev, proposals.boxes, origin=origin, cell=cell, grid_size=self.config.pool_size)
        return pooled[proposals.valid]

    def _iou_logits(self, bev: Tensor, proposals: Proposals) -> Tensor:
        logits = bev.new_zeros(proposals.valid.shape)
        return logits.masked_scatter(proposals.valid, self.roi_head(self._pool(bev, proposals)).to(logits.dtype))

    @torch.no_grad()
    def proposals(self, features: CutFeatures) -> list[ScoredProposals]:
        """Score every proposal with the IoU head.

        Args:
            features: features at the cut, on the device of the weights.

        Returns:
            The scored proposals of every scene, with the feature that the overlap is read from.
        """
        bev = self.bev_backbone(height_compression(features.voxels))
        proposals = self._propose(self.anchor_head(bev), None)
        shared = self.roi_head.shared_features(self._pool(bev, proposals))
        iou = self.roi_head.iou_logits(shared)
        return scored_proposals(proposals, proposals.boxes[proposals.valid], iou, shared)

    def loss(self, outputs: SecondIouOutputs, labels: Sequence[Labels]) -> LossTerms:
        """Class, box, direction and IoU losses of a batch, as OpenPCDet weighs them."""
        dense = dense_loss(outputs.dense, self.anchors, self.config.anchors, labels, self.config.dense_weights)
        return dense.merged(_iou_loss(outputs, self.config, labels))

    @torch.no_grad()
    def predict(self, outputs: SecondIouOutputs) -> list[Predictions]:
        """Detections of every scene; a box is ranked by its predicted IoU."""
        iou, cls = torch.sigmoid(outputs.iou_logits.float()), torch.sigmoid(outputs.proposals.logits)
        p = outputs.proposals
        return [
            select_detections(p.boxes[b, v], p.classes[b, v], iou[b, v], cls[b, v], self.config.final)
            for b, v in enumerate(p.valid)
        ]


def _iou_loss(outputs: SecondIouOutputs, config: SecondIouConfig, labels: Sequence[Labels]) -> LossTerms:
    p, losses, weights = outputs.proposals, [], []
    for b, scene in enumerate(labels):
        matched = match_rois(p.boxes[b], p.classes[b], scene)
        target = iou_quality_target(matched.iou, *config.iou_target)
        losses.append(F.binary_cross_entropy_with_logits(outputs.iou_logits[b].float(), target, reduction="none"))
        weights.append(matched.weight * p.valid[b])
    weight = torch.stack(weights)
    return LossTerms(terms={"iou": config.iou_weight * (torch.stack(losses) * weight).sum() / weight.sum().clamp_min(1)})
