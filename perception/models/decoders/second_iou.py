"""SECOND-IoU's server half: features at the cut -> BEV map -> anchors -> proposals -> predicted overlap.

    CutFeatures ─ height compression ─ BevBackbone ─┬─ AnchorHead ─ proposals ─┐
                                                    └── (detached) ─ 7 x 7 pooling of every proposal ─ IouHead ─ IoU

The IoU head scores proposals and does not refine them; its gradient never reaches the map (OpenPCDet `second_head.py`).
`bev.py` has the first stage; `../second_iou.py` joins this half with the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.cut import CutSpec
from ....core.errors import require, require_counts, require_numbers
from ....core.features import CutFeatures
from ....core.structures import Labels, LossTerms, Predictions
from ....ops.roi_grid import roi_grid_sample
from ..anchors import KITTI_ANCHORS, AnchorClass, check_anchors, make_anchors
from ..post_processing import FinalNms, ProposalNms, Proposals, propose, select_detections
from ..targets import DIRECTION_OFFSET, RoiSampling, iou_quality_target, match_rois
from .bev import AnchorHead, BevBackbone, BevBackboneConfig, DenseLossWeights, DenseOutputs, dense_loss, height_compression
from .decoder import Decoder
from .regions import ScoredProposals, fully_connected, padded_regions, sample_regions, scored_by_scene


@dataclass(frozen=True, kw_only=True)
class SecondIouConfig:
    """Everything that shapes the server half; defaults are the values of OpenPCDet's `kitti_models/second_iou.yaml`."""

    anchors: tuple[AnchorClass, ...] = KITTI_ANCHORS
    """The classes, in label order, with their anchors. Change them with the classes or the sizes of the source domain."""
    bev: BevBackboneConfig = BevBackboneConfig()
    """Size of the 2D backbone."""
    head_channels: int = 256
    """Channels of the IoU head."""
    pool_size: int = 7
    """Points along each side of a region at which the BEV map is read."""
    dropout: float = 0.3
    """Dropout of the IoU head in training."""
    train_proposals: ProposalNms = ProposalNms(pre=9000, iou=0.8, post=512)
    """How anchors become proposals in training, before `roi_sampling`."""
    test_proposals: ProposalNms = ProposalNms(pre=1024, iou=0.7, post=100)
    """How anchors become proposals in detection. Raise `post` for scenes with more objects."""
    roi_sampling: RoiSampling = RoiSampling()
    """Which proposals train the IoU head."""
    iou_target: tuple[float, float] = (0.25, 0.75)
    """3D overlaps that count as 0 and as 1 for the IoU head; (0, 1) keeps the overlap itself (ST3D)."""
    final: FinalNms = FinalNms()
    """How scored proposals become detections."""
    dense_weights: DenseLossWeights = DenseLossWeights()
    """Weights of the anchor head's losses."""
    iou_weight: float = 1.0
    """Weight of the IoU head's loss."""
    direction_offset: float = DIRECTION_OFFSET
    """Heading in radians at which the first half turn of the direction classifier begins. Imported weights bring their own."""
    ranked_by: Literal["iou", "class"] = "iou"
    """What ranks the boxes of a scan: the predicted overlap, or the probability of the class as in SECOND. With "class" the IoU head is
    not asked, and the IoU score of a detection is its class score."""

    def __post_init__(self) -> None:
        check_anchors("SecondIouConfig", self.anchors)
        require_counts("SecondIouConfig", head_channels=self.head_channels)
        require_counts("SecondIouConfig", most=256, pool_size=self.pool_size)
        require(0 <= self.dropout <= 1, f"SecondIouConfig.dropout must be in 0..1, found {self.dropout}")
        require_numbers("SecondIouConfig", least=0, most=1, iou_target=self.iou_target)
        low, high = self.iou_target
        require(low < high, f"SecondIouConfig.iou_target must rise, found {low} and {high}")
        require_numbers("SecondIouConfig", least=0, most=1e6, iou_weight=self.iou_weight)
        require_numbers("SecondIouConfig", least=-10, most=10, direction_offset=self.direction_offset)
        require(self.ranked_by in ("iou", "class"), f"SecondIouConfig.ranked_by must be iou or class, found {self.ranked_by!r}")


@dataclass(frozen=True, kw_only=True)
class SecondIouOutputs:
    """Raw outputs of a batch."""

    dense: DenseOutputs
    """Outputs of the anchor head."""
    proposals: Proposals
    """Proposals (B, R), sampled around the labels in training."""
    iou_logits: Tensor
    """(B, R) logits of the predicted IoU, 0 where a proposal is padding."""


class IouHead(nn.Module):
    """Predicts how well a region overlaps with its object, from the patch of the BEV map under it."""

    def __init__(self, in_channels: int, pool_size: int, channels: int, dropout: float) -> None:
        """Make the layers with fresh weights.

        Args:
            in_channels: channels of the map.
            pool_size: points along each side of a patch.
            channels: channels of the layers.
            dropout: dropout in training.
        """
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
        """Predict the overlap of each region.

        Args:
            pooled: (N, C, G, G) patches of the map under N regions.

        Returns:
            (N,) logits of the predicted IoU.
        """
        return self.iou_logits(self.shared_features(pooled))


