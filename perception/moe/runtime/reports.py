"""What a runtime did, as numbers: bytes and latency stand next to the hit ratio, because a better ratio alone may bring nothing.

Read next: `metrics.py`, which gives the same numbers to a monitoring system.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from threading import Lock

from ....core.errors import InvalidInput, require, require_counts
from .expert_memory import MemoryCounts
from .requests import Finished, QueueCounts, Status
from .scheduling import WorkBatch


@dataclass(frozen=True, kw_only=True)
class StepTimes:
    """Seconds in which an engine was busy, by what it did."""

    gate: float = 0.0
    """Deciding which experts serve new tokens."""
    schedule: float = 0.0
    """Choosing works and foreseeing batches."""
    stall: float = 0.0
    """Waiting for experts."""
    routed: float = 0.0
    """Computing with experts."""
    rest: float = 0.0
    """Computing everything else."""

    def __add__(self, other: StepTimes) -> StepTimes:
        return StepTimes(
            gate=self.gate + other.gate,
            schedule=self.schedule + other.schedule,
            stall=self.stall + other.stall,
            routed=self.routed + other.routed,
            rest=self.rest + other.rest,
        )

    @property
    def busy(self) -> float:
        """Their sum."""
        return self.gate + self.schedule + self.stall + self.routed + self.rest


@dataclass(frozen=True, kw_only=True)
class Spread:
    """Mean and percentiles of some times."""

    count: int
    """Number of values."""
    mean: float
    """Mean; NaN without values."""
    p50: float
    """Median; NaN without values."""
    p95: float
    """The value that 95 % of the values do not exceed; NaN without values."""
    most: float
    """Largest value; NaN without values."""

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize values.

        Args:
            values: Times in seconds.

        Returns:
            Their spread. A percentile is one of the values (nearest rank).
        """
        if not values:
            return cls(count=0, mean=math.nan, p50=math.nan, p95=math.nan, most=math.nan)
        ordered = sorted(values)

        def rank(share: float) -> float:
            return ordered[max(0, math.ceil(share * len(ordered)) - 1)]

        return cls(count=len(ordered), mean=math.fsum(ordered) / len(ordered), p50=rank(0.5), p95=rank(0.95), most=ordered[-1])


@dataclass(frozen=True, kw_only=True)
class RuntimeReport:
    """What a runtime did. `print(report)` shows a table."""

    seconds: float
    """Time from its start to the report."""
    queue: QueueCounts
    """What came to the queue."""
    served: int
    """Requests that were served."""
    failed: int
    """Requests that ended with an error."""
    cancelled: int
    """Requests that their senders cancelled."""
    refused: int
    """Requests that were refused because the runtime shut down."""
    tokens: int
    """Tokens that were computed, those of prompts included."""
    generated: int
    """New tokens and frames of the served requests."""
    batches: int
    """Number of batches."""
    unique_experts: float
    """Mean number of unique experts per batch."""
    works_per_batch: float
    """Mean number of works per batch."""
    tokens_per_batch: float
    """Mean number of tokens per batch."""
    latency: Spread
    """Seconds from arrival to end of the served requests."""
    latency_per_token: Spread
    """The same divided by the number of new tokens."""
    first_token: Spread
    """Seconds from arrival to the first token of the served requests."""
    left_out: int
    """Served requests that the spreads leave out, because only the last ones are kept."""
    longest_wait: float
    """Longest time in seconds for which one piece of work waited for its batch."""
    longest_wait_batches: int
    """Largest number of batches that began while one piece of work waited."""
    wait_bound: int | None
    """Number of batches that this cannot exceed; None without ageing."""
    times: StepTimes
    """Seconds by what the engine did."""
    memory: MemoryCounts
    """What happened between memory and store."""

    @property
    def throughput(self) -> float:
        """New tokens and frames of served requests per second."""
        return self.generated / self.seconds if self.seconds > 0 else 0.0

    @property
    def routed_share(self) -> float:
        """Share of the busy time that the choice of experts can influence at all: stalls and computing with experts."""
        return (self.times.stall + self.times.routed) / self.times.busy if self.times.busy > 0 else 0.0

    @property
    def stall_share(self) -> float:
        """Share of the busy time in which batches waited for experts."""
        return self.times.stall / self.times.busy if self.times.busy > 0 else 0.0

    def rows(self) -> tuple[tuple[str, str], ...]:
        """Give the report as a table.

        Returns:
            Pairs of name and value.
        """
        m, q, t = self.memory, self.queue, self.times
        bound = "no bound" if self.wait_bound is None else f"bound {self.wait_bound}"
        left_out = f" (without {self.left_out} earlier requests)" if self.left_out else ""
        return (
            ("requests served", f"{self.served} of {q.admitted} admitted"),
            ("failed / cancelled / refused", f"{self.failed} / {self.cancelled} / {self.refused}"),
            ("refused by the full queue", f"{q.overloaded} (most open {q.most_open})"),
            ("batches", f"{self.batches} of {self.works_per_batch:.1f} works and {self.tokens_per_batch:.1f} tokens"),
            ("unique experts per batch", f"{self.unique_experts:.2f}"),
            ("latency mean", f"{_seconds(self.latency.mean)}{left_out}"),
            ("latency p50 / p95", f"{_seconds(self.latency.p50)} / {_seconds(self.latency.p95)}"),
            ("latency per token mean / p95", f"{_seconds(self.latency_per_token.mean)} / {_seconds(self.latency_per_token.p95)}"),
            ("first token mean / p95", f"{_seconds(self.first_token.mean)} / {_seconds(self.first_token.p95)}"),
            ("longest wait", f"{_seconds(self.longest_wait)}, {self.longest_wait_batches} batches ({bound})"),
            ("throughput", f"{self.throughput:.2f} tokens per second"),
            ("hit ratio", f"{100 * m.hit_ratio:.1f} % of {m.accesses} (late {m.late}, missed {m.misses})"),
            ("moved on demand", _bytes(m.demand_bytes)),
            ("fetched ahead", f"{_bytes(m.ahead_bytes)}, useless {_bytes(m.useless_bytes)}, unused {_bytes(m.unused_bytes)}"),
            ("in memory at most", f"{_bytes(m.most_bytes)} of {_bytes(m.budget)}"),
            ("failed transfers", f"{m.failures}"),
            ("stall", f"{_seconds(t.stall)}, {100 * self.stall_share:.1f} % of the busy time"),
            ("gate / schedule", f"{_seconds(t.gate)} / {_seconds(t.schedule)}"),
            ("experts can influence", f"{100 * self.routed_share:.1f} % of the busy time"),
        )

    def __str__(self) -> str:
        return side_by_side({"": self})


