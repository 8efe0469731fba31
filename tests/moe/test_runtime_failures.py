"""What goes wrong in a runtime stays with whom it belongs to: overload, cancellation, shutdown, errors of gate, experts and network."""

import pytest

from moe_engines import engine_of, frame, run_all, sequence
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.engine import EngineConfig, Outcome
from upcycle3d.perception.moe.runtime.expert_memory import ExpertLayout
from upcycle3d.perception.moe.runtime.requests import QueueClosed, QueueFull, Request
from upcycle3d.perception.moe.runtime.scheduling import expert_aware, first_in_first_out
from upcycle3d.perception.moe.runtime.simulate import Simulation, simulate
from upcycle3d.perception.moe.runtime.traces import Arrival, traced_gate
from upcycle3d.perception.moe.runtime.transfers import SizedStore


def test_an_overload_is_refused_with_the_bound_and_counted():
    engine, _, ends = engine_of(bound=2)
    engine.queue.submit(frame("a", 0))
    engine.queue.submit(frame("b", 0))
    with pytest.raises(QueueFull, match="2 requests are open, and the bound is 2"):
        engine.queue.submit(frame("c", 0))
    engine.step()
    engine.queue.submit(frame("c", 0))
    engine.shut_down()
    with pytest.raises(QueueClosed, match="shuts down"):
        engine.queue.submit(frame("d", 0))
    engine.run()
    counts = engine.report().queue
    assert (counts.admitted, counts.overloaded, counts.late, counts.open) == (3, 1, 1, 0)
    assert len(ends) == 3


def test_a_simulated_overload_is_counted():
    trace = [Arrival(at=0.0, request=frame(str(i), i % 3)) for i in range(10)]
    config = EngineConfig(policy=first_in_first_out, layout=ExpertLayout(experts=3))
    report = simulate(trace, Simulation(engine=config, piece_bytes=1, budget=3, most_requests=4))
    assert (report.served, report.queue.overloaded, report.queue.admitted) == (4, 6, 4)


def test_two_open_requests_cannot_share_an_id_but_later_ones_can():
    engine, _, ends = engine_of()
    engine.queue.submit(frame("a", 0))
    with pytest.raises(InvalidInput, match="open already"):
        engine.queue.submit(frame("a", 1))
    engine.step()
    run_all(engine, [frame("a", 1)])
    assert [end.id for end in ends] == ["a", "a"]


def test_cancelled_requests_end_once_wherever_they_are():
    """One before the engine saw it, one that waits, one in the step that runs, one that has ended."""
    engine, computation, ends = engine_of(works=1, policy=first_in_first_out, age=None)
    engine.queue.submit(sequence("runs", [0], [0, 0, 0]))
    engine.queue.submit(sequence("waits", [0], [0]))
    computation.during = lambda batch: [engine.queue.cancel(id) for id in ("runs", "waits", "runs")]
    engine.step()
    engine.queue.submit(frame("new", 0))
    assert engine.queue.cancel("new")
    run_all(engine, [frame("other", 0)])
    assert sorted((end.id, end.status) for end in ends) == [
        ("new", "cancelled"), ("other", "served"), ("runs", "cancelled"), ("waits", "cancelled"),
    ]  # fmt: skip
    assert sorted(computation.released) == ["new", "other", "runs", "waits"]
    assert [id for id, _, _ in computation.steps] == ["runs", "other"]
    assert not engine.queue.cancel("other")
    assert engine.report().cancelled == 3


def test_a_trace_can_cancel():
    trace = [Arrival(at=0.0, request=sequence("a", [0], [0] * 50), cancelled_at=0.05), Arrival(at=1.0, request=frame("b", 0))]
    config = EngineConfig(policy=expert_aware, layout=ExpertLayout(experts=1))
    ends = []
    report = simulate(trace, Simulation(engine=config, piece_bytes=1, budget=1), ended=ends.append)
    assert [(end.id, end.status) for end in ends] == [("a", "cancelled"), ("b", "served")]
    assert report.cancelled == 1
    assert 1 <= ends[0].generated < 51


def test_a_shut_down_finishes_what_is_open_or_refuses_it_after_its_grace():
    for grace, statuses in ((float("inf"), {"served"}), (0.0, {"refused"}), (0.02, {"served", "refused"})):
        engine, computation, ends = engine_of(works=1, age=None)
        for i in range(6):
            engine.queue.submit(frame(str(i), 0))
        engine.shut_down(grace=grace)
        engine.run()
        assert {end.status for end in ends} == statuses
        assert sorted(end.id for end in ends) == sorted(computation.released) == [str(i) for i in range(6)]
        report = engine.report()
        assert (report.served + report.refused, report.queue.open) == (6, 0)


