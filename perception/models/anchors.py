"""Anchors of the dense head: boxes of typical size, two yaws per class, at every BEV cell of the cut.

`targets.py` matches them with labels; `decoders/bev.py` has the head that classifies and moves them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.cut import CutSpec

ANCHOR_YAWS = (0.0, 1.57)  # OpenPCDet's 1.57, not pi / 2: its weights were trained with it


@dataclass(frozen=True, kw_only=True)
class AnchorClass:
    """The anchor of one class, and how well it must fit an object to learn from it."""

    name: str
    """Name of the class in detections and protocols."""
    size: tuple[float, float, float]
    """Length, width and height in meters: the mean of the class in the source domain."""
    bottom_z: float
    """Height in meters of the anchor's lower face: about -1.7 for unshifted scans of a car's roof, 0 for scans whose road is at z = 0."""
    matched: float
    """IoU with an object, axis-aligned in BEV, from which an anchor is positive. Lower it if cells are large for the class."""
    unmatched: float
    """IoU below which an anchor is background; between the two it is ignored."""


KITTI_ANCHORS = (
    AnchorClass(name="Car", size=(3.9, 1.6, 1.56), bottom_z=-1.78, matched=0.60, unmatched=0.45),
    AnchorClass(name="Pedestrian", size=(0.8, 0.6, 1.73), bottom_z=-0.6, matched=0.50, unmatched=0.35),
    AnchorClass(name="Cyclist", size=(1.76, 0.6, 1.73), bottom_z=-0.6, matched=0.50, unmatched=0.35),
)

WAYMO_ANCHORS = (
    AnchorClass(name="Vehicle", size=(4.7, 2.1, 1.7), bottom_z=0.0, matched=0.55, unmatched=0.40),
    AnchorClass(name="Pedestrian", size=(0.91, 0.86, 1.73), bottom_z=0.0, matched=0.50, unmatched=0.35),
    AnchorClass(name="Cyclist", size=(1.78, 0.84, 1.78), bottom_z=0.0, matched=0.50, unmatched=0.35),
)


def make_anchors(spec: CutSpec, classes: tuple[AnchorClass, ...]) -> Tensor:
    """Place the anchors on the BEV cells of a cut.

    They are spread evenly from one end of the range to the other (step = range / (cells - 1)), the same as in OpenPCDet's
    `AnchorGenerator`, and so do not lie exactly on the centers of the cells.

    Args:
        spec: the cut, whose `shape` and range decide where anchors stand.
        classes: one anchor per class, in label order.

    Returns:
        (H, W, 2 * classes, 7) boxes in the shifted frame; the third index is 2 * class + yaw.
    """
    _, height, width = spec.shape
    x0, y0, _, x1, y1, _ = spec.grid.range
    xs = x0 + torch.arange(width) * ((x1 - x0) / max(width - 1, 1))
    ys = y0 + torch.arange(height) * ((y1 - y0) / max(height - 1, 1))
    anchors = torch.zeros(height, width, 2 * len(classes), 7)
    anchors[..., 0] = xs[None, :, None]
    anchors[..., 1] = ys[:, None, None]
    for index, anchor in enumerate(classes):
        for rotation, yaw in enumerate(ANCHOR_YAWS):
            slot = anchors[:, :, 2 * index + rotation]
            slot[..., 2] = anchor.bottom_z + anchor.size[2] / 2
            slot[..., 3:6] = torch.tensor(anchor.size)
            slot[..., 6] = yaw
    return anchors
