"""The report of a runtime in the text form that Prometheus reads.

Nothing is counted twice: every number comes from one `RuntimeReport`, so an endpoint makes a report and gives its text. Numbers of single
experts are left out on purpose, because they give away what the requests are about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields
from typing import TYPE_CHECKING

from ....core.errors import InvalidInput
from .reports import RuntimeReport, Spread

if TYPE_CHECKING:
    from prometheus_client.metrics_core import Metric


def prometheus_text(report: RuntimeReport, *, prefix: str = "upcycle3d_moe") -> str:
    """Write a report as metrics.

    Args:
        report: The report.
        prefix: Begin of every metric's name.

    Returns:
        Text in the exposition format of Prometheus, version 0.0.4.

    Raises:
        InvalidInput: The package prometheus_client is not installed.

    Example:
        print(prometheus_text(engine.report()))
    """
    try:
        from prometheus_client import CollectorRegistry, generate_latest
        from prometheus_client.registry import Collector
    except ImportError as error:
        raise InvalidInput(
            "metrics need the package prometheus_client, which is not installed; pip install -c constraints.txt -e '.[serve]'"
        ) from error

    class Once(Collector):
        def collect(self) -> Iterator[Metric]:
            yield from _metrics(report, prefix)

    registry = CollectorRegistry()
    registry.register(Once())
    return generate_latest(registry).decode()


def _metrics(report: RuntimeReport, prefix: str) -> Iterator[Metric]:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

    memory, times, queue = report.memory, report.times, report.queue
    ends = {"served": report.served, "failed": report.failed, "cancelled": report.cancelled, "refused": report.refused}
    groups: tuple[tuple[str, str, str, dict[str, float]], ...] = (
        ("requests", "Requests by how they ended.", "status", {**ends, "overloaded": queue.overloaded, "late": queue.late}),
        ("accesses", "Accesses to experts.", "found", {"hit": memory.hits, "late": memory.late, "miss": memory.misses}),
        ("moved_bytes", "Bytes moved into memory.", "why", {"demand": memory.demand_bytes, "ahead": memory.ahead_bytes}),
        ("busy_seconds", "Seconds by what the engine did.", "what", {f.name: getattr(times, f.name) for f in fields(times)}),
    )
    for name, text, label, values in groups:
        family = CounterMetricFamily(f"{prefix}_{name}", text, labels=[label])
        for value, number in values.items():
            family.add_metric([value], float(number))
        yield family
    counters = {
        "tokens": ("Tokens computed, those of prompts included.", report.tokens),
        "generated": ("New tokens and frames of served requests.", report.generated),
        "batches": ("Batches.", report.batches),
        "useless_bytes": ("Bytes fetched ahead and dropped unused.", memory.useless_bytes),
        "evictions": ("Experts dropped from memory.", memory.evictions),
        "failed_transfers": ("Transfers that failed.", memory.failures),
    }
    for name, (text, number) in counters.items():
        yield CounterMetricFamily(f"{prefix}_{name}", text, value=float(number))
    gauges = {
        "open_requests": ("Requests that have not ended.", queue.open),
        "resident_bytes": ("Bytes of experts in memory.", memory.resident_bytes),
        "budget_bytes": ("Bytes of experts that memory may hold.", memory.budget),
        "unique_experts": ("Mean number of unique experts per batch.", report.unique_experts),
        "longest_wait_seconds": ("Longest wait of one piece of work.", report.longest_wait),
    }
    for name, (text, number) in gauges.items():
        yield GaugeMetricFamily(f"{prefix}_{name}", text, value=float(number))
    for name, text, spread in (
        ("latency_seconds", "Seconds from arrival to end of the last served requests.", report.latency),
        ("latency_per_token_seconds", "Latency divided by the new tokens.", report.latency_per_token),
        ("first_token_seconds", "Seconds from arrival to the first token.", report.first_token),
    ):
        yield _spread(GaugeMetricFamily(f"{prefix}_{name}", text, labels=["of"]), spread)


def _spread(family: Metric, spread: Spread) -> Metric:
    for name, value in (("mean", spread.mean), ("p50", spread.p50), ("p95", spread.p95), ("max", spread.most)):
        family.add_sample(family.name, {"of": name}, value)
    return family
