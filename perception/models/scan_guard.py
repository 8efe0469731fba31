"""Looks at the scans that a detector is given in Python, as the commands look at theirs: a scan that does not suit it is not passed over.

Read next: `core/scan_comparison.py`, which compares; `core/ledger_rules.py`, which judges counts; `detector.py`, whose `detect` asks.
"""

from __future__ import annotations

from collections.abc import Sequence

from ...core.features import VoxelCounts
from ...core.ledger import Ledger
from ...core.ledger_rules import judge
from ...core.scan_comparison import ScanWatch
from ...core.structures import PointCloud
from ...core.trained_on import ScanMeasures, TrainedOn
from .encoders.scan_survey import measures_of

COMPARED_ALONE = 10
"""Scans that are compared with those of training one by one. Later ones are compared in groups of this size, by their medians, so that
one odd scan among many says nothing."""


class ScanGuard:
    """Finds what is wrong with scans, and says each kind once."""

    def __init__(self, trained: TrainedOn | None) -> None:
        """Begin with no scan.

        Args:
            trained: What the training knew. None compares no statistics; counts are judged all the same.
        """
        self._texts: list[str] = []
        self._compares = trained is not None and trained.scans is not None
        self._watch = ScanWatch(trained, self._texts.append)
        self._said: set[str] = set()
        self._seen = 0
        self._group: list[ScanMeasures] = []

    def look(self, scans: Sequence[PointCloud], counts: Sequence[VoxelCounts]) -> tuple[str, ...]:
        """Look at a batch.

        Args:
            scans: The scans in the shifted frame.
            counts: What became of their points (`SparseVoxels.counts`).

        Returns:
            Sentences to warn with; nothing that was said before.
        """
        self._texts.clear()
        for scan, count in zip(scans, counts, strict=True):
            self._judge(count)
            if self._compares and count.points > count.points_outside:
                self._compare(measures_of(scan.to("cpu"), count))
        return tuple(self._texts)

    def _judge(self, count: VoxelCounts) -> None:
        if not count.points:
            self._say("empty", "a scan without a point was given; nothing is detected in it")
            return
        range_counts = Ledger(scans=1, points=count.points, points_outside_range=count.points_outside)
        for finding in judge(range_counts):
            nothing = "; nothing is detected in such a scan" if finding.stops else ""
            self._say("nothing in range" if finding.stops else "range", finding.text + nothing)
        for finding in judge(Ledger(cells=count.cells, cells_over_limit=count.cells_over_limit)):
            self._say("cells", finding.text)

    def _compare(self, measures: ScanMeasures) -> None:
        self._seen += 1
        if self._seen <= COMPARED_ALONE:
            self._watch.check([measures])
            return
        self._group.append(measures)
        if len(self._group) == COMPARED_ALONE:
            self._watch.check(self._group)
            self._group.clear()

    def _say(self, kind: str, text: str) -> None:
        if kind not in self._said:
            self._said.add(kind)
            self._texts.append(text)