def side_by_side(reports: Mapping[str, RuntimeReport]) -> str:
    """Show reports as columns of one table.

    Args:
        reports: Reports by the name of their column.

    Returns:
        The table as text.

    Raises:
        InvalidInput: There is no report.

    Example:
        print(side_by_side({"first in, first out": one, "expert-aware": other}))
    """
    require(bool(reports), "a table needs at least one report")
    columns = [report.rows() for report in reports.values()]
    names = [name for name, _ in columns[0]]
    table = [[name, *(column[i][1] for column in columns)] for i, name in enumerate(names)]
    if any(reports):
        table.insert(0, ["", *reports])
    widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in table)


def _seconds(value: float) -> str:
    if math.isnan(value):
        return "-"
    return f"{value:.3f} s" if value >= 1 else f"{1000 * value:.3f} ms"


def _bytes(value: int) -> str:
    return f"{value / 1e6:.3f} MB" if value >= 1000 else f"{value} B"


class Recorder:
    """Adds up what an engine does. Counts are exact; percentiles are those of the last requests, so memory stays flat."""

    def __init__(self, *, begin: float, most_latencies: int = 65_536) -> None:
        """Start with nothing.

        Args:
            begin: Moment of the start.
            most_latencies: Number of served requests whose times are kept.
        """
        require_counts("Recorder", most=10_000_000, most_latencies=most_latencies)
        self._begin = begin
        self._lock = Lock()
        self._ends: dict[Status, int] = {"served": 0, "failed": 0, "cancelled": 0, "refused": 0}
        self._kept: deque[tuple[float, float, float]] = deque(maxlen=most_latencies)
        self._generated = self._tokens = self._batches = self._unique = self._works = 0
        self._wait, self._wait_batches = 0.0, 0
        self._times = StepTimes()

    def add_end(self, end: Finished) -> None:
        """Note the end of a request.

        Args:
            end: The end.
        """
        with self._lock:
            self._ends[end.status] += 1
            if end.status == "served":
                self._generated += end.generated
                first = end.at if end.first_token is None else end.first_token
                self._kept.append((end.latency, end.latency_per_token, first - end.arrived))

    def add_wait(self, seconds: float, batches: int) -> None:
        """Note how long a piece of work waited for its batch, or was waiting when its request ended.

        Args:
            seconds: Seconds.
            batches: Number of batches that began meanwhile.
        """
        with self._lock:
            self._wait, self._wait_batches = max(self._wait, seconds), max(self._wait_batches, batches)

    def add_batch(self, batch: WorkBatch, times: StepTimes) -> None:
        """Note a batch that ran.

        Args:
            batch: The batch.
            times: Seconds by what the engine did for it.
        """
        with self._lock:
            self._batches += 1
            self._tokens += batch.tokens
            self._unique += len(batch.experts)
            self._works += len(batch.works)
            self._times = self._times + times

    def report(self, *, now: float, queue: QueueCounts, memory: MemoryCounts, wait_bound: int | None) -> RuntimeReport:
        """Summarize.

        Args:
            now: Moment of the report.
            queue: What came to the queue.
            memory: What happened between memory and store.
            wait_bound: Bound of the longest wait in batches.

        Returns:
            The report.

        Raises:
            InvalidInput: The moment lies before the start.
        """
        if now < self._begin:
            raise InvalidInput(f"a report at {now} lies before the start at {self._begin}; use one clock")
        with self._lock:
            kept, per = tuple(self._kept), max(1, self._batches)
            return RuntimeReport(
                seconds=now - self._begin,
                queue=queue,
                served=self._ends["served"],
                failed=self._ends["failed"],
                cancelled=self._ends["cancelled"],
                refused=self._ends["refused"],
                tokens=self._tokens,
                generated=self._generated,
                batches=self._batches,
                unique_experts=self._unique / per,
                works_per_batch=self._works / per,
                tokens_per_batch=self._tokens / per,
                latency=Spread.of([latency for latency, _, _ in kept]),
                latency_per_token=Spread.of([per_token for _, per_token, _ in kept]),
                first_token=Spread.of([first for _, _, first in kept]),
                left_out=self._ends["served"] - len(kept),
                longest_wait=self._wait,
                longest_wait_batches=self._wait_batches,
                wait_bound=wait_bound,
                times=self._times,
                memory=memory,
            )
