"""Waymo's v2 files: one Parquet table per segment and component, joined here by segment, time and laser.

    root/lidar/<segment>.parquet               range images: a row per frame and laser
    root/lidar_pose/<segment>.parquet          pixel poses of the TOP laser: a row per frame
    root/lidar_calibration/<segment>.parquet   a row per laser
    root/vehicle_pose/<segment>.parquet        a row per frame
    root/lidar_box/<segment>.parquet           a row per labeled object (not in the testing set)

Columns have names such as `[LiDARComponent].range_image_return1.values` (waymo-open-dataset, `v2/perception`). A real file of range
images packs about fifty frames into a row group of a gigabyte, so rows are streamed and the position in the stream is kept: frames
that are asked for in order cost one pass, while a step back starts the row group again.

Read next: `waymo_geometry.py` for what a frame holds, `waymo_places.py` for the list of frames.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ..core.errors import InvalidInput
from .parquet import PARQUET_FAULTS, read_within, sum_values
from .parquet_footer import declared_values
from .waymo_geometry import Image, LaserScan, Matrix, WaymoFrame, WaymoObjects

# Names of the columns.
SEGMENT, TIME, LASER, OBJECT = (
    "key.segment_context_name",
    "key.frame_timestamp_micros",
    "key.laser_name",
    "key.laser_object_id",
)
RETURNS = tuple(f"[LiDARComponent].range_image_return{i}" for i in (1, 2))  # each .values and .shape
PIXEL_POSE = "[LiDARPoseComponent].range_image_return1"
VEHICLE_POSE = "[VehiclePoseComponent].world_from_vehicle.transform"
EXTRINSIC = "[LiDARCalibrationComponent].extrinsic.transform"
INCLINATION = "[LiDARCalibrationComponent].beam_inclination"  # .min, .max and .values
BOX = "[LiDARBoxComponent].box"
BOX_COLUMNS = tuple(f"{BOX}.{name}" for name in ("center.x", "center.y", "center.z", "size.x", "size.y", "size.z", "heading"))
TYPE, BOX_POINTS, LEVEL = (
    f"[LiDARBoxComponent].{name}" for name in ("type", "num_lidar_points_in_box", "difficulty_level.detection")
)

_MOST_TABLE_BYTES = 256 << 20  # of a component without images; a real one has a few megabytes
_MOST_ROW_VALUES = 4 << 20  # numbers of the images of one laser and frame; a real row has 1.4 million


@dataclass(frozen=True, kw_only=True)
class TablePlace:
    """Where a frame lies."""

    root: Path
    """Folder that holds the components."""
    segment: str
    """Context name of the sequence."""
    timestamp: int
    """Time in microseconds."""


def find_frames(root: Path, segment: str) -> tuple[TablePlace, ...]:
    """List the frames of a segment that have range images.

    Args:
        root: Folder that holds the components.
        segment: Context name of the sequence.

    Returns:
        The frames in order of time.

    Raises:
        InvalidInput: The table of range images cannot be read.
    """
    times = _Component(root, "lidar", segment, (TIME,)).times
    return tuple(TablePlace(root=root, segment=segment, timestamp=t) for t in sorted(set(times.tolist())))


class SegmentReader:
    """Reads the frames of one segment, fastest in order of time.

    It keeps the tables open and the labels in memory, but no images. Two threads must not share it.
    """

    def __init__(self, root: Path, segment: str) -> None:
        """Set up a reader; a table is opened when it is needed.

        Args:
            root: Folder that holds the components.
            segment: Context name of the sequence.
        """
        self.root, self.segment = root, segment

    def frame(self, timestamp: int, *, with_points: bool = True, with_objects: bool = True) -> WaymoFrame:
        """Read one frame.

        Args:
            timestamp: Time in microseconds.
            with_points: Read the range images, poses and calibrations.
            with_objects: Read the labels.

        Returns:
            The frame.

        Raises:
            InvalidInput: With table and time: something is missing or damaged.
        """
        return WaymoFrame(
            segment=self.segment,
            timestamp=timestamp,
            pose=self._pose(timestamp) if with_points else None,
            lasers=tuple(self._lasers(timestamp)) if with_points else (),
            objects=self._objects(timestamp) if with_objects else None,
        )

    @cached_property
    def _lidar(self) -> _Component:
        return _Component(self.root, "lidar", self.segment, (TIME, LASER, *_image_columns(*RETURNS)))

    @cached_property
    def _pixel_poses(self) -> _Component:
        return _Component(self.root, "lidar_pose", self.segment, (TIME, LASER, *_image_columns(PIXEL_POSE)))

    @cached_property
    def _vehicle_poses(self) -> _Component:
        return _Component(self.root, "vehicle_pose", self.segment, (TIME, VEHICLE_POSE))

    @cached_property
    def _boxes(self) -> _Component:
        return _Component(self.root, "lidar_box", self.segment, (TIME, OBJECT, *BOX_COLUMNS, TYPE, BOX_POINTS, LEVEL))

    @cached_property
    def _calibrations(self) -> dict[int, dict[str, Any]]:
        columns = (LASER, EXTRINSIC, *(f"{INCLINATION}.{name}" for name in ("min", "max", "values")))
        rows = _Component(self.root, "lidar_calibration", self.segment, columns).table.to_pylist()
        return {row[LASER]: row for row in rows}

    def _lasers(self, timestamp: int) -> Iterator[LaserScan]:
        poses = {row[LASER].as_py(): row for row in self._pixel_poses.rows(timestamp)}
        for row in self._lidar.rows(timestamp):
            name = row[LASER].as_py()
            where = f"{self._lidar.path}, time {timestamp}, laser {name}"
            if name not in self._calibrations:
                raise InvalidInput(f"{where}: lidar_calibration has no row of this laser; its points cannot be placed")
            calibration = self._calibrations[name]
            images = [_image(row, column, where) for column in RETURNS]
            listed = calibration[f"{INCLINATION}.values"]
            yield LaserScan(
                name=name,
                returns=tuple(image for image in images if image is not None),
                pixel_poses=_image(poses[name], PIXEL_POSE, f"{self._pixel_poses.path}, time {timestamp}")
                if name in poses
                else None,
                extrinsic=_transform(calibration[EXTRINSIC], where),
                inclinations=np.array(listed, np.float64) if listed else None,
                inclination_range=(calibration[f"{INCLINATION}.min"], calibration[f"{INCLINATION}.max"]),
            )

    def _pose(self, timestamp: int) -> Matrix | None:
        rows = self._vehicle_poses.at(timestamp).to_pylist()
        return _transform(rows[0][VEHICLE_POSE], f"{self._vehicle_poses.path}, time {timestamp}") if rows else None

    def _objects(self, timestamp: int) -> WaymoObjects:
        table = self._boxes.at(timestamp)

        def whole_numbers(name: str, unknown: int) -> NDArray[np.int64]:
            return table[name].fill_null(unknown).to_numpy().astype(np.int64)

        return WaymoObjects(
            boxes=np.stack([table[name].to_numpy() for name in BOX_COLUMNS], 1).astype(
                np.float64
            ),  # null: NaN, which labels refuse
            types=whole_numbers(TYPE, 0),
            num_points=whole_numbers(BOX_POINTS, -1),
            levels=whole_numbers(LEVEL, 0),
            names=tuple(str(name) for name in table[OBJECT].to_pylist()),
        )


class _Component:
    """One component of one segment: `table` reads all of a small one; `rows` streams the rows of one time, for range images."""

    def __init__(self, root: Path, component: str, segment: str, columns: Sequence[str]) -> None:
        self.path = root / component / f"{segment}.parquet"
        if not self.path.is_file():
            advice = "; or read without labels, if this is a testing set" if component == "lidar_box" else ""
            raise InvalidInput(
                f"segment {segment}: there is no table {self.path}; download the component {component} into {root}{advice}"
            )
        self._columns = list(columns)
        with self._readable():
            self._values = declared_values(self.path)
            self._file = pq.ParquetFile(self.path, page_checksum_verification=True)
            names = self._file.schema_arrow.names
            missing = [name for name in (SEGMENT, *columns) if name not in names]
            if missing:
                raise InvalidInput(
                    f"{self.path}: there is no column {', '.join(missing)}; it has {', '.join(names)}; is it the component {component} "
                    "of v2?"
                )
            keys = self._read([SEGMENT, *({TIME} & set(columns))])
        strangers = {str(name) for name in keys[SEGMENT].unique().to_pylist()} - {segment}
        if strangers:
            raise InvalidInput(f"{self.path} holds rows of segment {min(strangers)}; the file's name and content disagree")
        self.times = keys[TIME].to_numpy() if TIME in columns else np.zeros(0, np.int64)
        metadata = self._file.metadata
        self._ends = np.cumsum([metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)])
        self._stream: Iterator[pa.RecordBatch] = iter(())
        self._group, self._next = -1, 0  # the row group that is streamed, and the number of the row that comes next

    @cached_property
    def table(self) -> pa.Table:
        with self._readable():
            return self._read(self._columns)

    def _read(self, columns: list[str]) -> pa.Table:
        table = read_within(self._file, self._values, columns, max_bytes=_MOST_TABLE_BYTES)
        if table is None:
            raise InvalidInput(
                f"{self.path}: {', '.join(columns)} take more than {_MOST_TABLE_BYTES:,} bytes; a real segment has a few megabytes"
            )
        return table

    def at(self, timestamp: int) -> pa.Table:
        """The rows of one time of `table`."""
        return self.table.take(np.flatnonzero(self.times == timestamp))

    def rows(self, timestamp: int) -> Iterator[dict[str, Any]]:
        """Stream the rows of one time, as scalars by column. Row groups without such a row are not read."""
        for index in np.flatnonzero(self.times == timestamp).tolist():
            group = int(np.searchsorted(self._ends, index, "right"))
            with self._readable():
                if group != self._group or self._next > index:
                    self._check_images(group)
                    self._stream = self._file.iter_batches(1, row_groups=[group], columns=self._columns, use_threads=False)
                    self._group, self._next = group, int(self._ends[group - 1]) if group else 0
                batch = None
                while self._next <= index:
                    batch = next(self._stream, None)
                    self._next += 1
            if batch is None:
                raise InvalidInput(f"{self.path}: row {index} is missing from row group {group}; copy it again")
            yield {name: batch.column(name)[0] for name in self._columns}

    def _check_images(self, group: int) -> None:
        rows = self._file.metadata.row_group(group).num_rows
        values = sum_values(self._values, self._columns, [group])
        if values > _MOST_ROW_VALUES * max(rows, 1):
            raise InvalidInput(
                f"{self.path}: row group {group} declares {values:,} numbers in {rows} rows; a real row has fewer than two million"
            )

    @contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except PARQUET_FAULTS as error:
            self._group = -1
            if isinstance(error, InvalidInput):
                raise
            raise InvalidInput(f"{self.path}: not a readable Parquet file ({error}); copy it again") from error


def _image_columns(*images: str) -> list[str]:
    return [f"{image}.{part}" for image in images for part in ("values", "shape")]


def _image(row: dict[str, Any], column: str, where: str) -> Image | None:
    """(H, W, C) of a range image, None of a null."""
    values, shape = row[f"{column}.values"], row[f"{column}.shape"].as_py()
    if not values.is_valid or shape is None:
        return None
    flat = values.values.to_numpy(zero_copy_only=False)
    if len(shape) != 3 or min(shape) < 1 or shape[0] * shape[1] * shape[2] != len(flat):
        raise InvalidInput(f"{where}: {column} declares the shape {shape} and holds {len(flat)} numbers")
    return np.asarray(flat, np.float32).reshape(shape)


def _transform(numbers: list[float] | None, where: str) -> Matrix:
    numbers = numbers or []
    if len(numbers) != 16 or None in numbers:
        raise InvalidInput(f"{where}: a transform holds {len(numbers)} numbers, expected 16 (4 x 4)")
    return np.array(numbers, np.float64).reshape(4, 4)