class SecondIouDecoder(Decoder):
    """The server half. `forward` gives raw outputs, `loss` and `predict` are functions of them."""

    anchors: Tensor
    """(H, W, 2 * classes, 7) anchors of the cut, not stored with the weights."""
    class_parts: tuple[str, ...] = ("anchor_head",)
    branch_parts: ClassVar[tuple[str, ...]] = ("roi_head.iou_layers",)
    wide_parts: ClassVar[tuple[str, ...]] = ("roi_head.shared_fc_layer",)
    openpcdet_parts: ClassVar[Mapping[str, str]] = {
        "bev_backbone": "backbone_2d",
        "anchor_head": "dense_head",
        "roi_head": "roi_head",
    }
    openpcdet_optional: ClassVar[str | None] = "roi_head"  # SECOND has none

    def __init__(self, spec: CutSpec, config: SecondIouConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            spec: the cut whose features it reads.
            config: sizes and settings.
        """
        super().__init__()
        self.spec, self.config = spec, config
        self.grid_points = config.pool_size**2
        self.bev_backbone = BevBackbone(spec.channels * spec.shape[0], config.bev)
        self.anchor_head = AnchorHead(self.bev_backbone.out_channels, len(config.anchors))
        self.roi_head = IouHead(self.bev_backbone.out_channels, config.pool_size, config.head_channels, config.dropout)
        self.register_buffer("anchors", make_anchors(spec, config.anchors), persistent=False)

    def forward(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> SecondIouOutputs:
        """Compute the raw outputs of a batch.

        Args:
            features: features at the cut, on the device of the weights.
            labels: one per scene in training: proposals are sampled around them. Without, the best proposals are scored.

        Returns:
            Raw outputs.
        """
        bev = self.bev_map(features)
        dense = self.anchor_head(bev)
        proposals = self._propose(dense, labels)
        return SecondIouOutputs(dense=dense, proposals=proposals, iou_logits=self._iou_logits(bev.detach(), proposals))

    def bev_map(self, features: CutFeatures) -> Tensor:
        """Compute the map that the heads read.

        Args:
            features: features at the cut, on the device of the weights.

        Returns:
            (B, C, H, W) map with one cell for each cell of the cut.
        """
        bev: Tensor = self.bev_backbone(height_compression(features.voxels))
        return bev

    @torch.no_grad()
    def _propose(self, dense: DenseOutputs, labels: Sequence[Labels] | None) -> Proposals:
        nms = self.config.test_proposals if labels is None else self.config.train_proposals
        proposals = propose(*dense, self.anchors.view(-1, 7), nms, self.config.direction_offset)
        if labels is not None:
            proposals = sample_regions(proposals, labels, self.config.roi_sampling, refine=False)
        self.note_regions(proposals.valid)
        return proposals

    def _pool(self, bev: Tensor, proposals: Proposals) -> Tensor:
        """(N, C, G, G) patches of the map under the N valid proposals: padding must not enter the head's batch statistics."""
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
        bev = self.bev_map(features)
        proposals = self._propose(self.anchor_head(bev), None)
        shared = self.roi_head.shared_features(self._pool(bev, proposals))
        iou = self.roi_head.iou_logits(shared)
        return scored_by_scene(proposals, proposals.boxes[proposals.valid], iou, shared)

    def region_features(self, features: CutFeatures, regions: Sequence[Tensor]) -> Tensor:
        """Compute what the IoU head knows about given regions.

        Args:
            features: features at the cut, on the device of the weights.
            regions: (R, 7) boxes of each scene.

        Returns:
            (N, head_channels) features of all regions, scene by scene.
        """
        bev = self.bev_map(features)
        shared: Tensor = self.roi_head.shared_features(self._pool(bev, padded_regions(regions)))
        return shared

    def loss(self, outputs: SecondIouOutputs, labels: Sequence[Labels]) -> LossTerms:
        """Compute the losses of both stages.

        Args:
            outputs: what `forward` returned.
            labels: one per scene. They need not be the labels that `forward` sampled around.

        Returns:
            Terms `class`, `box`, `direction` and `iou`, with OpenPCDet's weights.
        """
        dense = dense_loss(
            outputs.dense, self.anchors, self.config.anchors, labels, self.config.dense_weights, self.config.direction_offset
        )
        return dense.merged(_iou_loss(outputs, self.config, labels))

    @torch.no_grad()
    def predict(self, outputs: SecondIouOutputs) -> list[Predictions]:
        """Choose the detections of every scene; a box is ranked by its predicted IoU, or by its class (`ranked_by`).

        Args:
            outputs: what `forward` returned without labels.

        Returns:
            Detections of every scene, best first.
        """
        cls = torch.sigmoid(outputs.proposals.logits)
        rank = torch.sigmoid(outputs.iou_logits.float()) if self.config.ranked_by == "iou" else cls
        p = outputs.proposals
        return [
            select_detections(p.boxes[b, v], p.classes[b, v], rank[b, v], cls[b, v], self.config.final)
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
