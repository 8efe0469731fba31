"""Anchors of the dense head: two yaws per class at every bird's-eye-view cell."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.cut import CutSpec

ANCHOR_YAWS = (0.0, 1.57)  # the reference's 1.57, not pi / 2


@dataclass(frozen=True, kw_only=True)
class AnchorClass:
    """The anchor of one class.

    size: (length, width, height) m. bottom_z: m, of the anchor's lower face in the model's frame.
    matched: IoU from which an anchor is positive. unmatched: IoU below which it is background.
    """

    name: str
    size: tuple[float, float, float]
    bottom_z: float
    matched: float
    unmatched: float


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
    """(H, W, 2 * classes, 7) anchors on the cut's bird's-eye view; the last but one index is 2 * class + yaw.

    Placed evenly from one end of the range to the other (step = range / (cells - 1)), as OpenPCDet's ``AnchorGenerator`` does.
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
