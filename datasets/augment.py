"""Augmentation of raw, labelled scans: flips, yaw, scale, and ground-truth sampling.

Each movement is a value that moves points and boxes alike and knows its inverse, so that what a network says about a moved scene
can be brought back. Randomness always comes from a generator that is passed in; nothing here has a state.

    points, boxes ── FlipY ── FlipX ── Yaw ── Scale ──> augmented          (all about the origin, the sensor)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ..core.boxes import wrap_angle
from ..core.errors import InvalidInput
from ..core.structures import Boxes3D, Frame
from .gt_database import GtSampler, paste
from .object_sizes import scale_sizes, shift_sizes


class Movement(ABC):
    """A movement of a scene. Points are (N, 3) m, boxes (N, 7) with the yaw wrapped into [-pi, pi); any device."""

    @abstractmethod
    def points(self, xyz: Tensor) -> Tensor:
        """(N, 3) -> (N, 3)."""

    @abstractmethod
    def boxes(self, boxes: Tensor) -> Tensor:
        """(N, 7) -> (N, 7)."""

    @abstractmethod
    def inverse(self) -> Movement:
        """The movement that undoes this one, up to float rounding."""

    def frame(self, frame: Frame) -> Frame:
        """The moved scan with its labels. The calibration is dropped: the camera picture did not move along."""
        labels = frame.labels
        if labels is not None:
            labels = replace(labels, boxes=Boxes3D(data=self.boxes(labels.boxes.data)))
        return replace(frame, points=replace(frame.points, xyz=self.points(frame.points.xyz)), labels=labels, calibration=None)


@dataclass(frozen=True)
class FlipY(Movement):
    """Left and right change places: y -> -y. OpenPCDet calls it ``random_flip_along_x``."""

    def points(self, xyz: Tensor) -> Tensor:
        return xyz * xyz.new_tensor([1, -1, 1])

    def boxes(self, boxes: Tensor) -> Tensor:
        return _boxes(self.points(boxes[:, :3]), boxes[:, 3:6], -boxes[:, 6])

    def inverse(self) -> FlipY:
        return self


@dataclass(frozen=True)
class FlipX(Movement):
    """Front and back change places: x -> -x. For scans all around only."""

    def points(self, xyz: Tensor) -> Tensor:
        return xyz * xyz.new_tensor([-1, 1, 1])

    def boxes(self, boxes: Tensor) -> Tensor:
        return _boxes(self.points(boxes[:, :3]), boxes[:, 3:6], math.pi - boxes[:, 6])

    def inverse(self) -> FlipX:
        return self


@dataclass(frozen=True)
class Yaw(Movement):
    """Rotation about the vertical axis by ``angle`` rad, counter-clockwise from above."""

    angle: float

    def points(self, xyz: Tensor) -> Tensor:
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y, z = xyz.unbind(1)
        return torch.stack([cos * x - sin * y, sin * x + cos * y, z], 1)

    def boxes(self, boxes: Tensor) -> Tensor:
        return _boxes(self.points(boxes[:, :3]), boxes[:, 3:6], boxes[:, 6] + self.angle)

    def inverse(self) -> Yaw:
        return Yaw(-self.angle)


@dataclass(frozen=True)
class Scale(Movement):
    """Everything ``factor`` times as large and as far away."""

    factor: float

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise InvalidInput(f"Scale.factor must be positive, found {self.factor}")

    def points(self, xyz: Tensor) -> Tensor:
        return xyz * self.factor

    def boxes(self, boxes: Tensor) -> Tensor:
        return torch.cat([boxes[:, :6] * self.factor, boxes[:, 6:]], 1)

    def inverse(self) -> Scale:
        return Scale(1 / self.factor)


@dataclass(frozen=True)
class Compose(Movement):
    """Movements one after the other, the first first. Of none, the movement that moves nothing."""

    movements: tuple[Movement, ...] = ()

    def points(self, xyz: Tensor) -> Tensor:
        for movement in self.movements:
            xyz = movement.points(xyz)
        return xyz

    def boxes(self, boxes: Tensor) -> Tensor:
        for movement in self.movements:
            boxes = movement.boxes(boxes)
        return boxes

    def inverse(self) -> Compose:
        return Compose(tuple(movement.inverse() for movement in reversed(self.movements)))


@dataclass(frozen=True, kw_only=True)
class AugmentationRanges:
    """How far ``sample_augmentation`` may go. The defaults are OpenPCDet's for KITTI (``kitti_dataset.yaml``).

    flip_x, flip_y: probabilities of ``FlipX`` and ``FlipY``. yaw: (least, most) rad. scale: (least, most) factor.
    size_shift: m added to length, width, height of every labelled object (statistical normalisation). object_scale: (least, most)
    factor of each object's size (random object scaling). See ``object_sizes.py``; neither does anything by default.
    """

    flip_x: float = 0.0
    flip_y: float = 0.5
    yaw: tuple[float, float] = (-math.pi / 4, math.pi / 4)
    scale: tuple[float, float] = (0.95, 1.05)
    size_shift: tuple[float, float, float] = (0.0, 0.0, 0.0)
    object_scale: tuple[float, float] = (1.0, 1.0)

    def __post_init__(self) -> None:
        if not (0 <= self.flip_x <= 1 and 0 <= self.flip_y <= 1):
            raise InvalidInput(f"flip_x and flip_y are probabilities in 0..1, found {self.flip_x} and {self.flip_y}")
        if self.yaw[0] > self.yaw[1] or not 0 < self.scale[0] <= self.scale[1]:
            raise InvalidInput(f"yaw and scale are (least, most), scale positive; found yaw {self.yaw} and scale {self.scale}")


def sample_augmentation(rng: np.random.Generator, ranges: AugmentationRanges) -> Compose:
    """Flips, then yaw, then scale, drawn uniformly. Always four draws, so that a changed range shifts no later randomness."""
    flip_y, flip_x = rng.random() < ranges.flip_y, rng.random() < ranges.flip_x
    yaw, scale = Yaw(rng.uniform(*ranges.yaw)), Scale(rng.uniform(*ranges.scale))
    return Compose((*([FlipY()] if flip_y else []), *([FlipX()] if flip_x else []), yaw, scale))


def labeled_example(
    frame: Frame,
    rng: np.random.Generator,
    ranges: AugmentationRanges,
    sampler: GtSampler | None,
    keep_range: tuple[float, float, float, float, float, float],
) -> Frame:
    """A labelled scan as the detector is trained on it: objects pasted, resized if asked for, scene moved, points shuffled, boxes outside dropped.

    keep_range: (x0, y0, z0, x1, y1, z1) m; boxes whose centre leaves it seen from above (x, y) are dropped, points stay (the
    voxeliser crops them). Raises ``InvalidInput`` for a frame without labels.
    """
    if frame.labels is None:
        raise InvalidInput(
            f"frame {frame.id!r} has no labels and cannot be a labelled example; take it out of the labelled split"
        )
    if sampler is not None:
        frame = paste(frame, sampler.sample(rng, frame.labels))
    if any(ranges.size_shift):
        frame = shift_sizes(frame, ranges.size_shift)
    if ranges.object_scale != (1.0, 1.0):
        frame = scale_sizes(frame, ranges.object_scale, rng)
    frame = sample_augmentation(rng, ranges).frame(frame)
    order = torch.from_numpy(rng.permutation(len(frame.points)))
    assert frame.labels is not None
    center = frame.labels.boxes.data[:, :2]
    low, high = center.new_tensor(keep_range[:2]), center.new_tensor(keep_range[3:5])
    inside = ((center >= low) & (center < high)).all(1)
    return replace(frame, points=frame.points.select(order), labels=frame.labels.select(inside))


def _boxes(center: Tensor, size: Tensor, yaw: Tensor) -> Tensor:
    return torch.cat([center, size, wrap_angle(yaw)[:, None]], 1)
