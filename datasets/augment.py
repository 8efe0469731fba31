"""Augmentation of raw, labeled scans: flips, yaw, scale, and ground-truth sampling.

A movement is a value that moves points and boxes alike and knows its inverse, so that what a network finds in a moved scene can be
brought back. Randomness always comes from a generator that is passed in; nothing here has a state.

    points, boxes ── FlipY ── FlipX ── Yaw ── Scale ──> augmented          (all about the origin, the sensor)

Read next: `gt_sampling.py` for the objects that are pasted, `batches.py` for who calls this.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from typing_extensions import override  # comes with torch; `typing` has it from Python 3.12 on

from ..core.boxes import wrap_angle
from ..core.errors import InvalidInput
from ..core.frame import Frame, labels_of
from ..core.structures import Boxes3D
from .gt_sampling import GtSampler, paste
from .object_sizes import check_scales, check_shift, scale_sizes, shift_sizes


class Movement(ABC):
    """A movement of a whole scene about the sensor. It works on any device.

    Example:
        movement = Compose((FlipY(), Yaw(0.3)))
        moved = movement.frame(frame)
        boxes = movement.inverse().boxes(boxes_found_in_the_moved_scan)
    """

    @abstractmethod
    def points(self, xyz: Tensor) -> Tensor:
        """Move points.

        Args:
            xyz: (N, 3) x, y, z in m.

        Returns:
            (N, 3) moved points.
        """

    @abstractmethod
    def boxes(self, boxes: Tensor) -> Tensor:
        """Move boxes along with the points inside them.

        Args:
            boxes: (N, 7) boxes.

        Returns:
            (N, 7) moved boxes, yaw in [-pi, pi).
        """

    @abstractmethod
    def inverse(self) -> Movement:
        """Return the movement that undoes this one, up to float rounding."""

    def frame(self, frame: Frame) -> Frame:
        """Move a scan and its labels. The calibration is dropped, because the camera picture does not move along.

        Args:
            frame: Any frame.

        Returns:
            The moved frame.
        """
        labels = frame.labels
        if labels is not None:
            labels = replace(labels, boxes=Boxes3D(data=self.boxes(labels.boxes.data)))
        return replace(frame, points=replace(frame.points, xyz=self.points(frame.points.xyz)), labels=labels, calibration=None)


@dataclass(frozen=True)
class FlipY(Movement):
    """Left and right change places: y becomes -y. OpenPCDet calls it `random_flip_along_x`."""

    @override
    def points(self, xyz: Tensor) -> Tensor:
        """Change the sign of y."""
        return xyz * xyz.new_tensor([1, -1, 1])

    @override
    def boxes(self, boxes: Tensor) -> Tensor:
        """Change the sign of y and of the yaw."""
        return _boxes(self.points(boxes[:, :3]), boxes[:, 3:6], -boxes[:, 6])

    @override
    def inverse(self) -> FlipY:
        """A flip undoes itself."""
        return self


@dataclass(frozen=True)
class FlipX(Movement):
    """Front and back change places: x becomes -x. Only for scans of the full turn."""

    @override
    def points(self, xyz: Tensor) -> Tensor:
        """Change the sign of x."""
        return xyz * xyz.new_tensor([-1, 1, 1])

    @override
    def boxes(self, boxes: Tensor) -> Tensor:
        """Change the sign of x and mirror the yaw."""
        return _boxes(self.points(boxes[:, :3]), boxes[:, 3:6], math.pi - boxes[:, 6])

    @override
    def inverse(self) -> FlipX:
        """A flip undoes itself."""
        return self


@dataclass(frozen=True)
class Yaw(Movement):
    """Rotation about the vertical axis."""

    angle: float
    """Radians, counter-clockwise in BEV."""

    @override
    def points(self, xyz: Tensor) -> Tensor:
        """Turn x and y."""
        cos, sin = math.cos(self.angle), math.sin(self.angle)
        x, y, z = xyz.unbind(1)
        return torch.stack([cos * x - sin * y, sin * x + cos * y, z], 1)

    @override
    def boxes(self, boxes: Tensor) -> Tensor:
        """Turn centers and add the angle to the yaw."""
        return _boxes(self.points(boxes[:, :3]), boxes[:, 3:6], boxes[:, 6] + self.angle)

    @override
    def inverse(self) -> Yaw:
        """Turn back."""
        return Yaw(-self.angle)


@dataclass(frozen=True)
class Scale(Movement):
    """Everything becomes larger and farther away by one factor."""

    factor: float
    """The factor, above 0."""

    def __post_init__(self) -> None:
        if not self.factor > 0:
            raise InvalidInput(f"Scale.factor must be positive, found {self.factor}")

    @override
    def points(self, xyz: Tensor) -> Tensor:
        """Scale all coordinates."""
        return xyz * self.factor

    @override
    def boxes(self, boxes: Tensor) -> Tensor:
        """Scale centers and sizes; the yaw stays."""
        return torch.cat([boxes[:, :6] * self.factor, boxes[:, 6:]], 1)

    @override
    def inverse(self) -> Scale:
        """Scale by the reciprocal factor."""
        return Scale(1 / self.factor)


@dataclass(frozen=True)
class Compose(Movement):
    """Several movements in order."""

    movements: tuple[Movement, ...] = ()
    """The movements; the first is applied first. An empty tuple is the identity."""

    @override
    def points(self, xyz: Tensor) -> Tensor:
        """Apply every movement to the points."""
        for movement in self.movements:
            xyz = movement.points(xyz)
        return xyz

    @override
    def boxes(self, boxes: Tensor) -> Tensor:
        """Apply every movement to the boxes."""
        for movement in self.movements:
            boxes = movement.boxes(boxes)
        return boxes

    @override
    def inverse(self) -> Compose:
        """Undo the movements in reverse order."""
        return Compose(tuple(movement.inverse() for movement in reversed(self.movements)))


@dataclass(frozen=True, kw_only=True)
class AugmentationRanges:
    """How far augmentation may move a scene. The defaults are OpenPCDet's for KITTI (`kitti_dataset.yaml`)."""

    flip_x: float = 0.0
    """Probability that front and back change places. Raise it to 0.5 for scans of the full turn."""
    flip_y: float = 0.5
    """Probability that left and right change places. Set it to 0 where traffic keeps to one side and that matters."""
    yaw: tuple[float, float] = (-math.pi / 4, math.pi / 4)
    """Smallest and largest rotation about the vertical axis in radians. Widen it to a full turn for scans of the full turn."""
    scale: tuple[float, float] = (0.95, 1.05)
    """Smallest and largest factor of the whole scene. Widen it if objects of the target have other sizes than those of the source."""
    size_shift: tuple[float, ...] = (0.0, 0.0, 0.0)
    """Meters added to length, width and height of every labeled object (statistical normalization, see `object_sizes.py`): three numbers for
    all classes, or three for each class. Set it to the mean size of the target's objects minus that of the source's."""
    object_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest factor of each labeled object's own size (random object scaling, see `object_sizes.py`)."""
    side_scale: tuple[float, float] = (1.0, 1.0)
    """Smallest and largest further factor of each labeled object's length, width and height alone. Widen it, as to 0.88 and 1.12, where a
    detector must tell proportions (`upcycle --method upcycling_calibrated`)."""

    def __post_init__(self) -> None:
        check_shift(self.size_shift)
        check_scales(self.object_scale, self.side_scale)
        if not (0 <= self.flip_x <= 1 and 0 <= self.flip_y <= 1):
            raise InvalidInput(f"flip_x and flip_y are probabilities in 0..1, found {self.flip_x} and {self.flip_y}")
        if self.yaw[0] > self.yaw[1] or not 0 < self.scale[0] <= self.scale[1]:
            raise InvalidInput(
                f"yaw and scale must have the smallest value first, and scale must be positive; found yaw {self.yaw} and scale {self.scale}"
            )


