"""PV-RCNN's server half: a BEV stage that proposes, and keypoints that refine.

    CutFeatures ─┬─ voxels ─ height compression ─ BevBackbone ─ AnchorHead ─ proposals ──────────┐
                 └─ keypoints ─┬─ fusion ────────────────── × score ─ 6 x 6 x 6 grid of every proposal ─ RegionHead
                               └─ KeypointHead: in an object? ─┘                                  ├─ class: how good is it
                                                                                                  └─ box: refined

Source: Shi et al., PV-RCNN (2020), sections 3.3 and 3.4; OpenPCDet `point_head_simple.py`, `pvrcnn_head.py`. `bev.py` has the first
stage, `pv_rcnn_loss.py` the losses of keypoints and regions; `../pv_rcnn.py` joins this half with the encoder.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec
from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.features import CutFeatures, Keypoints
from ....core.structures import Labels, LossTerms, Predictions
from ..anchors import KITTI_ANCHORS, AnchorClass, check_anchors, make_anchors
from ..encoders.norm import RowBatchNorm
from ..encoders.pv_rcnn import bev_under
from ..encoders.set_abstraction import SetAbstraction, SetAbstractionConfig
from ..post_processing import FinalNms, ProposalNms, Proposals, decode_regions, propose, select_detections
from ..targets import DIRECTION_OFFSET, RoiSampling
from .bev import AnchorHead, BevBackbone, BevBackboneConfig, DenseLossWeights, DenseOutputs, dense_loss, height_compression
from .decoder import Decoder
from .pv_rcnn_loss import keypoint_loss, region_loss
from .regions import ScoredProposals, fully_connected, padded_regions, region_grid, sample_regions, scored_by_scene


@dataclass(frozen=True, kw_only=True)
class PvRcnnConfig:
    """Everything that shapes the server half; defaults are the values of OpenPCDet's `kitti_models/pv_rcnn.yaml`."""

    anchors: tuple[AnchorClass, ...] = KITTI_ANCHORS
    """The classes, in label order, with their anchors. Change them with the classes or the sizes of the source domain."""
    bev: BevBackboneConfig = BevBackboneConfig()
    """Size of the 2D backbone."""
    fused_channels: int = 128
    """Channels of a keypoint after fusion."""
    keypoint_channels: int = 256
    """Channels of the head that tells whether a keypoint lies in an object."""
    grid_size: int = 6
    """Grid points along each side of a region; their number is the cube of it."""
    grid_pooling: SetAbstractionConfig = SetAbstractionConfig(channels=(64, 64), radii=(0.8, 1.6), limits=(16, 16))
    """How grid points gather the keypoints around them."""
    head_channels: int = 256
    """Channels of the region head."""
    dropout: float = 0.3
    """Dropout of the region head in training."""
    train_proposals: ProposalNms = ProposalNms(pre=9000, iou=0.8, post=512)
    """How anchors become proposals in training, before `roi_sampling`."""
    test_proposals: ProposalNms = ProposalNms(pre=1024, iou=0.7, post=100)
    """How anchors become proposals in detection. Raise `post` for scenes with more objects."""
    roi_sampling: RoiSampling = RoiSampling()
    """Which proposals train the region head."""
    quality_target: tuple[float, float] = (0.25, 0.75)
    """3D overlaps that count as quality 0 and 1; (0, 1) keeps the overlap itself (ST3D)."""
    final: FinalNms = FinalNms(iou=0.1)
    """How refined proposals become detections."""
    dense_weights: DenseLossWeights = DenseLossWeights()
    """Weights of the anchor head's losses."""
    direction_offset: float = DIRECTION_OFFSET
    """Heading in radians at which the first half turn of the direction classifier begins. Imported weights bring their own."""
    bev_map: bool = False
    """Whether the decoder computes the BEV map under the keypoints. True goes with `bev_map=False` of the encoder, which then does not
    send it."""

    def __post_init__(self) -> None:
        check_anchors("PvRcnnConfig", self.anchors)
        require_counts(
            "PvRcnnConfig",
            fused_channels=self.fused_channels,
            keypoint_channels=self.keypoint_channels,
            head_channels=self.head_channels,
        )
        require_counts("PvRcnnConfig", most=64, grid_size=self.grid_size)
        require(0 <= self.dropout <= 1, f"PvRcnnConfig.dropout must be in 0..1, found {self.dropout}")
        require_numbers("PvRcnnConfig", least=0, most=1, quality_target=self.quality_target)
        require_numbers("PvRcnnConfig", least=-10, most=10, direction_offset=self.direction_offset)
        low, high = self.quality_target
        require(low < high, f"PvRcnnConfig.quality_target must rise, found {low} and {high}")


