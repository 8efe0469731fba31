"""A frame: a scan with its id and what is known about it. Read next: `structures.py` for its parts, `rig.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .errors import InvalidInput
from .ledger import Ledger
from .rig import RigSpec
from .structures import Labels, PointCloud
from .tensor_value import TensorValue, shape_of


@dataclass(frozen=True, kw_only=True, repr=False)
class Calibration(TensorValue):
    """The way from the LiDAR frame to a camera picture (KITTI's rectified left color camera)."""

    lidar_to_camera: Tensor
    """(4, 4) float64, into the camera frame x right, y down, z forward, in meters."""

    projection: Tensor
    """(3, 4) float64, camera frame to pixels."""

    image_size: tuple[int, int]
    """Width and height in pixels."""

    def __post_init__(self) -> None:
        for name, shape in (("lidar_to_camera", (4, 4)), ("projection", (3, 4))):
            matrix = getattr(self, name)
            if not isinstance(matrix, Tensor) or matrix.shape != shape:
                raise InvalidInput(f"Calibration.{name} must be a tensor {shape}, found {shape_of(matrix)}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Frame(TensorValue):
    """A scan with its id and what is known about it."""

    id: str
    """Name of the frame, unique in its dataset."""

    points: PointCloud
    """The scan."""

    labels: Labels | None = None
    """The objects. None where nobody labeled the frame, which is not the same as no object."""

    calibration: Calibration | None = None
    """The camera, where the dataset has one."""

    rig: RigSpec = RigSpec()
    """What was done to points and labels: `rig.to_sensor` brings them back to the sensor frame. The default did nothing."""

    reading: Ledger = Ledger()
    """What the reader counted and dropped on the way. A reader that counts nothing leaves it empty."""

    def __post_init__(self) -> None:
        if not isinstance(self.id, str):
            raise InvalidInput(f"Frame.id must be a text, found {self.id!r}; give the frame a name")
        if not isinstance(self.rig, RigSpec):
            raise InvalidInput(
                f"Frame.rig must be a RigSpec, found {shape_of(self.rig)}; write RigSpec(z_shift=..., intensity_scale=...)"
            )
        if not isinstance(self.points, PointCloud):
            raise InvalidInput(
                f"Frame.points must be a PointCloud, found {shape_of(self.points)}; make one with PointCloud.from_array"
            )
        if self.labels is not None and not isinstance(self.labels, Labels):
            raise InvalidInput(f"Frame.labels must be Labels or None, found {shape_of(self.labels)}; make them with Labels.make")


def count_ignored(labels: Labels, classes: Sequence[str], reading: Ledger) -> tuple[Tensor, Mapping[str, int]]:
    """Find the labels of a frame that are kept with weight 0, such as KITTI's vans where cars are a class.

    Args:
        labels: The labels.
        classes: Names of the class numbers.
        reading: What the frame's reader counted; it may know the types (`Ledger.types_ignored`).

    Returns:
        (N,) bool, True for these labels; and their number by type, or by class where the reader did not name the types. Where it did
        not, boxes without a point are left out: a reader may give them weight 0 for that alone, and they are counted as such.
    """
    found = are_ignored(labels.weight.tolist(), labels.num_points.tolist(), reading)
    ignored = torch.tensor(found, dtype=torch.bool, device=labels.weight.device)
    types = reading.types_ignored or Counter(classes[number] for number in labels.classes[ignored].tolist())
    return ignored, types


def are_ignored(weights: Sequence[float], num_points: Sequence[int], reading: Ledger) -> list[bool]:
    """Say which labels of a frame `count_ignored` finds, without tensors.

    Args:
        weights: Weight of each label.
        num_points: Points in the box of each label; negative where unknown.
        reading: What the frame's reader counted.

    Returns:
        One value per label.
    """
    return [weight == 0 and (number != 0 or bool(reading.types_ignored)) for weight, number in zip(weights, num_points)]


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
