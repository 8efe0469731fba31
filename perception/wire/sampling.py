"""Which scans of a drive a vehicle uploads: the rule, as the manifest of a shard records it.

Neighboring scans show the same place, so their features tell the order of a drive. A rule thins the drive out before anything leaves.
The manifest records the rule and nothing about single scans: no index, no time, no number of scans left out.

Read next: `perception/vehicle/scan_choice.py`, which applies a rule.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...core.errors import require

MAX_GAP = 1_000_000


@dataclass(frozen=True, kw_only=True)
class SceneSampling:
    """A rule by which a vehicle keeps most scans to itself. A fleet uses one rule, because a rule that one vehicle alone uses would name it."""

    gap: int = 0
    """Fewest scans left out between two uploads of a drive. Each gap is drawn anew, from this number to twice as many, so that the place
    of an upload in the drive does not follow from another one. It should cover the distance that the detector sees."""

    share: float = 1.0
    """Chance that a scan which the gap allows is uploaded. Lower it to upload less of every drive."""

    def __post_init__(self) -> None:
        require(
            isinstance(self.gap, int) and not isinstance(self.gap, bool) and 0 <= self.gap <= MAX_GAP,
            f"SceneSampling.gap must be a whole number of scans in 0..{MAX_GAP:,}, found {self.gap!r}",
        )
        require(
            isinstance(self.share, float) and math.isfinite(self.share) and 0 < self.share <= 1,
            f"SceneSampling.share must be above 0 and at most 1, found {self.share!r}",
        )

    @property
    def every_scan(self) -> bool:
        """Whether the rule leaves nothing out."""
        return self.gap == 0 and self.share == 1.0


FLEET_SAMPLING = SceneSampling(gap=100)
"""The rule of a fleet that records 10 scans per second: uploads lie 10 to 20 seconds apart."""

EVERY_SCAN = SceneSampling()
"""The rule of a folder that somebody chose scan by scan: all are uploaded."""
