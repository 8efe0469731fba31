"""Preparation: read every frame of a dataset once, check it, and write it for fast use.

Work is done in chunks of frames by worker processes (`prepared_parts.py`). Finished chunks are kept whatever happens, so killing
preparation and starting it again does nothing twice. `prepared_format.py` draws the files.

Read next: `prepared.py` reads the result; `raw.py` takes what `layouts.py` opened, and adds the databases
of objects to paste.
"""

from __future__ import annotations

import re
import warnings
import zlib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..core.errors import InvalidInput, UpcycleError
from ..core.files import atomic_file, locked_folder, remove_litter
from ..core.foreign_text import check_name, shown
from ..core.frame import are_ignored
from ..core.ledger import Ledger
from ..core.ledger_rules import judge
from ..core.rig import RigSpec
from ..core.strict_json import read_json, write_json_file
from .class_names import check_class_names
from .frame_source import DatasetOrigin, DescribedSource, FrameSource
from .id_lists import overlap_warnings
from .label_shares import label_share_of
from .object_summary import ObjectSummary, summarize_objects
from .prepared import PreparedDataset
from .prepared_format import (
    INDEX_SCHEMA,
    PREPARED_VERSION,
    FrameFailure,
    PreparedHeader,
    origin_to_json,
    read_header,
    read_index,
    row_reading,
)
from .prepared_parts import finished, make_chunk, remove_leftovers, remove_superseded, rows_files, write_chunks

ProgressCallback = Callable[[int, int], None]
"""Called with the number of frames that are done and the number of all frames."""


@dataclass(frozen=True, kw_only=True)
class PrepareReport:
    """What `prepare` found and wrote."""

    root: Path
    """The folder that was written."""
    frames: int
    """Good frames."""
    reused_frames: int
    """Frames, good or not, of chunks that an earlier start had finished."""
    points: int
    """Points of all good frames."""
    boxes: int
    """Labels of all good frames."""
    empty_boxes: int
    """Labels without a point in their box."""
    splits: dict[str, int]
    """Good frames by name of the split."""
    failures: tuple[FrameFailure, ...]
    """The frames that were left out, with reasons."""
    changed_frames: int = 0
    """Frames of finished chunks that were read again, because their files, or the choice of splits with labels, were changed since."""
    ledger: Ledger = Ledger()
    """What the readers counted and dropped, with the boxes by class."""
    kept_splits: tuple[str, ...] = ()
    """Splits of earlier starts that were kept, besides those of this one."""
    warnings: tuple[str, ...] = ()
    """What deserves the user's attention, one sentence each: all that `prepare` finds in the counts, splits and objects."""
    objects: tuple[ObjectSummary, ...] = ()
    """Sizes and points of the labeled objects, by class."""
    road_height: float | None = None
    """Median height of the road in the prepared scans, in meters; None where no road was found."""


class AbsurdDataError(UpcycleError):
    """The counts of a preparation say that its result would be worthless, so nothing was published.

    Attributes:
        ledger: The counts.
    """

    def __init__(self, text: str, ledger: Ledger) -> None:
        super().__init__(text)
        self.ledger = ledger


