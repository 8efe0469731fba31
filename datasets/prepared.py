"""Prepared datasets: every frame read and checked once, then served fast from a few large files, with flat memory.

    out/preparation.json         the settings, written first; a restart with other settings is refused
    out/parts/KEY-CRC.f32        points of one chunk of frames: float32 rows x, y, z, features..., frame after frame
    out/parts/KEY.parquet        what is known about those frames, failures included; appears last, so it means "finished"
    out/index-CRC.parquet        the rows of all good frames
    out/dataset.json             schema version, classes, notes, splits, failures, the index in force; written last of all

Each file appears under its name by one rename of complete, synced bytes, and names of data carry a checksum, so a process killed
at any moment leaves a folder from which ``prepare`` goes on: finished chunks are kept, nothing half-written is ever read.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import torch

from ..core.errors import InvalidInput, UpcycleError
from ..core.files import atomic_file
from ..core.structures import Calibration, Frame, Labels, PointCloud
from .fingerprint import split_fingerprint
from .frame_source import FrameSource
from .prepared_parts import SCHEMA_VERSION, finished, make_chunk, read_index, remove_leftovers, remove_superseded, write_chunks

Notes = Mapping[str, str | float | bool]
Progress = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class FrameFailure:
    """A frame that was left out, and why."""

    id: str
    reason: str


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What ``prepare`` found. ``reused_frames`` were already there from an earlier start; ``empty_boxes`` hold no point."""

    root: Path
    frames: int
    reused_frames: int
    points: int
    boxes: int
    empty_boxes: int
    splits: dict[str, int]
    failures: tuple[FrameFailure, ...]


def prepare(
    source: FrameSource,
    ids: Sequence[str],
    out: Path,
    *,
    splits: Mapping[str, Sequence[str]],
    classes: tuple[str, ...],
    notes: Notes | None = None,
    workers: int = 2,
    chunk_frames: int = 16,
    on_progress: Progress | None = None,
) -> PrepareReport:
    """Read every frame of ``source`` once, check it, and write a prepared dataset into the folder ``out``.

    ids: ``ids[i]`` is the id of ``source[i]``. splits: name -> ids; they may change between starts without reading anything anew.
    notes: what readers of the data must know and the frames do not say (where it comes from, z_shift in m, rig).
    workers: forked processes; 0 or 1 reads in this one. The files are the same bytes for any number.
    on_progress: called with (frames done, frames in all).

    A frame that cannot be read or breaks the contract does not stop the rest: it is named in the report with the reason and left
    out of index and splits. A later start tries chunks with such frames again, in case the cause was repaired.
    Raises ``InvalidInput`` for contradictory arguments or settings other than those of an earlier start, ``UpcycleError`` when a
    worker dies, another process is preparing the same folder, or the failures empty a split.
    """
    ids = tuple(ids)
    _check_arguments(source, ids, splits, chunk_frames)
    out = Path(out)
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    with _locked(out) as lock:
        settings = {
            "schema_version": SCHEMA_VERSION,
            "classes": list(classes),
            "notes": dict(notes or {}),
            "chunk_frames": chunk_frames,
        }
        _refuse_other_settings(out / "preparation.json", settings)
        remove_leftovers(parts)
        chunks = [make_chunk(settings, first, ids[first : first + chunk_frames]) for first in range(0, len(ids), chunk_frames)]
        todo = [chunk for chunk in chunks if not finished(parts, chunk)]
        reused = done = len(ids) - sum(len(chunk.ids) for chunk in todo)
        for frames in write_chunks(source, todo, parts, len(classes), workers, lock):
            done += frames
            if on_progress:
                on_progress(done, len(ids))
        table = pa.concat_tables([read_index(parts / f"{chunk.key}.parquet") for chunk in chunks])
        report = _publish(out, table, settings, splits, reused)
        remove_superseded(parts, chunks, table)
        return report


# ---- writing ------------------------------------------------------------------------------------------------------------------


