"""The ground-truth database: labelled objects cut out of their scans, to be pasted into other scans of the same split.

Sampling objects into a scene ("GT sampling", Yan et al., SECOND, 2018, section 3.3; OpenPCDet ``database_sampler.py``) gives rare
classes a chance. An object stays at the place where it was seen: distance decides how many points it has. It goes only where it
touches nothing, and replaces the scene points in its box, as the real object would have hidden them.

    out/objects-CRC.f32     float32 rows x, y, z, features..., object after object, in the frame of its scene
    out/index-CRC.parquet   one row an object
    out/database.json       schema version, classes, the fingerprint of the labelled split, the index in force; written last

The database of one split refuses to serve another: its objects would leak labels a run is not meant to see.
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import atomic_file
from ..core.structures import Frame, Labels, PointCloud
from ..ops.iou3d import iou_bev
from ..ops.points_in_boxes import points_in_boxes, points_in_boxes_mask
from .fingerprint import combine_digests, frame_digest
from .frame_source import FrameSource

SCHEMA_VERSION = 1
MIN_POINTS = 5  # in an object's box; with fewer there is nothing to learn from (OpenPCDet ``filter_by_min_points``)

_INDEX_SCHEMA = pa.schema(
    [
        ("frame_id", pa.string()),
        ("class", pa.int32()),
        ("difficulty", pa.int32()),
        ("box", pa.list_(pa.float32(), 7)),
        ("offset", pa.int64()),  # first row of the object in the file of points
        ("rows", pa.int64()),  # how many it has there
        ("num_points", pa.int64()),  # the same number; an earlier program could cut with an enlarged box
    ]
)


@dataclass(frozen=True, kw_only=True)
class GtObject:
    """One labelled object. box: (7,) float32 in its scene; points: its own, in the same frame; difficulty: as in ``Labels``."""

    box: Tensor
    class_index: int
    difficulty: int
    points: PointCloud
    frame_id: str


class GtDatabase:
    """An opened database. ``boxes`` (M, 7) float32 and ``classes`` (M,) are at hand; the points of an object are read on demand.

    Memory: about 60 bytes an object. No point is kept, and none is read before it is asked for.
    """

    @classmethod
    def open(cls, path: Path, *, expected_fingerprint: str) -> GtDatabase:
        """The database in the folder ``path``, which must have been built from the split of ``expected_fingerprint``.

        Raises ``InvalidInput`` if there is none, if it was built from another split, or if its points were cut off.
        """
        database = cls(path)
        if database.fingerprint != expected_fingerprint:
            raise InvalidInput(
                f"the GT database in {path} was built from another labelled split: fingerprint {database.fingerprint[:12]} "
                f"({database.num_frames} frames, {len(database)} objects), expected {expected_fingerprint[:12]}. Its objects could "
                "leak labels this run must not see; build a database from this run's labelled split"
            )
        return database

    def __init__(self, path: Path) -> None:
        """Opens without asking which split it was built from: for inspection only. To train, use ``open``."""
        self.path = Path(path)
        try:
            header = json.loads((self.path / "database.json").read_text())
        except FileNotFoundError:
            raise InvalidInput(f"no GT database in {path} (no database.json); build one from the labelled split") from None
        if header["schema_version"] != SCHEMA_VERSION:
            raise InvalidInput(
                f"the GT database in {path} has schema version {header['schema_version']}, this program reads {SCHEMA_VERSION}; build it again"
            )
        self.class_names: tuple[str, ...] = tuple(header["class_names"])
        self.feature_names: tuple[str, ...] = tuple(header["feature_names"])
        self.fingerprint: str = header["fingerprint"]
        self.num_frames: int = header["num_frames"]
        table = pq.read_table(self.path / Path(header["index"]).name, use_threads=False).combine_chunks()
        if not table.schema.equals(_INDEX_SCHEMA):
            raise InvalidInput(
                f"the index of the GT database in {path} has other columns than schema version {SCHEMA_VERSION}; build it again"
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


def build_gt_database(source: FrameSource, out: Path, *, class_names: Sequence[str], fingerprint: str) -> GtDatabase:
    """Cut every labelled object out of ``source`` into the folder ``out``, one frame in memory at a time.

    fingerprint: of the labelled split (``split_fingerprint``); it is checked against the labels that are read, so that a database
    cannot bear the name of a split it was not made from. Objects with fewer than ``MIN_POINTS`` points in their box are left out,
    and so are ignored ones (weight 0) and boxes that are not exact. A database that was in ``out`` before serves until the new
    one is complete.
    Raises ``InvalidInput`` if the labels have another fingerprint or frames differ in their point features.
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
                f"asked to build a GT database for the labelled split {fingerprint[:12]}, but the {len(source)} frames given have the "
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
        "schema_version": SCHEMA_VERSION,
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
    """Writes the points of all objects to ``file``; gives index, feature names, checksum and the fingerprint of what was read."""
    if len(source) == 0:
        raise InvalidInput("cannot build a GT database from no frame: the split is empty")
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


