"""What an ingest did with every shard, and what it found about the scenes. Read next: `ingest.py`, which fills the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Refusal:
    """A shard that was not taken in."""

    shard: str
    """The stem of its file names."""

    reason: str
    """Why, as a sentence for the operator."""


@dataclass(frozen=True, kw_only=True)
class ForeignShards:
    """Shards of another encoder or rig, which stay where they are for the store of that encoder."""

    fingerprint: str
    """Fingerprint of their encoder and rig."""

    shards: tuple[str, ...]
    """Stems of their file names."""

    scenes: int
    """Scenes that their manifests list."""


@dataclass(frozen=True, kw_only=True)
class RepeatedShard:
    """A new shard that holds scenes with the content of other scenes of the store."""

    shard: str
    """The stem of its file names."""

    scenes: int
    """Its scenes."""

    repeated: int
    """Those of them that the store holds a second time."""

    others: tuple[str, ...]
    """Stems of the other shards that hold the same content; empty where the shard itself holds a scene twice."""


@dataclass(frozen=True, kw_only=True)
class IngestReport:
    """What one run of ingest did. Shards are named by the stem of their file names."""

    accepted: tuple[str, ...]
    """Shards that are new in the catalog."""

    already_there: tuple[str, ...]
    """Shards that the catalog had already. They were verified again, and nothing changed."""

    quarantined: tuple[Refusal, ...]
    """Shards that failed and were moved to quarantine."""

    duplicates: tuple[Refusal, ...]
    """Those of `quarantined` that hold a scene that the store or the shard itself holds already."""

    foreign: tuple[ForeignShards, ...]
    """Shards of other encoders, by fingerprint. They were left where they are."""

    waiting: tuple[Refusal, ...]
    """Shards left in the incoming folder, because a file has not come yet, is still growing, or cannot be read now."""

    overdue: tuple[Refusal, ...]
    """Those of `waiting` whose other half has not come in `OVERDUE_SECONDS`."""

    unrecognized: tuple[str, ...]
    """Names in the incoming folder that cannot be a shard. They were left alone."""

    gone: tuple[str, ...]
    """Shards of the catalog that were deleted from the store since; their rows were dropped."""

    new_scenes: int
    """Rows added to the catalog."""

    empty_scenes: int
    """Those of them without a cell."""

    repeated_scenes: int
    """Those of them whose content equals that of another scene in the store: most likely one scan that was extracted twice."""

    total_scenes: int
    """Rows of the catalog now."""

    repeated_shards: tuple[RepeatedShard, ...] = ()
    """The new shards that hold `repeated_scenes`."""

    codecs: tuple[tuple[str, int], ...] = ()
    """Codecs in the catalog now, each with its number of scenes."""

    total_shards: int = 0
    """Shards of the catalog now."""

    @staticmethod
    def together(reports: Sequence[IngestReport]) -> IngestReport:
        """Join the reports of several folders that were taken into one store, in order.

        Args:
            reports: At least one.

        Returns:
            All shards and sums of the scenes; shards that are foreign or already there stand once for each folder.
        """
        foreign: dict[str, list[ForeignShards]] = {}
        for found in (found for report in reports for found in report.foreign):
            foreign.setdefault(found.fingerprint, []).append(found)
        joined: dict[str, Any] = {}
        for f in fields(IngestReport):
            values = [getattr(report, f.name) for report in reports]
            joined[f.name] = sum(values) if isinstance(values[0], int) else tuple(v for part in values for v in part)
        joined |= {name: getattr(reports[-1], name) for name in ("total_scenes", "total_shards", "codecs")}
        joined["foreign"] = tuple(
            ForeignShards(fingerprint=name, shards=tuple(s for p in parts for s in p.shards), scenes=sum(p.scenes for p in parts))
            for name, parts in sorted(foreign.items())
        )
        return IngestReport(**joined)

    @property
    def nothing(self) -> bool:
        """Whether there was no shard to take in, and none waits."""
        return not (self.accepted or self.already_there or self.quarantined or self.foreign or self.waiting)

    @property
    def refused_all(self) -> bool:
        """Whether shards were refused or foreign, and none was accepted or there already."""
        return bool(self.quarantined or self.foreign) and not (self.accepted or self.already_there)