def _check_arguments(source: FrameSource, ids: tuple[str, ...], splits: Mapping[str, Sequence[str]], chunk_frames: int) -> None:
    if len(source) != len(ids) or not ids:
        raise InvalidInput(f"prepare needs one id a frame and at least one frame, found {len(ids)} ids for {len(source)} frames")
    if chunk_frames < 1:
        raise InvalidInput(f"chunk_frames must be at least 1, found {chunk_frames}")
    for what, names in {"the dataset": ids, **{f"split {name!r}": tuple(names) for name, names in splits.items()}}.items():
        if not names:
            raise InvalidInput(f"{what} is empty: name at least one frame, or leave the split out")
        twice = [name for name, count in Counter(names).items() if count > 1]
        unknown = sorted(set(names) - set(ids))
        if twice or unknown:
            raise InvalidInput(
                f"{what} names {len(twice)} frames twice {twice[:3]} and {len(unknown)} that do not exist {unknown[:3]}"
            )


@contextmanager
def _locked(out: Path) -> Iterator[int]:
    """Holds ``out`` for this process; the kernel lets go of it however the process ends."""
    lock = os.open(out / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UpcycleError(f"another process is preparing {out}; wait for it or choose another folder") from None
        yield lock
    finally:
        os.close(lock)


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        with atomic_file(path) as file:
            file.write(json.dumps(settings, indent=1).encode())
        return
    before = json.loads(path.read_text())
    changed = [f"{name}: {before.get(name)!r} -> {value!r}" for name, value in settings.items() if before.get(name) != value]
    if changed:
        raise InvalidInput(
            f"{path.parent} was begun with other settings ({'; '.join(changed)}); prepare into another folder, "
            "or delete this one to start over"
        )


def _publish(
    out: Path, table: pa.Table, settings: dict[str, Any], splits: Mapping[str, Sequence[str]], reused: int
) -> PrepareReport:
    """Index and ``dataset.json`` from the rows of all chunks: the good frames, the failures, the splits without the failures."""
    kinds = [None if names is None else tuple(names) for names in table["feature_names"].to_pylist()]
    usual = Counter(kind for kind in kinds if kind is not None).most_common(1)
    failures, good = [], []
    for i, (frame_id, error, kind) in enumerate(zip(table["id"].to_pylist(), table["error"].to_pylist(), kinds)):
        if error is None and kind != usual[0][0]:
            error = f"its point features are {kind}, those of most frames are {usual[0][0]}: no model can learn from both"
        if error is None:
            good.append(i)
        else:
            failures.append(FrameFailure(id=frame_id, reason=error))
    failed = {failure.id: failure.reason for failure in failures}
    kept = {name: [i for i in names if i not in failed] for name, names in splits.items()}
    for name, names in {"the dataset": good, **kept}.items():
        if not names:
            reasons = "; ".join(f"{f.id}: {f.reason}" for f in [f for f in failures if f.id in splits.get(name, failed)][:3])
            raise UpcycleError(
                f"every frame of {name} in {out} failed, so there is nothing to learn from. The first failures: {reasons}"
            )
    table = table.take(good)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    index = sink.getvalue()
    index_name = f"index-{zlib.crc32(index):08x}.parquet"
    with atomic_file(out / index_name) as file:
        file.write(index)
    header = {
        **settings,
        "feature_names": usual[0][0],
        "index": index_name,
        "splits": kept,
        "failures": [{"id": f.id, "reason": f.reason} for f in failures],
    }
    with atomic_file(out / "dataset.json") as file:
        file.write(json.dumps(header, indent=1).encode())
    for old in out.glob("index-*.parquet"):
        if old.name != index_name:
            old.unlink()
    box_points = pc.list_flatten(table["box_points"])
    return PrepareReport(
        root=out,
        frames=len(good),
        reused_frames=reused,
        points=pc.sum(table["num_points"]).as_py(),
        boxes=len(box_points),
        empty_boxes=pc.sum(pc.equal(box_points, 0)).as_py() or 0,
        splits={name: len(names) for name, names in kept.items()},
        failures=tuple(failures),
    )


# ---- reading ------------------------------------------------------------------------------------------------------------------


class PreparedDataset:
    """A prepared dataset, or the frames of one split of it, as a ``FrameSource``.

    root: the folder ``prepare`` wrote. split: a split's name, or None for every frame.
    The index is held in Arrow buffers, which forked workers share; points are mapped frame by frame, only while they are copied
    out, so memory does not grow with what was read and no open file is handed to a worker.
    Raises ``InvalidInput`` if the folder is not a finished prepared dataset, was cut off, or lacks the split.
    """

    def __init__(self, root: Path, split: str | None = None) -> None:
        self.root = Path(root)
        try:
            header = json.loads((self.root / "dataset.json").read_text())
        except FileNotFoundError:
            raise InvalidInput(f"{self.root} holds no dataset.json; run `upcycle3d prepare` (again) to finish it") from None
        if header["schema_version"] != SCHEMA_VERSION:
            raise InvalidInput(
                f"{self.root} has schema version {header['schema_version']}, this program reads {SCHEMA_VERSION}; prepare it again"
            )
        self.classes: tuple[str, ...] = tuple(header["classes"])
        self.feature_names: tuple[str, ...] = tuple(header["feature_names"])
        self.notes: Notes = header["notes"]
        self.splits: dict[str, int] = {name: len(names) for name, names in header["splits"].items()}
        if split is not None and split not in header["splits"]:
            raise InvalidInput(f"{self.root} has no split {split!r}; it has {sorted(header['splits'])}")
        table = read_index(self.root / Path(header["index"]).name)
        position = {frame_id: i for i, frame_id in enumerate(table["id"].to_pylist())}
        self.ids: tuple[str, ...] = tuple(position if split is None else header["splits"][split])
        unknown = [frame_id for frame_id in self.ids if frame_id not in position]
        if unknown or not self.ids:
            raise InvalidInput(f"{len(unknown)} of {len(self.ids)} frames asked of {self.root} are not in it: {unknown[:3]}")
        self._table = table.take([position[frame_id] for frame_id in self.ids]).combine_chunks()
        self._check_parts()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int, /) -> Frame:
        row = self._row(index)
        rows = self._points(row)
        points = PointCloud(
            xyz=torch.from_numpy(np.array(rows[:, :3], np.float32, order="C")),
            features=torch.from_numpy(np.array(rows[:, 3:], np.float32, order="C")),
            feature_names=self.feature_names,
        )
        return Frame(id=row["id"], points=points, labels=_labels(row), calibration=_calibration(row))

    def labels(self, index: int) -> Labels | None:
        """The labels of frame ``index``, without reading its points."""
        return _labels(self._row(index))

    def split_fingerprint(self) -> str:
        """The fingerprint of these frames and their labels; see ``fingerprint.split_fingerprint``."""
        return split_fingerprint(self.ids, (self.labels(i) for i in range(len(self))), classes=self.classes)

    def verify(self) -> tuple[str, ...]:
        """Reads every point and gives the ids of the frames whose checksum is wrong (a failing disk, a bad copy)."""
        rows = (self._row(i) for i in range(len(self)))
        return tuple(row["id"] for row in rows if zlib.crc32(self._points(row).tobytes()) != row["crc32"])

    def _row(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"frame {index} of {len(self)}")
        return self._table.slice(index, 1).to_pylist()[0]

    def _points(self, row: dict[str, Any]) -> np.ndarray:
        """(N, 3 + C) float32, mapped."""
        shape = (row["num_points"], 3 + len(self.feature_names))
        if shape[0] == 0:
            return np.zeros(shape, np.float32)  # nothing cannot be mapped
        return np.memmap(str(self.root / "parts" / row["part"]), "<f4", mode="r", offset=row["offset"] * 4, shape=shape)

    def _check_parts(self) -> None:
        """Every frame must lie inside its part file, and every part inside the folder."""
        ends = pc.add(self._table["offset"], pc.multiply(self._table["num_points"], 3 + len(self.feature_names)))
        needed = pa.table({"part": self._table["part"], "end": ends}).group_by("part").aggregate([("end", "max")])
        for part, end in zip(needed["part"].to_pylist(), needed["end_max"].to_pylist()):
            path = self.root / "parts" / part
            if not re.fullmatch(r"[0-9a-f]{16}-[0-9a-f]{8}\.f32", part) or not path.exists() or path.stat().st_size < end * 4:
                raise InvalidInput(f"{path} is missing or shorter than the index says ({end * 4} bytes); copy the dataset again")


def _labels(row: dict[str, Any]) -> Labels | None:
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


def _calibration(row: dict[str, Any]) -> Calibration | None:
    if row["lidar_to_camera"] is None:
        return None
    return Calibration(
        lidar_to_camera=torch.tensor(row["lidar_to_camera"], dtype=torch.float64).view(4, 4),
        projection=torch.tensor(row["projection"], dtype=torch.float64).view(3, 4),
        image_size=(row["image_size"][0], row["image_size"][1]),
    )