@dataclass(frozen=True, kw_only=True)
class PvRcnnOutputs:
    """Raw outputs of a batch."""

    dense: DenseOutputs
    """Outputs of the anchor head."""
    keypoints: Keypoints
    """The K keypoints, with their features at the cut, and the BEV map under them first."""
    keypoint_logits: Tensor
    """(K,) logits that a keypoint lies in an object."""
    proposals: Proposals
    """Proposals (B, R), sampled around the labels in training."""
    quality_logits: Tensor
    """(B, R) logits of the quality of each proposal, 0 where it is padding."""
    box_codes: Tensor
    """(B, R, 7) residuals from each proposal to its refined box, 0 where it is padding."""


class KeypointHead(nn.Module):
    """Tells whether a keypoint lies in an object, from its features before fusion."""

    def __init__(self, in_channels: int, channels: int) -> None:
        """Make the layers with fresh weights.

        Args:
            in_channels: channels of a keypoint at the cut.
            channels: channels of the layers.
        """
        super().__init__()
        self.cls_layers = nn.Sequential(*_linear(in_channels, channels), *_linear(channels, channels), nn.Linear(channels, 1))

    def forward(self, features: Tensor) -> Tensor:
        """Classify keypoints.

        Args:
            features: (K, in_channels) features at the cut.

        Returns:
            (K,) logits that the keypoint lies in an object.
        """
        return self.cls_layers(features).squeeze(1)


