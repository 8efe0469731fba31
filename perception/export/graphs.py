"""What of a decoder is exported, as graphs of dense operators, and what stays outside of them.

    map ─ first_stage ─ logits, codes ─ (choose, NMS) ─ regions ─ second_stage ─ scores ─ (choose, NMS) ─ detections

Choosing and NMS have results of no fixed length and are a few lines in any language; a graph would hide them. PV-RCNN also gathers
keypoints around the regions, which needs neighbors: that stays outside too. Every graph is made of the detector's own layers.

Read next: `onnx_folder.py`, which writes them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...ops.roi_grid import roi_grid_sample
from ..models.decoders.bev import height_compression
from ..models.decoders.decoder import Decoder
from ..models.decoders.pv_rcnn import PvRcnnDecoder, RegionHead
from ..models.decoders.second_iou import SecondIouDecoder
from ..models.post_processing import decode_boxes


@dataclass(frozen=True, kw_only=True)
class Port:
    """One input or output of a graph; all hold float32 numbers."""

    name: str
    """Name in the graph."""
    shape: tuple[int | str, ...]
    """Sizes; a word stands for a size that is free, and is the same wherever it stands in one graph."""
    meaning: str
    """What the numbers are, with their units."""


@dataclass(frozen=True, kw_only=True)
class Graph:
    """A part of a decoder that is exported."""

    name: str
    """Name of the file, without suffix."""
    module: nn.Module
    """What computes it here, in evaluation mode."""
    inputs: tuple[Port, ...]
    """Inputs in the order of the module's arguments."""
    outputs: tuple[Port, ...]
    """Outputs in the order of the module's results."""
    feed: Callable[[CutFeatures], tuple[Tensor, ...]]
    """Computes the inputs that the graph gets in a detection, of the features of a batch of scans."""


@dataclass(frozen=True, kw_only=True)
class DecoderGraphs:
    """The exported part of a decoder, and the rest of it in words."""

    graphs: tuple[Graph, ...]
    """The graphs in the order in which a detection runs them."""
    steps: tuple[tuple[str, str], ...]
    """Every step of a detection from the features at the cut on: where it runs, and what it does."""


def decoder_graphs(decoder: Decoder) -> DecoderGraphs:
    """Take a decoder apart into what is exported and what is not.

    Args:
        decoder: A decoder in evaluation mode, on the CPU.

    Returns:
        Its graphs and the steps of a detection.

    Raises:
        InvalidInput: It is neither SECOND-IoU's nor PV-RCNN's decoder, as one with an upcycled head.
    """
    if isinstance(decoder, SecondIouDecoder):
        return _second_iou(decoder)
    if isinstance(decoder, PvRcnnDecoder):
        return _pv_rcnn(decoder)
    raise InvalidInput(
        f"a {type(decoder).__name__} cannot be exported: its head sends each region to some of its experts, and a graph of fixed operators has "
        "no such choice. Export the dense detector that it was made of"
    )


# ---- the first stage, the same in both


class _FirstStage(nn.Module):
    def __init__(self, decoder: SecondIouDecoder | PvRcnnDecoder) -> None:
        super().__init__()
        self.bev_backbone, self.anchor_head, self.anchors = decoder.bev_backbone, decoder.anchor_head, decoder.anchors

    def forward(self, bev: Tensor) -> tuple[Tensor, ...]:
        features = self.bev_backbone(bev)
        return features, *self.anchor_head(features), self.anchors.reshape(-1, 7).clone()


class _Boxes(nn.Module):
    def forward(self, box_codes: Tensor, direction_logits: Tensor, anchors: Tensor) -> Tensor:
        return decode_boxes(box_codes, direction_logits, anchors)


