"""Clock, transfers and memory: time overlaps as it should, bytes are counted by cause, and errors stay where they belong."""

import random
from threading import Event

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.clock import ManualClock, SystemClock
from upcycle3d.perception.moe.runtime.expert_cache import Belady, Lfu, Lru, RandomVictim
from upcycle3d.perception.moe.runtime.expert_memory import ExpertLayout, ExpertMemory
from upcycle3d.perception.moe.runtime.transfers import SimulatedChannel, SizedStore, ThreadedChannel, TransferCost

COST = TransferCost(latency=1.0, bandwidth=10.0)  # 10 bytes take 2 seconds


class Shelf:
    """A store that keeps book on its own, and some of whose experts cannot be loaded."""

    def __init__(self, sizes, broken=()) -> None:
        self.sizes, self.broken = sizes, set(broken)
        self.there: set[int] = set()
        self.moved = self.most = 0

    def bytes_of(self, expert: int) -> int:
        return self.sizes[expert]

    def load(self, expert: int) -> None:
        if expert in self.broken:
            raise OSError(f"expert {expert} is damaged")
        assert expert not in self.there
        self.there.add(expert)
        self.moved += self.sizes[expert]
        self.most = max(self.most, sum(self.sizes[e] for e in self.there))

    def drop(self, expert: int) -> None:
        self.there.remove(expert)


def memory_of(shelf, budget, *, ahead=True, eviction=None, clock=None):
    clock = clock or ManualClock()
    channel = SimulatedChannel(shelf, COST, clock)
    memory = ExpertMemory(store=shelf, channel=channel, budget=budget, eviction=eviction or Lru(), clock=clock, fetch_ahead=ahead)
    return memory, clock


def test_timers_fire_in_order_while_somebody_waits():
    clock, seen = ManualClock(), []
    clock.at(2.0, lambda: seen.append(("b", clock.now())))
    clock.at(1.0, lambda: (seen.append(("a", clock.now())), clock.at(1.5, lambda: seen.append(("c", clock.now())))))
    clock.at(5.0, lambda: seen.append(("late", clock.now())))
    clock.wait(3.0)
    assert seen == [("a", 1.0), ("c", 1.5), ("b", 2.0)]
    assert clock.now() == 3.0
    assert clock.wait_for(lambda: len(seen) == 4, None)
    assert clock.now() == 5.0
    assert not clock.wait_for(lambda: False, None, 2.0)
    assert clock.now() == 7.0
    with pytest.raises(InvalidInput, match="no timer brings"):
        clock.wait_for(lambda: False, None)
    clock.at(8.0, lambda: clock.wait(1.0))
    with pytest.raises(InvalidInput, match="must not wait"):
        clock.wait(2.0)
    with pytest.raises(InvalidInput, match="0 seconds or more"):
        clock.wait(-1.0)


def test_a_channel_moves_one_at_a_time_and_urgent_ones_first():
    """Counted by hand: 0 has begun and is not interrupted; 3 is urgent; 2 is withdrawn; so 1 ends last."""
    clock = ManualClock()
    channel = SimulatedChannel(SizedStore(lambda expert: 10), COST, clock)
    for expert in (0, 1, 2):
        channel.submit(expert, urgent=False)
    channel.submit(3, urgent=True)
    assert not channel.withdraw(0)
    assert channel.withdraw(2)
    ends = []
    for expert in (0, 3, 1):
        channel.wait(expert)
        ends.append(clock.now())
    assert ends == [2.0, 4.0, 6.0]
    assert channel.take_ended() == {0: None, 3: None, 1: None}
    assert channel.take_ended() == {}
    channel.submit(4, urgent=True)
    with pytest.raises(InvalidInput, match="on its way already"):
        channel.submit(4, urgent=False)
    channel.close()
    with pytest.raises(InvalidInput, match="is closed"):
        channel.submit(5, urgent=True)


def test_transfers_overlap_with_computing_only_when_they_are_fetched_ahead():
    """A batch computes 3 seconds, and the next expert takes 2: fetched ahead it costs nothing, on demand it stalls 2 seconds."""
    for ahead, stall in ((True, 2.0), (False, 4.0)):
        shelf = Shelf([10, 10])
        memory, clock = memory_of(shelf, 20, ahead=ahead)
        memory.hold((0,), lambda: iter((1,)))
        memory.fetch_ahead((1,))
        clock.wait(3.0)
        memory.let_go((0,))
        memory.hold((1,), lambda: iter(()))
        assert memory.stall_seconds == stall
        assert clock.now() == 3.0 + stall
        counts = memory.counts
        assert (counts.demand_bytes, counts.ahead_bytes) == ((10, 10) if ahead else (20, 0))
        assert (counts.hits, counts.late, counts.misses) == ((1, 0, 1) if ahead else (0, 0, 2))


def test_a_late_expert_stalls_for_the_rest_only():
    memory, clock = memory_of(Shelf([10, 10]), 20)
    memory.fetch_ahead((0,))
    clock.wait(1.5)
    memory.hold((0,), lambda: iter(()))
    assert (memory.counts.late, memory.stall_seconds) == (1, 0.5)


def test_fetching_ahead_never_evicts_what_is_needed_sooner():
    """Room for two: 0 is in use and 1 is needed next, so 2, which comes after, must not take its place."""
    shelf = Shelf([10, 10, 10])
    memory, clock = memory_of(shelf, 20)
    memory.hold((0, 1), lambda: iter(()))
    memory.let_go((1,))
    assert not memory.fetch_ahead((1, 2)) or shelf.there == {0, 1}
    clock.wait(9.0)
    assert shelf.there == {0, 1}
    memory.fetch_ahead((2, 1))  # now 2 is needed first
    clock.wait(9.0)
    assert shelf.there == {0, 2}


