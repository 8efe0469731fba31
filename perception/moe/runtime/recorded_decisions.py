"""Decisions that a gate made for texts or drives, as a small JSON file: traces of a simulation that nobody made up.

    {"format": "upcycle3d decisions 1", "decisions": {"experts": 4, "sources": [{"name": "law 0", "experts": [2, 2, 0, 2]}]}}

A *source* is one document or one drive: the expert of each of its tokens or frames, in order. The file holds no text and no point. But
decisions tell what a text is about and where a vehicle drove, so guard it as you guard those. Read next: `traces.py`, which draws requests
from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ....core.config_json import config_stored_in, config_to_json
from ....core.errors import InvalidInput, require, require_counts
from ....core.files import write_atomically
from ....core.foreign_text import shown
from ....core.strict_json import canonical_json, read_json

_FORMAT = "upcycle3d decisions 1"
_ADVICE = "write it again with write_decisions"


@dataclass(frozen=True, kw_only=True)
class DecisionSource:
    """What a gate decided for one document or one drive."""

    name: str
    """Name of the source, such as `law 3` or `drive 0`."""
    experts: tuple[int, ...]
    """Expert of each token or frame, in order."""


@dataclass(frozen=True, kw_only=True)
class RecordedDecisions:
    """What a gate decided for several sources."""

    experts: int
    """Number of experts that it chose among."""
    sources: tuple[DecisionSource, ...]
    """The sources, at least one; none is empty."""

    def __post_init__(self) -> None:
        require_counts("RecordedDecisions", experts=self.experts)
        require(bool(self.sources), "recorded decisions need at least one source, found none")
        for source in self.sources:
            require(bool(source.experts), f"the source {shown(source.name)!r} has no decision")
            require_counts(f"the source {shown(source.name)!r}", least=0, most=self.experts - 1, experts=source.experts)

    @property
    def repeated(self) -> float:
        """Share of the decisions that repeat the one before them in their source; 0 where none has one before it."""
        pairs = [pair for source in self.sources for pair in zip(source.experts, source.experts[1:])]
        return sum(a == b for a, b in pairs) / max(1, len(pairs))


def write_decisions(path: str | Path, decisions: RecordedDecisions) -> None:
    """Write decisions as a file.

    Args:
        path: The file.
        decisions: What a gate decided.

    Raises:
        OSError: The file cannot be written.

    Example:
        drive = DecisionSource(name="drive 0", experts=(0, 0, 1))
        write_decisions("drives.json", RecordedDecisions(experts=2, sources=(drive,)))
    """
    write_atomically(path, canonical_json({"format": _FORMAT, "decisions": config_to_json(decisions)}) + b"\n")


def read_decisions(path: str | Path) -> RecordedDecisions:
    """Read a file of decisions.

    Args:
        path: The file.

    Returns:
        The decisions.

    Raises:
        InvalidInput: The file is missing, of another kind or damaged.
    """
    data = read_json(path, "the file of decisions", remedy=_ADVICE)
    found = data.get("format")
    if found != _FORMAT:
        raise InvalidInput(f"{path} is no file of decisions: expected the format {_FORMAT!r}, found {shown(found)}; {_ADVICE}")
    return config_stored_in(Path(path), RecordedDecisions, data.get("decisions"), _ADVICE)
