"""Reports and metrics of a runtime tell the same numbers, and say what they leave out."""

import sys

import pytest

from moe_engines import engine_of, frame, run_all, sequence
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.metrics import prometheus_text
from upcycle3d.perception.moe.runtime.reports import Recorder, Spread


def test_percentiles_are_kept_of_the_last_requests_and_it_says_so():
    assert Spread.of([3.0, 1.0, 2.0, 4.0]).p50 == 2.0
    assert Spread.of(list(range(1, 101))).p95 == 95
    engine, _, _ = engine_of()
    engine._recorder = Recorder(begin=0.0, most_latencies=3)
    run_all(engine, [frame(str(i), 0) for i in range(5)])
    report = engine.report()
    assert (report.served, report.latency.count, report.left_out) == (5, 3, 2)
    assert "without 2 earlier requests" in str(report)


def test_an_engine_without_requests_gives_an_empty_report():
    engine, _, _ = engine_of()
    engine.shut_down()
    engine.run()
    report = engine.report()
    assert (report.served, report.batches, report.throughput, report.routed_share) == (0, 0, 0.0, 0.0)
    assert "-" in str(report)


def test_metrics_tell_the_numbers_of_the_report():
    prometheus = pytest.importorskip("prometheus_client.parser", reason="pip install -c constraints.txt -e '.[serve]'")
    engine, _, _ = engine_of()
    run_all(engine, [frame("a", 0), sequence("b", [1, 2], [3])])
    report = engine.report()
    samples = {
        (s.name.removeprefix("upcycle3d_moe_"), *s.labels.values()): s.value
        for family in prometheus.text_string_to_metric_families(prometheus_text(report))
        for s in family.samples
    }
    assert samples["requests_total", "served"] == 2
    assert samples["moved_bytes_total", "demand"] == report.memory.demand_bytes
    assert samples["generated_total",] == 3
    assert samples["latency_seconds", "p95"] == report.latency.p95
    assert samples["budget_bytes",] == 30


def test_metrics_without_their_package_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client", None)
    engine, _, _ = engine_of()
    with pytest.raises(InvalidInput, match=r"\.\[serve\]"):
        prometheus_text(engine.report())