class RegionHead(nn.Module):
    """Scores and refines regions, from keypoints gathered on a grid in each."""

    def __init__(self, config: PvRcnnConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            config: sizes and settings of the decoder.
        """
        super().__init__()
        self.grid_size = config.grid_size
        self.roi_grid_pool_layer = SetAbstraction(config.fused_channels, config.grid_pooling)
        c, pooled = config.head_channels, config.grid_size**3 * config.grid_pooling.out_channels
        self.shared_fc_layer = nn.Sequential(*fully_connected(pooled, c), nn.Dropout(config.dropout), *fully_connected(c, c))
        self.cls_layers, self.reg_layers = (
            nn.Sequential(*fully_connected(c, c), nn.Dropout(config.dropout), *fully_connected(c, c), nn.Conv1d(c, outputs, 1))
            for outputs in (1, 7)
        )
        for module in self.modules():
            if isinstance(module, nn.Conv1d):
                nn.init.xavier_normal_(module.weight)
        nn.init.normal_(self.reg_layers[-1].weight, std=0.001)  # type: ignore[arg-type]

    def pool(self, regions: Tensor, starts: Sequence[int], keypoints: Keypoints) -> Tensor:
        """Gather keypoints on the grids of regions.

        Args:
            regions: (N, 7) boxes, the scenes in order.
            starts: B + 1 bounds of the scenes in the rows of `regions`.
            keypoints: keypoints with fused features.

        Returns:
            (N, grid_size^3, C) features of the grid points.
        """
        points = self.grid_size**3
        centers = region_grid(regions, self.grid_size).view(-1, 3)
        pooled = self.roi_grid_pool_layer(
            centers, [points * s for s in starts], keypoints.xyz, keypoints.starts, keypoints.features
        )
        return pooled.view(len(regions), points, self.roi_grid_pool_layer.config.out_channels)

    def shared_features(self, regions: Tensor, starts: Sequence[int], keypoints: Keypoints) -> Tensor:
        """Compute what the head knows about each region.

        Args:
            regions: (N, 7) boxes, the scenes in order.
            starts: B + 1 bounds of the scenes in the rows of `regions`.
            keypoints: keypoints with fused features.

        Returns:
            (N, head_channels) features that quality and refinement are read from.
        """
        pooled = self.pool(regions, starts, keypoints).transpose(1, 2)  # OpenPCDet flattens channel by channel
        return self.shared_fc_layer(pooled.flatten(1)[..., None])[..., 0]

    def quality_and_codes(self, shared: Tensor) -> tuple[Tensor, Tensor]:
        """Read quality and refinement of each region from its features.

        Args:
            shared: (N, head_channels) what `shared_features` returned.

        Returns:
            (N,) quality logits and (N, 7) box codes.
        """
        return self.cls_layers(shared[..., None]).view(-1), self.reg_layers(shared[..., None]).view(-1, 7)

    def forward(self, regions: Tensor, starts: Sequence[int], keypoints: Keypoints) -> tuple[Tensor, Tensor]:
        """Score and refine regions.

        Args:
            regions: (N, 7) boxes, the scenes in order.
            starts: B + 1 bounds of the scenes in the rows of `regions`.
            keypoints: keypoints with fused features.

        Returns:
            (N,) quality logits and (N, 7) box codes.
        """
        return self.quality_and_codes(self.shared_features(regions, starts, keypoints))


def _linear(c_in: int, c_out: int) -> list[nn.Module]:
    return [nn.Linear(c_in, c_out, bias=False), RowBatchNorm(c_out), nn.ReLU()]


class PvRcnnDecoder(Decoder):
    """The server half. `forward` gives raw outputs, `loss` and `predict` are functions of them."""

    anchors: Tensor
    """(H, W, 2 * classes, 7) anchors of the cut, not stored with the weights."""
    class_parts: tuple[str, ...] = ("anchor_head",)
    branch_parts: ClassVar[tuple[str, ...]] = ("roi_head.cls_layers", "roi_head.reg_layers")
    wide_parts: ClassVar[tuple[str, ...]] = ("roi_head.shared_fc_layer",)
    openpcdet_parts: ClassVar[Mapping[str, str]] = {
        "fusion": "pfe.vsa_point_feature_fusion",
        "keypoint_head": "point_head",
        "bev_backbone": "backbone_2d",
        "anchor_head": "dense_head",
        "roi_head": "roi_head",
    }

    def __init__(self, spec: CutSpec, config: PvRcnnConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            spec: the cut whose features it reads.
            config: sizes and settings.

        Raises:
            InvalidInput: The cut has no keypoints.
        """
        super().__init__()
        if spec.keypoints is None:
            raise InvalidInput(f"PV-RCNN's decoder reads keypoints; the cut {spec.layer!r} has none: use PV-RCNN's encoder")
        self.spec, self.config = spec, config
        self.grid_points = config.grid_size**3
        self.bev_backbone = BevBackbone(spec.channels * spec.shape[0], config.bev)
        self.anchor_head = AnchorHead(self.bev_backbone.out_channels, len(config.anchors))
        channels = spec.keypoints.channels + (spec.channels * spec.shape[0] if config.bev_map else 0)
        self.fusion = nn.Sequential(*_linear(channels, config.fused_channels))
        self.keypoint_head = KeypointHead(channels, config.keypoint_channels)
        self.roi_head = RegionHead(config)
        self.register_buffer("anchors", make_anchors(spec, config.anchors), persistent=False)

    def forward(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> PvRcnnOutputs:
        """Compute the raw outputs of a batch.

        Args:
            features: features at the cut, on the device of the weights.
            labels: one per scene in training: proposals are sampled around them. Without, the best proposals are refined.

        Returns:
            Raw outputs.

        Raises:
            InvalidInput: The features have no keypoints.
        """
        dense = self.anchor_head(self.bev_map(features))
        proposals = self._propose(dense, labels)
        given = self._keypoints(features)
        logits, keypoints = self._fuse(given)
        quality, codes = self.roi_head(proposals.boxes[proposals.valid], _starts(proposals.valid), keypoints)
        return PvRcnnOutputs(
            dense=dense,
            keypoints=given,
            keypoint_logits=logits,
            proposals=proposals,
            quality_logits=_padded(quality, proposals.valid),
            box_codes=_padded(codes, proposals.valid),
        )

    def _keypoints(self, features: CutFeatures) -> Keypoints:
        if features.keypoints is None:
            raise InvalidInput(
                f"PV-RCNN's decoder reads keypoints; the features of the cut {features.spec.layer!r} have none: "
                "encode the scans with PV-RCNN's encoder"
            )
        given = features.keypoints
        if not self.config.bev_map:
            return given
        below = bev_under(given.xyz, given.starts, features.voxels, self.spec)
        return replace(given, features=torch.cat([below.to(given.features.dtype), given.features], 1))

    def _fuse(self, keypoints: Keypoints) -> tuple[Tensor, Keypoints]:
        """Logits (K,) that a keypoint lies in an object, and the keypoints with fused features weighted by that."""
        logits = self.keypoint_head(keypoints.features)
        fused = self.fusion(keypoints.features) * torch.sigmoid(logits)[:, None]
        return logits, Keypoints(xyz=keypoints.xyz, features=fused, starts=keypoints.starts)

    @torch.no_grad()
    def proposals(self, features: CutFeatures) -> list[ScoredProposals]:
        """Score and refine every proposal with the region head.

        Args:
            features: features at the cut, on the device of the weights.

        Returns:
            The proposals of every scene with refined boxes, and the feature that quality and refinement are read from.
        """
        keypoints = self._fuse(self._keypoints(features))[1]
        p = self._propose(self.anchor_head(self.bev_map(features)), None)
        boxes = p.boxes[p.valid]
        shared = self.roi_head.shared_features(boxes, _starts(p.valid), keypoints)
        quality, codes = self.roi_head.quality_and_codes(shared)
        return scored_by_scene(p, decode_regions(codes.float(), boxes), quality, shared)

    def region_features(self, features: CutFeatures, regions: Sequence[Tensor]) -> Tensor:
        """Compute what the region head knows about given regions.

        Args:
            features: features at the cut, on the device of the weights.
            regions: (R, 7) boxes of each scene.

        Returns:
            (N, head_channels) features of all regions, scene by scene.
        """
        given = padded_regions(regions)
        keypoints = self._fuse(self._keypoints(features))[1]
        shared: Tensor = self.roi_head.shared_features(given.boxes[given.valid], _starts(given.valid), keypoints)
        return shared

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
            proposals = sample_regions(proposals, labels, self.config.roi_sampling, refine=True)
        self.note_regions(proposals.valid)
        return proposals

    def loss(self, outputs: PvRcnnOutputs, labels: Sequence[Labels]) -> LossTerms:
        """Compute the losses of the anchors, the keypoints and the regions.

        Args:
            outputs: what `forward` returned.
            labels: one per scene. They need not be the labels that `forward` sampled around.

        Returns:
            Terms `class`, `box`, `direction`, `keypoint`, `roi_quality`, `roi_box` and `roi_corner`, with OpenPCDet's weights.
        """
        p = outputs.proposals
        dense = dense_loss(
            outputs.dense, self.anchors, self.config.anchors, labels, self.config.dense_weights, self.config.direction_offset
        )
        regions = region_loss(p, outputs.quality_logits, outputs.box_codes, labels, self.config.quality_target)
        return dense.merged(keypoint_loss(outputs.keypoints, outputs.keypoint_logits, labels)).merged(regions)

    @torch.no_grad()
    def predict(self, outputs: PvRcnnOutputs) -> list[Predictions]:
        """Choose the refined detections of every scene, ranked by their predicted quality.

        Args:
            outputs: what `forward` returned without labels.

        Returns:
            Detections of every scene, best first.
        """
        p = outputs.proposals
        boxes = decode_regions(outputs.box_codes.float(), p.boxes)
        quality, cls = torch.sigmoid(outputs.quality_logits.float()), torch.sigmoid(p.logits)
        return [
            select_detections(boxes[b, v], p.classes[b, v], quality[b, v], cls[b, v], self.config.final)
            for b, v in enumerate(p.valid)
        ]


def _starts(valid: Tensor) -> list[int]:
    """(B, R) -> B + 1 bounds of the scenes among the valid entries."""
    return [0, *valid.sum(1).cumsum(0).tolist()]


def _padded(rows: Tensor, valid: Tensor) -> Tensor:
    """Rows (N, ...) of the valid entries -> (B, R, ...), zeros elsewhere."""
    out = rows.new_zeros(*valid.shape, *rows.shape[1:])
    out[valid] = rows
    return out