def test_a_forecast_that_changes_costs_no_bytes_before_its_transfer_begins():
    shelf = Shelf([10] * 5)
    memory, clock = memory_of(shelf, 40)
    memory.fetch_ahead((0, 1, 2))  # 0 begins, 1 and 2 are queued
    memory.fetch_ahead((3,))
    clock.wait(9.0)
    memory.hold((3,), lambda: iter(()))
    assert shelf.there == {0, 3}
    assert (memory.counts.withdrawn, memory.counts.ahead_bytes, shelf.moved) == (2, 20, 20)
    memory.hold((1, 2, 4), lambda: iter(()))
    counts = memory.counts
    assert (counts.useless_bytes, counts.unused_bytes) == (10, 0)  # 0 made room without ever being used
    assert counts.demand_bytes == 30


def test_a_demand_takes_the_place_of_what_is_only_queued_ahead():
    """All room is reserved ahead: the demand takes queued places back, and waits for the transfer that runs if it must."""
    shelf = Shelf([10] * 5)
    memory, clock = memory_of(shelf, 20)
    memory.fetch_ahead((0, 1))
    memory.hold((2, 3), lambda: iter(()))
    assert shelf.there == {2, 3}
    assert clock.now() == 6.0  # the rest of 0, then 2 and 3
    assert shelf.most <= 20
    with pytest.raises(InvalidInput, match="does not fit beside the pieces that are in use"):
        memory.hold((4,), lambda: iter(()))


def test_an_expert_that_cannot_be_loaded_is_reported_and_leaves_no_trace():
    shelf = Shelf([10] * 3, broken=(1,))
    memory, clock = memory_of(shelf, 30)
    failed = memory.hold((0, 1), lambda: iter(()))
    assert list(failed) == [1]
    assert "damaged" in str(failed[1])
    memory.let_go((0,))
    memory.fetch_ahead((1,))
    failed = memory.hold((1, 2), lambda: iter(()))  # late, and broken again
    assert list(failed) == [1]
    memory.fetch_ahead((1,))
    clock.wait(9.0)
    shelf.broken.clear()
    assert memory.hold((1,), lambda: iter(())) == {}  # it was mended
    assert memory.resident == shelf.there == {0, 1, 2}
    assert memory.counts.demand_bytes + memory.counts.ahead_bytes == shelf.moved == 30
    assert memory.counts.failures == 3


@pytest.mark.parametrize("eviction", [Lru(), Lfu(), RandomVictim(), Belady(look_ahead=2), Belady()], ids=str)
def test_memory_and_store_agree_over_random_use(eviction):
    """Different sizes, changing forecasts, broken transfers: the budget holds at every load, and all bytes have one cause."""
    for seed in range(4):
        draw = random.Random(seed)
        shelf = Shelf([draw.randint(5, 30) for _ in range(8)])
        memory, clock = memory_of(shelf, 70, eviction=eviction)
        for _ in range(120):
            shelf.broken = {draw.randrange(8)} if draw.random() < 0.2 else set()
            future = [draw.randrange(8) for _ in range(6)]
            pieces = tuple(draw.sample(range(8), 2))
            failed = memory.hold(pieces, lambda future=future: iter(future))
            held = [piece for piece in pieces if piece not in failed]
            assert shelf.there.issuperset(held)
            memory.fetch_ahead(future)
            clock.wait(draw.choice((0.0, 1.0, 20.0)))
            assert shelf.there.issuperset(held)
            assert sum(shelf.sizes[e] for e in shelf.there) <= memory.counts.resident_bytes <= 70
            memory.let_go(held)
        clock.wait(1e3)
        memory.fetch_ahead(())
        counts = memory.counts
        assert shelf.most <= counts.most_bytes <= 70
        assert memory.resident == shelf.there
        assert counts.demand_bytes + counts.ahead_bytes == shelf.moved
        assert counts.accesses == 240
        assert 0 <= counts.useless_bytes + counts.unused_bytes <= counts.ahead_bytes


def test_the_threaded_channel_loads_in_order_and_reports_errors():
    """The first load waits for a signal, so the order of the others is not a race."""
    clock, begun, go, loaded = SystemClock(), Event(), Event(), []

    class Slow(Shelf):
        def load(self, expert: int) -> None:
            begun.set()
            go.wait(10.0)
            loaded.append(expert)
            super().load(expert)

    channel = ThreadedChannel(Slow([1] * 6, broken=(4,)), clock)
    channel.submit(0, urgent=False)
    assert begun.wait(10.0)
    for expert in (1, 2, 4):
        channel.submit(expert, urgent=False)
    assert not channel.withdraw(0)
    channel.submit(3, urgent=True)
    channel.urge(4)
    assert channel.withdraw(2)
    go.set()
    for expert in (0, 1, 3, 4):
        channel.wait(expert)
    ended = channel.take_ended()
    channel.close()
    assert loaded == [0, 3, 4, 1]
    assert {expert: str(error) for expert, error in ended.items() if error} == {4: "expert 4 is damaged"}


def test_pieces_are_numbered_layer_by_layer():
    layout = ExpertLayout(experts=3, layers=2)
    assert [layout.piece(e, n) for n in range(2) for e in range(3)] == list(range(layout.pieces))
