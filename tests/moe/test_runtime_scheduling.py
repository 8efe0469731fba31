"""Batch policies: nothing is lost, doubled or over the budget, waiting has the stated bound, and fewer experts are needed together."""

import random
import statistics

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.requests import Request, Work
from upcycle3d.perception.moe.runtime.scheduling import (
    BatchLimits,
    OpenBatch,
    decoding_first,
    expert_aware,
    first_in_first_out,
    following_batches,
    next_batch,
    oldest_leads,
    prefill_first,
    resident_first,
)

POLICIES = (first_in_first_out, decoding_first, prefill_first, expert_aware, resident_first, oldest_leads)


def work(experts, *, stage="decode", tokens=1, since=0.0, since_batch=0) -> Work:
    kind = "frame" if stage == "frame" else "sequence"
    request = Request(id=f"{stage} {since}", kind=kind, tokens=tokens)
    return Work(request=request, stage=stage, experts=tuple(experts), tokens=tokens, since=since, since_batch=since_batch)


def random_works(draw: random.Random, count: int) -> list[Work]:
    works = []
    for place in range(count):
        if draw.random() < 0.3:
            tokens = draw.randint(1, 12)
            works.append(work([draw.randrange(6) for _ in range(tokens)], stage="prefill", tokens=tokens, since=float(place)))
        else:
            works.append(work([draw.randrange(6)], stage=draw.choice(("decode", "frame")), since=float(place)))
    return works


@pytest.mark.parametrize("policy", POLICIES)
def test_every_work_is_taken_once_within_the_limits_and_it_ends(policy):
    """Random works until nothing waits, with all limits: the loop that the paper prints does not end there."""
    for seed in range(12):
        draw = random.Random(seed)
        waiting, taken = random_works(draw, 60), []
        limits = BatchLimits(
            tokens=draw.randint(12, 30),
            works=draw.choice((None, 1, 7)),
            experts=draw.choice((None, 1, 3)),
            age=draw.choice((None, 0, 3)),
        )
        everything = list(waiting)
        for number in range(61):
            batch = next_batch(policy, waiting, limits, number=number, resident=(0, 1))
            if not batch.works:
                break
            assert batch.tokens == sum(w.tokens for w in batch.works) <= limits.tokens
            assert limits.works is None or len(batch.works) <= limits.works
            assert batch.experts == tuple(sorted({e for w in batch.works for e in w.experts}))
            assert limits.experts is None or len(batch.experts) <= limits.experts or len(batch.works) == 1
            taken += batch.works
            waiting = [w for w in waiting if w not in batch.works]
        assert waiting == []
        assert sorted(map(id, taken)) == sorted(map(id, everything))


@pytest.mark.parametrize("policy", POLICIES)
def test_nothing_waits_means_an_empty_batch(policy):
    batch = next_batch(policy, [], BatchLimits(), number=0)
    assert (batch.works, batch.experts, batch.tokens) == ((), (), 0)
    assert following_batches(policy, [], BatchLimits(), number=0, count=3) == ()


def test_orders_of_the_plain_policies():
    a, b, c, d = (work([0], stage=s, since=i) for i, s in enumerate(("prefill", "decode", "frame", "decode")))
    limits = BatchLimits(tokens=3)
    orders = {p: next_batch(p, [a, b, c, d], limits, number=0).works for p in POLICIES[:3]}
    assert orders == {first_in_first_out: (a, b, c), decoding_first: (b, d, a), prefill_first: (a, c, b)}


def test_first_in_first_out_stops_at_what_does_not_fit():
    works = [work([0], since=0.0), work([1] * 9, stage="prefill", tokens=9, since=1.0), work([0], since=2.0)]
    assert next_batch(first_in_first_out, works, BatchLimits(tokens=9), number=0).works == tuple(works[:1])


def test_expert_aware_takes_the_longest_queue_and_closes_with_the_first_in_part():
    """Counted by hand: queues of 2, 4 and 3 works; 5 tokens hold the queue of 4 and one work of the queue of 3."""
    works = [work([e], since=float(i)) for i, e in enumerate((0, 1, 2, 1, 2, 1, 2, 1, 0))]
    batch = next_batch(expert_aware, works, BatchLimits(tokens=5), number=0)
    assert [w.experts[0] for w in batch.works] == [1, 1, 1, 1, 2]
    assert batch.works[-1] is works[2]  # its oldest


def test_a_prefill_counts_with_all_its_experts_and_then_brings_works_for_free():
    """6 tokens over 3 new experts count as 2 for each, less than 3 decode steps of one. Once it is in, its experts cost nothing."""
    prefill = work([0, 1, 2, 0, 1, 2], stage="prefill", tokens=6, since=0.0)
    decode = [work([3], since=float(i)) for i in range(1, 4)]
    free, lonely = work([2], since=9.0), work([4], since=0.5)
    waiting = [prefill, lonely, *decode, free]
    assert next_batch(expert_aware, waiting, BatchLimits(tokens=3), number=0).works == tuple(decode)
    assert next_batch(expert_aware, waiting, BatchLimits(tokens=10), number=0).works == (*decode, prefill, free)


