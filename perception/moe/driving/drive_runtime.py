"""Drives a carved detector over the frames of a drive within a memory budget, and reports what that costs.

    frame ─ gate with hysteresis ─ hold its context (the stall) ─ start to fetch the candidate ─ detect ─ let go

A vehicle cannot see future frames. All that it knows ahead is the candidate of the hysteresis: the context that may be next. Fetching it
while frames are computed hides a transfer, if memory holds two contexts. Frames repeat their context, so dropping the one that was used
longest ago (`Lru`) is near the best rule, and nothing better is claimed here. `PlainDrive` is the control without contexts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from ....core.errors import InvalidInput, require, require_counts
from ....core.structures import PointCloud, Predictions
from ...models.detector import Detector, unwatched
from ..runtime.clock import Clock, SystemClock
from ..runtime.expert_cache import Lru
from ..runtime.expert_memory import ExpertMemory, MemoryCounts
from ..runtime.reports import Spread
from ..runtime.transfers import ThreadedChannel, TransferChannel
from .carved_folder import CarvedDetector
from .context_gate import DriveCounts, DriveState, Hysteresis, decide
from .context_store import ContextStore

Find = Callable[[Detector, PointCloud], Predictions]
"""Runs a detector on a scan."""


def find_objects(detector: Detector, scan: PointCloud) -> Predictions:
    """Run a detector, and warn of nothing: the drive reports.

    Args:
        detector: The detector.
        scan: The scan in the shifted frame.

    Returns:
        Its detections.
    """
    with unwatched(detector):
        return detector.detect(scan)


@dataclass(frozen=True, kw_only=True)
class DriveConfig:
    """How a carved detector drives."""

    budget: int
    """Bytes of contexts that memory holds."""
    hysteresis: Hysteresis | None = None
    """How slowly decisions change; None takes that of the folder, and `Hysteresis(frames=1)` is the control without it."""
    fetch_ahead: bool = True
    """Whether the candidate of the hysteresis is fetched while frames are computed; False is the control."""
    all_resident: bool = False
    """Whether all contexts are loaded before the first frame; the budget must hold them."""

    def __post_init__(self) -> None:
        require_counts("DriveConfig", most=2**60, budget=self.budget)


@dataclass(frozen=True, kw_only=True, eq=False)
class DrivenFrame:
    """What happened in one frame."""

    context: int | None
    """Number of the context; None where there are none."""
    switched: bool
    """Whether the context is another one than in the frame before."""
    found: Predictions
    """The detections, in the shifted frame."""
    gate_seconds: float
    """Time of description and gate."""
    stall_seconds: float
    """Time in which the frame waited for its context."""
    waited: bool
    """Whether its context was not there completely."""
    detect_seconds: float
    """Time of the network."""

    @property
    def seconds(self) -> float:
        """Time of the whole frame."""
        return self.gate_seconds + self.stall_seconds + self.detect_seconds


@dataclass(frozen=True, kw_only=True)
class DriveReport:
    """What a drive cost. `print(report)` shows a table."""

    frames: int
    """Number of frames."""
    resident_bytes: int
    """Largest number of bytes of weights in memory: what all contexts share, and the contexts."""
    common_bytes: int
    """Bytes of what all contexts share, or of the whole detector where there are no contexts."""
    frame: Spread
    """Seconds per frame."""
    gate: Spread
    """Seconds of description and gate per frame."""
    stall: Spread
    """Seconds that frames waited for their context."""
    switch_stall: Spread
    """The same for frames whose context changed."""
    stalled: int
    """Frames that waited for a transfer."""
    memory: MemoryCounts | None
    """Hits, misses and bytes moved; None where there are no contexts."""
    counts: DriveCounts | None
    """What the gate has seen; None where nothing was decided."""

    def __str__(self) -> str:
        rows = [
            ("frames", f"{self.frames}"),
            (
                "weights in memory at most",
                f"{self.resident_bytes / 1e6:.3f} MB, of which {self.common_bytes / 1e6:.3f} MB always",
            ),
            ("frame mean / p95 / most", _milliseconds(self.frame)),
            ("gate mean / p95 / most", _milliseconds(self.gate)),
            ("stall mean / p95 / most", _milliseconds(self.stall)),
            (
                "stall of a switch",
                f"{_milliseconds(self.switch_stall)} of {self.switch_stall.count}; {self.stalled} frames waited",
            ),
        ]
        if self.memory is not None:
            m = self.memory
            rows.append(("moved", f"{m.demand_bytes / 1e6:.3f} MB on demand, {m.ahead_bytes / 1e6:.3f} MB ahead"))
            rows.append(("fetched in vain", f"{(m.useless_bytes + m.unused_bytes) / 1e6:.3f} MB"))
        if self.counts is not None:
            c = self.counts
            rows.append(
                (
                    "gate",
                    f"{c.switches} switches, {c.held_back} frames held back, {c.empty} empty, {c.non_finite} points no numbers",
                )
            )
        width = max(len(name) for name, _ in rows)
        return "\n".join(f"{name.ljust(width)}  {text}" for name, text in rows)


def _milliseconds(spread: Spread) -> str:
    return " / ".join(f"{1000 * value:.2f}" for value in (spread.mean, spread.p95, spread.most)) + " ms"


class Drive(Protocol):
    """Anything that drives: with contexts or without."""

    def step(self, scan: PointCloud) -> DrivenFrame:
        """Find the objects of the next frame.

        Args:
            scan: The frame in the shifted frame.

        Returns:
            What happened.
        """
        ...


class ContextDrive:
    """Drives a carved detector. One thread may use it.

    Example:
        ```python
        drive = ContextDrive(open_carved_detector("carved"), DriveConfig(budget=2_000_000))
        for scan in scans:
            print(drive.step(scan).found)
        print(drive.close())
        ```
    """

    def __init__(
        self,
        opened: CarvedDetector,
        config: DriveConfig,
        *,
        clock: Clock | None = None,
        channel: Callable[[ContextStore], TransferChannel] | None = None,
        find: Find = find_objects,
    ) -> None:
        """Load what is always in memory.

        Args:
            opened: The carved detector. The drive closes its files.
            config: How it drives.
            clock: Measures; None is the clock of the machine.
            channel: Makes what moves contexts; None is a thread. A simulation gives one with the clock that it moves.
            find: Runs the network.

        Raises:
            InvalidInput: The budget is too small.
        """
        count, own = len(opened.description.contexts), opened.context_bytes
        least = count * own if config.all_resident else own
        require(
            least <= config.budget,
            f"each of {count} contexts has {own:,} bytes, and the budget is {config.budget:,}; it must be {least:,} or more",
        )
        self._opened, self._find = opened, find
        self._rule = opened.description.hysteresis if config.hysteresis is None else config.hysteresis
        self._clock: Clock = SystemClock() if clock is None else clock
        self._store = ContextStore(opened)
        made = ThreadedChannel(self._store, self._clock) if channel is None else channel(self._store)
        self._memory = ExpertMemory(
            store=self._store,
            channel=made,
            budget=config.budget,
            eviction=Lru(),
            clock=self._clock,
            fetch_ahead=config.fetch_ahead,
        )
        self._state = DriveState()
        self._frames: list[DrivenFrame] = []
        for context in range(count) if config.all_resident else ():
            self._hold(context)
            self._memory.let_go((context,))

    @property
    def state(self) -> DriveState:
        """What the gate remembers."""
        return self._state

    def step(self, scan: PointCloud, *, given: int | None = None) -> DrivenFrame:
        """Find the objects of the next frame.

        Args:
            scan: The frame in the shifted frame.
            given: Context that replaces the gate's decision: an oracle, or a wrong one. The gate is not asked then.

        Returns:
            What happened.

        Raises:
            InvalidInput: The scan lacks what gate or network read, or a context cannot be loaded.
        """
        before, began = self._state.context, self._clock.now()
        if given is None:
            self._state = decide(self._opened.gate, self._rule, self._state, scan)
        else:
            require(0 <= given < len(self._opened.description.contexts), f"there is no context {given}")
            self._state = replace(self._state, context=given, candidate=None)
        context = self._state.context
        assert context is not None
        decided = self._clock.now()
        hits = self._memory.counts.hits
        self._hold(context)
        waited = self._memory.counts.hits == hits
        held = self._clock.now()
        candidate = self._state.candidate
        self._memory.fetch_ahead((context,) if candidate is None else (context, candidate))
        try:
            found = self._find(self._store.use(context), scan)
        finally:
            self._memory.let_go((context,))
        frame = DrivenFrame(
            context=context,
            switched=before is not None and before != context,
            found=found,
            gate_seconds=decided - began,
            stall_seconds=held - decided,
            waited=waited,
            detect_seconds=self._clock.now() - held,
        )
        self._frames.append(replace(frame, found=Predictions.empty()))  # a drive has no end, so its boxes are not kept
        return frame

    def close(self) -> DriveReport:
        """End the transfers, free the contexts, and report.

        Returns:
            What the drive cost.
        """
        self._memory.close()
        counts = self._memory.counts
        self._store.close()
        common = self._opened.common_bytes
        return _report(self._frames, common, common + counts.most_bytes, memory=counts, counts=self._state.counts)

    def _hold(self, context: int) -> None:
        errors = self._memory.hold((context,), lambda: iter(()))
        if context in errors:
            raise InvalidInput(f"the context {self._opened.description.contexts[context]!r} cannot be loaded: {errors[context]}")


class PlainDrive:
    """Drives one detector without contexts: the dense one, or pooled pruning."""

    def __init__(self, detector: Detector, *, clock: Clock | None = None, find: Find = find_objects) -> None:
        """Keep the detector.

        Args:
            detector: The detector in evaluation mode.
            clock: Measures; None is the clock of the machine.
            find: Runs the network.
        """
        self._detector, self._find = detector, find
        self._clock: Clock = SystemClock() if clock is None else clock
        self._frames: list[DrivenFrame] = []

    def step(self, scan: PointCloud) -> DrivenFrame:
        """Find the objects of the next frame.

        Args:
            scan: The frame in the shifted frame.

        Returns:
            What happened.
        """
        began = self._clock.now()
        found = self._find(self._detector, scan)
        spent = self._clock.now() - began
        frame = DrivenFrame(
            context=None, switched=False, found=found, gate_seconds=0.0, stall_seconds=0.0, waited=False, detect_seconds=spent
        )
        self._frames.append(replace(frame, found=Predictions.empty()))
        return frame

    def close(self) -> DriveReport:
        """Report.

        Returns:
            What the drive cost.
        """
        size = sum(tensor.nbytes for tensor in self._detector.state_dict().values())
        return _report(self._frames, size, size)


def _report(
    frames: list[DrivenFrame],
    common: int,
    resident: int,
    *,
    memory: MemoryCounts | None = None,
    counts: DriveCounts | None = None,
) -> DriveReport:
    waits = [frame.stall_seconds for frame in frames]
    return DriveReport(
        frames=len(frames),
        resident_bytes=resident,
        common_bytes=common,
        frame=Spread.of([frame.seconds for frame in frames]),
        gate=Spread.of([frame.gate_seconds for frame in frames]),
        stall=Spread.of(waits),
        switch_stall=Spread.of([frame.stall_seconds for frame in frames if frame.switched]),
        stalled=sum(frame.waited for frame in frames),
        memory=memory,
        counts=counts,
    )