def _first_stage(decoder: SecondIouDecoder | PvRcnnDecoder) -> tuple[Graph, Graph]:
    spec = decoder.spec
    deep, height, width = spec.shape
    anchors, classes = decoder.anchors.numel() // 7, len(decoder.config.anchors)
    module = _FirstStage(decoder)

    def best_anchors(features: CutFeatures) -> tuple[Tensor, ...]:
        _, logits, codes, directions, table = module(height_compression(features.voxels))
        rows = logits[0].amax(1).topk(min(decoder.config.test_proposals.pre, anchors)).indices
        return codes[0, rows], directions[0, rows], table[rows]

    first = Graph(
        name="first_stage",
        module=module,
        inputs=(
            Port(
                name="map",
                shape=("scenes", spec.channels * deep, height, width),
                meaning=f"features at the cut: channel c of the cell (z, y, x) stands in channel c * {deep} + z, row y, column x; 0 in empty cells",
            ),
        ),
        outputs=(
            Port(
                name="features",
                shape=("scenes", decoder.bev_backbone.out_channels, height, width),
                meaning="map that the heads read",
            ),
            Port(
                name="class_logits",
                shape=("scenes", anchors, classes),
                meaning="logit of each class per anchor; anchors in the order row, column, anchor of the cell",
            ),
            Port(
                name="box_codes",
                shape=("scenes", anchors, 7),
                meaning="residuals from the anchor to the box, for the graph `boxes`",
            ),
            Port(
                name="direction_logits",
                shape=("scenes", anchors, 2),
                meaning="logits of the two half turns, for the graph `boxes`",
            ),
            Port(name="anchors", shape=(anchors, 7), meaning="the anchors, always the same: " + _BOX),
        ),
        feed=lambda features: (height_compression(features.voxels),),
    )
    boxes = Graph(
        name="boxes",
        module=_Boxes(),
        inputs=(
            Port(name="box_codes", shape=("rows", 7), meaning="residuals of the chosen anchors"),
            Port(name="direction_logits", shape=("rows", 2), meaning="their logits of the two half turns"),
            Port(name="anchors", shape=("rows", 7), meaning="the chosen anchors"),
        ),
        outputs=(Port(name="boxes", shape=("rows", 7), meaning=_BOX + "; the yaw is not wrapped to one turn"),),
        feed=best_anchors,
    )
    return first, boxes


_BOX = "x, y, z of the center, length, width, height in meters, yaw in radians from x to y; in the shifted frame (the road lies near z = 0)"


def _choice(decoder: SecondIouDecoder | PvRcnnDecoder) -> tuple[tuple[str, str], ...]:
    nms = decoder.config.test_proposals
    return (
        ("first_stage", "compute the map of the heads, and logits and codes of all anchors"),
        (
            "outside",
            f"for each scene, take the {nms.pre} anchors with the highest class logit (the class of an anchor is its best one), in descending order",
        ),
        ("boxes", "turn their codes into boxes"),
        (
            "outside",
            f"rotated NMS in bird's-eye view over all classes: drop a box whose IoU with a better one exceeds {nms.iou:g}; keep {nms.post}: the regions",
        ),
    )


def _final(decoder: SecondIouDecoder | PvRcnnDecoder, score: str) -> tuple[str, str]:
    nms = decoder.config.final
    return (
        "outside",
        f"score = sigmoid({score}); keep scores of at least {nms.score:g}; rotated NMS over all classes with IoU {nms.iou:g}, at most {nms.post} "
        "detections; wrap the yaw to [-pi, pi)",
    )


# ---- SECOND-IoU


class _IouStage(nn.Module):
    def __init__(self, decoder: SecondIouDecoder) -> None:
        super().__init__()
        self.roi_head, self.pool_size = decoder.roi_head, decoder.config.pool_size
        self.origin, self.cell = decoder.spec.grid.range[:2], decoder.spec.cell_size()

    def forward(self, features: Tensor, regions: Tensor) -> Tensor:
        pooled = roi_grid_sample(features, regions, origin=self.origin, cell=self.cell, grid_size=self.pool_size)
        logits: Tensor = self.roi_head(pooled.flatten(0, 1))
        return logits.reshape(regions.shape[0], regions.shape[1])


