"""The Waymo Open Dataset, Perception, as frames: v1 TFRecord files or v2 Parquet tables, without TensorFlow.

    root[/training, /validation, /testing]/*.tfrecord                v1: a file per segment, a ``Frame`` message per record
    root[/training, /validation, /testing]/lidar/<segment>.parquet   v2: see ``waymo_parquet``
    root/ImageSets/<split>.txt                                       optional: the segments of a split, one a line

A segment is 20 s of one drive, so neighbouring frames show one street: whatever is split is split by segment. Frames are called
``<segment>_<time in us>``. Points and boxes are in the vehicle's frame: x forward, y left, z up, z = 0 on the road.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from difflib import get_close_matches
from pathlib import Path

import numpy as np
import torch

from ..core.boxes import wrap_angle
from ..core.errors import InvalidInput
from ..core.rig import RigSpec
from ..core.structures import Frame, Labels
from .frame_source import DatasetOrigin, described_origin
from .kitti import read_ids, with_point_counts
from .waymo_geometry import TYPES, WaymoFrame, WaymoObjects, frame_points
from .waymo_parquet import SegmentReader, TablePlace, find_frames
from .waymo_proto import read_frame, read_identity
from .waymo_records import RecordPlace, find_records

WAYMO_CLASSES = ("Vehicle", "Pedestrian", "Cyclist")
MOST_POINTS_LEVEL_2 = 5  # up to so many points an object is hard unless the labeller says otherwise
FOLDERS = {"training": "train", "validation": "val", "testing": "test"}  # folder of the download -> split


@dataclass(frozen=True, kw_only=True)
class FramePlace:
    """Where one frame is read from. source: a record or a table's rows, or the reason why this frame, or all that would follow
    it in the file, cannot be read: such a place stays in the list so that preparation names what was left out."""

    id: str
    segment: str
    source: RecordPlace | TablePlace | str


@dataclass(frozen=True)
class WaymoDataset:
    """The frames at ``places``: a length, and frame i. ``find_waymo_frames`` lists the places.

    classes: names of the labels' classes, counted in this order; Waymo's Vehicle, Pedestrian, Cyclist, or what class_map makes of
        them: {"Vehicle": "Car"}. Other types (Sign) are dropped.
    second_return: take both echoes of each pulse, as Waymo's own tutorial does; False takes the first.
    drop_no_label_zones: leave out points where nobody labelled, as OpenPCDet does.
    z_shift: m, added to z of points and boxes; the road lies near 0 already.
    with_labels: False leaves ``labels`` None and never opens lidar_box: the testing set has none.

    Point features: "intensity", tanh of the recorded value, which is not bounded (OpenPCDet does the same), and "elongation".
    Not for two threads at once: a segment's tables stay open between frames.
    """

    places: tuple[FramePlace, ...]
    classes: tuple[str, ...] = WAYMO_CLASSES
    class_map: Mapping[str, str] = field(default_factory=dict)
    second_return: bool = True
    drop_no_label_zones: bool = True
    z_shift: float = 0.0
    with_labels: bool = True
    root: Path | str | None = None
    _open: list[SegmentReader] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "places", tuple(self.places))
        object.__setattr__(self, "classes", tuple(self.classes))
        _class_indices(self.classes, self.class_map)

    def __len__(self) -> int:
        return len(self.places)

    @property
    def ids(self) -> tuple[str, ...]:
        return tuple(place.id for place in self.places)

    def __getitem__(self, index: int) -> Frame:
        """Frame ``index``. Raises InvalidInput naming the frame: what cannot be read, or that it holds no point."""
        place = self.places[index]
        try:
            read = self._read(place, with_points=True, with_objects=self.with_labels)
            points = frame_points(read, second_return=self.second_return, drop_no_label_zones=self.drop_no_label_zones)
            if len(points) == 0:
                images = sum(len(scan.returns) for scan in read.lasers)
                raise InvalidInput(
                    f"none of its {images} range images holds a point; leave the frame out, or read only its labels"
                )
            points = replace(points, xyz=self.rig.from_sensor(points.xyz))
            labels = self._labels(read) if self.with_labels else None
        except InvalidInput as error:
            raise InvalidInput(f"frame {place.id}: {error}") from error
        if labels is not None and bool((labels.num_points < 0).any()):
            counted = with_point_counts(labels, points).num_points
            labels = _weighed(replace(labels, num_points=torch.where(labels.num_points < 0, counted, labels.num_points)))
        return Frame(id=place.id, points=points, labels=labels, rig=self.rig)

    @property
    def rig(self) -> RigSpec:
        """What the reader does to scans and boxes; tanh has brought the intensity to 0..1 already."""
        return RigSpec(z_shift=self.z_shift)

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        options = {
            "z_shift": self.z_shift,
            "class_map": self.class_map,
            "second_return": self.second_return,
            "drop_no_label_zones": self.drop_no_label_zones,
            "with_labels": self.with_labels,
        }
        return described_origin("waymo", self.root, options)

    def labels(self, index: int) -> Labels:
        """The labels of frame ``index`` without its range images, for a frame that has none; unknown point counts stay -1."""
        place = self.places[index]
        try:
            return self._labels(self._read(place, with_points=False, with_objects=True))
        except InvalidInput as error:
            raise InvalidInput(f"frame {place.id}: {error}") from error

    def _labels(self, read: WaymoFrame) -> Labels:
        assert read.objects is not None  # they were asked for
        labels = labels_from_waymo(read.objects, self.classes, self.class_map)
        return replace(labels, boxes=self.rig.from_sensor(labels.boxes))

    def _read(self, place: FramePlace, *, with_points: bool, with_objects: bool) -> WaymoFrame:
        source = place.source
        if isinstance(source, str):
            raise InvalidInput(source)
        if isinstance(source, RecordPlace):
            return read_frame(source)
        if not self._open or (self._open[0].root, self._open[0].segment) != (source.root, source.segment):
            self._open[:] = [SegmentReader(source.root, source.segment)]
        return self._open[0].frame(source.timestamp, with_points=with_points, with_objects=with_objects)


def labels_from_waymo(objects: WaymoObjects, classes: tuple[str, ...], class_map: Mapping[str, str] | None = None) -> Labels:
    """The objects of ``classes``, boxes as they are, in their order.

    difficulty: Waymo's level, 1 or 2, as the label says, else 2 with up to 5 points (``compute_detection_metrics_main.cc``).
    weight: 0 for a box without a point: it exists for the tracker's sake, and no detector can find it.
    Raises InvalidInput for a class Waymo does not have, or a box with NaN or without a size.
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


