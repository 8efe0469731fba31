"""Where the frames of the Waymo Open Dataset, Perception, lie: v1 TFRecord files or v2 Parquet tables.

    root[/training, /validation, /testing]/*.tfrecord                v1: one file per segment, one `Frame` message per record
    root[/training, /validation, /testing]/lidar/<segment>.parquet   v2: see `waymo_parquet.py`
    root/ImageSets/<split>.txt                                       optional: the segments of a split, one per line

A segment is 20 s of one drive, so neighboring frames show one street: whatever is split is split by segment. Frames are called
`<segment>_<time in microseconds>`.

Read next: `waymo.py`, which reads the frames.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from difflib import get_close_matches
from pathlib import Path

from ..core.errors import InvalidInput
from ..core.foreign_text import check_name
from .id_lists import list_names, read_ids
from .waymo_parquet import TablePlace, find_frames
from .waymo_proto import read_identity
from .waymo_records import RecordPlace, find_records

WAYMO_FOLDERS = {"training": "train", "validation": "val", "testing": "test"}
"""Folder of the download -> name of the split."""


@dataclass(frozen=True, kw_only=True)
class FramePlace:
    """Where one frame is read from."""

    id: str
    """Id of the frame."""
    segment: str
    """Name of its segment."""
    source: RecordPlace | TablePlace | str
    """A record or the rows of a table; or the reason why this frame, or the rest of its file, cannot be read. Such a place stays in
    the list, so that preparation names what was left out."""


def find_waymo_frames(
    root: Path | str, segments: Iterable[str] | None = None, *, every: int = 1
) -> dict[str, tuple[FramePlace, ...]]:
    """List the frames of segments.

    v1 frames are told apart by their content, so only the first bytes of each record are read. What cannot be read keeps one place
    that says why: a segment without files, a damaged record (`<file>_record<number>`), the cut-off rest of a file.

    Args:
        root: Folder of the download.
        segments: Names of segments: their context names or, as in OpenPCDet's lists, their file names. None takes all below `root`.
        every: Take each n-th frame of a segment, beginning with the first.

    Returns:
        Segment -> its frames in order of time.

    Raises:
        InvalidInput: There is no such folder, or nothing of Waymo's in it.
    """
    root = Path(root)
    if every < 1:
        raise InvalidInput(f"every must be at least 1, found {every}")
    folders = [folder for folder in (root, *(root / name for name in WAYMO_FOLDERS)) if folder.is_dir()]
    tables = {path.stem: folder for folder in folders for path in _visible(folder / "lidar", "*.parquet")}
    files = {_segment_name(path.name): path for folder in folders for path in _visible(folder, "*.tfrecord")}
    if not tables and not files:
        raise InvalidInput(
            f"there is no lidar/<segment>.parquet (v2) and no *.tfrecord (v1) in {root} or its {', '.join(WAYMO_FOLDERS)}; check "
            "the root folder"
        )
    found: dict[str, tuple[FramePlace, ...]] = {}
    for name in dict.fromkeys([*tables, *files] if segments is None else map(_segment_name, segments)):
        if name in tables:
            places = _table_places(tables[name], name)
        elif name in files:
            places = _record_places(files[name])
        else:
            near = get_close_matches(name, [*tables, *files], 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            places = (FramePlace(id=name, segment=name, source=f"segment {name}: there is no file of it below {root}{hint}"),)
        if not places:
            places = (FramePlace(id=name, segment=name, source=f"segment {name}: its file holds no frame; copy it again"),)
        found[name] = tuple(p for i, p in enumerate(places) if i % every == 0 or isinstance(p.source, str))
    return found


def find_waymo_splits(root: Path | str, names: Sequence[str] = ()) -> dict[str, tuple[str, ...]]:
    """List the splits: the files of `ImageSets`, else the folders training (train), validation (val) and testing (test), else "all".

    Args:
        root: Folder of the download.
        names: Take only these splits; by default all.

    Returns:
        Name of the split -> its segments.

    Raises:
        InvalidInput: A named split is not there.
    """
    root = Path(root)
    lists = {name: root / "ImageSets" / f"{name}.txt" for name in list_names(root / "ImageSets")}
    if lists:
        splits = {name: tuple(map(_segment_name, read_ids(path))) for name, path in lists.items() if not names or name in names}
    else:
        held = {split: root / folder for folder, split in WAYMO_FOLDERS.items() if (root / folder).is_dir()} or {"all": root}
        splits = {
            split: tuple(sorted(p.stem for p in _visible(folder / "lidar", "*.parquet")))
            + tuple(sorted(_segment_name(p.name) for p in _visible(folder, "*.tfrecord")))
            for split, folder in held.items()
            if not names or split in names
        }
    missing = [name for name in names if name not in splits]
    if missing:
        raise InvalidInput(f"there is no split {', '.join(missing)} in {root}; there are {', '.join(lists or splits) or 'none'}")
    return {name: segments for name, segments in splits.items() if segments}


def segment_of(frame_id: str) -> str:
    """Take the segment out of a frame's id.

    Args:
        frame_id: `<segment>_<time>`.

    Returns:
        What precedes the last "_".
    """
    return frame_id.rpartition("_")[0]


def _table_places(root: Path, segment: str) -> tuple[FramePlace, ...]:
    try:
        sources = find_frames(root, segment)
    except InvalidInput as error:
        return (FramePlace(id=segment, segment=segment, source=str(error)),)
    return tuple(FramePlace(id=f"{segment}_{s.timestamp}", segment=segment, source=s) for s in sources)


def _record_places(path: Path) -> tuple[FramePlace, ...]:
    records, problem = find_records(path)
    name = _segment_name(path.name)
    places: list[FramePlace] = []
    seen: set[str] = set()
    for record in records:
        unnamed = FramePlace(id=f"{name}_record{record.index:06d}", segment=name, source=record)
        try:
            segment, timestamp = read_identity(record)
            place = FramePlace(id=f"{segment}_{timestamp}", segment=segment, source=record)
        except InvalidInput:
            place = unnamed  # reading it says what is wrong
        try:
            check_name(place.id, "frame id")  # the context name is a part of it, and it becomes a part of paths
        except InvalidInput as error:
            place = replace(unnamed, source=f"{record}: {error}")
        places.append(unnamed if place.id in seen else place)
        seen.add(place.id)
    if problem is not None:
        places.append(FramePlace(id=f"{name}_record{len(records):06d}", segment=name, source=problem))
    return tuple(places)


def _visible(folder: Path, pattern: str) -> list[Path]:
    """Files of a folder in order of their names, without hidden ones, which macOS leaves beside every file."""
    return sorted(path for path in folder.glob(pattern) if not path.name.startswith("."))


def _segment_name(text: str) -> str:
    """The context name in a v1 file name, `segment-<context>_with_camera_labels.tfrecord`; other names without their suffix."""
    return text.removesuffix(".tfrecord").removesuffix("_with_camera_labels").removeprefix("segment-")
