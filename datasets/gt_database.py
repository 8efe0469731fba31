"""The ground-truth database: labeled objects cut out of their scans, to be pasted into other scans of the same split.

    out/objects-CRC.f32     float32 rows x, y, z, features..., object after object, in the frame of its scene
    out/index-CRC.parquet   one row per object, with a checksum of its points
    out/database.json       schema version, classes, the fingerprint of the labeled split, the index in force, a digest; written last

The database of one split refuses to serve another, because its objects would leak labels that a run must not see.

Read next: `gt_sampling.py`, which chooses and pastes the objects; `fingerprint.py`.
"""

from __future__ import annotations

import os
import re
import zlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..core.config_json import config_from_json
from ..core.errors import InvalidInput
from ..core.files import atomic_file, locked_folder, remove_litter
from ..core.strict_json import json_digest, read_json, write_json_file
from ..core.structures import PointCloud
from ..ops.points_in_boxes import BoxSearch
from .fingerprint import combine_digests, frame_digest, points_checksum, same_split, short, with_points
from .frame_source import FrameSource
from .parquet import checksum_in_name, read_parquet

GT_DATABASE_VERSION = 2
"""Version of the files. Version 2 added a checksum of each object and the digest of the header; version 1 is still read."""
MIN_POINTS = 5
"""Points in an object's box; an object with fewer teaches nothing (OpenPCDet `filter_by_min_points`)."""

_COLUMNS_OF_VERSION_1 = [
    ("frame_id", pa.string()),
    ("class", pa.int32()),
    ("difficulty", pa.int32()),
    ("box", pa.list_(pa.float32(), 7)),
    ("offset", pa.int64()),  # first row of the object in the file of points
    ("rows", pa.int64()),  # number of its rows there
    ("num_points", pa.int64()),  # the same number; an earlier version could cut with an enlarged box
]
_INDEX_SCHEMA = pa.schema([*_COLUMNS_OF_VERSION_1, ("crc32", pa.int64())])
_SCHEMAS = {1: pa.schema(_COLUMNS_OF_VERSION_1), 2: _INDEX_SCHEMA}
_REMEDY = "delete this folder: it is built again from the labeled split by the next `upcycle3d prepare` or `upcycle3d train`"
_CHECKED_WHEN_OPENED = 1 << 30  # bytes of points that are compared with their checksum at once; a larger file object by object