def test_an_error_of_one_request_does_not_end_the_others():
    """A gate that fails for one, an expert that does not exist, an outcome with an error, and a listener that fails."""

    def gate(asked):
        if any(one.request.id == "gate" for one in asked):
            raise ValueError("no decision")
        return traced_gate(asked)

    engine, computation, ends = engine_of(gate=gate)
    computation.outcomes["nan"] = Outcome(error=ArithmeticError("not finite"))
    requests = [frame("gate", 0), frame("range", 9), sequence("nan", [0], [0]), sequence("good", [1, 2], [3]), frame("fine", 4)]
    run_all(engine, requests)
    errors = {end.id: (end.status, str(end.error or "")) for end in ends}
    assert errors["gate"] == ("failed", "no decision")
    assert errors["range"] == ("failed", "the gate named expert 9 for 'range', and there are 5")
    assert errors["nan"] == ("failed", "not finite")
    assert errors["good"] == errors["fine"] == ("served", "")
    assert (engine.report().failed, engine.report().served) == (3, 2)


def test_a_batch_that_raises_ends_its_requests_and_leaves_nothing_pinned(caplog):
    engine, computation, ends = engine_of(works=2, age=None, budget=10, experts=2)

    def explode(batch):
        if batch.number == 0:
            raise RuntimeError("out of memory")

    computation.during = explode
    run_all(engine, [frame("a", 0), frame("b", 0), frame("c", 1), frame("d", 0)])
    assert [(end.id, end.status) for end in ends] == [("a", "failed"), ("b", "failed"), ("c", "served"), ("d", "served")]
    assert "a batch of 2 works failed" in caplog.text


def test_an_error_in_the_middle_of_a_wave_unpins_its_experts(caplog):
    """The next batch needs the whole budget, so an expert that stayed pinned would stop it."""
    engine, _, ends = engine_of(works=1, age=None, budget=10, experts=2)

    class Breaks:
        def run(self, batch, experts):
            for _ in experts.waves():
                if batch.number == 0:
                    raise RuntimeError("broken kernel")
            return [Outcome()]

        def release(self, request):
            raise OSError("a listener that fails stops nobody")

    engine._computation = Breaks()
    run_all(engine, [frame("a", 0), frame("b", 1)])
    assert [(end.id, end.status) for end in ends] == [("a", "failed"), ("b", "served")]


@pytest.mark.parametrize("layers", [1, 2])
def test_an_expert_that_cannot_be_loaded_fails_only_who_needs_it(layers):
    class Damaged(SizedStore):
        def load(self, expert):
            if expert == 1 + 3 * (layers - 1):  # of the last layer
                raise OSError("damaged")

    engine, _, ends = engine_of(store=Damaged(lambda piece: 10), layers=layers, experts=3, budget=30)
    run_all(engine, [frame("a", 0), frame("b", 1), sequence("c", [0, 1], [2]), sequence("d", [0, 2], [0])])
    assert {end.id: end.status for end in ends} == {"a": "served", "b": "failed", "c": "failed", "d": "served"}
    assert engine.report().memory.failures == layers  # fetched ahead it fails, and once more on demand


def test_what_can_never_be_served_is_refused_at_once():
    engine, _, _ = engine_of(tokens=4)
    with pytest.raises(InvalidInput, match="has 5 tokens, and a batch holds 4"):
        engine.queue.submit(sequence("long", [0] * 5))
    with pytest.raises(InvalidInput, match="expert 0 has 10 bytes, and the budget is 9"):
        engine_of(budget=9)
    with pytest.raises(InvalidInput, match="a frame has no new tokens"):
        Request(id="a", kind="frame", tokens=1, new_tokens=2)
    with pytest.raises(InvalidInput, match="no traced decisions"):
        traced_gate([type("One", (), {"request": Request(id="a", kind="frame", tokens=1), "generated": 0})()])


def test_a_broken_policy_ends_every_open_request():
    """The engine cannot go on, but nobody waits forever for an answer."""
    engine, computation, ends = engine_of(policy=lambda waiting, batch: None, age=None)
    with pytest.raises(InvalidInput, match="took none of 2 works"):
        run_all(engine, [frame("a", 0), frame("b", 1)])
    assert [(end.id, end.status) for end in ends] == [("a", "failed"), ("b", "failed")]
    assert computation.released == ["a", "b"]
    with pytest.raises(QueueClosed):
        engine.queue.submit(frame("c", 0))
