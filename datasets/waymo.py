"""Frames from the Waymo Open Dataset, Perception, v1 or v2, without TensorFlow.

Points and boxes are in the vehicle's frame: x forward, y left, z up, z = 0 on the road.

Read next: `waymo_places.py` for the files and splits, `waymo_geometry.py` for the way from range images to points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from ..core.boxes import wrap_angle
from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.frame import Frame
from ..core.ledger import Ledger
from ..core.rig import RigSpec
from ..core.structures import Labels
from .class_names import nearest
from .frame_source import DatasetOrigin, described_origin
from .kitti import with_point_counts
from .waymo_geometry import MOST_POINTS_LEVEL_2, TYPES, WaymoFrame, WaymoObjects, count_no_label_points, frame_points
from .waymo_parquet import SegmentReader, TablePlace
from .waymo_places import FramePlace
from .waymo_proto import read_frame
from .waymo_records import RecordPlace

WAYMO_CLASSES = ("Vehicle", "Pedestrian", "Cyclist")
"""The classes of Waymo's benchmark."""


class WaymoDataset:
    """Frames of the Waymo Open Dataset.

    Point features are "intensity", tanh of the recorded value, which is not bounded (OpenPCDet does the same), and "elongation".

    The dataset keeps the tables of the last v2 segment open, because frames of one segment are fastest in order. So it is not a value,
    and two threads must not share it.

    Attributes:
        places: Where the frames are read from.
        ids: Ids of the frames.
        classes: Names of the class numbers of the labels.

    Example:
        found = find_waymo_frames("waymo", find_waymo_splits("waymo")["val"])
        frames = WaymoDataset([place for part in found.values() for place in part], classes=("Vehicle",))
    """

    def __init__(
        self,
        places: Sequence[FramePlace],
        *,
        classes: Sequence[str] = WAYMO_CLASSES,
        class_map: Mapping[str, str] | None = None,
        second_return: bool = True,
        drop_no_label_zones: bool = True,
        z_shift: float = 0.0,
        with_labels: bool = True,
        root: Path | str | None = None,
    ) -> None:
        """Set up a reader; nothing is read yet.

        Args:
            places: Where the frames are, from `find_waymo_frames`.
            classes: Names of the classes to keep; their order gives the class numbers. Other types (Sign) are dropped.
            class_map: Waymo's type -> your name for it, for example {"Vehicle": "Car"}.
            second_return: Take both echoes of each pulse, as Waymo's own tutorial does. False takes the first echo.
            drop_no_label_zones: Leave out points where nobody labeled, as OpenPCDet does.
            z_shift: Meters added to z of points and boxes. The road already lies near 0 in Waymo's frame.
            with_labels: False leaves `labels` None and never opens lidar_box, which the testing set lacks.
            root: Folder of the download, to be named as the origin.

        Raises:
            InvalidInput: A class or a type of `class_map` does not exist.
        """
        self.places = tuple(places)
        self.ids = tuple(place.id for place in self.places)
        self.classes = tuple(classes)
        self._class_map = dict(class_map or {})
        self._second_return, self._drop_no_label_zones = second_return, drop_no_label_zones
        self._with_labels = with_labels
        self._rig = RigSpec(z_shift=z_shift)
        self._root = root
        self._reader: SegmentReader | None = None  # of the last v2 segment
        _class_indices(self.classes, self._class_map)

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, index: int) -> Frame:
        """Read frame `index`. Raises `InvalidInput` with the frame: what cannot be read, or that it holds no point."""
        place = self.places[index]
        try:
            read = self._read(place, with_points=True, with_objects=self._with_labels)
            points = frame_points(read, second_return=self._second_return, drop_no_label_zones=self._drop_no_label_zones)
            if len(points) == 0:
                images = sum(len(scan.returns) for scan in read.lasers)
                raise InvalidInput(
                    f"none of its {images} range images holds a point; leave the frame out, or read only its labels"
                )
            points = replace(points, xyz=self.rig.from_sensor(points.xyz))
            labels = self._labels(read) if self._with_labels else None
            zones = count_no_label_points(read, second_return=self._second_return) if self._drop_no_label_zones else 0
            reading = Ledger(points=len(points) + zones, points_no_label_zone=zones, types_dropped=self._dropped(read))
        except InvalidInput as error:
            raise InvalidInput(f"frame {place.id}: {error}") from error
        if labels is not None and bool((labels.num_points < 0).any()):
            counted = with_point_counts(labels, points).num_points
            labels = _weighed(replace(labels, num_points=torch.where(labels.num_points < 0, counted, labels.num_points)))
        return Frame(id=place.id, points=points, labels=labels, rig=self.rig, reading=reading)

    @property
    def rig(self) -> RigSpec:
        """What this reader does to scans and boxes; tanh brings the intensity to 0..1 already."""
        return self._rig

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        options = {
            "z_shift": self.rig.z_shift,
            "class_map": self._class_map,
            "second_return": self._second_return,
            "drop_no_label_zones": self._drop_no_label_zones,
            "with_labels": self._with_labels,
        }
        return described_origin("waymo", self._root, options)

    def files_of(self, frame_id: str) -> tuple[Path, ...]:
        """Name the files that a frame is read from; see `FiledSource`.

        Args:
            frame_id: Id of the frame.

        Returns:
            The file of its record, or the tables of its segment.
        """
        source = self._sources[frame_id]
        if isinstance(source, RecordPlace):
            return (source.path,)
        return tuple(sorted(source.root.glob(f"*/{source.segment}.parquet"))) if isinstance(source, TablePlace) else ()

    @cached_property
    def _sources(self) -> dict[str, RecordPlace | TablePlace | str]:
        return {place.id: place.source for place in self.places}

    def labels(self, index: int) -> Labels:
        """Read the labels of a frame without its range images, for a frame that has none.

        Args:
            index: Position of the frame.

        Returns:
            The labels; unknown point counts stay -1.

        Raises:
            InvalidInput: With the frame: what cannot be read.
        """
        place = self.places[index]
        try:
            return self._labels(self._read(place, with_points=False, with_objects=True))
        except InvalidInput as error:
            raise InvalidInput(f"frame {place.id}: {error}") from error

    def _labels(self, read: WaymoFrame) -> Labels:
        if read.objects is None:
            raise InvalidInput("its labels were not read")
        labels = labels_from_waymo(read.objects, self.classes, self._class_map)
        return replace(labels, boxes=self.rig.from_sensor(labels.boxes))

    def _dropped(self, read: WaymoFrame) -> Mapping[str, int]:
        """Number of objects that no class wants, by Waymo's type."""
        if read.objects is None or not self._with_labels:
            return {}
        wanted = _class_indices(self.classes, self._class_map)
        return Counter(TYPES.get(t, f"type {t}") for t in read.objects.types.tolist() if t not in wanted)

    def _read(self, place: FramePlace, *, with_points: bool, with_objects: bool) -> WaymoFrame:
        source = place.source
        if isinstance(source, str):
            raise InvalidInput(source)
        if isinstance(source, RecordPlace):
            return read_frame(source)
        if self._reader is None or (self._reader.root, self._reader.segment) != (source.root, source.segment):
            self._reader = SegmentReader(source.root, source.segment)
        return self._reader.frame(source.timestamp, with_points=with_points, with_objects=with_objects)


