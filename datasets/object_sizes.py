"""Other sizes for labelled objects: a detector trained on one place's cars finds another place's cars and draws them too large.

An object's points are stretched in its own frame to the new size, heading and the middle of its bottom face stay, so it keeps
standing on the road. Two uses, both from ST3D (Yang et al., CVPR 2021; ``augmentor_utils.py``, ``data_augmentor.py``):

* statistical normalisation (SN, Wang et al., "Train in Germany, test in the USA", CVPR 2020): add the difference of the two places'
  mean sizes. It needs the target's mean size, a statistic that a fleet's operator may know; it is no label of a scene;
* random object scaling (ROS): each object by a factor of its own, so that the detector learns no size by heart.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import rotate_z
from ..core.errors import InvalidInput
from ..core.structures import Boxes3D, Frame
from ..ops.points_in_boxes import points_in_boxes

SMALLEST = 0.1  # m; a shift that would shrink a side below this leaves that object alone


def shift_sizes(frame: Frame, shift: tuple[float, float, float]) -> Frame:
    """Every labelled object ``shift`` (length, width, height, m) larger; one that would vanish keeps its size."""
    sizes = _sizes(frame)
    new = sizes + sizes.new_tensor(shift)
    return resize_objects(frame, torch.where((new > SMALLEST).all(1, keepdim=True), new, sizes))


def scale_sizes(frame: Frame, factors: tuple[float, float], rng: np.random.Generator) -> Frame:
    """Every labelled object times a factor of its own, drawn uniformly from ``factors`` (least, most)."""
    if not 0 < factors[0] <= factors[1]:
        raise InvalidInput(f"object factors are (least, most), positive; found {factors}")
    sizes = _sizes(frame)
    drawn = torch.from_numpy(rng.uniform(*factors, size=(len(sizes), 1))).to(sizes)
    return resize_objects(frame, sizes * drawn)


def resize_objects(frame: Frame, sizes: Tensor) -> Frame:
    """``frame`` with its labelled objects at ``sizes`` (N, 3) length, width, height in m, and their points stretched along.

    A background point that a grown box swallows is removed: the object would have hidden it. Raises InvalidInput without labels.
    """
    old = _boxes(frame)
    bottom = old[:, 2] - old[:, 5] / 2
    new = torch.cat([old[:, :2], (bottom + sizes[:, 2] / 2)[:, None], sizes, old[:, 6:]], 1)
    xyz = frame.points.xyz
    owner = points_in_boxes(xyz, old)
    moved = owner >= 0
    box, target = old[owner[moved]], new[owner[moved]]
    local = rotate_z(xyz[moved] - box[:, :3], -box[:, 6])
    stretched = rotate_z(local * (target[:, 3:6] / box[:, 3:6]), box[:, 6]) + target[:, :3]
    points = replace(frame.points, xyz=xyz.index_put((moved,), stretched))
    hidden = ~moved & (points_in_boxes(xyz, new) >= 0)
    assert frame.labels is not None
    labels = replace(frame.labels, boxes=Boxes3D(data=new))
    return replace(frame, points=points.select(~hidden), labels=labels)


def _boxes(frame: Frame) -> Tensor:
    if frame.labels is None:
        raise InvalidInput(f"frame {frame.id!r} has no labels, so its objects cannot be resized")
    return frame.labels.boxes.data


def _sizes(frame: Frame) -> Tensor:
    return _boxes(frame)[:, 3:6]
