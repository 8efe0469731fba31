"""The files of a prepared dataset: their names, columns and header, and the way from a frame to a row and back.

    out/preparation.json         the settings, written first; a restart with other settings is refused
    out/parts/KEY-CRC.f32        points of one chunk of frames: float32 rows x, y, z, features..., frame after frame
    out/parts/KEY.parquet        one row per frame of that chunk, failures included; written last, so it means "finished"
    out/index-CRC.parquet        the rows of all good frames
    out/dataset.json             the header: version, classes, origin, rig, splits, failures, name of the index; written last of all

Each file appears under its name by one rename of complete, synced bytes, and names of data files carry a checksum, so a process
that is killed at any moment leaves a folder from which `prepare` goes on. Nothing half-written is ever read.

Read next: `prepare.py` writes these files, `prepared.py` reads them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast, get_args

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..core.errors import InvalidInput
from ..core.frame import Calibration, Frame
from ..core.rig import RigSpec
from ..core.structures import Labels
from ..ops.points_in_boxes import count_points_in_boxes
from .frame_source import DatasetOrigin, Layout
from .kitti_text import KittiObjects

PREPARED_VERSION = 2
"""Version 2 added the rig of each frame and KITTI's label files. Version 1 is still read, and scored by every protocol but KITTI's."""

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
_SCHEMAS: Mapping[int, pa.Schema] = {1: pa.schema(_COLUMNS), 2: pa.schema(_COLUMNS + _SINCE_VERSION_2)}
INDEX_SCHEMA = _SCHEMAS[PREPARED_VERSION]
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
        """Return the header as plain values for a JSON file."""
        return {
            "schema_version": self.version,
            "classes": list(self.classes),
            "feature_names": list(self.feature_names),
            "rig": {"z_shift": self.rig.z_shift, "intensity_scale": self.rig.intensity_scale},
            "origin": origin_to_json(self.origin),
            "index": self.index,
            "splits": {name: list(ids) for name, ids in self.splits.items()},
            "failures": [{"id": f.id, "reason": f.reason} for f in self.failures],
        }


def origin_to_json(origin: DatasetOrigin) -> dict[str, Any]:
    """Write an origin as plain values for a JSON file.

    Args:
        origin: Where frames come from.

    Returns:
        `layout`, `root` (None where there is no folder) and `options`, a dictionary of texts.
    """
    root = None if origin.root is None else str(origin.root)
    return {"layout": origin.layout, "root": root, "options": dict(origin.options)}


def read_header(root: Path) -> PreparedHeader:
    """Read `dataset.json` of a prepared dataset, of this version or of version 1.

    Args:
        root: Folder of the dataset.

    Returns:
        The header; a header of version 1 in the words of version 2.

    Raises:
        InvalidInput: The folder holds no finished prepared dataset, or one of an unknown version.
    """
    path = root / "dataset.json"
    try:
        values = json.loads(path.read_text())
    except FileNotFoundError:
        raise InvalidInput(f"{root} holds no dataset.json; run `upcycle3d prepare` (again) to finish it") from None
    except ValueError as error:
        raise InvalidInput(f"{path} is not JSON ({error}); copy it again, or prepare the dataset again") from error
    version: Any = values.get("schema_version") if isinstance(values, dict) else None
    if version not in _SCHEMAS:
        raise InvalidInput(
            f"{root} has schema version {version}, this program reads versions {', '.join(map(str, _SCHEMAS))}; prepare it again "
            "with this program, or use the program that wrote it"
        )
    if version == 1:
        rig, origin = _origin_of_version_1(values["notes"])
    else:
        rig, origin = RigSpec(**values["rig"]), _origin_from_json(values["origin"])
    return PreparedHeader(
        version=version,
        classes=tuple(values["classes"]),
        feature_names=tuple(values["feature_names"]),
        rig=rig,
        origin=origin,
        index=Path(values["index"]).name,
        splits={name: tuple(ids) for name, ids in values["splits"].items()},
        failures=tuple(FrameFailure(**failure) for failure in values["failures"]),
    )


def _origin_from_json(values: dict[str, Any]) -> DatasetOrigin:
    layout = values["layout"] if values["layout"] in get_args(Layout) else "own"
    root = None if values["root"] is None else Path(values["root"])
    return DatasetOrigin(layout=cast(Layout, layout), root=root, options=tuple(values["options"].items()))


def _origin_of_version_1(notes: dict[str, Any]) -> tuple[RigSpec, DatasetOrigin]:
    """Rig and origin from the loose notes of version 1."""
    rig = RigSpec(z_shift=float(notes.get("z_shift", 0.0)), intensity_scale=float(notes.get("intensity_scale", 1.0)))
    options = {name: str(value) for name, value in notes.items() if name not in ("layout", "root")}
    return rig, _origin_from_json({"layout": notes.get("layout"), "root": notes.get("root"), "options": options})


def read_index(path: Path, version: int = PREPARED_VERSION) -> pa.Table:
    """Read the rows of one Parquet file, of a chunk or of the whole dataset.

    Args:
        path: The file.
        version: Version of the dataset that it belongs to.

    Returns:
        A table with the columns of `INDEX_SCHEMA`; columns that an older version lacks are null.

    Raises:
        InvalidInput: The file has other columns than its version.
    """
    table = pq.read_table(path, use_threads=False)
    if not table.schema.equals(_SCHEMAS[version]):
        raise InvalidInput(f"{path} has other columns than schema version {version}; prepare the dataset again")
    for name, kind in _SINCE_VERSION_2 if version == 1 else []:
        table = table.append_column(name, pa.nulls(len(table), kind))
    return table


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