def labels_from_waymo(objects: WaymoObjects, classes: tuple[str, ...], class_map: Mapping[str, str] | None = None) -> Labels:
    """Translate Waymo's objects into labels, with the boxes unchanged and in the same order.

    Args:
        objects: The objects of a frame.
        classes: Names of the classes to keep; their order gives the class numbers.
        class_map: Waymo's type -> your name for it.

    Returns:
        Labels. `difficulty` is Waymo's level 1 or 2: what the label says, else 2 with at most 5 points
        (`compute_detection_metrics_main.cc`). `weight` is 0 for a box without a point: such a box exists for tracking only, and no
        detector can find it.

    Raises:
        InvalidInput: Waymo has no such class, or a box holds NaN or has no size.
    """
    index = _class_indices(classes, class_map or {})
    wanted = np.isin(objects.types, list(index))
    boxes = torch.from_numpy(objects.boxes[wanted])
    bad = ~(torch.isfinite(boxes).all(1) & (boxes[:, 3:6] > 0).all(1))
    if bad.any():
        i = int(bad.nonzero()[0])
        name = objects.names[int(np.flatnonzero(wanted)[i])]
        raise InvalidInput(
            f"object {name} has the box {boxes[i].tolist()}: NaN, or a size that is not positive; the label is damaged"
        )
    boxes[:, 6] = wrap_angle(boxes[:, 6])
    return _weighed(
        Labels.make(
            boxes.float(),
            torch.tensor([index[t] for t in objects.types[wanted].tolist()], dtype=torch.int64),
            num_points=torch.from_numpy(objects.num_points[wanted]),
            difficulty=torch.from_numpy(objects.levels[wanted]),
        )
    )


def _class_indices(classes: tuple[str, ...], class_map: Mapping[str, str]) -> dict[int, int]:
    """Waymo's type -> number of the class. Raises InvalidInput for classes and maps that do not fit."""
    strangers = [name for name in class_map if name not in TYPES.values()]
    names = {number: class_map.get(name, name) for number, name in TYPES.items()}
    missing = [name for name in classes if name not in names.values()]
    if strangers or missing or not classes:
        wrong = tuple(strangers or missing)
        given = (
            f"; the class map given is {', '.join(f'{shown(k)} {shown(n)}' for k, n in class_map.items())}" if class_map else ""
        )
        near = nearest(wrong[0], tuple(TYPES.values())) if wrong else ""
        raise InvalidInput(
            f"no class {', '.join(map(shown, wrong)) or 'given'}: Waymo has {', '.join(TYPES.values())}{near}; a class map gives a type "
            f"another name, for example --class-map Vehicle Car{given}"
        )
    return {number: classes.index(name) for number, name in names.items() if name in classes}


def _weighed(labels: Labels) -> Labels:
    """Fill in levels that the labels do not say, and weight 0 for boxes without a point, as far as point counts are known."""
    unsaid = (labels.difficulty < 1) | (labels.difficulty > 2)
    by_points = torch.where(labels.num_points <= MOST_POINTS_LEVEL_2, 2, 1)
    by_points = torch.where(labels.num_points < 0, -1, by_points)
    return replace(
        labels,
        difficulty=torch.where(unsaid, by_points, labels.difficulty),
        weight=torch.where(labels.num_points == 0, 0.0, labels.weight),
    )