class GtSampler:
    """Chooses objects for a scene: for each class as many as are missing to its count, only where they touch nothing.

    groups: class name -> objects of that class a scene should hold. The reference KITTI setting is Car 15-20, Pedestrian 10-15,
    Cyclist 10-15 (OpenPCDet ``pv_rcnn.yaml``, ``kitti_dataset.yaml``). Class numbers of scenes are those of the database.
    Raises ``InvalidInput`` for a class the database does not name. It has no state: what it chooses depends on ``rng`` alone.
    """

    def __init__(self, database: GtDatabase, groups: Mapping[str, int]) -> None:
        unknown = [name for name in groups if name not in database.class_names]
        if unknown:
            raise InvalidInput(
                f"GT sampling asks for {unknown}, but the database in {database.path} has the classes {database.class_names}"
            )
        self.database = database
        self.groups = {database.class_names.index(name): count for name, count in groups.items()}
        self._members = {c: torch.nonzero(database.classes == c)[:, 0].numpy() for c in self.groups}

    def sample(self, rng: np.random.Generator, labels: Labels) -> list[GtObject]:
        """Objects to paste into a scene with ``labels``; none overlaps a labelled box (ignored ones included) or another.

        Candidates are drawn without replacement; one that is in the way of an earlier one is dropped, not replaced.
        """
        taken = labels.boxes.data
        chosen: list[int] = []
        for class_index, count in self.groups.items():
            present = int(((labels.classes == class_index) & (labels.weight > 0)).sum())
            members = self._members[class_index]
            missing = min(count - present, len(members))
            if missing <= 0:
                continue
            candidates = rng.choice(members, size=missing, replace=False)
            boxes = self.database.boxes[torch.from_numpy(candidates)]
            free = ~(iou_bev(boxes, taken) > 0).any(1)
            among = iou_bev(boxes, boxes) > 0
            accepted: list[int] = []
            for i in range(missing):
                if free[i] and not among[i, accepted].any():
                    accepted.append(i)
            taken = torch.cat([taken, boxes[accepted]])
            chosen += candidates[accepted].tolist()
        return [self.database[i] for i in chosen]


def paste(frame: Frame, objects: Sequence[GtObject]) -> Frame:
    """``frame`` with ``objects`` at their own places: scene points in their boxes go, theirs come, and their labels are added.

    Raises ``InvalidInput`` for an unlabelled frame: nobody knows what an object pasted there would stand in.
    """
    if frame.labels is None:
        raise InvalidInput(
            f"frame {frame.id!r} has no labels, so objects cannot be pasted into it: they could stand inside others"
        )
    if not objects:
        return frame
    boxes = torch.stack([o.box for o in objects])
    scene = frame.points.select(points_in_boxes(frame.points.xyz, boxes) < 0)
    pasted = Labels.make(
        boxes,
        torch.tensor([o.class_index for o in objects]),
        num_points=torch.tensor([len(o.points) for o in objects]),
        difficulty=torch.tensor([o.difficulty for o in objects]),
    )
    return replace(
        frame,
        points=PointCloud.concatenate([scene, *(o.points for o in objects)]),
        labels=Labels.concatenate([frame.labels, pasted]),
    )
