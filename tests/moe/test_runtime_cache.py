"""The cache of experts: bounds that are theorems, counted by hand on small traces, and bytes that never exceed the budget."""

import random
from functools import cache as memoized

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.expert_cache import Belady, ExpertCache, Lfu, Lru, RandomVictim, replay
from upcycle3d.perception.moe.runtime.traces import sticky_accesses

RULES = (Lru(), Lfu(), RandomVictim(seed=3), Belady(look_ahead=0), *(Belady(look_ahead=n) for n in (1, 2, 4, 8)))
TRACES = st.lists(st.integers(0, 5), max_size=40)


def fewest_misses(trace: tuple[int, ...], capacity: int) -> int:
    """Tries every victim at every miss."""

    @memoized
    def misses(at: int, held: frozenset[int]) -> int:
        if at == len(trace):
            return 0
        if trace[at] in held:
            return misses(at + 1, held)
        if len(held) < capacity:
            return 1 + misses(at + 1, held | {trace[at]})
        return 1 + min(misses(at + 1, held - {victim} | {trace[at]}) for victim in held)

    return misses(0, frozenset())


@settings(max_examples=60, deadline=None)
@given(TRACES, st.integers(1, 5))
def test_full_look_ahead_is_never_worse_than_another_rule(trace, budget):
    best = replay(trace, budget=budget, eviction=Belady()).misses
    assert all(best <= replay(trace, budget=budget, eviction=rule).misses for rule in RULES)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(0, 4), max_size=14), st.integers(1, 3))
def test_full_look_ahead_misses_as_seldom_as_the_best_of_all_choices(trace, budget):
    assert replay(trace, budget=budget, eviction=Belady()).misses == fewest_misses(tuple(trace), budget)


@settings(max_examples=40, deadline=None)
@given(TRACES, st.integers(1, 4))
def test_lru_holds_with_more_memory_all_that_it_holds_with_less(trace, budget):
    small, large = (ExpertCache(budget=n, sizes=lambda expert: 1, eviction=Lru()) for n in (budget, budget + 1))
    for expert in trace:
        small.access(expert)
        large.access(expert)
        assert small.resident <= large.resident


@pytest.mark.parametrize("rule", [*RULES, Belady()], ids=str)
def test_bytes_never_exceed_the_budget_and_add_up(rule):
    """Experts of different sizes, some pinned: what is there plus what is evicted is what was moved, and pinned ones stay."""
    draw = random.Random(5)
    sizes = [draw.randint(1, 40) for _ in range(9)]
    cache, gone = ExpertCache(budget=100, sizes=sizes.__getitem__, eviction=rule), 0
    trace = [draw.randrange(9) for _ in range(400)]
    pinned: list[int] = []
    for place, expert in enumerate(trace):
        before = cache.resident
        cache.access(expert, iter(trace[place + 1 :]))
        gone += sum(sizes[e] for e in before - cache.resident)
        assert expert in cache
        assert cache.resident_bytes == sum(sizes[e] for e in cache.resident) <= 100
        assert set(pinned) <= cache.resident
        if pinned and draw.random() < 0.6:
            cache.unpin(pinned.pop())
        elif not pinned and draw.random() < 0.5:
            cache.pin(expert)
            pinned.append(expert)
    counts = cache.counts
    assert counts.hits + counts.misses == len(trace)
    assert counts.bytes_moved == gone + cache.resident_bytes
    assert counts.most_bytes <= 100


def test_rules_drop_what_they_say():
    """Counted by hand: 0 is used often and long ago, 1 seldom and lately, and the future needs 0 soon."""
    gone = {}
    for rule in (Lru(), Lfu(), Belady(), Belady(look_ahead=1)):
        cache = ExpertCache(budget=2, sizes=lambda expert: 1, eviction=rule)
        for expert in (0, 0, 0, 1):
            cache.access(expert)
        gone[rule] = cache.victims(1, [2, 1, 0])
    assert gone == {Lru(): (0,), Lfu(): (1,), Belady(): (0,), Belady(look_ahead=1): (0,)}
    assert cache.victims(1, [1, 0]) == (0,)
    assert cache.victims(1, [0, 1]) == (1,)
    assert cache.victims(1, keep=(0, 1)) is None
    assert cache.victims(3) is None