def find_waymo_frames(
    root: Path | str, segments: Iterable[str] | None = None, *, every: int = 1
) -> dict[str, tuple[FramePlace, ...]]:
    """Segment -> its frames by time, of ``segments`` or of all below ``root``.

    v1 files are told apart by their content, so only the heads of their records are read; a segment may be named by its context name
    or, as in OpenPCDet's lists, by its file. What cannot be read keeps one place that says why: a segment without files, a damaged
    record (``<file>_record<number>``), the cut-off rest of a file. every: take each n-th frame of a segment, from the first.
    Raises InvalidInput if there is no folder, or nothing of Waymo's in it.
    """
    root = Path(root)
    if every < 1:
        raise InvalidInput(f"every must be at least 1, found {every}")
    folders = [folder for folder in (root, *(root / name for name in FOLDERS)) if folder.is_dir()]
    tables = {path.stem: folder for folder in folders for path in sorted((folder / "lidar").glob("*.parquet"))}
    files = {_segment_name(path.name): path for folder in folders for path in sorted(folder.glob("*.tfrecord"))}
    if not tables and not files:
        raise InvalidInput(
            f"no lidar/<segment>.parquet (v2) and no *.tfrecord (v1) in {root} or its {', '.join(FOLDERS)}; check the root folder"
        )
    found: dict[str, tuple[FramePlace, ...]] = {}
    for name in dict.fromkeys([*tables, *files] if segments is None else map(_segment_name, segments)):
        if name in tables:
            places = _table_places(tables[name], name)
        elif name in files:
            places = _record_places(files[name])
        else:
            near = get_close_matches(name, [*tables, *files], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            places = (FramePlace(id=name, segment=name, source=f"segment {name}: no file of it below {root}{hint}"),)
        if not places:
            places = (FramePlace(id=name, segment=name, source=f"segment {name}: its file holds no frame; copy it again"),)
        found[name] = tuple(p for i, p in enumerate(places) if i % every == 0 or isinstance(p.source, str))
    return found


def find_waymo_splits(root: Path | str, names: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """Split -> its segments: the files of ``ImageSets``, else the folders training (train), validation (val) and testing (test),
    else everything as "all". names: only these. Raises InvalidInput for a split that is not there."""
    root = Path(root)
    lists = {path.stem: path for path in sorted((root / "ImageSets").glob("*.txt"))}
    if lists:
        splits = {name: tuple(map(_segment_name, read_ids(path))) for name, path in lists.items() if not names or name in names}
    else:
        held = {split: root / folder for folder, split in FOLDERS.items() if (root / folder).is_dir()} or {"all": root}
        splits = {
            split: tuple(sorted(p.stem for p in (folder / "lidar").glob("*.parquet")))
            + tuple(sorted(_segment_name(p.name) for p in folder.glob("*.tfrecord")))
            for split, folder in held.items()
            if not names or split in names
        }
    missing = [name for name in names if name not in splits]
    if missing:
        raise InvalidInput(f"no split {', '.join(missing)} in {root}; there are {', '.join(lists or splits) or 'none'}")
    return {name: segments for name, segments in splits.items() if segments}


def segment_of(frame_id: str) -> str:
    """The segment of a frame: what stands before the last "_" of its id."""
    return frame_id.rpartition("_")[0]


def _table_places(root: Path, segment: str) -> tuple[FramePlace, ...]:
    try:
        sources = find_frames(root, segment)
    except InvalidInput as error:
        return (FramePlace(id=segment, segment=segment, source=str(error)),)
    return tuple(FramePlace(id=f"{segment}_{s.timestamp}", segment=segment, source=s) for s in sources)


def _record_places(path: Path) -> tuple[FramePlace, ...]:
    records, problem = find_records(path)
    name = _segment_name(path.name)
    places: list[FramePlace] = []
    seen: set[str] = set()
    for record in records:
        unnamed = FramePlace(id=f"{name}_record{record.index:06d}", segment=name, source=record)
        try:
            segment, timestamp = read_identity(record)
            place = FramePlace(id=f"{segment}_{timestamp}", segment=segment, source=record)
        except InvalidInput:
            place = unnamed  # reading it says what is wrong
        places.append(unnamed if place.id in seen else place)
        seen.add(place.id)
    if problem is not None:
        places.append(FramePlace(id=f"{name}_record{len(records):06d}", segment=name, source=problem))
    return tuple(places)


def _segment_name(text: str) -> str:
    """The context name in a v1 file name, ``segment-<context>_with_camera_labels.tfrecord``; other names without their suffix."""
    return text.removesuffix(".tfrecord").removesuffix("_with_camera_labels").removeprefix("segment-")


def _class_indices(classes: tuple[str, ...], class_map: Mapping[str, str]) -> dict[int, int]:
    """Waymo's type -> number of the class. Raises InvalidInput for classes and maps that do not fit."""
    strangers = [name for name in class_map if name not in TYPES.values()]
    names = {number: class_map.get(name, name) for number, name in TYPES.items()}
    missing = [name for name in classes if name not in names.values()]
    if strangers or missing or not classes:
        raise InvalidInput(
            f"no class {', '.join(strangers or missing) or 'given'}: Waymo has {', '.join(TYPES.values())}; "
            f'for other names use class_map, as {{"Vehicle": "Car"}}; found {dict(class_map)}'
        )
    return {number: classes.index(name) for number, name in names.items() if name in classes}


def _weighed(labels: Labels) -> Labels:
    """Levels where none was given, and weight 0 for boxes without a point, as far as point counts are known."""
    unsaid = (labels.difficulty < 1) | (labels.difficulty > 2)
    by_points = torch.where(labels.num_points <= MOST_POINTS_LEVEL_2, 2, 1)
    by_points = torch.where(labels.num_points < 0, -1, by_points)
    return replace(
        labels,
        difficulty=torch.where(unsaid, by_points, labels.difficulty),
        weight=torch.where(labels.num_points == 0, 0.0, labels.weight),
    )
