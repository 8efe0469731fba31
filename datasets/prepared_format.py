"""The files of a prepared dataset: their names, columns and header, and the way from a frame to a row and back.

    out/preparation.json         the settings, written first; a restart with other settings is refused
    out/parts/KEY-CRC.f32        points of one chunk of frames: float32 rows x, y, z, features..., frame after frame
    out/parts/KEY-CRC.parquet    one row per frame of that chunk, failures included; written last, so it means "finished"
    out/index-CRC.parquet        the rows of all good frames
    out/dataset.json             the header: version, classes, origin, rig, splits, failures, name of the index; written last of all

Each file appears under its name by one rename of complete, synced bytes, and names of data files carry a checksum, so a process
that is killed at any moment leaves a folder from which `prepare` goes on. Nothing half-written is ever read.

Read next: `prepare.py` writes these files, `prepared.py` reads them.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from ..core.config_json import config_from_json
from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.frame import Calibration, Frame
from ..core.ledger import Ledger
from ..core.rig import RigSpec, intensity_range
from ..core.strict_json import json_digest, read_json, strict_json
from ..core.structures import Labels
from ..ops.points_in_boxes import count_points_in_boxes
from .frame_source import DatasetOrigin, Layout
from .kitti_text import KittiObjects
from .parquet import checksum_in_name, read_parquet

PREPARED_VERSION = 3
"""Version 3 added what the reader counted for each frame, and a digest of the header. Version 2 added the rig of each frame and KITTI's
label files. Both older ones are still read, and version 1 is scored by every protocol but KITTI's."""

# One row per frame. Boxes, matrices and the like are flat lists; null means "not known" (no labels, no calibration).
_COLUMNS = [
    ("id", pa.string()),
    ("error", pa.string()),  # why the frame was left out; null for a good frame
    ("part", pa.string()),  # file of the points
    ("offset", pa.int64()),  # first float32 of the frame in that file
    ("num_points", pa.int64()),
    ("feature_names", pa.list_(pa.string())),
    ("crc32", pa.int64()),  # of the frame's points
    ("boxes", pa.list_(pa.float32())),
    ("classes", pa.list_(pa.int32())),
    ("box_points", pa.list_(pa.int32())),
    ("difficulty", pa.list_(pa.int32())),
    ("weight", pa.list_(pa.float32())),
    ("exact", pa.list_(pa.bool_())),
    ("complete", pa.bool_()),
    ("lidar_to_camera", pa.list_(pa.float64())),
    ("projection", pa.list_(pa.float64())),
    ("image_size", pa.list_(pa.int32())),
]
_SINCE_VERSION_2 = [
    ("z_shift", pa.float64()),
    ("intensity_scale", pa.float64()),
    ("kitti_types", pa.list_(pa.string())),  # the frame's label file, every line of it
    ("kitti_numbers", pa.list_(pa.float64())),  # its 14 numeric columns, line after line
]
_SINCE_VERSION_3 = [("reading", pa.string())]  # what the reader counted: a `Ledger` in JSON; null where it counted nothing
_ALL_COLUMNS = _COLUMNS + _SINCE_VERSION_2 + _SINCE_VERSION_3
_SCHEMAS: Mapping[int, pa.Schema] = {
    1: pa.schema(_COLUMNS),
    2: pa.schema(_COLUMNS + _SINCE_VERSION_2),
    3: pa.schema(_ALL_COLUMNS),
}
INDEX_SCHEMA = _SCHEMAS[PREPARED_VERSION]
_REMEDY = "copy the dataset again, or prepare it again"
KITTI_COLUMNS = ("id", "kitti_types", "kitti_numbers")
"""The columns that `row_kitti_objects` needs; everything else needs none of the last two."""


@dataclass(frozen=True, kw_only=True)
class FrameFailure:
    """A frame that preparation left out, and why."""

    id: str
    """Id of the frame."""
    reason: str
    """What the reader or a check said."""


@dataclass(frozen=True, kw_only=True)
class PreparedHeader:
    """What `dataset.json` says about a prepared dataset."""

    version: int
    """Version of the files."""
    classes: tuple[str, ...]
    """Names of the class numbers of all labels."""
    feature_names: tuple[str, ...]
    """What the point features are, the same for all frames."""
    rig: RigSpec
    """What was done to every scan and its labels."""
    origin: DatasetOrigin
    """Where the frames come from."""
    index: str
    """File name of the index in force."""
    splits: Mapping[str, tuple[str, ...]]
    """Frame ids by name of the split; only good frames."""
    failures: tuple[FrameFailure, ...]
    """The frames that were left out."""

    def to_json(self) -> dict[str, Any]:
        """Return the header as plain values for a JSON file, with a digest over all of them."""
        values = {
            "schema_version": self.version,
            "classes": list(self.classes),
            "feature_names": list(self.feature_names),
            "rig": {"z_shift": self.rig.z_shift, "intensity_scale": self.rig.intensity_scale},
            "origin": origin_to_json(self.origin),
            "index": self.index,
            "splits": {name: list(ids) for name, ids in self.splits.items()},
            "failures": [{"id": f.id, "reason": f.reason} for f in self.failures],
        }
        return values | {"digest": json_digest(values)}