def test_a_victim_that_turns_out_not_to_be_needed_stays():
    cache = ExpertCache(budget=10, sizes={0: 2, 1: 8, 2: 8}.__getitem__, eviction=Lru())
    cache.access(0)
    cache.access(1)
    assert cache.victims(8) == (1,)  # 0 is older, but without 1 there is room for 8


def test_what_cannot_be_held_is_refused():
    cache = ExpertCache(budget=5, sizes={0: 5, 1: 6, 2: 3, 3: 0}.__getitem__, eviction=Lru())
    with pytest.raises(InvalidInput, match="expert 1 has 6 bytes, and the budget is 5"):
        cache.access(1)
    with pytest.raises(InvalidInput, match="must have 1 byte or more"):
        cache.access(3)
    cache.access(0)
    cache.pin(0)
    with pytest.raises(InvalidInput, match="pinned experts leave no room for expert 2"):
        cache.access(2)
    with pytest.raises(InvalidInput, match="in use and cannot be evicted"):
        cache.evict(0)
    cache.unpin(0)
    assert not cache.access(2)
    assert cache.resident == {2}


def test_an_insert_that_is_taken_back_leaves_no_trace_in_the_counts():
    cache = ExpertCache(budget=5, sizes=lambda expert: 2, eviction=Lru())
    cache.access(0)
    before = cache.counts
    cache.insert(1)
    cache.take_back(1)
    assert cache.resident == {0}
    assert (cache.counts.bytes_moved, cache.counts.evictions) == (before.bytes_moved, before.evictions)


HIT_RATIOS = {  # of an independent simulation: random, LRU, Belady with look-ahead 1, 2, 4 and full
    (6, 0.0, 2): (33.4, 33.3, 42.8, 47.3, 49.7, 49.9),
    (6, 0.0, 3): (50.1, 50.0, 57.2, 62.7, 67.7, 69.3),
    (6, 0.0, 4): (66.5, 66.9, 71.7, 75.2, 79.8, 82.8),
    (6, 0.0, 5): (83.4, 83.4, 85.6, 87.5, 89.9, 92.7),
    (7, 0.7, 2): (78.8, 79.0, 79.8, 80.6, 81.7, 83.9),
    (7, 0.7, 5): (91.7, 91.8, 92.1, 92.4, 92.9, 96.1),
    (7, 0.95, 2): (96.4, 96.4, 96.4, 96.4, 96.5, 97.2),
    (7, 0.95, 5): (98.5, 98.5, 98.5, 98.5, 98.5, 99.3),
}


@pytest.mark.parametrize(("experts", "repeat", "capacity"), HIT_RATIOS)
def test_hit_ratios_agree_with_an_independent_simulation(experts, repeat, capacity):
    """A few accesses of look-ahead bring most of the gain on uniform traces; on sticky ones LRU is near the best already."""
    trace = sticky_accesses(12_000, experts=experts, repeat=repeat, seed=1)
    rules = (RandomVictim(), Lru(), Belady(look_ahead=1), Belady(look_ahead=2), Belady(look_ahead=4), Belady())
    found = [100 * replay(trace, budget=capacity, eviction=rule).hit_ratio for rule in rules]
    assert found == pytest.approx(HIT_RATIOS[experts, repeat, capacity], abs=1.0)


def test_nothing_in_nothing_out():
    counts = replay((), budget=1, eviction=Belady())
    assert (counts.hits, counts.misses, counts.hit_ratio, counts.bytes_moved) == (0, 0, 0.0, 0)