@dataclass(frozen=True, kw_only=True)
class _Header:
    """What `database.json` must say, and of which type."""

    schema_version: int
    class_names: tuple[str, ...]
    feature_names: tuple[str, ...]
    fingerprint: str
    num_frames: int
    objects: str
    index: str
    digest: str = ""


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
            InvalidInput: There is no database, it was built from another split, or it is damaged.
        """
        database = cls(path)
        if not same_split(database.fingerprint, expected_fingerprint):
            raise InvalidInput(
                f"the GT database in {path} was built from another labeled split: fingerprint {short(database.fingerprint)} "
                f"({database.num_frames} frames, {len(database)} objects), expected {short(expected_fingerprint)}. Its objects could "
                "leak labels this run must not see; build a database from this run's labeled split"
            )
        return database

    def __init__(self, path: Path | str) -> None:
        """Open a database without asking which split it was built from: for inspection only. To train, use `open`.

        Args:
            path: Folder of the database.

        Raises:
            InvalidInput: There is no database, it is of another version, or it is damaged.
        """
        self.path = Path(path)
        header = _read_header(self.path)
        self.class_names: tuple[str, ...] = header.class_names
        self.feature_names: tuple[str, ...] = header.feature_names
        self.fingerprint: str = header.fingerprint
        self.num_frames: int = header.num_frames
        self._objects = self.path / header.objects
        self._width = 3 + len(self.feature_names)
        index = self.path / header.index
        table = read_parquet(index, _SCHEMAS[header.schema_version], remedy=_REMEDY, checksum=checksum_in_name(index))
        _check_index(table.combine_chunks(), header, index)
        needed = int((table["offset"].to_numpy() + table["rows"].to_numpy()).max(initial=0)) * self._width * 4
        if not self._objects.is_file() or self._objects.stat().st_size < needed:
            raise InvalidInput(f"{self._objects} is missing or shorter than the index says ({needed} bytes); {_REMEDY}")
        has_checksums = header.schema_version > 1
        self._rest = table.select(
            ["frame_id", "difficulty", "offset", "rows", *(["crc32"] if has_checksums else [])]
        ).combine_chunks()
        self.boxes = torch.from_numpy(pc.list_flatten(table["box"]).to_numpy().reshape(-1, 7).copy())
        self.classes = torch.from_numpy(table["class"].to_numpy().astype(np.int64))
        if not has_checksums or self._objects.stat().st_size <= _CHECKED_WHEN_OPENED:
            self._compare_whole_file()

    def __len__(self) -> int:
        return len(self.classes)

    def __getitem__(self, index: int) -> GtObject:
        """Read object `index`. Raises `InvalidInput` if its points have another checksum."""
        if not 0 <= index < len(self):
            raise IndexError(f"object {index} of {len(self)}")
        row = self._rest.slice(index, 1).to_pylist()[0]
        shape = (row["rows"], self._width)
        rows = np.zeros(shape, np.float32)
        if shape[0]:  # mapped only while it is copied
            rows[:] = np.memmap(str(self._objects), "<f4", mode="r", offset=row["offset"] * self._width * 4, shape=shape)
        if row.get("crc32", found := zlib.crc32(rows.data)) != found:
            raise InvalidInput(f"{self._objects} is damaged: the points of object {index} have another checksum; {_REMEDY}")
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

    def verify(self) -> tuple[int, ...]:
        """Read every object and compare checksums.

        Returns:
            Positions of the damaged objects. Opening a database of version 1 has compared the whole file already.
        """
        damaged = []
        for index in range(len(self)):
            try:
                self[index]
            except InvalidInput:
                damaged.append(index)
        return tuple(damaged)

    def _compare_whole_file(self) -> None:
        found = 0
        with open(self._objects, "rb") as file:
            while block := file.read(1 << 20):
                found = zlib.crc32(block, found)
        if found != checksum_in_name(self._objects):
            raise InvalidInput(f"{self._objects} is damaged: its bytes have another checksum than its name; {_REMEDY}")


def _read_header(folder: Path) -> _Header:
    path = folder / "database.json"
    if not path.exists():
        raise InvalidInput(f"there is no GT database in {folder} (no database.json); build one from the labeled split")
    values = read_json(path, "the header of a GT database", remedy=_REMEDY)
    version = values.get("schema_version")
    if type(version) is not int or version not in _SCHEMAS:
        raise InvalidInput(
            f"the GT database in {folder} has schema version {str(version)[:20]}, this program reads "
            f"{', '.join(map(str, _SCHEMAS))}; {_REMEDY}"
        )
    try:
        header = config_from_json(_Header, values)
        names = re.fullmatch(r"objects-[0-9a-f]{8}\.f32", header.objects) and re.fullmatch(
            r"index-[0-9a-f]{8}\.parquet", header.index
        )
        if not names:
            raise InvalidInput("it does not name the files of a database")
        if version > 1 and header.digest != json_digest(values):
            raise InvalidInput("its content has another digest than the one it names")
    except InvalidInput as error:
        raise InvalidInput(f"{path} is damaged or was edited: {error}; {_REMEDY}") from error
    return header


def _check_index(table: pa.Table, header: _Header, path: Path) -> None:
    """Every row must describe an object of a class of the header, whatever program wrote it."""
    fault = next(
        (f"{name} is empty in {table[name].null_count} rows" for name in table.column_names if table[name].null_count), ""
    )
    boxes = pc.list_flatten(table["box"])
    if boxes.null_count or not np.isfinite(boxes.to_numpy()).all():
        fault = fault or "a box is not finite"
    if not fault and len(table):
        limits = {"class": len(header.class_names), "offset": 1 << 50, "rows": 1 << 40}  # limits keep later products in 64 bits
        for name, limit in limits.items():
            values = table[name].to_numpy()
            if values.min() < 0 or values.max() >= limit:
                fault = f"{name} must be in 0..{limit - 1}, found {values.min()} to {values.max()}"
    if fault:
        raise InvalidInput(f"{path} does not fit its database.json or is damaged: {fault}; {_REMEDY}")


def build_gt_database(source: FrameSource, out: Path | str, *, class_names: Sequence[str], fingerprint: str) -> GtDatabase:
    """Cut every labeled object out of its scan, with one frame in memory at a time.

    Left out are objects with fewer than `MIN_POINTS` points in their box, ignored ones (weight 0), and boxes that are not exact. A
    database that was in the folder before serves until the new one is complete.

    Args:
        source: The frames of a labeled split.
        out: Folder to write.
        class_names: Names of the class numbers.
        fingerprint: Fingerprint of the split, from `PreparedDataset.split_fingerprint`, or its half of the labels, from the function
            `split_fingerprint`. It is compared with the labels and points that are read, so that a database cannot bear the name of a
            split that it was not made from.

    Returns:
        The database, opened.

    Raises:
        InvalidInput: The labels have another fingerprint, frames differ in their point features, or there is no frame.
    """
    out = Path(out)
    with locked_folder(out, f"another process builds the GT database in {out}", wait=True):
        remove_litter(out)
        temporary = out / f".objects.{os.getpid()}.tmp"
        try:
            with open(temporary, "wb") as file:
                cut = _cut(source, file, tuple(class_names))
                file.flush()
                os.fsync(file.fileno())
            if not same_split(cut.fingerprint, fingerprint):
                raise InvalidInput(
                    f"asked to build a GT database for the labeled split {short(fingerprint)}, but the {len(source)} frames given have "
                    f"the fingerprint {short(cut.fingerprint)}; pass the frames of that split, or the fingerprint of these frames"
                )
            objects_name = f"objects-{cut.checksum:08x}.f32"
            os.replace(temporary, out / objects_name)
        finally:
            temporary.unlink(missing_ok=True)
        sink = pa.BufferOutputStream()
        pq.write_table(cut.index, sink)
        index = sink.getvalue()
        index_name = f"index-{zlib.crc32(index):08x}.parquet"
        with atomic_file(out / index_name) as file:
            file.write(index)
        header = {
            "schema_version": GT_DATABASE_VERSION,
            "class_names": list(class_names),
            "feature_names": list(cut.features),
            "fingerprint": fingerprint,
            "num_frames": len(source),
            "objects": objects_name,
            "index": index_name,
        }
        write_json_file(out / "database.json", header | {"digest": json_digest(header)})
        for old in (*out.glob("objects-*.f32"), *out.glob("index-*.parquet")):
            if old.name not in (objects_name, index_name):
                old.unlink()
    return GtDatabase.open(out, expected_fingerprint=fingerprint)


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """What `_cut` wrote and found."""

    index: pa.Table
    features: tuple[str, ...]
    checksum: int
    """CRC-32 of the file of points."""
    fingerprint: str
    """Of the labels and points that were read."""


def _cut(source: FrameSource, file: BinaryIO, class_names: tuple[str, ...]) -> _Cut:
    """Write the points of all objects, box by box. What is kept of a scan are numbers in a few growing arrays: an Arrow table or a mask
    per scan would leave holes in memory that grow with the number of scans."""
    if len(source) == 0:
        raise InvalidInput("a GT database needs at least one frame, but the split is empty")
    features = source[0].points.feature_names
    search, frame_ids, digests, checksums = BoxSearch(), [], [], []
    numbers, boxes = array("q"), array("f")  # class, difficulty, first row, rows, checksum; seven values
    offset = checksum = 0
    for i in range(len(source)):
        frame = source[i]
        digests.append(frame_digest(frame.id, frame.labels, classes=class_names))
        checksums.append((frame.id, points_checksum(frame.points)))
        if frame.labels is None:
            continue
        if frame.points.feature_names != features:
            raise InvalidInput(
                f"frame {frame.id!r} has point features {frame.points.feature_names}, the first frame has {features}"
            )
        labels = frame.labels.select((frame.labels.weight > 0) & frame.labels.exact)
        search.load(frame.points.xyz, labels.boxes.data)
        xyz, values = frame.points.xyz.numpy(), frame.points.features.numpy()
        for k in range(len(labels)):
            rows = search.rows(k)
            if len(rows) < MIN_POINTS:
                continue
            blob = np.concatenate([xyz[rows], values[rows]], 1, dtype="<f4").tobytes()
            file.write(blob)
            checksum = zlib.crc32(blob, checksum)
            frame_ids.append(frame.id)
            numbers.extend((int(labels.classes[k]), int(labels.difficulty[k]), offset, len(rows), zlib.crc32(blob)))
            boxes.extend(labels.boxes.data[k].float().tolist())
            offset += len(rows)
    return _Cut(
        index=_index_table(frame_ids, numbers, boxes),
        features=features,
        checksum=checksum,
        fingerprint=with_points(combine_digests(digests), checksums),
    )


def _index_table(frame_ids: list[str], numbers: array[int], boxes: array[float]) -> pa.Table:
    classes, difficulty, first, rows, checksums = np.array(numbers, np.int64).reshape(-1, 5).T
    columns = {
        "frame_id": frame_ids,
        "class": classes.astype(np.int32),
        "difficulty": difficulty.astype(np.int32),
        "box": pa.FixedSizeListArray.from_arrays(pa.array(np.array(boxes, np.float32)), 7),
        "offset": first,
        "rows": rows,
        "num_points": rows,
        "crc32": checksums,
    }
    return pa.table(columns, schema=_INDEX_SCHEMA).combine_chunks()
