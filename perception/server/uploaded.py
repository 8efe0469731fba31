"""What the server knows about a scan of which a vehicle sent features: perhaps not all of it.

Where the encoder carries defences, labeled scans on the server pass them too (`UpcycleConfig.labeled_as_sent` says how many), and a scene
may be partial: whole places were not sent.
An empty cell there is no background, and an object there cannot be seen; neither may teach the decoder anything.

Read next: `perception/models/encoders/defended.py`, which says what is sent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from ...core.features import CutFeatures
from ...core.structures import Labels, PointCloud
from ..models.detector import Detector
from ..models.footprint import footprint
from .store import quantize_features

SEEN_MARGIN = 2
"""Cells around a cell that was sent of which is known that nothing is there, if they are empty."""


def features_as_uploaded(detector: Detector, points: Sequence[PointCloud], codec: str) -> CutFeatures:
    """Compute the features that the decoder would read of scans if vehicles had sent them: through the defences and the codec.

    Args:
        detector: Its encoder computes the features.
        points: One scan per scene, in the shifted frame.
        codec: "fp16" or "int8".

    Returns:
        Features for the decoder, without gradient. Where the encoder carries no defence they are those of `encode`, rounded by the codec.
    """
    return detector.encoder.restore(quantize_features(detector.upload(points), codec))


def seen_cells(scene: CutFeatures) -> Tensor:
    """Find the places of which a scene shows what is there.

    Args:
        scene: One scene.

    Returns:
        (H, W) bool of the BEV map: columns with a cell, and their surroundings up to `SEEN_MARGIN` cells.
    """
    _, height, width = scene.spec.shape
    coords = scene.voxels.coords.long()
    sent = torch.zeros(1, 1, height, width, device=coords.device)
    sent[0, 0, coords[:, 2], coords[:, 3]] = 1
    return F.max_pool2d(sent, 2 * SEEN_MARGIN + 1, stride=1, padding=SEEN_MARGIN)[0, 0] > 0


def only_seen(labels: Labels, scene: CutFeatures) -> Labels:
    """Restrict the labels of a partial scene to what it shows.

    Args:
        labels: Labels of the scene.
        scene: The scene, of which parts may be missing.

    Returns:
        The same labels with `seen`. A label of whose place no cell was sent has weight 0.
    """
    _, height, width = scene.spec.shape
    coords = scene.voxels.coords.long()
    sent = torch.zeros(height, width, dtype=torch.bool, device=coords.device)
    sent[coords[:, 2], coords[:, 3]] = True
    shown = (footprint(labels.boxes.data.to(coords.device), scene.spec, 0.0) & sent).flatten(1).any(1)
    return replace(labels, weight=labels.weight * shown.to(labels.weight.device), seen=seen_cells(scene))