def _second_iou(decoder: SecondIouDecoder) -> DecoderGraphs:
    first, boxes = _first_stage(decoder)

    def map_and_regions(features: CutFeatures) -> tuple[Tensor, ...]:
        outputs = decoder(features)
        return decoder.bev_map(features), outputs.proposals.boxes

    second = Graph(
        name="second_stage",
        module=_IouStage(decoder),
        inputs=(
            Port(name="features", shape=first.outputs[0].shape, meaning="output of the first stage"),
            Port(
                name="regions",
                shape=("scenes", "regions", 7),
                meaning=_BOX + "; rows that hold no region may hold anything finite",
            ),
        ),
        outputs=(Port(name="iou_logits", shape=("scenes", "regions"), meaning="logit of the predicted 3D IoU with the object"),),
        feed=map_and_regions,
    )
    steps = (*_choice(decoder), ("second_stage", "score the regions"), _final(decoder, "iou_logits"))
    return DecoderGraphs(graphs=(first, boxes, second), steps=steps)


# ---- PV-RCNN


class _KeypointStage(nn.Module):
    def __init__(self, decoder: PvRcnnDecoder) -> None:
        super().__init__()
        self.fusion, self.keypoint_head = decoder.fusion, decoder.keypoint_head

    def forward(self, keypoints: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.keypoint_head(keypoints)
        return self.fusion(keypoints) * torch.sigmoid(logits)[:, None], logits


class _RegionStage(nn.Module):
    def __init__(self, head: RegionHead) -> None:
        super().__init__()
        self.shared_fc_layer, self.cls_layers, self.reg_layers = head.shared_fc_layer, head.cls_layers, head.reg_layers

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        shared = self.shared_fc_layer(pooled.transpose(1, 2).flatten(1)[..., None])
        return self.cls_layers(shared).flatten(), self.reg_layers(shared).flatten(1)


def _pv_rcnn(decoder: PvRcnnDecoder) -> DecoderGraphs:
    first, boxes = _first_stage(decoder)
    head, config = decoder.roi_head, decoder.config
    fused = config.fused_channels

    def keypoints(features: CutFeatures) -> tuple[Tensor, ...]:
        return (decoder._keypoints(features).features,)

    def pooled(features: CutFeatures) -> tuple[Tensor, ...]:
        proposals = decoder(features).proposals
        starts = [0, *proposals.valid.sum(1).cumsum(0).tolist()]
        return (head.pool(proposals.boxes[proposals.valid], starts, decoder._fuse(decoder._keypoints(features))[1]),)

    width = cast(nn.Linear, decoder.fusion[0]).in_features
    below = "the BEV map under the keypoint (bilinear, outside), then " if config.bev_map else ""
    points, channels = config.grid_size**3, config.grid_pooling.out_channels
    fuse = Graph(
        name="keypoints",
        module=_KeypointStage(decoder),
        inputs=(Port(name="keypoints", shape=("keypoints", width), meaning=f"{below}the features of each keypoint at the cut"),),
        outputs=(
            Port(name="fused", shape=("keypoints", fused), meaning="features that the regions gather"),
            Port(name="object_logits", shape=("keypoints",), meaning="logit that the keypoint lies in an object"),
        ),
        feed=keypoints,
    )
    regions = Graph(
        name="second_stage",
        module=_RegionStage(head),
        inputs=(
            Port(
                name="pooled",
                shape=("regions", points, channels),
                meaning=f"features gathered on the {config.grid_size} x {config.grid_size} x {config.grid_size} grid of each region",
            ),
        ),
        outputs=(
            Port(name="quality_logits", shape=("regions",), meaning="logit of the quality of the region"),
            Port(
                name="box_codes",
                shape=("regions", 7),
                meaning="residuals from the region to the refined box, in the frame of the region",
            ),
        ),
        feed=pooled,
    )
    return DecoderGraphs(graphs=(first, boxes, fuse, regions), steps=_pv_rcnn_steps(decoder))


def _pv_rcnn_steps(decoder: PvRcnnDecoder) -> tuple[tuple[str, str], ...]:
    below = "add the BEV map under each keypoint (outside), then " if decoder.config.bev_map else ""
    return (
        *_choice(decoder),
        ("keypoints", f"{below}fuse the features of the keypoints"),
        (
            "outside",
            "gather fused keypoints on the grid of each region (set abstraction: balls, perceptron, maximum; numba here)",
        ),
        ("second_stage", "score and refine the regions"),
        ("outside", "decode the refined boxes (perception/models/post_processing.py, decode_regions)"),
        _final(decoder, "quality_logits"),
    )
