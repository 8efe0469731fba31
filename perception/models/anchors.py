"""Anchors of the dense head: boxes of typical size, two yaws per class, at every BEV cell of the cut.

`targets.py` matches them with labels; `decoders/bev.py` has the head that classifies and moves them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.cut import CutSpec
from ...core.errors import InvalidInput, require, require_numbers
from ...core.foreign_text import is_one_name, shown

MAX_CLASSES = 1000
MAX_ANCHORS = 1 << 23
"""Most anchors of a detector, 0.23e9 bytes; OpenPCDet's PV-RCNN for KITTI has 211,200."""
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

    def __post_init__(self) -> None:
        require(
            is_one_name(self.name), f"{shown(repr(self.name))} cannot be the name of a class; give a printable name, such as Car"
        )
        require(
            all(0 < side < math.inf for side in self.size) and math.isfinite(self.bottom_z),
            f"the anchor of {self.name} needs a positive size and a finite bottom_z, found {self.size} and {self.bottom_z}",
        )
        require_numbers("AnchorClass", least=0, most=1000, size=self.size)
        require_numbers("AnchorClass", least=-10_000, most=10_000, bottom_z=self.bottom_z)
        require(
            0 <= self.unmatched <= self.matched <= 1,
            f"the anchor of {self.name} needs 0 <= unmatched <= matched <= 1, found {self.unmatched} and {self.matched}",
        )


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


def check_anchors(owner: str, classes: tuple[AnchorClass, ...]) -> None:
    """Check the number of classes of a decoder.

    Args:
        owner: Class of the decoder's configuration, for the message.
        classes: The anchor of each class.

    Raises:
        InvalidInput: There is no class, there are more than `MAX_CLASSES`, or two have one name.
    """
    require(1 <= len(classes) <= MAX_CLASSES, f"{owner}.anchors must be 1..{MAX_CLASSES} classes, found {len(classes)}")
    names = [c.name for c in classes]
    require(len(set(names)) == len(names), f"{owner}.anchors name a class twice: {', '.join(map(shown, names[:20]))}")


def make_anchors(spec: CutSpec, classes: tuple[AnchorClass, ...]) -> Tensor:
    """Place the anchors on the BEV cells of a cut.

    They are spread evenly from one end of the range to the other (step = range / (cells - 1)), the same as in OpenPCDet's
    `AnchorGenerator`, and so do not lie exactly on the centers of the cells.

    Args:
        spec: the cut, whose `shape` and range decide where anchors stand.
        classes: one anchor per class, in label order.

    Returns:
        (H, W, 2 * classes, 7) boxes in the shifted frame; the third index is 2 * class + yaw.

    Raises:
        InvalidInput: There would be more than `MAX_ANCHORS` anchors.
    """
    _, height, width = spec.shape
    if height * width * 2 * len(classes) > MAX_ANCHORS:
        raise InvalidInput(
            f"{len(classes)} classes on a cut of {height} x {width} cells make more than {MAX_ANCHORS} anchors; use a smaller range, "
            "larger voxels or fewer classes"
        )
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