def test_resident_experts_go_first():
    works = [work([0], since=0.0), work([0], since=1.0), work([5], since=2.0)]
    limits = BatchLimits(tokens=2)
    assert next_batch(resident_first, works, limits, number=0, resident=(5,)).works == (works[2], works[0])
    assert next_batch(expert_aware, works, limits, number=0, resident=(5,)).works == (works[0], works[1])


def test_the_oldest_leads_and_takes_along_what_moves_nothing():
    """Expert 5 is in memory. The prefill brings 0 and 1, so works of 0, 1 and 5 come along; those of 2 wait, though they are older."""
    prefill = work([0, 1], stage="prefill", tokens=2, since=0.0)
    others = [work([e], since=1.0 + i) for i, e in enumerate((2, 2, 5, 1, 2, 0))]
    batch = next_batch(oldest_leads, [prefill, *others], BatchLimits(), number=0, resident=(5,))
    assert batch.works == (prefill, others[2], others[3], others[5])
    rest = [others[0], others[1], others[4]]
    assert next_batch(oldest_leads, rest, BatchLimits(works=2), number=1, resident=(5,)).works == tuple(rest[:2])


def longest_wait(policy, limits: BatchLimits, *, bound: int, batches: int) -> int:
    """Adversary: one work of a rare expert, and a queue that is always filled up with works that the policy prefers."""
    rare, most, made = work([7], stage="prefill", tokens=5, since=0.0), 0, 1
    waiting = [rare]
    for number in range(batches):
        while len(waiting) < bound:
            waiting.append(work([made % 2], since=float(made), since_batch=number))
            made += 1
        batch = next_batch(policy, waiting, limits, number=number)
        most = max(most, *(number - w.since_batch for w in batch.works))
        waiting = [w for w in waiting if w not in batch.works]
    return max(most, *(batches - w.since_batch for w in waiting)) if waiting else most


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("age", [0, 4, 9])
def test_nobody_waits_longer_than_the_stated_bound(policy, age):
    limits = BatchLimits(tokens=5, works=3, age=age)
    assert longest_wait(policy, limits, bound=20, batches=120) <= limits.longest_wait(20) == age + 20


def test_without_ageing_a_rare_expert_starves():
    """The reason for ageing: the paper's rule lets it wait as long as the others keep coming."""
    assert longest_wait(expert_aware, BatchLimits(tokens=5, age=None), bound=20, batches=120) == 120
    assert BatchLimits(age=None).longest_wait(20) is None


def test_where_the_oldest_leads_nobody_starves_even_without_ageing():
    assert longest_wait(oldest_leads, BatchLimits(tokens=5, age=None), bound=20, batches=120) < 20


def test_expert_aware_needs_fewer_experts_per_batch_than_first_in_first_out():
    """There is no theorem for a greedy rule, so this is the mean over seeds."""
    unique = {}
    for policy in (first_in_first_out, expert_aware):
        counts = []
        for seed in range(20):
            batches = following_batches(policy, random_works(random.Random(seed), 80), BatchLimits(tokens=16), number=0, count=99)
            counts += [len(batch.experts) for batch in batches]
        unique[policy] = statistics.fmean(counts)
    assert unique[expert_aware] < 0.85 * unique[first_in_first_out]


def test_foreseen_batches_are_those_that_will_run():
    draw = random.Random(1)
    waiting, limits = random_works(draw, 50), BatchLimits(tokens=20, age=2)
    foreseen = following_batches(expert_aware, waiting, limits, number=0, count=4)
    for number in range(4):
        batch = next_batch(expert_aware, waiting, limits, number=number)
        assert batch.works == foreseen[number].works
        waiting = [w for w in waiting if w not in batch.works]


def test_a_policy_that_takes_nothing_or_something_twice_is_refused():
    one = work([0])

    def twice(waiting, batch: OpenBatch) -> None:
        batch.add(waiting[0])
        batch.add(waiting[0])

    with pytest.raises(InvalidInput, match="took none of 1 works"):
        next_batch(lambda waiting, batch: None, [one], BatchLimits(age=None), number=0)
    with pytest.raises(InvalidInput, match="took a work twice"):
        next_batch(twice, [one], BatchLimits(age=None), number=0)
    with pytest.raises(InvalidInput, match="does not fit into a batch"):
        OpenBatch(BatchLimits(tokens=1)).add(work([0] * 2, stage="prefill", tokens=2))
