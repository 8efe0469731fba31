"""The ground-truth database: labeled objects cut out of their scans, to be pasted into other scans of the same split.

    out/objects-CRC.f32     float32 rows x, y, z, features..., object after object, in the frame of its scene
    out/index-CRC.parquet   one row per object
    out/database.json       schema version, classes, the fingerprint of the labeled split, the index in force; written last

The database of one split refuses to serve another, because its objects would leak labels that a run must not see.

Read next: `gt_sampling.py`, which chooses and pastes the objects; `fingerprint.py`.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import atomic_file
from ..core.structures import PointCloud
from ..ops.points_in_boxes import points_in_boxes_mask
from .fingerprint import combine_digests, frame_digest
from .frame_source import FrameSource

GT_DATABASE_VERSION = 1
"""Version of the files."""
MIN_POINTS = 5
"""Points in an object's box; an object with fewer teaches nothing (OpenPCDet `filter_by_min_points`)."""

_INDEX_SCHEMA = pa.schema(
    [
        ("frame_id", pa.string()),
        ("class", pa.int32()),
        ("difficulty", pa.int32()),
        ("box", pa.list_(pa.float32(), 7)),
        ("offset", pa.int64()),  # first row of the object in the file of points
        ("rows", pa.int64()),  # number of its rows there
        ("num_points", pa.int64()),  # the same number; an earlier version could cut with an enlarged box
    ]
)


@dataclass(frozen=True, kw_only=True)
class GtObject:
    """One labeled object with its points."""

    box: Tensor
    """(7,) float32 box in its scene."""
    class_index: int
    """Number of its class among the database's `class_names`."""
    difficulty: int
    """Difficulty as in `Labels`."""
    points: PointCloud
    """The points in its box, in the frame of its scene."""
    frame_id: str
    """The frame that it comes from."""


class GtDatabase:
    """An opened database: a sequence of `GtObject`.

    Memory: about 60 bytes per object. Points are read when an object is asked for, and not kept.

    Attributes:
        boxes: (M, 7) float32 boxes of all objects.
        classes: (M,) int64 class numbers of all objects.
        class_names: Names of the class numbers.
        feature_names: What the point features are.
        fingerprint: Fingerprint of the labeled split.
        num_frames: Number of frames of the split.
        path: The folder.

    Example:
        database = GtDatabase.open("data/gt_database/train", expected_fingerprint=frames.split_fingerprint())
        print(len(database), database[0].points)
    """

    @classmethod
    def open(cls, path: Path | str, *, expected_fingerprint: str) -> GtDatabase:
        """Open the database of a labeled split for training.

        Args:
            path: Folder of the database.
            expected_fingerprint: Fingerprint of the split that the run may learn from; see `split_fingerprint`.

        Returns:
            The database.

        Raises:
            InvalidInput: There is no database, it was built from another split, or its points were cut off.
        """
        database = cls(path)
        if database.fingerprint != expected_fingerprint:
            raise InvalidInput(
                f"the GT database in {path} was built from another labeled split: fingerprint {database.fingerprint[:12]} "
                f"({database.num_frames} frames, {len(database)} objects), expected {expected_fingerprint[:12]}. Its objects could "
                "leak labels this run must not see; build a database from this run's labeled split"
            )
        return database

    def __init__(self, path: Path | str) -> None:
        """Open a database without asking which split it was built from: for inspection only. To train, use `open`.

        Args:
            path: Folder of the database.

        Raises:
            InvalidInput: There is no database, it is of another version, or its points were cut off.
        """
        self.path = Path(path)
        try:
            header = json.loads((self.path / "database.json").read_text())
        except FileNotFoundError:
            raise InvalidInput(
                f"there is no GT database in {path} (no database.json); build one from the labeled split"
            ) from None
        if header["schema_version"] != GT_DATABASE_VERSION:
            raise InvalidInput(
                f"the GT database in {path} has schema version {header['schema_version']}, this program reads "
                f"{GT_DATABASE_VERSION}; build it again"
            )
        self.class_names: tuple[str, ...] = tuple(header["class_names"])
        self.feature_names: tuple[str, ...] = tuple(header["feature_names"])
        self.fingerprint: str = header["fingerprint"]
        self.num_frames: int = header["num_frames"]
        table = pq.read_table(self.path / Path(header["index"]).name, use_threads=False).combine_chunks()
        if not table.schema.equals(_INDEX_SCHEMA):
            raise InvalidInput(
                f"the index of the GT database in {path} has other columns than schema version {GT_DATABASE_VERSION}; build it again"
            )
        self.boxes = torch.from_numpy(table["box"].combine_chunks().flatten().to_numpy().reshape(-1, 7).copy())
        self.classes = torch.from_numpy(table["class"].to_numpy().astype(np.int64))
        self._rest = table.select(["frame_id", "difficulty", "offset", "rows"])
        self._objects = self.path / Path(header["objects"]).name
        self._width = 3 + len(self.feature_names)
        needed = int((table["offset"].to_numpy() + table["rows"].to_numpy()).max(initial=0)) * self._width * 4
        if not self._objects.exists() or self._objects.stat().st_size < needed:
            raise InvalidInput(
                f"{self._objects} is missing or shorter than the index says ({needed} bytes); build the database again"
            )

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> GtObject:
        """Read object `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"object {index} of {len(self)}")
        row = self._rest.slice(index, 1).to_pylist()[0]
        shape = (row["rows"], self._width)
        rows = np.zeros(shape, np.float32)
        if shape[0]:  # mapped only while it is copied
            rows[:] = np.memmap(str(self._objects), "<f4", mode="r", offset=row["offset"] * self._width * 4, shape=shape)
        points = torch.from_numpy(rows)
        return GtObject(
            box=self.boxes[index].clone(),
            class_index=int(self.classes[index]),
            difficulty=row["difficulty"],
            points=PointCloud(
                xyz=points[:, :3].contiguous(), features=points[:, 3:].contiguous(), feature_names=self.feature_names
            ),
            frame_id=row["frame_id"],
        )


def build_gt_database(source: FrameSource, out: Path | str, *, class_names: Sequence[str], fingerprint: str) -> GtDatabase:
    """Cut every labeled object out of its scan, with one frame in memory at a time.

    Left out are objects with fewer than `MIN_POINTS` points in their box, ignored ones (weight 0), and boxes that are not exact. A
    database that was in the folder before serves until the new one is complete.

    Args:
        source: The frames of a labeled split.
        out: Folder to write.
        class_names: Names of the class numbers.
        fingerprint: Fingerprint of the split, from `split_fingerprint`. It is compared with the labels that are read, so that a
            database cannot bear the name of a split that it was not made from.

    Returns:
        The database, opened.

    Raises:
        InvalidInput: The labels have another fingerprint, frames differ in their point features, or there is no frame.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    temporary = out / f".objects.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            columns, features, checksum, found = _cut(source, file, tuple(class_names))
            file.flush()
            os.fsync(file.fileno())
        if found != fingerprint:
            raise InvalidInput(
                f"asked to build a GT database for the labeled split {fingerprint[:12]}, but the {len(source)} frames given have the "
                f"fingerprint {found[:12]}; pass the frames of that split, or the fingerprint of these frames"
            )
        objects_name = f"objects-{checksum:08x}.f32"
        os.replace(temporary, out / objects_name)
    finally:
        temporary.unlink(missing_ok=True)
    sink = pa.BufferOutputStream()
    pq.write_table(columns, sink)
    index = sink.getvalue()
    index_name = f"index-{zlib.crc32(index):08x}.parquet"
    with atomic_file(out / index_name) as file:
        file.write(index)
    header = {
        "schema_version": GT_DATABASE_VERSION,
        "class_names": list(class_names),
        "feature_names": features,
        "fingerprint": fingerprint,
        "num_frames": len(source),
        "objects": objects_name,
        "index": index_name,
    }
    with atomic_file(out / "database.json") as file:
        file.write(json.dumps(header, indent=1).encode())
    for old in (*out.glob("objects-*.f32"), *out.glob("index-*.parquet")):
        if old.name not in (objects_name, index_name):
            old.unlink()
    return GtDatabase.open(out, expected_fingerprint=fingerprint)


