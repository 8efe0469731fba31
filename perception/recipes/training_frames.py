"""Which frames a detector has learned from, as far as run folders say: scores on them are too good.

The record of a run names its data, and the run that it started from. A detector file alone does not: it may go anywhere, so it holds
no place and no name of a frame.

Read next: `job_records.py`, which makes the records.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ...core.errors import UpcycleError
from ...datasets.data_split import DataSplit
from ...datasets.fingerprint import same_split
from ...datasets.prepared import PreparedDataset
from ..training.run_folder import RunFolder

_MOST_RUNS = 10  # that are followed from one to the one it started from


def shared_with(one: PreparedDataset, other: PreparedDataset) -> int:
    """Count the frames that two splits share.

    Args:
        one: A split.
        other: Another split, perhaps of another prepared dataset.

    Returns:
        Number of ids in both, where both come from the same folder; 0 otherwise, because ids of two data sets mean nothing.
    """
    same = one.root.resolve() == other.root.resolve()
    same |= one.origin.root is not None and (one.origin.root, one.origin.layout) == (other.origin.root, other.origin.layout)
    return len(set(one.ids) & set(other.ids)) if same else 0


def shared_frames_note(detector: str | Path, frames: PreparedDataset) -> str | None:
    """Say whether a detector is scored on frames that it has learned from.

    Args:
        detector: Its run folder, or a file or checkpoint in it.
        frames: The split that it is scored on.

    Returns:
        A sentence; None where no frame is shared, or where no run folder says what the training read.
    """
    for data, fingerprint in _splits(Path(detector)):
        name, shared = data.get("name"), 0
        try:
            learned = DataSplit(root=Path(data["root"]), name=name if isinstance(name, str) else None).open()
            shared = shared_with(learned, frames)
        except (UpcycleError, OSError):  # moved or removed
            if same_split(fingerprint, frames.split_fingerprint()):
                shared = len(frames)
        if shared:
            which = "" if name is None else f":{name}"
            return (
                f"{shared} of {len(frames)} frames were also in the training ({data['root']}{which}): a score on them says little about "
                "new frames; score a split that was not trained on"
            )
    return None


def training_is_recorded(detector: str | Path) -> bool:
    """Say whether a run folder names the frames that a detector has learned from, and they are still there.

    Args:
        detector: Its run folder, or a file or checkpoint in it.

    Returns:
        True if they can be compared with others.
    """
    for data, _ in _splits(Path(detector)):
        try:
            DataSplit(root=Path(data["root"]), name=data.get("name")).open()
        except (UpcycleError, OSError):  # moved or removed
            continue
        return True
    return False


def _splits(detector: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """The splits that a detector has learned from, each with its fingerprint."""
    for record in _records(detector):
        for place, content in (("data", "data_fingerprint"), ("target_labels", "target_fingerprint")):
            data = record.get(place)
            if isinstance(data, dict) and isinstance(data.get("root"), str):
                yield data, str(record.get(content))


def _records(place: Path) -> list[dict[str, Any]]:
    """The records of the run that made a detector and of the runs that it started from, the newest first."""
    found: list[dict[str, Any]] = []
    seen: set[Path] = set()
    while len(found) < _MOST_RUNS:
        folder = next((p for p in (place, *list(place.parents)[:2]) if (p / "config.json").is_file()), None)
        if folder is None or folder.resolve() in seen:
            break
        seen.add(folder.resolve())
        try:
            record: Any = RunFolder.open(folder).config_json()
        except (UpcycleError, OSError):
            break
        found.append(record)
        source = record.get("detector") or record.get("init")
        if not isinstance(source, str):
            break
        place = Path(source)
    return found
