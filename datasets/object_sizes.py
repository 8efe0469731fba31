"""Other sizes for labeled objects: a detector trained on one place's cars finds another place's cars but draws them too large.

An object's points are stretched in the object's own frame to the new size. Heading and the middle of the bottom face stay, so the
object keeps standing on the road. Both uses are from ST3D (Yang et al., CVPR 2021; `augmentor_utils.py`, `data_augmentor.py`):

* statistical normalization (SN; Wang et al., "Train in Germany, test in the USA", CVPR 2020) adds the difference between the mean
  sizes of target and source. It needs the target's mean size, a statistic that a fleet's operator may know; no scene is labeled for it;
* random object scaling (ROS) scales each object by its own factor, so that the detector learns no size by heart.

Read next: `augment.py`, which applies both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import rotate_z
from ..core.errors import InvalidInput
from ..core.frame import Frame
from ..core.structures import Boxes3D, Labels
from ..ops.points_in_boxes import points_in_boxes

SMALLEST_SIDE = 0.1  # m; a shift that would make a side shorter leaves that object unchanged
SKIN = 0.1  # m; points this far outside a box still belong to it: a surface lies on the box, and noise puts half of its points outside


def shift_sizes(frame: Frame, shift: Sequence[float]) -> Frame:
    """Make every labeled object of a class larger by the same lengths. An object that would become shorter than `SMALLEST_SIDE` keeps its size.

    Args:
        frame: A labeled frame.
        shift: Meters added to length, width and height, negative values shrink: three numbers for all classes, or three for each class in
            their order.

    Returns:
        The frame with resized objects and their points.

    Raises:
        InvalidInput: The frame has no labels, or the numbers do not fit its classes.
    """
    sizes, classes = _sizes(frame), _labels(frame).classes
    rows = sizes.new_tensor(check_shift(shift)).view(-1, 3)
    if len(rows) > 1 and len(classes) and int(classes.max()) >= len(rows):
        raise InvalidInput(
            f"the size shift has {len(rows)} classes, and frame {frame.id!r} has an object of class {int(classes.max())} (counted from 0); "
            "give three numbers for all classes, or three for each"
        )
    new = sizes + (rows[classes] if len(rows) > 1 else rows)
    return resize_objects(frame, torch.where((new > SMALLEST_SIDE).all(1, keepdim=True), new, sizes))


def check_shift(shift: Sequence[float]) -> tuple[float, ...]:
    """Check the numbers of a size shift.

    Args:
        shift: Meters.

    Returns:
        The numbers.

    Raises:
        InvalidInput: They are not finite, or not three for each class.
    """
    if not shift or len(shift) % 3 or not all(map(math.isfinite, shift)):
        raise InvalidInput(
            f"a size shift is three numbers in meters (length, width, height), or three for each class; found {tuple(shift)}"
        )
    return tuple(shift)


def scale_sizes(
    frame: Frame, factors: tuple[float, float], rng: np.random.Generator, *, sides: tuple[float, float] = (1.0, 1.0)
) -> Frame:
    """Scale every labeled object by its own factor, and each of its sides by a further one.

    Args:
        frame: A labeled frame.
        factors: Smallest and largest factor of an object; drawn uniformly between them.
        rng: Source of randomness.
        sides: Smallest and largest further factor of length, width and height alone. With (1, 1) objects keep their proportions, and a
            detector learns to read one number instead of three.

    Returns:
        The frame with resized objects and their points.

    Raises:
        InvalidInput: The frame has no labels, or the factors are not positive and in order.
    """
    check_scales(factors, sides)
    sizes = _sizes(frame)
    drawn = torch.from_numpy(rng.uniform(*factors, size=(len(sizes), 1))).to(sizes)
    if sides != (1.0, 1.0):
        drawn = drawn * torch.from_numpy(rng.uniform(*sides, size=(len(sizes), 3))).to(sizes)
    return resize_objects(frame, sizes * drawn)


def check_scales(*ranges: tuple[float, float]) -> None:
    """Check ranges of factors by which objects are resized.

    Args:
        ranges: Smallest and largest factor of each.

    Raises:
        InvalidInput: A factor is not finite and positive, or a range has the largest first.
    """
    for low, high in ranges:
        if not 0 < low <= high < math.inf:
            raise InvalidInput(f"object factors must be finite and positive, the smallest first; found {(low, high)}")


def resize_objects(frame: Frame, sizes: Tensor) -> Frame:
    """Give the labeled objects new sizes and stretch their points along.

    Points up to `SKIN` outside a box move with it, except below it, where the road is. Left behind, they would keep showing the old size. A
    background point inside an enlarged box is removed: the object would have hidden it.

    Args:
        frame: A labeled frame.
        sizes: (N, 3) length, width, height in m, one row per label.

    Returns:
        The changed frame.

    Raises:
        InvalidInput: The frame has no labels.
    """
    labels = _labels(frame)
    old = labels.boxes.data
    bottom = old[:, 2] - old[:, 5] / 2
    new = torch.cat([old[:, :2], (bottom + sizes[:, 2] / 2)[:, None], sizes, old[:, 6:]], 1)
    xyz = frame.points.xyz
    owner = points_in_boxes(xyz, old + old.new_tensor([0, 0, SKIN / 2, 2 * SKIN, 2 * SKIN, SKIN, 0]))
    moved = owner >= 0
    box, target = old[owner[moved]], new[owner[moved]]
    local = rotate_z(xyz[moved] - box[:, :3], -box[:, 6])
    stretched = rotate_z(local * (target[:, 3:6] / box[:, 3:6]), box[:, 6]) + target[:, :3]
    points = replace(frame.points, xyz=xyz.index_put((moved,), stretched))
    hidden = ~moved & (points_in_boxes(xyz, new) >= 0)
    return replace(frame, points=points.select(~hidden), labels=replace(labels, boxes=Boxes3D(data=new)))


def _labels(frame: Frame) -> Labels:
    if frame.labels is None:
        raise InvalidInput(f"frame {frame.id!r} has no labels, so its objects cannot be resized")
    return frame.labels


def _sizes(frame: Frame) -> Tensor:
    return _labels(frame).boxes.data[:, 3:6]