def origin_to_json(origin: DatasetOrigin) -> dict[str, Any]:
    """Write an origin as plain values for a JSON file.

    Args:
        origin: Where frames come from.

    Returns:
        `layout`, `root` (None where there is no folder) and `options`, a dictionary of texts.
    """
    root = None if origin.root is None else str(origin.root)
    return {"layout": origin.layout, "root": root, "options": dict(origin.options)}


@dataclass(frozen=True, kw_only=True)
class _StoredOrigin:
    """The origin as the header has it. A layout of a later program, and none at all (version 1), count as "own"."""

    layout: str | None = None
    root: Path | None = None
    options: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class _StoredHeader:
    """What a header must have and of which type, whatever the version; `config_from_json` refuses everything else."""

    classes: tuple[str, ...]
    feature_names: tuple[str, ...]
    rig: RigSpec
    origin: _StoredOrigin
    index: str
    splits: Mapping[str, tuple[str, ...]]
    failures: tuple[FrameFailure, ...]


def _not_prepared(root: Path) -> str:
    """Say what a folder without a header is, and how it becomes a prepared dataset."""
    if (root / "config.json").exists():
        return f"{root} is a run folder, not a prepared dataset; give the dataset with --data and the run with --detector"
    raw = {
        "kitti": ("training", "ImageSets", "velodyne", "label_2"),
        "folder": ("points",),
        "lyft": ("train_data", "lidar"),
        "nuscenes": ("samples", "v1.0-trainval", "v1.0-mini"),
    }
    for layout, folders in raw.items():
        inside = next((above for above in (root, *root.parents[:2]) if above.name not in folders), root)
        if root.name in folders or any((root / name).is_dir() for name in folders):
            return (
                f"{root} holds raw data, not a prepared dataset; run `upcycle3d prepare {layout} {inside} --out DIR` and give DIR "
                "(`upcycle3d prepare --help` lists the layouts)"
            )
    if any(root.glob("*.tfrecord")) or any(root.glob("lidar/*.parquet")):
        return f"{root} holds raw data, not a prepared dataset; run `upcycle3d prepare waymo {root} --out DIR` and give DIR"
    if (root / "parts").exists() or (root / "preparation.json").exists():
        return f"{root} holds no dataset.json: its preparation has not finished; run the same `upcycle3d prepare` command again"
    return f"{root} holds no dataset.json, so it is not a prepared dataset; give the folder that `upcycle3d prepare … --out DIR` wrote"


def read_header(root: Path) -> PreparedHeader:
    """Read `dataset.json` of a prepared dataset, of this version or an earlier one.

    Args:
        root: Folder of the dataset.

    Returns:
        The header; a header of version 1 in the words of this version.

    Raises:
        InvalidInput: The folder holds no finished prepared dataset, one of an unknown version, or one whose header is damaged.
    """
    path = root / "dataset.json"
    if root.is_dir() and not path.exists():
        raise InvalidInput(_not_prepared(root))
    if root.is_file():
        raise InvalidInput(
            f"{root} is a file, not the folder of a prepared dataset; give the folder that `upcycle3d prepare` wrote"
        )
    if not root.exists():
        raise InvalidInput(
            f"there is no folder {root}; give the folder that `upcycle3d prepare … --out DIR` wrote, as DIR or DIR:SPLIT"
        )
    values = read_json(path, "the header of a prepared dataset", remedy=_REMEDY)
    version: Any = values.get("schema_version")
    if type(version) is not int or version not in _SCHEMAS:
        raise InvalidInput(
            f"{root} has schema version {version}, this program reads versions {', '.join(map(str, _SCHEMAS))}; prepare it again "
            "with this program, or use the program that wrote it"
        )
    try:
        if version == 1:
            values |= _origin_of_version_1(values.get("notes"))
        known = {name: values[name] for name in _StoredHeader.__dataclass_fields__ if name in values}
        header = config_from_json(_StoredHeader, known)
        if not re.fullmatch(r"index-[0-9a-f]{8}\.parquet", header.index):
            raise InvalidInput(f"{shown(header.index)!r} cannot be the name of the index")
        if version >= 3 and values.get("digest") != json_digest(values):
            raise InvalidInput("its content has another digest than the one it names")
    except InvalidInput as error:
        raise InvalidInput(f"{path} is damaged or was edited: {error}; {_REMEDY}") from error
    layout = header.origin.layout if header.origin.layout in get_args(Layout) else "own"
    return PreparedHeader(
        version=version,
        classes=header.classes,
        feature_names=header.feature_names,
        rig=header.rig,
        origin=DatasetOrigin(layout=cast(Layout, layout), root=header.origin.root, options=tuple(header.origin.options.items())),
        index=header.index,
        splits=header.splits,
        failures=header.failures,
    )


