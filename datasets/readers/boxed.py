"""What the readers of other people's layouts share: scans and typed boxes become frames, in one place.

A layout says where its frames lie (`FrameFiles`), and a `BoxFormat` reads one scan and the boxes of one frame, both already with x
forward, y left, z up, in meters and radians, intensity in the sensor's own unit. `BoxedDataset` does the rest: classes, rig, counts.

Read next: `opening.py`, which makes splits; `sustechpoints.py`, the shortest format.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from ...core.boxes import wrap_angle
from ...core.errors import InvalidInput
from ...core.foreign_text import LONGEST_NAME, shown
from ...core.frame import Frame
from ...core.ledger import Ledger
from ...core.rig import RigSpec, count_intensity, scale_intensity
from ...core.structures import Labels, PointCloud
from ..class_names import ClassRule
from ..frame_source import DatasetOrigin, Layout, described_origin
from ..kitti import with_point_counts
from ..kitti_text import count_label_types

LEANING = math.radians(5)
"""Angle between the vertical axes of a box and of the scan from which a box counts as leaning."""


@dataclass(frozen=True, kw_only=True)
class FrameFiles:
    """Where one frame lies on disk."""

    id: str
    """Name of the frame, unique in its dataset."""
    drive: str
    """Name of the drive, log or scene. Frames of one drive show the same objects."""
    scan: Path
    """File of the scan."""
    labels: Path | None
    """File that holds the boxes; None where nobody labeled the frame."""
    key: str = ""
    """How the files name the frame: a time or a number."""


@dataclass(frozen=True, kw_only=True)
class TypedBoxes:
    """The labeled boxes of one frame, with the types of the file."""

    types: tuple[str, ...]
    """N types, as spelled in the file."""
    boxes: Tensor
    """(N, 7) float64 x, y, z of the center, length, width, height in meters and yaw in radians, in the frame of the scan."""
    leaning: int = 0
    """Boxes that lean by more than `LEANING` in the file. Center, sizes and heading are kept; the box is upright here."""
    without_box: Mapping[str, int] = field(default_factory=dict)
    """Objects that the file describes by something else than an upright box (a mask, a box of another LiDAR), by type."""


def typed_boxes(
    where: str, types: Sequence[str], center: Tensor, size: Tensor, rotation: Tensor, without_box: Mapping[str, int] | None = None
) -> TypedBoxes:
    """Check the boxes of a file and set them upright.

    Args:
        where: File and frame, for messages.
        types: N types.
        center: (N, 3) float64 centers in the frame of the scan, in meters.
        size: (N, 3) float64 length along the box's own x axis, width, height in meters.
        rotation: (N, 3, 3) float64 axes of the boxes in the frame of the scan; the first column is the heading.
        without_box: See `TypedBoxes`.

    Returns:
        The boxes in the order of the file.

    Raises:
        InvalidInput: With the number of the object: a type is no text or too long, a number is not finite, or a size is not positive.
    """
    for number, kind in enumerate(types):
        if not isinstance(kind, str) or not kind or len(kind) > LONGEST_NAME:
            raise InvalidInput(f"{where}, object {number}: the type must be a short text, found {shown(repr(kind), most=60)}")
    yaw = wrap_angle(torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0]))
    boxes = torch.cat([center, size, yaw[:, None]], 1)
    bad = ~(boxes.isfinite().all(1) & (size > 0).all(1) & (center.abs() < 1e6).all(1) & (size < 1e4).all(1))
    if bool(bad.any()):
        number = int(bad.nonzero()[0])
        raise InvalidInput(
            f"{where}, object {number} ({shown(types[number], most=60)}): numbers must be finite and sizes positive, found the box "
            f"{[round(value, 4) for value in boxes[number].tolist()]}; correct the label or remove it"
        )
    leaning = rotation[:, 2, 2] < math.cos(LEANING)
    return TypedBoxes(types=tuple(types), boxes=boxes, leaning=int(leaning.sum()), without_box=dict(without_box or {}))


def yaw_matrices(yaw: Tensor) -> Tensor:
    """Turn headings into rotation matrices.

    Args:
        yaw: (N,) float64 headings in radians.

    Returns:
        (N, 3, 3) rotations about z.
    """
    zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
    rows = [[yaw.cos(), -yaw.sin(), zero], [yaw.sin(), yaw.cos(), zero], [zero, zero, one]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def euler_matrices(angles: Tensor, order: str) -> Tensor:
    """Turn Euler angles into rotation matrices.

    Args:
        angles: (N, 3) float64 angles about x, y and z in radians.
        order: "xyz" for R = Rx Ry Rz (three.js, order XYZ), "zyx" for R = Rz Ry Rx.

    Returns:
        (N, 3, 3) rotations.
    """
    zyx = yaw_matrices(angles[:, 2])
    cycle = torch.tensor([1, 2, 0])  # axes x y z -> y z x: a turn about z becomes one about x
    about_x = yaw_matrices(angles[:, 0])[:, [2, 0, 1]][:, :, [2, 0, 1]]
    about_y = yaw_matrices(angles[:, 1])[:, cycle][:, :, cycle]
    return about_x @ about_y @ zyx if order == "xyz" else zyx @ about_y @ about_x


class BoxFormat(Protocol):
    """How the files of one layout are read."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        ...

    def options(self) -> Mapping[str, object]:
        """Say what the user chose about reading; it is compared when a preparation is started again.

        Returns:
            Options that shape the dataset, by name.
        """
        ...

    def scan(self, frame: FrameFiles) -> tuple[PointCloud, Ledger]:
        """Read a scan.

        Args:
            frame: The frame.

        Returns:
            The scan, intensity in the sensor's own unit; and its counts.

        Raises:
            InvalidInput: The scan is missing or broken.
        """
        ...

    def objects(self, frame: FrameFiles) -> TypedBoxes:
        """Read the boxes of a labeled frame.

        Args:
            frame: The frame.

        Returns:
            The boxes in the frame of the scan.

        Raises:
            InvalidInput: The labels are missing or broken.
        """
        ...

    def types(self, labels: Path) -> Counter[str]:
        """Count the objects of a label file by type, without opening a scan.

        Args:
            labels: The file.

        Returns:
            Number of objects by type.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class BoxedDataset:
    """Frames of one layout.

    `frames[i]` raises `InvalidInput` with the frame and the file that is missing or broken, so one bad file costs one frame.
    """

    root: Path
    """Folder of the dataset."""
    format: BoxFormat
    """How its files are read."""
    frames: tuple[FrameFiles, ...]
    """The frames, in this order."""
    classes: tuple[str, ...]
    """Names of the classes to keep; their order gives the class numbers. Case does not matter."""
    class_map: Mapping[str, str] = field(default_factory=dict)
    """Type of the label files -> class."""
    unlabeled: frozenset[str] = frozenset()
    """Ids of frames whose labels are not read."""
    z_shift: float = 0.0
    """Mounting height of the origin in m, added to z of points and boxes so that the road lies near 0."""
    intensity_scale: float = 1.0
    """Factor that brings intensity to 0..1."""

    def __post_init__(self) -> None:
        self._rule  # noqa: B018 - it checks classes and class map
        self.rig  # noqa: B018 - it checks shift and scale

    def __len__(self) -> int:
        return len(self.frames)

    def __getitem__(self, index: int) -> Frame:
        """Read frame `index`."""
        frame = self.frames[index]
        try:
            points, reading = self.format.scan(frame)
            reading = reading + count_intensity(points, self.intensity_scale)
            points = scale_intensity(points, self.intensity_scale)
            points = replace(points, xyz=self.rig.from_sensor(points.xyz)) if self.z_shift else points
            labels = None
            if self.has_labels(frame.id):
                labels, counts = self._labels(self.format.objects(frame))
                labels, reading = with_point_counts(labels, points), reading + counts
        except InvalidInput as error:
            raise InvalidInput(f"frame {frame.id}: {error}") from error
        return Frame(id=frame.id, points=points, labels=labels, rig=self.rig, reading=reading)

    def _labels(self, found: TypedBoxes) -> tuple[Labels, Ledger]:
        numbers = [self._rule.number(kind) for kind in found.types]
        kept = torch.tensor([number is not None for number in numbers], dtype=torch.bool)
        dropped = Counter(kind for kind, number in zip(found.types, numbers) if number is None) + Counter(found.without_box)
        boxes = self.rig.from_sensor(found.boxes[kept]).float()
        boxes[:, 6] = wrap_angle(boxes[:, 6])  # rounding to float32 may reach pi
        labels = Labels.make(boxes, torch.tensor([n for n in numbers if n is not None], dtype=torch.int64))
        return labels, Ledger(types_dropped=dropped, boxes_leaning=found.leaning)

    @cached_property
    def _rule(self) -> ClassRule:
        return ClassRule(self.classes, self.class_map)

    @property
    def rig(self) -> RigSpec:
        """What is done to scans and boxes."""
        return RigSpec(z_shift=self.z_shift, intensity_scale=self.intensity_scale)

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        own = {"z_shift": self.z_shift, "intensity_scale": self.intensity_scale, "class_map": self.class_map}
        return described_origin(self.format.layout, self.root, {**self.format.options(), **own})

    @cached_property
    def _by_id(self) -> Mapping[str, FrameFiles]:
        return {frame.id: frame for frame in self.frames}

    def has_labels(self, frame_id: str) -> bool:
        """Say whether the labels of a frame are read.

        Args:
            frame_id: Id of the frame.

        Returns:
            False for frames of `unlabeled`, and for those that nobody labeled.
        """
        return frame_id not in self.unlabeled and self._by_id[frame_id].labels is not None

    def files_of(self, frame_id: str) -> tuple[Path, ...]:
        """Name the files that a frame is read from; see `FiledSource`.

        Args:
            frame_id: Id of the frame.

        Returns:
            Its scan, and its label file where that is opened.
        """
        frame = self._by_id[frame_id]
        return (frame.scan, *([frame.labels] if frame.labels is not None and self.has_labels(frame_id) else []))

    def label_types(self) -> Mapping[str, int]:
        """Count the objects of all label files by type, without reading a scan. A file that is broken counts as empty here.

        Returns:
            Number of objects by type as spelled in the files.

        Raises:
            InvalidInput: No file can be read.
        """
        labeled = (frame.labels for frame in self.frames if self.has_labels(frame.id))
        return count_label_types(dict.fromkeys(path for path in labeled if path is not None), self.format.types)