def prepare(
    source: FrameSource,
    ids: Sequence[str],
    out: Path | str,
    *,
    splits: Mapping[str, Sequence[str]],
    classes: tuple[str, ...],
    origin: DatasetOrigin | None = None,
    workers: int = 2,
    chunk_frames: int = 16,
    replace_splits: bool = False,
    on_progress: ProgressCallback | None = None,
) -> PrepareReport:
    """Read every frame of a source once, check it, and write a prepared dataset.

    A frame that cannot be read or breaks the contract of its values does not stop the rest: the report names it with the reason,
    and index and splits leave it out. A later start tries chunks with such frames again, in case the cause was repaired. It also reads
    those chunks again in which a frame's files have another size or time than before, or a frame has labels now and had none before.

    Args:
        source: The frames. All good frames must have the same point features and the same rig.
        ids: One id per frame, in the order of `source`.
        out: Folder to write.
        splits: Name of a split and the ids of its frames. Splits of an earlier start stay unless they are named again, so splits can be
            added later, from a source that holds only their frames.
        classes: Names of the class numbers of the labels.
        origin: Where the data comes from. By default `source.origin`, or "own" where the source has none.
        workers: Number of forked processes; 0 or 1 reads in this process. The files are the same bytes for any number.
        chunk_frames: Frames per part file.
        replace_splits: Drop the splits of earlier starts, with the files that no split needs any more.
        on_progress: Called after each chunk.

    Returns:
        Counts, and the frames that were left out.

    Warns:
        UserWarning: Each of the report's `warnings`, for a source of your own.

    Raises:
        InvalidInput: The arguments contradict each other, or an earlier start of this folder had other settings.
        UpcycleError: A worker died, another process prepares the same folder, no frame of a split is good, or the counts are absurd
            (`core/ledger_rules.py`).

    Example:
        source = KittiDataset("KITTI", ids, z_shift=1.73)
        report = prepare(source, ids, "data/kitti", splits={"train": ids}, classes=source.classes)
        frames = PreparedDataset("data/kitti", "train")
    """
    check_class_names(classes)
    ids = tuple(ids)
    _check_arguments(source, ids, splits, chunk_frames, workers)
    out = Path(out)
    parts = out / "parts"
    parts.mkdir(parents=True, exist_ok=True)
    if origin is None:
        origin = source.origin if isinstance(source, DescribedSource) else DatasetOrigin()
    with locked_folder(out, f"another process is preparing {out}; wait for it or choose another folder") as lock:
        settings = {
            "schema_version": PREPARED_VERSION,
            "classes": list(classes),
            "origin": origin_to_json(origin),
            "chunk_frames": chunk_frames,
        }
        _refuse_other_settings(out / "preparation.json", settings)
        remove_litter(out)
        remove_leftovers(parts)
        chunks = [make_chunk(settings, first, ids[first : first + chunk_frames]) for first in range(0, len(ids), chunk_frames)]
        rows = rows_files(parts)
        todo, changed = [], list[str]()
        for chunk in chunks:
            whole, other = finished(parts, chunk, rows.get(chunk.key), source)
            changed += other
            if not whole:
                todo.append(chunk)
        for chunk in todo:
            if chunk.key in rows:
                rows[chunk.key].unlink()  # it is written anew, perhaps under another checksum
        reused = done = len(ids) - sum(len(chunk.ids) for chunk in todo)
        for frames in write_chunks(source, todo, parts, len(classes), workers, lock):
            done += frames
            if on_progress:
                on_progress(done, len(ids))
        rows = rows_files(parts)
        table = pa.concat_tables([read_index(rows[chunk.key]).replace_schema_metadata(None) for chunk in chunks])
        if table["error"].null_count == 0 and not (out / "dataset.json").exists():
            (out / "preparation.json").unlink(
                missing_ok=True
            )  # every frame failed: other options may follow, and nothing good is lost
        earlier = _Earlier() if replace_splits else _read_earlier(out, ids, splits)
        if earlier.rows is not None:
            table = pa.concat_tables([table, earlier.rows])
        report = _publish(out, table, classes, origin, {**earlier.splits, **splits}, reused)
        remove_superseded(parts, chunks, table, everything=replace_splits)
    summaries, findings, road = summarize_objects(PreparedDataset(out))
    drawn = {
        name: names for name, names in splits.items() if label_share_of(name.removesuffix("-rest")) is None
    }  # label shares share frames on purpose
    judged = (finding.text for finding in judge(report.ledger))
    said = tuple(dict.fromkeys((*earlier.warnings, *_about_changes(changed), *overlap_warnings(drawn), *findings, *judged)))
    if origin.layout == "own":  # no command shows the report
        for text in said:
            warnings.warn(text, stacklevel=2)
    return replace(
        report, changed_frames=len(changed), kept_splits=tuple(earlier.splits), warnings=said, objects=summaries, road_height=road
    )


def _about_changes(changed: Sequence[str]) -> tuple[str, ...]:
    if not changed:
        return ()
    return (
        f"{len(changed)} frames were read again, because their files were changed since they were prepared, or because they have labels now and "
        f"had none or the other way round (--unlabeled): {', '.join(map(shown, changed[:3]))}{' …' if len(changed) > 3 else ''}. What was "
        "trained or scored on them before is of the older data",
    )


@dataclass(frozen=True, kw_only=True)
class _Earlier:
    """What earlier starts published and this one does not touch."""

    splits: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    rows: pa.Table | None = None
    warnings: tuple[str, ...] = ()


