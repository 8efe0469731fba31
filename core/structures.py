"""The values that flow through the toolkit.

Every function of this project takes and returns these values or plain tensors; there is no dictionary of everything.
All of them are frozen, hold torch tensors, are checked where they are made, and move with ``to(device)``.

Frame of every coordinate: x forward, y left, z up, metres. Sparse coordinates are (batch, z, y, x). Classes count from 0.

    raw scan ── PointCloud ── encoder ── features at the cut (``features.py``) ── decoder ── Predictions
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from .errors import InvalidInput, require
from .rig import RigSpec


def shape_of(tensor: Tensor) -> str:
    """Shape and type for a message: ``(3, 4) float32``."""
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


class TensorValue:
    """Shared by the values below and in ``features.py``: moving between devices, and a ``repr`` of shapes instead of numbers."""

    def to(self, device: torch.device | str) -> Self:
        """The same value with every tensor on ``device``."""
        moved: dict[str, Any] = {}
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            if isinstance(value, Tensor | TensorValue):
                moved[f.name] = value.to(device)
        return replace(self, **moved)  # type: ignore[type-var]

    def __repr__(self) -> str:
        parts = []
        for f in fields(self):  # type: ignore[arg-type]
            value = getattr(self, f.name)
            parts.append(f"{f.name}={shape_of(value) if isinstance(value, Tensor) else repr(value)}")
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, kw_only=True, repr=False)
class PointCloud(TensorValue):
    """One LiDAR scan.

    xyz: (N, 3) float32, metres, sensor frame (or shifted by the rig's known height).
    features: (N, C) float32; what the columns are stands in ``feature_names``; "intensity" is in 0..1.
    """

    xyz: Tensor
    features: Tensor
    feature_names: tuple[str, ...] = ("intensity",)

    def __post_init__(self) -> None:
        require(self.xyz.ndim == 2 and self.xyz.shape[1] == 3, f"PointCloud.xyz must be (N, 3), found {shape_of(self.xyz)}")
        require(
            self.features.shape == (self.xyz.shape[0], len(self.feature_names)),
            f"PointCloud.features must be ({self.xyz.shape[0]}, {len(self.feature_names)}) for the names "
            f"{self.feature_names}, found {shape_of(self.features)}",
        )

    def __len__(self) -> int:
        return self.xyz.shape[0]

    def select(self, mask_or_index: Tensor) -> PointCloud:
        """The points of a boolean mask or an index, in that order."""
        return replace(self, xyz=self.xyz[mask_or_index], features=self.features[mask_or_index])

    @staticmethod
    def concatenate(clouds: Sequence[PointCloud]) -> PointCloud:
        """All points of ``clouds`` one after the other; the feature names must agree."""
        require(len(clouds) > 0, "PointCloud.concatenate needs at least one cloud")
        names = {c.feature_names for c in clouds}
        require(len(names) == 1, f"cannot concatenate point clouds with different features: {sorted(names)}")
        return replace(clouds[0], xyz=torch.cat([c.xyz for c in clouds]), features=torch.cat([c.features for c in clouds]))


@dataclass(frozen=True, kw_only=True, repr=False)
class Boxes3D(TensorValue):
    """Oriented boxes, (N, 7) float32: x, y, z of the centre, dx (length), dy (width), dz (height), yaw.

    Metres and radians; yaw is 0 along +x, counter-clockwise seen from above, kept in [-pi, pi). Drawn in ``boxes.py``.
    """

    data: Tensor

    def __post_init__(self) -> None:
        require(self.data.ndim == 2 and self.data.shape[1] == 7, f"Boxes3D.data must be (N, 7), found {shape_of(self.data)}")

    def __len__(self) -> int:
        return self.data.shape[0]

    @staticmethod
    def empty() -> Boxes3D:
        return Boxes3D(data=torch.zeros(0, 7))


_LABEL_COLUMNS = ("classes", "num_points", "difficulty", "weight", "exact", "box_weight")


@dataclass(frozen=True, kw_only=True, repr=False)
class Labels(TensorValue):
    """What is known about the objects of one scene, from people, from a teacher or from pasting.

    boxes: (N, 7). classes: (N,) int64 from 0. num_points: (N,) int64, LiDAR points inside, -1 unknown.
    difficulty: (N,) int64, KITTI's 0 easy, 1 moderate, 2 hard, -1 none of them.
    weight: (N,) float32, 1 = learn from it, 0 = ignore: neither object nor background.
    exact: (N,) bool, the box is right to the centimetre (labelled or pasted), so heads that judge quality may learn from it.
    box_weight: (N,) float32, how much box regression learns from it; a teacher may know that a car is there but not its sides.
    complete: what is not labelled is background. False for pseudo labels: a teacher misses objects.
    """

    boxes: Boxes3D
    classes: Tensor
    num_points: Tensor
    difficulty: Tensor
    weight: Tensor
    exact: Tensor
    box_weight: Tensor
    complete: bool = True

    def __post_init__(self) -> None:
        n = len(self.boxes)
        for name in _LABEL_COLUMNS:
            tensor = getattr(self, name)
            require(tensor.shape == (n,), f"Labels.{name} must be ({n},) like the boxes, found {shape_of(tensor)}")

    def __len__(self) -> int:
        return len(self.boxes)

    @staticmethod
    def make(
        boxes: Tensor,
        classes: Tensor,
        *,
        num_points: Tensor | None = None,
        difficulty: Tensor | None = None,
        weight: Tensor | None = None,
        exact: Tensor | bool = True,
        box_weight: Tensor | None = None,
        complete: bool = True,
    ) -> Labels:
        """Labels with the usual defaults: unknown point counts and difficulty, weights 1, exact."""
        n = boxes.shape[0]
        unknown = torch.full((n,), -1, dtype=torch.int64, device=boxes.device)
        return Labels(
            boxes=Boxes3D(data=boxes),
            classes=classes.to(torch.int64),
            num_points=unknown if num_points is None else num_points,
            difficulty=unknown if difficulty is None else difficulty,
            weight=torch.ones(n, device=boxes.device) if weight is None else weight,
            exact=torch.full((n,), exact, device=boxes.device) if isinstance(exact, bool) else exact,
            box_weight=torch.ones(n, device=boxes.device) if box_weight is None else box_weight,
            complete=complete,
        )

    @staticmethod
    def empty(*, complete: bool = True) -> Labels:
        return Labels.make(torch.zeros(0, 7), torch.zeros(0, dtype=torch.int64), complete=complete)

    def select(self, mask_or_index: Tensor) -> Labels:
        """The labels of a boolean mask or an index, in that order."""
        return replace(
            self,
            boxes=Boxes3D(data=self.boxes.data[mask_or_index]),
            **{n: getattr(self, n)[mask_or_index] for n in _LABEL_COLUMNS},
        )

    @staticmethod
    def concatenate(parts: Sequence[Labels]) -> Labels:
        """All labels of ``parts``; the result is complete only if every part is."""
        require(len(parts) > 0, "Labels.concatenate needs at least one part")
        return Labels(
            boxes=Boxes3D(data=torch.cat([p.boxes.data for p in parts])),
            complete=all(p.complete for p in parts),
            **{n: torch.cat([getattr(p, n) for p in parts]) for n in _LABEL_COLUMNS},
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration(TensorValue):
    """From the LiDAR frame to a camera picture (KITTI's rectified left colour camera).

    lidar_to_camera: (4, 4) float64, camera frame x right, y down, z forward, metres.
    projection: (3, 4) float64, camera frame to pixels.
    image_size: (width, height) pixels.
    """

    lidar_to_camera: Tensor
    projection: Tensor
    image_size: tuple[int, int]

    def __post_init__(self) -> None:
        require(
            self.lidar_to_camera.shape == (4, 4),
            f"Calibration.lidar_to_camera must be (4, 4), found {shape_of(self.lidar_to_camera)}",
        )
        require(self.projection.shape == (3, 4), f"Calibration.projection must be (3, 4), found {shape_of(self.projection)}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Frame(TensorValue):
    """One scan with what is known about it. ``labels`` is None where nobody labelled (not the same as no object)."""

    id: str
    points: PointCloud
    labels: Labels | None = None
    calibration: Calibration | None = None
    rig: RigSpec = RigSpec()
    """What was done to points and labels: `rig.to_sensor` brings them back to the sensor frame. The default did nothing."""


def labels_of(frames: Sequence[Frame]) -> list[Labels]:
    """Take the labels out of labeled frames, so that they stay beside the frames' scans.

    Args:
        frames: Frames of a batch, all labeled.

    Returns:
        The labels of each frame, in the same order.

    Raises:
        InvalidInput: Frames have no labels. Leaving them out would give the labels of one frame to the scan of another.
    """
    labels = [frame.labels for frame in frames if frame.labels is not None]
    if len(labels) != len(frames):
        names = [frame.id for frame in frames if frame.labels is None]
        raise InvalidInput(
            f"{len(names)} of {len(frames)} frames have no labels ({', '.join(names[:5])}); "
            "a loss with labels needs labeled frames only"
        )
    return labels


@dataclass(frozen=True, kw_only=True, repr=False)
class Predictions(TensorValue):
    """Detections of one scene, best first.

    boxes: (N, 7). classes: (N,) int64. scores: (N,) in 0..1, what they are ranked by.
    class_scores: (N,) in 0..1, the classifier's own. iou_scores: (N,) in 0..1, the predicted overlap with the truth.
    """

    boxes: Boxes3D
    classes: Tensor
    scores: Tensor
    class_scores: Tensor
    iou_scores: Tensor

    def __len__(self) -> int:
        return len(self.boxes)

    def select(self, mask_or_index: Tensor) -> Predictions:
        return Predictions(
            boxes=Boxes3D(data=self.boxes.data[mask_or_index]),
            **{n: getattr(self, n)[mask_or_index] for n in ("classes", "scores", "class_scores", "iou_scores")},
        )

    @staticmethod
    def empty() -> Predictions:
        zero = torch.zeros(0)
        return Predictions(
            boxes=Boxes3D.empty(), classes=torch.zeros(0, dtype=torch.int64), scores=zero, class_scores=zero, iou_scores=zero
        )


@dataclass(frozen=True, kw_only=True)
class LossTerms:
    """Named scalar losses of one step, already weighted; their sum is what is minimised."""

    terms: dict[str, Tensor] = field(default_factory=dict)

    def total(self) -> Tensor:
        return torch.stack(list(self.terms.values())).sum()

    def scaled(self, factor: float, prefix: str = "") -> LossTerms:
        """Every term times ``factor``, its name behind ``prefix``."""
        return LossTerms(terms={prefix + name: value * factor for name, value in self.terms.items()})

    def merged(self, other: LossTerms) -> LossTerms:
        """The terms of both; the names must not clash."""
        clash = self.terms.keys() & other.terms.keys()
        require(not clash, f"two losses share a name: {sorted(clash)}")
        return LossTerms(terms={**self.terms, **other.terms})

    def first_non_finite(self) -> str | None:
        """The name of the first NaN or infinite term, or None."""
        for name, value in self.terms.items():
            if not np.isfinite(value.item()):
                return name
        return None

    def floats(self) -> dict[str, float]:
        return {name: value.item() for name, value in self.terms.items()}
