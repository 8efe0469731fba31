"""Which works the next batch takes: policies as plain functions over the same limits.

A policy gets the waiting works, oldest first, and an `OpenBatch` that says what still fits. It never splits a work: the tokens of a
prefill attend to each other, so a prefill counts with all its experts. `next_batch` lets overdue works go first under every policy.
Read next: `expert_memory.py`, which brings the experts of a batch into memory.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from ....core.errors import InvalidInput, require_counts
from .requests import Work


@dataclass(frozen=True, kw_only=True)
class BatchLimits:
    """What one batch may hold."""

    tokens: int = 256
    """Token budget. A request with more tokens than this is refused when it is sent. Raise it for long prompts."""
    works: int | None = None
    """Largest number of works; None sets no limit."""
    experts: int | None = None
    """Largest number of unique experts; None sets no limit. A work that needs more alone gets a batch of its own."""
    age: int | None = 16
    """A work that has seen this number of batches begin is overdue and goes first, oldest first. None lets rare experts starve."""

    def __post_init__(self) -> None:
        require_counts("BatchLimits", most=2**31, tokens=self.tokens)
        for name, value in (("works", self.works), ("experts", self.experts)):
            if value is not None:
                require_counts("BatchLimits", most=2**31, **{name: value})
        if self.age is not None:
            require_counts("BatchLimits", least=0, most=2**31, age=self.age)

    def longest_wait(self, most_requests: int) -> int | None:
        """State how many batches can begin before a work is taken.

        After `age` batches only older works go before it. There are at most `most_requests` - 1 of them, and no later work becomes
        older. Each batch takes at least the oldest.

        Args:
            most_requests: Bound of the request queue.

        Returns:
            The bound in batches; None without ageing, where it does not exist.
        """
        return None if self.age is None else self.age + most_requests


class OpenBatch:
    """A batch while a policy fills it."""

    def __init__(self, limits: BatchLimits, *, resident: Collection[int] = ()) -> None:
        """Begin with nothing.

        Args:
            limits: What it may hold.
            resident: Experts that are in memory now.
        """
        self.limits = limits
        self.resident = frozenset(resident)
        self.works: list[Work] = []
        self.experts: set[int] = set()
        self.tokens = 0

    def fits(self, work: Work) -> bool:
        """Say whether a work can be added.

        Args:
            work: A work that is not in the batch.

        Returns:
            Whether all limits hold with it. The number of experts does not limit the first work.
        """
        limits = self.limits
        if self.tokens + work.tokens > limits.tokens or len(self.works) == limits.works:
            return False
        return limits.experts is None or not self.works or len(self.experts.union(work.unique)) <= limits.experts

    def add(self, work: Work) -> None:
        """Take a work.

        Args:
            work: A work that is not in the batch.

        Raises:
            InvalidInput: It does not fit.
        """
        if not self.fits(work):
            raise InvalidInput(
                f"a work of {work.tokens} tokens and experts {work.unique[:8]} does not fit into a batch with {self.tokens} of "
                f"{self.limits.tokens} tokens, {len(self.works)} works and {len(self.experts)} experts"
            )
        self.works.append(work)
        self.experts.update(work.unique)
        self.tokens += work.tokens


BatchPolicy = Callable[[Sequence[Work], OpenBatch], None]
"""Adds some of the waiting works, which come oldest first, to a batch."""


@dataclass(frozen=True, kw_only=True, eq=False)
class WorkBatch:
    """What one step computes."""

    number: int
    """Number of batches before it."""
    works: tuple[Work, ...]
    """Its works; empty if nothing waited."""
    experts: tuple[int, ...]
    """Its experts without repetition, sorted."""
    tokens: int
    """Number of its tokens."""


def next_batch(
    policy: BatchPolicy, waiting: Sequence[Work], limits: BatchLimits, *, number: int, resident: Collection[int] = ()
) -> WorkBatch:
    """Choose the works of one batch: overdue works first, oldest first, then what the policy takes.

    Args:
        policy: Fills the batch.
        waiting: Works, oldest first; each fits into an empty batch.
        limits: What the batch may hold.
        number: Number of batches before it; the age of a work is counted from there.
        resident: Experts that are in memory now.

    Returns:
        The batch. It has a work if one waits, so whoever calls this until nothing waits comes to an end.

    Raises:
        InvalidInput: The policy takes nothing although something waits, or takes a work twice.

    Example:
        batch = next_batch(expert_aware, works, BatchLimits(tokens=64), number=0)
    """
    batch = OpenBatch(limits, resident=resident)
    rest = waiting
    if limits.age is not None:
        due = number - limits.age
        late = sorted((w for w in waiting if w.since_batch <= due), key=lambda work: work.since)
        _take_in_order(late, batch)
        taken = {id(work) for work in batch.works}
        rest = [w for w in waiting if id(w) not in taken] if taken else waiting
    if rest:
        policy(rest, batch)
    if waiting and not batch.works:
        raise InvalidInput(f"the policy took none of {len(waiting)} works; each must fit into {limits.tokens} tokens")
    if len({id(work) for work in batch.works}) < len(batch.works):
        raise InvalidInput("the policy took a work twice")
    return WorkBatch(number=number, works=tuple(batch.works), experts=tuple(sorted(batch.experts)), tokens=batch.tokens)


def following_batches(
    policy: BatchPolicy, waiting: Sequence[Work], limits: BatchLimits, *, number: int, count: int, resident: Collection[int] = ()
) -> tuple[WorkBatch, ...]:
    """Foresee the next batches as if nothing new arrived: what a cache and a prefetcher may know of the future.

    Args:
        policy: Fills the batches.
        waiting: Works that wait, oldest first.
        limits: What a batch may hold.
        number: Number of batches before the first of them.
        count: Largest number of batches to foresee.
        resident: Experts that are in memory when the first of them is chosen; those of each batch count for the next.

    Returns:
        The batches; fewer when the works end.
    """
    batches: list[WorkBatch] = []
    while waiting and len(batches) < count:
        batch = next_batch(policy, waiting, limits, number=number + len(batches), resident=resident)
        taken = {id(work) for work in batch.works}
        waiting = [work for work in waiting if id(work) not in taken]
        resident = batch.experts
        batches.append(batch)
    return tuple(batches)


def first_in_first_out(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """Take works in order, and stop at the first that does not fit.

    Args:
        waiting: Works, oldest first.
        batch: Where they go.
    """
    _take_in_order(waiting, batch)


def decoding_first(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """Take decode steps in order, then the others: running sequences go on, and new ones wait.

    Args:
        waiting: Works, oldest first.
        batch: Where they go.
    """
    _take_in_order([w for w in waiting if w.stage == "decode"], batch)
    _take_in_order([w for w in waiting if w.stage != "decode"], batch)


def prefill_first(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """Take prefills and frames in order, then decode steps: new sequences begin early, and running ones wait.

    Args:
        waiting: Works, oldest first.
        batch: Where they go.
    """
    _take_in_order([w for w in waiting if w.stage != "decode"], batch)
    _take_in_order([w for w in waiting if w.stage == "decode"], batch)


def expert_aware(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """Take the longest queue of an expert, again and again, so that a batch needs few experts (after Read-ME; Cai et al., 2024).

    There is one queue for each set of experts. Its length is its tokens, divided by the number of experts that it would add to the
    batch: for works of one expert that is the paper's rule, and a prefill counts with all its experts. A queue that adds no expert is
    taken first. A queue that fits is taken completely. The first that fits in part gives what fits, and the batch is closed; a queue of
    which nothing fits, such as one long prefill, is passed over.

    The paper's printed loop takes the queue of another index than the longest, does not end when all queues are empty with tokens
    left, and lets rare experts starve. Here it ends with the works, and `next_batch` serves overdue works first.

    Args:
        waiting: Works, oldest first.
        batch: Where they go.
    """
    _take_queues(waiting, batch, frozenset())


def resident_first(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """Do what `expert_aware` does, but experts that are in memory already cost nothing.

    Args:
        waiting: Works, oldest first.
        batch: Where they go. Its `resident` experts are preferred.
    """
    _take_queues(waiting, batch, batch.resident)


def oldest_leads(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """Take the oldest work, and whatever needs no other experts than it and those in memory, oldest first.

    So a batch moves no expert that its oldest work does not need, and nobody starves, even without ageing: each batch serves the work that
    has waited longest. It pays where moving an expert costs more than a step of the network. Its batches are small, so it costs time where
    moving is cheap and everything that waits fits into one batch.

    Args:
        waiting: Works, oldest first.
        batch: Where they go. Its `resident` experts cost nothing.
    """
    if not batch.works:
        batch.add(waiting[0])
        waiting = waiting[1:]
    there = batch.resident | batch.experts
    for work in waiting:
        if there.issuperset(work.unique) and batch.fits(work):
            batch.add(work)


def _take_in_order(works: Sequence[Work], batch: OpenBatch) -> None:
    for work in works:
        if not batch.fits(work):
            return
        batch.add(work)


def _take_queues(waiting: Sequence[Work], batch: OpenBatch, free: frozenset[int]) -> None:
    queues: dict[tuple[int, ...], list[Work]] = {}
    for work in waiting:
        queues.setdefault(work.unique, []).append(work)
    lengths = {experts: sum(work.tokens for work in works) for experts, works in queues.items()}
    order = {experts: place for place, experts in enumerate(queues)}  # of the oldest work: decides between equal queues

    def cost(experts: tuple[int, ...]) -> tuple[bool, float, int]:
        new = sum(e not in batch.experts and e not in free for e in experts)
        return new > 0, -lengths[experts] / max(1, new), order[experts]

    most = batch.limits.experts
    while queues:
        chosen = min(queues, key=cost)
        works = queues.pop(chosen)
        if most is not None and batch.works and len(batch.experts.union(chosen)) > most:
            continue  # a queue of fewer experts may fit
        before = len(batch.works)
        for work in works:
            if batch.fits(work):
                batch.add(work)
        if before < len(batch.works) < before + len(works):
            return