def _origin_of_version_1(notes: Any) -> dict[str, Any]:
    """Rig and origin, in the words of version 2, from the loose notes of version 1."""
    if not isinstance(notes, dict):
        raise InvalidInput("the `notes` are missing")
    options = {name: str(value) for name, value in notes.items() if name not in ("layout", "root")}
    return {
        "rig": {name: notes[name] for name in ("z_shift", "intensity_scale") if name in notes},
        "origin": {"layout": notes.get("layout"), "root": notes.get("root"), "options": options},
    }


def read_index(path: Path, version: int = PREPARED_VERSION) -> pa.Table:
    """Read the rows of one Parquet file, of a chunk or of the whole dataset, and compare them with the checksum in its name.

    Args:
        path: The file.
        version: Version of the dataset that it belongs to.

    Returns:
        A table with the columns of `INDEX_SCHEMA`; columns that an older version lacks are null.

    Raises:
        InvalidInput: The file is missing or damaged, or has other columns than its version.
    """
    table = read_parquet(path, None, remedy=_REMEDY, checksum=checksum_in_name(path))
    if not table.schema.equals(_SCHEMAS[version]):
        raise InvalidInput(f"{path} has other columns than schema version {version}; prepare the dataset again")
    for name, kind in _ALL_COLUMNS[len(_SCHEMAS[version]) :]:
        table = table.append_column(name, pa.nulls(len(table), kind))
    return table


def check_rows(table: pa.Table, header: PreparedHeader, path: Path) -> None:
    """Check that every row of an index can be turned into a frame, without turning any into one.

    Args:
        table: Rows of good frames.
        header: The header that they must agree with.
        path: The file that they were read from, for messages.

    Raises:
        InvalidInput: A row lacks a value, its lists do not fit together, or it contradicts the header; the message names the column.
    """

    def refuse(fault: str) -> None:
        raise InvalidInput(
            f"{path} does not fit its dataset.json or is damaged: {fault}; copy the dataset again, or prepare it again"
        )

    def lengths(column: str) -> np.ndarray:
        """(N,) number of values in each list of a column, -1 for null."""
        return pc.list_value_length(table[column]).fill_null(-1).to_numpy()

    for column in ("id", "part", "offset", "num_points", "crc32"):
        if table[column].null_count:
            refuse(f"{column} is empty in {table[column].null_count} rows")
    for column, limit in (("offset", 1 << 60), ("num_points", 1 << 32)):  # limits keep later products in 64 bits
        smallest, largest = (pc.min_max(table[column])[name].as_py() or 0 for name in ("min", "max"))
        if smallest < 0 or largest >= limit:
            refuse(f"{column} must be in 0..{limit - 1}, found {smallest} to {largest}")
    if any(tuple(names or ()) != header.feature_names for names in table["feature_names"].to_pylist()):
        refuse(f"frames have other point features than {header.feature_names}")
    boxes, calibrations, files = lengths("classes"), lengths("lidar_to_camera"), lengths("kitti_types")
    unlabeled = boxes < 0
    counts: list[tuple[str, Any, np.ndarray]] = [  # column, number of values, rows that have none
        ("boxes", 7 * boxes, unlabeled),
        *((name, boxes, unlabeled) for name in ("box_points", "difficulty", "weight", "exact")),
        ("lidar_to_camera", 16, calibrations < 0),
        ("projection", 12, calibrations < 0),
        ("image_size", 2, calibrations < 0),
        ("kitti_numbers", 14 * files, files < 0),
    ]
    for column, expected, absent in counts:
        wrong = lengths(column) != np.where(absent, -1, expected)
        if wrong.any():
            refuse(f"{column} has the wrong number of values in {wrong.sum()} rows")
    for column in (name for name, kind in _ALL_COLUMNS if pa.types.is_list(kind)):
        if pc.list_flatten(table[column]).null_count:
            refuse(f"{column} has empty places in its lists")
    if (pc.is_null(table["complete"]).to_numpy() & ~unlabeled).any():
        refuse("complete is empty in rows with labels")
    found = pc.list_flatten(table["classes"]).to_numpy()
    outside = ((found < 0) | (found >= len(header.classes))).sum()
    if outside:
        refuse(f"{outside} labels have a class outside 0..{len(header.classes) - 1}, the classes {', '.join(header.classes)}")