def _read_earlier(out: Path, ids: tuple[str, ...], splits: Mapping[str, Sequence[str]]) -> _Earlier:
    """Read the splits that the folder holds already, and the rows of their frames that are not among `ids`."""
    if not (out / "dataset.json").exists():
        return _Earlier()
    try:
        header = read_header(out)
        table = read_index(out / header.index, header.version)
    except InvalidInput as error:
        return _Earlier(warnings=(f"the splits of earlier starts could not be kept, because they cannot be read: {error}",))
    kept = {name: names for name, names in header.splits.items() if name not in splits}
    now, failed = set(ids), {failure.id: failure.reason for failure in header.failures}
    there = {name: (out / "parts" / name).exists() for name in table["part"].unique().to_pylist()}
    position = {name: i for i, (name, part) in enumerate(zip(table["id"].to_pylist(), table["part"].to_pylist())) if there[part]}
    lost = [name for name, names in kept.items() if not all(i in now or i in position for i in names)]
    kept = {name: names for name, names in kept.items() if name not in lost}
    wanted = dict.fromkeys(i for names in kept.values() for i in names if i not in now)
    failures = [{"id": name, "error": reason} for name, reason in failed.items() if kept and name not in now]
    rows = pa.concat_tables(
        [table.take(pa.array([position[i] for i in wanted], pa.int64())), pa.Table.from_pylist(failures, INDEX_SCHEMA)]
    )
    warnings = (
        [f"the splits {', '.join(lost)} of an earlier start could not be kept, because files of them are missing"] if lost else []
    )
    return _Earlier(splits=kept, rows=rows, warnings=tuple(warnings))


def _check_arguments(
    source: FrameSource, ids: tuple[str, ...], splits: Mapping[str, Sequence[str]], chunk_frames: int, workers: int
) -> None:
    if workers < 0:
        raise InvalidInput(
            f"the number of processes (--workers) must be 0 or more, found {workers}; 0 and 1 read in this process"
        )
    for name in splits:
        check_name(name, "split name")
    for name in ids:
        check_name(name, "frame id")
    if len(source) != len(ids) or not ids:
        raise InvalidInput(
            f"preparation needs one id per frame and at least one frame, found {len(ids)} ids for {len(source)} frames"
        )
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


def _refuse_other_settings(path: Path, settings: dict[str, Any]) -> None:
    if not path.exists():
        write_json_file(path, settings)
        return
    remedy = "delete it, and every frame is read again with the settings given now"
    before = read_json(path, "the settings of a preparation", remedy=remedy)
    if before.get("schema_version") != PREPARED_VERSION:
        raise InvalidInput(
            f"{path.parent} was begun by another version of this program (schema version {before.get('schema_version')}, this one "
            f"writes {PREPARED_VERSION}), and nothing finished is carried over, neither its frames nor the results of an experiment on "
            "them; use another folder, or delete this one to start over"
        )
    try:
        old, new = _flat(before), _flat(settings)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise InvalidInput(f"{path} is damaged or was edited: there is no readable origin in it; {remedy}") from error
    changed = [f"{name}: {old.get(name)!r} -> {new.get(name)!r}" for name in old | new if old.get(name) != new.get(name)]
    if changed:
        raise InvalidInput(
            f"{path.parent} was begun with other settings ({'; '.join(changed)}); prepare into another folder, "
            "or delete this one to start over"
        )


def _flat(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings with the reader's options as entries of their own, so that a message names only what differs."""
    origin = settings["origin"]
    rest = {name: value for name, value in settings.items() if name != "origin"}
    return rest | {"layout": origin["layout"], "root": origin["root"], **origin["options"]}


def _publish(
    out: Path,
    table: pa.Table,
    classes: tuple[str, ...],
    origin: DatasetOrigin,
    splits: Mapping[str, Sequence[str]],
    reused: int,
) -> PrepareReport:
    """Write index and header from the rows of all chunks: the good frames, the failures, the splits without the failures."""
    good, failures, features, rig = _good_frames(table)
    failed = {failure.id: failure.reason for failure in failures}
    kept = {name: tuple(i for i in names if i not in failed) for name, names in splits.items()}
    for name, names in {"the dataset": good, **kept}.items():
        if not names:
            of_it = [f for f in failures if f.id in splits.get(name, failed)]
            raise UpcycleError(
                f"every frame of {name} in {out} failed, so there is nothing to learn from. {_distinct_reasons(of_it)}"
            )
    table = table.take(good)
    ledger = _ledger(table, classes, len(failures))
    for finding in judge(ledger):
        if finding.stops:
            if not (out / "dataset.json").exists():
                (out / "preparation.json").unlink()  # other settings may be tried in the same folder
            raise AbsurdDataError(f"{finding.text}. Nothing was published in {out}; prepare again with other options", ledger)
    header = PreparedHeader(
        version=PREPARED_VERSION,
        classes=classes,
        feature_names=features,
        rig=rig,
        origin=origin,
        index=_write_index(out, table),
        splits=kept,
        failures=tuple(failures),
    )
    write_json_file(out / "dataset.json", header.to_json())
    for old in out.glob("index-*.parquet"):
        if old.name != header.index:
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
        failures=header.failures,
        ledger=ledger,
    )


