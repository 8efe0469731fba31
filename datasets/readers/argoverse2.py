"""Argoverse 2, sensor dataset: Feather files, read with pyarrow.

    root/train|val|test/<log>/sensors/lidar/<nanoseconds>.feather   x y z intensity (0..255) laser_number offset_ns
    root/train|val/<log>/annotations.feather                        boxes of all sweeps of the log
    root/ImageSets/<split>.txt                                      yours, instead of the folders: one log per line

Facts from `src/av2/datasets/sensor/README.md`, `av2/structures/sweep.py` and `cuboid.py` of github.com/argoverse/av2-api: a sweep
joins the points of both LiDARs, compensated for the vehicle's motion to the time in the file name, in the vehicle's frame (x forward,
y left, z up; the origin is at the rear axle, about 0.33 m above the road). A box has its center in the same frame at the same time,
`length_m` along its own x axis, and a quaternion w x y z. So nothing is moved or turned here; the heading of the quaternion is the yaw.

Boxes belong to the sweep of exactly their time. A sweep without any box is not labeled, because somebody who drives in a city sees
objects all around: it is left out of a labeled split and counted, and so are boxes whose sweep is missing.

A cyclist has two boxes in this dataset, BICYCLIST for the person and BICYCLE; the usual map makes the first one a Cyclist.
Left out: pictures, maps, ring and time of the points.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from ...core.errors import InvalidInput
from ...core.ledger import Ledger
from ...core.point_files import scan_of_rows
from ...core.structures import PointCloud
from ..drive_tables import quaternion_matrix
from ..feather import numbers, read_feather
from ..frame_source import Layout
from ..raw import RawDataset
from .boxed import FrameFiles, TypedBoxes, typed_boxes
from .opening import BoxedOptions, FoundFrames, open_boxed

ARGOVERSE2_MAP = {"REGULAR_VEHICLE": "Car", "PEDESTRIAN": "Pedestrian", "BICYCLIST": "Cyclist"}
"""Category -> class, by default."""
_SPLITS = ("train", "val", "test")
_POINTS = ("x", "y", "z", "intensity")
_CENTER, _SIZE, _TURN = ("tx_m", "ty_m", "tz_m"), ("length_m", "width_m", "height_m"), ("qw", "qx", "qy", "qz")
_TIME = "timestamp_ns"
_REMEDY = "download the log again, or leave it out of ImageSets/NAME.txt"


@dataclass(frozen=True)
class Argoverse2:
    """How Argoverse 2's files are read."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        return "argoverse2"

    def options(self) -> Mapping[str, object]:
        """There is nothing to choose."""
        return {}

    def scan(self, frame: FrameFiles) -> tuple[PointCloud, Ledger]:
        """Read a sweep of both LiDARs.

        Args:
            frame: The frame.

        Returns:
            The points in the vehicle's frame, intensity in 0..255; and their counts.

        Raises:
            InvalidInput: The file is missing or broken, or holds no point.
        """
        table = read_feather(frame.scan, _POINTS, what="sweep", remedy=_REMEDY)
        return scan_of_rows(numbers(frame.scan, table, _POINTS), _POINTS, str(frame.scan))

    def objects(self, frame: FrameFiles) -> TypedBoxes:
        """Read the boxes of a sweep.

        Args:
            frame: A labeled frame.

        Returns:
            The boxes whose time is that of the sweep.

        Raises:
            InvalidInput: The file is missing or broken, or a box is.
        """
        assert frame.labels is not None
        table = _boxes(frame.labels, "category", *_CENTER, *_SIZE, *_TURN)
        table = {name: values[table[_TIME] == int(frame.key)] for name, values in table.items()}
        center, size, turn = (torch.from_numpy(numbers(frame.labels, table, names)) for names in (_CENTER, _SIZE, _TURN))
        off = (turn.norm(dim=1) - 1).abs()
        if bool((~(off < 1e-3)).any()):
            raise InvalidInput(
                f"{frame.labels}, time {frame.key}: the rotation {turn[int((~(off < 1e-3)).nonzero()[0])].tolist()} is no unit quaternion "
                f"(qw qx qy qz); {_REMEDY}"
            )
        return typed_boxes(f"{frame.labels}, time {frame.key}", table["category"].tolist(), center, size, quaternion_matrix(turn))

    def types(self, labels: Path) -> Counter[str]:
        """Count the boxes of a log by category.

        Args:
            labels: Its `annotations.feather`.

        Returns:
            Number of boxes by category.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        return Counter(map(str, _boxes(labels, "category")["category"].tolist()))


def _boxes(path: Path, *columns: str) -> dict[str, NDArray[Any]]:
    """Columns of a log's boxes, and their times as whole nanoseconds: other numbers would be equal to no sweep's or to several."""
    table = read_feather(path, (_TIME, *columns), what="table of boxes", remedy=_REMEDY)
    if table[_TIME].dtype.kind not in "iu":
        raise InvalidInput(f"{path}: the column {_TIME} must hold whole nanoseconds, found {table[_TIME].dtype}; {_REMEDY}")
    return table


def _counts(path: Path) -> Counter[int] | None:
    """Number of boxes of a log by time; None where the file is broken, which costs its frames, with the reason."""
    try:
        return Counter(_boxes(path)[_TIME].tolist())
    except InvalidInput:
        return None


def open_argoverse2(root: Path | str, options: BoxedOptions | None = None) -> RawDataset:
    """Open the sensor dataset of Argoverse 2.

    Args:
        root: Folder with `train`, `val` and `test`, or with logs, or one log.
        options: Splits, classes, rig.

    Returns:
        The dataset. Intensity is divided by 255 unless the options say something else.

    Raises:
        InvalidInput: There is no log, or a split or its labels are missing.

    Example:
        raw = open_argoverse2("argoverse2/sensor", BoxedOptions(splits=("val",), z_shift=0.33))
    """
    root = Path(root)
    parts = {name: root / name for name in _SPLITS if (root / name).is_dir()}
    logs: dict[Path, str] = {}
    for split, folder in (parts or {"all": root}).items():
        logs |= {log: split for log in sorted(folder.iterdir()) if (log / "sensors" / "lidar").is_dir()}
    if not logs and (root / "sensors" / "lidar").is_dir():
        logs = {root: "all"}
    frames: list[FrameFiles] = []
    skipped: Counter[str] = Counter()
    for log in logs:
        boxes = log / "annotations.feather"
        counts = _counts(boxes) if boxes.is_file() else Counter()
        times = set()
        for path in sorted((log / "sensors" / "lidar").iterdir()):
            if path.suffix != ".feather" or not path.stem.isdecimal():
                skipped["not a sweep"] += 1
                continue
            times.add(int(path.stem))
            labels = boxes if counts is None or counts[int(path.stem)] else None
            frames.append(FrameFiles(id=f"{log.name}_{path.stem}", drive=log.name, scan=path, labels=labels, key=path.stem))
        skipped["box without its sweep"] += sum(n for time, n in (counts or {}).items() if time not in times)
    if not frames:
        raise InvalidInput(
            f"there is no sweep in {root}: expected train, val, test or logs in it, and LOG/sensors/lidar/NANOSECONDS.feather in each; check the root"
        )
    found = FoundFrames(frames=tuple(frames), splits={log.name: split for log, split in logs.items()}, skipped=+skipped)
    return open_boxed(root, found, Argoverse2(), options or BoxedOptions(), usual_map=ARGOVERSE2_MAP, usual_scale=1 / 255)
