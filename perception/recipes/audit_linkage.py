"""The attack on the order and origin of uploads as a part of an audit, and the file of drives that it needs.

Read next: `perception/privacy/attacks/linkage.py`, the attack.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...core.errors import InvalidInput, require
from ...core.text_files import read_text
from ..privacy.attacks.linkage import attack_linkage
from ..privacy.frames import AuditFrame
from ..privacy.linkage_metrics import LinkageScores


@dataclass(frozen=True, kw_only=True)
class LinkageMeasured:
    """What the pile of uploads gave away."""

    scores: LinkageScores
    """Neighbors in time, drives, and order."""
    scenes: int
    """Number of uploads in the pile."""
    drives: int
    """Number of drives."""


def measure_linkage(frames: Sequence[AuditFrame], drives: Path | None) -> LinkageMeasured | None:
    """Look for order and origin in a pile of uploads.

    Args:
        frames: The frames whose uploads are the pile.
        drives: CSV file with the drive, and perhaps the position, of each frame.

    Returns:
        The scores; None without a file.

    Raises:
        InvalidInput: The file cannot be read, or a frame is not in it.
    """
    if drives is None:
        return None
    known = read_drives(drives)
    missing = [frame.id for frame in frames if frame.id not in known]
    if missing:
        raise InvalidInput(f"{drives} names no drive of {len(missing)} of {len(frames)} frames, such as {missing[0]}")
    names = [known[frame.id][0] for frame in frames]
    positions = [known[frame.id][1] for frame in frames]
    shuffled = np.random.default_rng(0).permutation(len(frames)).tolist()  # the recording's order helps no attack
    uploads = [frames[i].upload for i in shuffled]
    names, positions = [names[i] for i in shuffled], [positions[i] for i in shuffled]
    return LinkageMeasured(scores=attack_linkage(uploads, names, positions), scenes=len(frames), drives=len(set(names)))


def read_drives(path: Path) -> dict[str, tuple[str, int]]:
    """Read the drives of frames.

    Args:
        path: CSV file with the columns `id`, `drive` and perhaps `position`.

    Returns:
        Drive and position by frame id. Without positions, the order of the ids in each drive counts.

    Raises:
        InvalidInput: A column is missing, a frame is named twice or has no drive, only some frames have a position, or a position is no
            whole number.
    """
    rows = list(csv.DictReader(io.StringIO(read_text(path, "the drives of frames"))))
    if not rows or not {"id", "drive"} <= rows[0].keys():
        raise InvalidInput(f"{path} needs the columns id and drive, found {', '.join(rows[0]) if rows else 'no row'}")
    ids = [row["id"] for row in rows]
    require(len(set(ids)) == len(ids), f"{path} names the frame {max(ids, key=ids.count)} twice; give one row for each frame")
    alone = [row["id"] for row in rows if not row["drive"]]
    require(not alone, f"{path} names no drive of {len(alone)} of {len(rows)} frames, such as {alone[:1]}")
    placed = sum(bool(row.get("position")) for row in rows)
    require(placed in (0, len(rows)), f"{path} has a position of {placed} of {len(rows)} frames; give all of them or none")
    order = {frame: number for number, frame in enumerate(sorted(ids, key=_counted))}
    try:
        return {row["id"]: (row["drive"], int(row["position"]) if row.get("position") else order[row["id"]]) for row in rows}
    except ValueError as error:
        raise InvalidInput(f"{path}: a position must be a whole number ({error})") from error


def _counted(frame: str) -> tuple[tuple[int, str], ...]:
    """Sort frame 9 before frame 10."""
    return tuple((int(part), "") if part.isdecimal() else (-1, part) for part in re.split(r"(\d+)", frame))