def _distinct_reasons(failures: Sequence[FrameFailure]) -> str:
    """At most three different reasons. Reasons that differ by the frame's id or by numbers only are one, shown with its number."""
    alike: dict[str, list[FrameFailure]] = {}
    for failure in failures:
        alike.setdefault(re.sub(r"\d+", "#", failure.reason.replace(failure.id, "#")), []).append(failure)
    most = sorted(alike.values(), key=len, reverse=True)[:3]
    said = []
    for first, *more in most:
        others = f" and {len(more)} more like it" if more else ""
        named = first.id in first.reason  # the reader names the frame itself
        said.append(f"{first.reason}{f' ({others.strip()})' if more else ''}" if named else f"{first.id}{others}: {first.reason}")
    return "; ".join(said)


def _ledger(table: pa.Table, classes: tuple[str, ...], failed: int) -> Ledger:
    """What the readers of all good frames counted, and their boxes by class. A reader that counts nothing has its points counted."""
    total = Ledger(scans=len(table), scans_failed=failed, boxes=dict.fromkeys(classes, 0))
    columns = zip(*(table[name].to_pylist() for name in ("reading", "num_points", "classes", "box_points", "weight")))
    for reading, num_points, numbers, box_points, weights in columns:
        read = row_reading({"reading": reading})
        names = [classes[number] for number in numbers or ()]
        ignored = are_ignored(weights or (), box_points or (), read)
        read = replace(
            read,
            scans=0,
            points=read.points or num_points,
            boxes=Counter(name for name, no in zip(names, ignored) if not no),
            boxes_empty=Counter(name for name, no, count in zip(names, ignored, box_points or ()) if not no and count == 0),
            types_ignored=read.types_ignored or Counter(name for name, no in zip(names, ignored) if no),
            scans_with_boxes=int(not all(ignored)),
            scans_with_empty_boxes=int(not all(ignored) and not any(n for n, no in zip(box_points or (), ignored) if not no)),
        )
        total = total + read
    return total


def _good_frames(table: pa.Table) -> tuple[list[int], list[FrameFailure], tuple[str, ...], RigSpec]:
    """Row numbers of the good frames, the failures, and the point features and the rig that most frames have.

    A frame with other features or another rig than most is a failure: no model can learn from both.
    """
    names, errors = table["id"].to_pylist(), table["error"].to_pylist()
    features = [None if kind is None else tuple(kind) for kind in table["feature_names"].to_pylist()]
    shifts = list(zip(table["z_shift"].to_pylist(), table["intensity_scale"].to_pylist()))
    read = [i for i, error in enumerate(errors) if error is None]
    usual_features = Counter(features[i] for i in read).most_common(1)
    usual_shift = Counter(shifts[i] for i in read).most_common(1)
    good, failures = [], []
    for i, (frame_id, error) in enumerate(zip(names, errors)):
        if error is None and features[i] != usual_features[0][0]:
            error = f"its point features are {features[i]}, those of most frames are {usual_features[0][0]}"
        if error is None and shifts[i] != usual_shift[0][0]:
            error = f"its rig (z_shift, intensity_scale) is {shifts[i]}, that of most frames is {usual_shift[0][0]}"
        if error is None:
            good.append(i)
        else:
            failures.append(FrameFailure(id=frame_id, reason=error))
    if not good:
        return good, failures, (), RigSpec()
    z_shift, intensity_scale = usual_shift[0][0]
    return good, failures, usual_features[0][0] or (), RigSpec(z_shift=z_shift, intensity_scale=intensity_scale)


def _write_index(out: Path, table: pa.Table) -> str:
    """Write the index under a name with its checksum; returns the name."""
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    index = sink.getvalue()
    name = f"index-{zlib.crc32(index):08x}.parquet"
    with atomic_file(out / name) as file:
        file.write(index)
    return name