# ---- a frame and its row


def frame_row(frame: Frame, kitti: KittiObjects | None, *, offset: int, crc32: int) -> dict[str, Any]:
    """Describe a frame as one row of the index. Point counts of boxes that are not known are counted here.

    Args:
        frame: A frame that `check_frame` accepted.
        kitti: Its KITTI label file, or None.
        offset: Where its points begin in the part file, in float32 values.
        crc32: Checksum of its points.

    Returns:
        Values by name of the column; names that are missing are null.
    """
    row: dict[str, Any] = {
        "id": frame.id,
        "offset": offset,
        "num_points": len(frame.points),
        "feature_names": list(frame.points.feature_names),
        "crc32": crc32,
        "z_shift": frame.rig.z_shift,
        "intensity_scale": frame.rig.intensity_scale,
    }
    reading = frame.reading + Ledger(intensity_range=intensity_range(frame.points))
    if reading != Ledger():
        counted = {name: value for name, value in reading.to_json().items() if value or isinstance(value, float)}
        row["reading"] = json.dumps(counted)
    if (labels := frame.labels) is not None:
        box_points = labels.num_points
        if (box_points < 0).any():
            box_points = torch.where(box_points < 0, count_points_in_boxes(frame.points.xyz, labels.boxes.data), box_points)
        row |= {
            "boxes": labels.boxes.data.flatten().tolist(),
            "box_points": box_points.tolist(),
            **{name: getattr(labels, name).tolist() for name in ("classes", "difficulty", "weight", "exact")},
            "complete": labels.complete,
        }
    if (calibration := frame.calibration) is not None:
        row |= {
            "lidar_to_camera": calibration.lidar_to_camera.flatten().tolist(),
            "projection": calibration.projection.flatten().tolist(),
            "image_size": list(calibration.image_size),
        }
    if kitti is not None:
        row |= {"kitti_types": list(kitti.types), "kitti_numbers": kitti.label_columns().flatten().tolist()}
    return row


def row_labels(row: Mapping[str, Any]) -> Labels | None:
    """Rebuild the labels of a frame from its row.

    Args:
        row: Values by name of the column.

    Returns:
        The labels, or None where nobody labeled.
    """
    if row["boxes"] is None:
        return None
    return Labels.make(
        torch.tensor(row["boxes"], dtype=torch.float32).view(-1, 7),
        torch.tensor(row["classes"], dtype=torch.int64),
        num_points=torch.tensor(row["box_points"], dtype=torch.int64),
        difficulty=torch.tensor(row["difficulty"], dtype=torch.int64),
        weight=torch.tensor(row["weight"], dtype=torch.float32),
        exact=torch.tensor(row["exact"], dtype=torch.bool),
        complete=row["complete"],
    )


def row_reading(row: Mapping[str, Any]) -> Ledger:
    """Rebuild what the reader counted for a frame from its row.

    Args:
        row: Values by name of the column.

    Returns:
        The counts; all zero where none were stored.

    Raises:
        InvalidInput: The column holds something else.
    """
    if row["reading"] is None:
        return Ledger()
    return Ledger.from_json(strict_json(row["reading"].encode(), "the column reading"))


def row_calibration(row: Mapping[str, Any]) -> Calibration | None:
    """Rebuild the calibration of a frame from its row.

    Args:
        row: Values by name of the column.

    Returns:
        The calibration, or None where there is no camera.
    """
    if row["lidar_to_camera"] is None:
        return None
    return Calibration(
        lidar_to_camera=torch.tensor(row["lidar_to_camera"], dtype=torch.float64).view(4, 4),
        projection=torch.tensor(row["projection"], dtype=torch.float64).view(3, 4),
        image_size=(row["image_size"][0], row["image_size"][1]),
    )


def row_kitti_objects(row: Mapping[str, Any]) -> KittiObjects | None:
    """Rebuild the KITTI label file of a frame from its row.

    Args:
        row: Values by name of the column.

    Returns:
        Every line of the file in its order, DontCare included, or None where none was stored.
    """
    if row["kitti_types"] is None:
        return None
    numbers = torch.tensor(row["kitti_numbers"], dtype=torch.float64).view(-1, 14)
    return KittiObjects.from_columns(tuple(row["kitti_types"]), numbers)