def _cut(source: FrameSource, file: BinaryIO, class_names: tuple[str, ...]) -> tuple[pa.Table, tuple[str, ...], int, str]:
    """Write the points of all objects; returns index, feature names, checksum and the fingerprint of what was read."""
    if len(source) == 0:
        raise InvalidInput("a GT database needs at least one frame, but the split is empty")
    features = source[0].points.feature_names
    tables, digests = [], []
    offset = checksum = 0
    for i in range(len(source)):
        frame = source[i]
        digests.append(frame_digest(frame.id, frame.labels, classes=class_names))
        if frame.labels is None:
            continue
        if frame.points.feature_names != features:
            raise InvalidInput(
                f"frame {frame.id!r} has point features {frame.points.feature_names}, the first frame has {features}"
            )
        labels = frame.labels.select((frame.labels.weight > 0) & frame.labels.exact)
        masks = points_in_boxes_mask(frame.points.xyz, labels.boxes.data)
        keep = masks.sum(1) >= MIN_POINTS
        labels, masks = labels.select(keep), masks[keep]
        for mask in masks:
            cloud = frame.points.select(mask)
            blob = torch.cat([cloud.xyz, cloud.features], 1).float().numpy().astype("<f4").tobytes()
            file.write(blob)
            checksum = zlib.crc32(blob, checksum)
        rows = masks.sum(1).numpy()
        ends = offset + np.cumsum(rows)
        columns = {
            "frame_id": [frame.id] * len(labels),
            "class": labels.classes.int().numpy(),
            "difficulty": labels.difficulty.int().numpy(),
            "box": pa.FixedSizeListArray.from_arrays(pa.array(labels.boxes.data.float().flatten().numpy()), 7),
            "offset": ends - rows,
            "rows": rows,
            "num_points": rows,
        }
        tables.append(pa.table(columns, schema=_INDEX_SCHEMA))
        offset += int(rows.sum())
    index = pa.concat_tables([_INDEX_SCHEMA.empty_table(), *tables]).combine_chunks()
    return index, features, checksum, combine_digests(digests)
