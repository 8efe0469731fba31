"""The parts of a prepared dataset: chunks of frames, read, checked and written by worker processes.

A chunk becomes two files, points (`KEY-CRC.f32`, float32 rows) and one row per frame (`KEY-CRC.parquet`). Each appears under its name
by one rename of complete, synced bytes, the second after the first, so a chunk whose Parquet file exists is finished, whenever the
process was killed. KEY is a hash of the settings and the frame ids, CRC is the checksum of the file, which the next start compares. The rows
also keep what the files of each frame were (names, sizes, times), so that frames whose files were changed since are read again.

Read next: `prepare.py`, which plans the chunks and publishes the result.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import multiprocessing.connection
import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ..core.errors import InvalidInput, UpcycleError
from ..core.files import atomic_file, remove_litter, write_atomically
from ..core.foreign_text import shown
from ..core.frame import Frame
from ..core.intensity import propose_scale
from .fingerprint import points_bytes
from .frame_source import FiledSource, FrameSource, KittiLabelSource, LabelChoiceSource
from .parquet import checksum_in_name
from .prepared_format import INDEX_SCHEMA, frame_row, read_index

_FILES = b"files"  # key of the metadata of a chunk's rows: what the files of each frame were
_LONGEST_REASON = 1000  # letters; a reason may quote a label file, and dataset.json must stay a file that people can open


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """Frames that follow each other in the source and are written together."""

    key: str
    """Hash of the settings and the ids; names the files."""
    first: int
    """Position of the first frame in the source."""
    ids: tuple[str, ...]
    """Ids of the frames."""


def check_frame(frame: Frame, num_classes: int) -> None:
    """Check that a frame keeps the contract of its values.

    Args:
        frame: What a reader gave.
        num_classes: Number of classes of the dataset.

    Raises:
        InvalidInput: There is a NaN, an intensity outside 0..1, a box without a size, a yaw or a class out of range.
    """
    points = frame.points
    if not (torch.isfinite(points.xyz).all() and torch.isfinite(points.features).all()):
        bad = ~(torch.isfinite(points.xyz).all(1) & torch.isfinite(points.features).all(1))
        raise InvalidInput(f"{int(bad.sum())} of {len(points)} points hold NaN or inf, the first in row {int(bad.nonzero()[0])}")
    if "intensity" in points.feature_names and len(points):
        intensity = points.features[:, points.feature_names.index("intensity")]
        if intensity.min() < 0 or intensity.max() > 1:
            low, high, scale = intensity.min().item(), intensity.max().item(), frame.rig.intensity_scale
            raise InvalidInput(
                f"intensity must be in 0..1, found {low:.6g} to {high:.6g} after scaling by {scale:.6g}; "
                f"{propose_scale(low / scale, high / scale)}"
            )
    if frame.labels is None:
        return
    boxes, labels = frame.labels.boxes.data, frame.labels
    checks = {
        "boxes hold NaN or inf": ~torch.isfinite(boxes).all(1),
        "boxes have a size of zero or less": (boxes[:, 3:6] <= 0).any(1),
        "yaws are outside [-pi, pi) (see core.boxes.wrap_angle)": boxes[:, 6].abs() > torch.pi + 1e-5,
        f"classes are outside 0..{num_classes - 1}": (labels.classes < 0) | (labels.classes >= num_classes),
        "weights are negative or NaN": ~(labels.weight >= 0),
    }
    for what, bad in checks.items():
        if bad.any():
            first = int(bad.nonzero()[0])
            raise InvalidInput(
                f"{int(bad.sum())} of {len(labels)} {what}; the first is label {first}: class {int(labels.classes[first])}, "
                f"weight {float(labels.weight[first]):g}, box {[round(v, 3) for v in boxes[first].tolist()]}"
            )


def rows_files(parts: Path) -> dict[str, Path]:
    """Find the file of rows of every chunk.

    Args:
        parts: Folder of the part files.

    Returns:
        The file `KEY-CRC.parquet` by key.
    """
    return {path.name.split("-")[0]: path for path in sorted(parts.glob("*-*.parquet"))}


def remove_leftovers(parts: Path) -> None:
    """Delete unfinished files of a killed start: temporary ones, and points whose rows never appeared. The caller holds the lock.

    Args:
        parts: Folder of the part files.
    """
    remove_litter(parts)
    keys = rows_files(parts)
    for path in parts.glob("*.f32"):
        if path.name.split("-")[0] not in keys:
            path.unlink()


def remove_superseded(parts: Path, chunks: list[Chunk], table: pa.Table, *, everything: bool = False) -> None:
    """Delete points of an earlier reading that no row names any more, because a failed frame was repaired since.

    Args:
        parts: Folder of the part files.
        chunks: All chunks of the dataset.
        table: The rows of all chunks.
        everything: Also delete the files of chunks of earlier starts, whose splits were dropped.
    """
    keys, current = {chunk.key for chunk in chunks}, set(table["part"].to_pylist())
    for path in parts.glob("*.parquet") if everything else ():
        if (key := path.name.split("-")[0]) not in keys:
            path.unlink()
            for points in parts.glob(f"{key}-*.f32"):
                points.unlink()
    for path in parts.glob("*.f32"):
        if path.name.split("-")[0] in keys and path.name not in current:
            path.unlink()


def make_chunk(settings: dict[str, Any], first: int, ids: tuple[str, ...]) -> Chunk:
    """Name a chunk by its content.

    Args:
        settings: Everything besides the ids that shapes the files, as plain values.
        first: Position of its first frame in the source.
        ids: Ids of its frames.

    Returns:
        The chunk.
    """
    key = hashlib.sha256(json.dumps([settings, ids], sort_keys=True).encode()).hexdigest()[:16]
    return Chunk(key=key, first=first, ids=ids)


def finished(parts: Path, chunk: Chunk, rows: Path | None, source: FrameSource) -> tuple[bool, tuple[str, ...]]:
    """Say whether an earlier start wrote the whole chunk, no frame of it failed, and neither it nor what it was read from changed since.

    Args:
        parts: Folder of the part files.
        chunk: The chunk.
        rows: Its file among `rows_files`, if there is one.
        source: The frames as they are read now.

    Returns:
        True if the chunk need not be read again; a damaged chunk is read and written again. And the frames of a whole chunk whose files
        were changed since, or which have labels now and had none, or the other way round.
    """
    if rows is None:
        return False, ()
    try:
        table = read_index(rows)
    except InvalidInput:
        return False, ()
    good = table["error"].null_count == len(table) and table["id"].to_pylist() == list(chunk.ids)
    if not good or not all(_whole(parts / name) for name in table["part"].unique().to_pylist()):
        return False, ()
    changed = _changed_frames(table, source)
    return not changed, changed


def _changed_frames(table: pa.Table, source: FrameSource) -> tuple[str, ...]:
    """The frames of a chunk that would be read otherwise now. A chunk of an earlier version knows nothing of its files."""
    ids = table["id"].to_pylist()
    before = json.loads((table.schema.metadata or {}).get(_FILES, b"{}"))
    changed = {frame_id for frame_id in ids if frame_id in before and before[frame_id] != _state_of_files(source, frame_id)}
    if isinstance(source, LabelChoiceSource):
        labeled = table["boxes"].is_valid().to_pylist()
        changed |= {frame_id for frame_id, had in zip(ids, labeled) if source.has_labels(frame_id) != had}
    return tuple(frame_id for frame_id in ids if frame_id in changed)


def _state_of_files(source: FrameSource, frame_id: str) -> str:
    """A digest of names, sizes and times of the files of a frame; empty where the source does not name them."""
    if not isinstance(source, FiledSource):
        return ""
    found = []
    for path in source.files_of(frame_id):
        try:
            state = path.stat()
            found.append([path.name, path.parent.name, state.st_size, state.st_mtime_ns])
        except OSError:
            found.append([path.name, path.parent.name, -1, -1])
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()[:16]


def _whole(path: Path) -> bool:
    """Whether a file of points is there, with the bytes that its name promises."""
    found = 0
    try:
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                found = zlib.crc32(block, found)
    except OSError:
        return False
    return found == checksum_in_name(path)


def write_chunks(source: FrameSource, todo: list[Chunk], parts: Path, num_classes: int, workers: int, lock: int) -> Iterator[int]:
    """Write chunks. Worker w of W takes the chunks w, w + W, ...

    Args:
        source: The frames.
        todo: The chunks to write.
        parts: Folder of the part files.
        num_classes: Number of classes of the dataset.
        workers: Number of forked processes; 0 or 1 writes in this process.
        lock: Descriptor of the folder's lock, which workers let go.

    Yields:
        The number of frames of a chunk, each time a chunk is finished.

    Raises:
        UpcycleError: A worker died or could not write.
    """
    if workers <= 1 or len(todo) <= 1:
        for chunk in todo:
            _write_chunk(source, chunk, parts, num_classes)
            yield len(chunk.ids)
        return
    context = multiprocessing.get_context("fork")  # the source need not be picklable, and nothing is copied
    running: dict[Any, Any] = {}
    try:
        for w in range(min(workers, len(todo))):
            reader, writer = context.Pipe(duplex=False)
            arguments = (writer, lock, os.getpid(), source, todo[w::workers], parts, num_classes)
            process = context.Process(target=_worker, args=arguments, daemon=True)
            process.start()
            writer.close()  # else the end of the worker would not be seen
            running[reader] = process
        while running:
            for ready in multiprocessing.connection.wait(list(running)):
                try:
                    message = json.loads(ready.recv_bytes())  # type: ignore[union-attr]
                except EOFError:
                    process = running.pop(ready)
                    process.join()
                    if process.exitcode:
                        raise UpcycleError(
                            f"a worker of prepare ended with code {process.exitcode} (-9: killed, often because memory ran out); "
                            f"what is finished in {parts} is kept: start again, perhaps with fewer workers"
                        ) from None
                    continue
                if isinstance(message, str):
                    raise UpcycleError(f"a worker of prepare failed: {message}; what is finished in {parts} is kept: start again")
                yield message
    finally:
        for process in running.values():
            process.terminate()
            process.join()


def _worker(
    connection: Any, lock: int, parent: int, source: FrameSource, chunks: list[Chunk], parts: Path, num_classes: int
) -> None:
    os.close(lock)  # if the parent is killed, a new start need not wait for its orphans
    torch.set_num_threads(1)  # thread pools of the parent do not survive the fork
    try:
        for chunk in chunks:
            _write_chunk(source, chunk, parts, num_classes, parent=parent)
            connection.send_bytes(json.dumps(len(chunk.ids)).encode())
    except OSError as error:  # the disk is full, or nobody listens
        if os.getppid() != parent:
            os._exit(0)
        connection.send_bytes(json.dumps(f"{type(error).__name__}: {error}").encode())


def _reason(error: Exception) -> str:
    return str(error) if isinstance(error, UpcycleError) else f"{type(error).__name__}: {error}"


def _write_chunk(source: FrameSource, chunk: Chunk, parts: Path, num_classes: int, parent: int | None = None) -> None:
    rows: list[dict[str, Any]] = []
    blobs: list[bytes] = []
    offset = 0
    states: dict[str, str] = {}
    for i, frame_id in enumerate(chunk.ids, chunk.first):
        if parent is not None and os.getppid() != parent:
            os._exit(0)  # orphaned by a kill: whoever starts again does the rest
        try:
            if state := _state_of_files(source, frame_id):  # before the frame is read: a later change is noticed
                states[frame_id] = state
            frame = source[i]
            if frame.id != frame_id:
                raise InvalidInput(f"frame {i} of the source calls itself {frame.id!r}, expected {frame_id!r}")
            check_frame(frame, num_classes)
            blob = points_bytes(frame.points)
            labeled = frame.labels is not None
            kitti = source.kitti_objects(frame_id) if labeled and isinstance(source, KittiLabelSource) else None
            row = frame_row(frame, kitti, offset=offset, crc32=zlib.crc32(blob))
        except MemoryError:
            raise
        except Exception as error:  # whatever a reader raises concerns this frame only, and is reported
            rows.append({"id": frame_id, "error": shown(_reason(error), most=_LONGEST_REASON)})
            continue
        blobs.append(blob)
        rows.append(row)
        offset += len(blob) // 4
    points = b"".join(blobs)
    name = f"{chunk.key}-{zlib.crc32(points):08x}.f32"
    with atomic_file(parts / name) as file:
        file.write(points)
    table = pa.Table.from_pylist([row if "error" in row else {**row, "part": name} for row in rows], INDEX_SCHEMA)
    if states:
        table = table.replace_schema_metadata({_FILES: json.dumps(states).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    data = sink.getvalue().to_pybytes()
    write_atomically(parts / f"{chunk.key}-{zlib.crc32(data):08x}.parquet", data)