def sample_augmentation(rng: np.random.Generator, ranges: AugmentationRanges) -> Compose:
    """Draw flips, then a yaw, then a scale. There are always four draws, so a changed range shifts no later randomness.

    Args:
        rng: Source of randomness.
        ranges: How far the movement may go; drawn uniformly.

    Returns:
        The movement.
    """
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
    """Make a training example of a labeled scan: paste and resize objects, move the scene, shuffle points, drop boxes outside.

    Args:
        frame: A labeled frame.
        rng: Source of randomness.
        ranges: How far the scene is moved and objects are resized.
        sampler: Chooses objects to paste; None pastes none.
        keep_range: x0, y0, z0, x1, y1, z1 in m. Boxes whose center leaves it in BEV are dropped; points stay, because the voxelizer
            crops them.

    Returns:
        The example.

    Raises:
        InvalidInput: The frame has no labels.
    """
    if frame.labels is None:
        raise InvalidInput(f"frame {frame.id!r} has no labels and cannot be a labeled example; take it out of the labeled split")
    if sampler is not None:
        frame = paste(frame, sampler.sample(rng, frame.labels))
    if any(ranges.size_shift):
        frame = shift_sizes(frame, ranges.size_shift)
    if (ranges.object_scale, ranges.side_scale) != ((1.0, 1.0), (1.0, 1.0)):
        frame = scale_sizes(frame, ranges.object_scale, rng, sides=ranges.side_scale)
    frame = sample_augmentation(rng, ranges).frame(frame)
    order = torch.from_numpy(rng.permutation(len(frame.points)))
    (labels,) = labels_of([frame])
    center = labels.boxes.data[:, :2]
    low, high = center.new_tensor(keep_range[:2]), center.new_tensor(keep_range[3:5])
    inside = ((center >= low) & (center < high)).all(1)
    return replace(frame, points=frame.points.select(order), labels=labels.select(inside))


def _boxes(center: Tensor, size: Tensor, yaw: Tensor) -> Tensor:
    return torch.cat([center, size, wrap_angle(yaw)[:, None]], 1)
