"""Which experts are in memory, and which one goes when another must come: bookkeeping in bytes, without any loading.

The budget counts bytes, because experts may have different sizes. Experts that are in use are pinned and never go. With equal sizes and
the whole future known, `Belady` misses least of all rules; that is a theorem, and the tests check it. Read next: `transfers.py`.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

from ....core.errors import InvalidInput, require, require_counts

_MOST_BYTES = 2**60


@dataclass(frozen=True, kw_only=True)
class Lru:
    """Drop the expert that was used longest ago. Near the optimum when accesses repeat, as for the frames of one vehicle."""


@dataclass(frozen=True, kw_only=True)
class Lfu:
    """Drop the expert that was used least often since the start; between equals the one that was used longest ago."""


@dataclass(frozen=True, kw_only=True)
class RandomVictim:
    """Drop any expert. The control for all other rules."""

    seed: int = 0
    """Decides all draws."""


@dataclass(frozen=True, kw_only=True)
class Belady:
    """Drop the expert whose next use is farthest away among the accesses that are known ahead."""

    look_ahead: int | None = None
    """Number of accesses that are looked at; None looks at all that are known. Experts that are not among them go first, the one that
    was used longest ago before the others."""

    def __post_init__(self) -> None:
        if self.look_ahead is not None:
            require_counts("Belady", least=0, most=2**31, look_ahead=self.look_ahead)


Eviction = Lru | Lfu | RandomVictim | Belady
"""Rule that decides which expert goes."""


@dataclass(frozen=True, kw_only=True)
class CacheCounts:
    """What happened in a cache."""

    hits: int
    """Accesses to an expert that was in memory."""
    misses: int
    """Accesses to an expert that had to be moved into memory."""
    bytes_moved: int
    """Bytes that were moved into memory."""
    evictions: int
    """Experts that were dropped."""
    most_bytes: int
    """Largest number of bytes in memory at one time."""

    @property
    def hit_ratio(self) -> float:
        """Share of the accesses that were hits; 0 before the first access."""
        return self.hits / max(1, self.hits + self.misses)


class ExpertCache:
    """The experts in memory. It never holds more bytes than its budget.

    Example:
        cache = ExpertCache(budget=300, sizes=lambda expert: 100, eviction=Lru())
        cache.access(4)
        print(cache.resident, cache.counts)
    """

    def __init__(self, *, budget: int, sizes: Callable[[int], int], eviction: Eviction) -> None:
        """Make an empty cache.

        Args:
            budget: Bytes of experts that memory holds.
            sizes: Bytes of an expert.
            eviction: Decides which expert goes.
        """
        require_counts("ExpertCache", most=_MOST_BYTES, budget=budget)
        self.budget = budget
        self._sizes = sizes
        self._eviction = eviction
        self._random = random.Random(eviction.seed) if isinstance(eviction, RandomVictim) else None
        self._held: dict[int, int] = {}  # bytes of each expert, the one that was used longest ago first
        self._pins: Counter[int] = Counter()
        self._uses: Counter[int] = Counter()
        self._bytes = self._most_bytes = self._moved = self._hits = self._misses = self._evictions = 0
        self.changes = 0

    @property
    def resident(self) -> frozenset[int]:
        """The experts in memory, those on their way included."""
        return frozenset(self._held)

    @property
    def resident_bytes(self) -> int:
        """Their bytes."""
        return self._bytes

    @property
    def counts(self) -> CacheCounts:
        """What happened until now."""
        return CacheCounts(
            hits=self._hits,
            misses=self._misses,
            bytes_moved=self._moved,
            evictions=self._evictions,
            most_bytes=self._most_bytes,
        )

    def __contains__(self, expert: int) -> bool:
        return expert in self._held

    def bytes_of(self, expert: int) -> int:
        """Get the size of an expert, and refuse one that no budget like this can hold.

        Args:
            expert: Number of the expert.

        Returns:
            Its bytes.

        Raises:
            InvalidInput: It is larger than the budget, or has no size.
        """
        size = self._sizes(expert)
        require(size > 0, f"expert {expert} must have 1 byte or more, found {size}")
        if size > self.budget:
            raise InvalidInput(
                f"expert {expert} has {size:,} bytes, and the budget is {self.budget:,}; raise the budget or load experts layer by layer"
            )
        return size

    def use(self, expert: int) -> bool:
        """Note that an expert is used now: a hit if it is there, else a miss, which moves nothing yet.

        Args:
            expert: Number of the expert.

        Returns:
            Whether it is in memory.
        """
        self._uses[expert] += 1
        if expert in self._held:
            self._hits += 1
            self._held[expert] = self._held.pop(expert)
            return True
        self._misses += 1
        return False

    def pin(self, expert: int) -> None:
        """Keep an expert in memory until `unpin` was called as often as this.

        Args:
            expert: Number of an expert in memory.

        Raises:
            InvalidInput: It is not in memory.
        """
        require(expert in self._held, f"expert {expert} is not in memory and cannot be pinned; insert it first")
        self._pins[expert] += 1

    def unpin(self, expert: int) -> None:
        """Take back one `pin`.

        Args:
            expert: Number of a pinned expert.

        Raises:
            InvalidInput: It is not pinned.
        """
        require(self._pins[expert] > 0, f"expert {expert} is not pinned")
        self._pins[expert] -= 1

    def pinned(self, expert: int) -> bool:
        """Say whether an expert is pinned.

        Args:
            expert: Number of the expert.

        Returns:
            Whether it must stay.
        """
        return self._pins[expert] > 0

    def victims(self, size: int, future: Iterable[int] = (), *, keep: Collection[int] = ()) -> tuple[int, ...] | None:
        """Choose what must go so that some bytes become free. Nothing is changed but the random state.

        Args:
            size: Bytes that must be free.
            future: Experts that will be used, in order, as far as they are known. Only `Belady` reads it.
            keep: Experts that must stay, besides pinned ones.

        Returns:
            The experts to evict, possibly none; None if it is impossible.
        """
        missing = size - (self.budget - self._bytes)
        if missing <= 0:
            return ()
        free = [expert for expert in self._held if not self._pins[expert] and expert not in keep]
        if sum(self._held[expert] for expert in free) < missing:
            return None
        chosen: list[int] = []
        for expert in self._order(free, future):
            if missing <= 0:
                break
            chosen.append(expert)
            missing -= self._held[expert]
        for expert in tuple(reversed(chosen)):  # with different sizes, an early choice may turn out not to be needed
            if self._held[expert] <= -missing:
                chosen.remove(expert)
                missing += self._held[expert]
        return tuple(chosen)

    def evict(self, expert: int) -> None:
        """Drop an expert.

        Args:
            expert: Number of an expert in memory.

        Raises:
            InvalidInput: It is pinned or not in memory.
        """
        require(expert in self._held, f"expert {expert} is not in memory and cannot be evicted")
        require(not self._pins[expert], f"expert {expert} is in use and cannot be evicted")
        self._bytes -= self._held.pop(expert)
        self._evictions += 1
        self.changes += 1

    def insert(self, expert: int) -> int:
        """Take an expert in. Room must have been made.

        Args:
            expert: Number of an expert that is not in memory.

        Returns:
            Its bytes.

        Raises:
            InvalidInput: It is there already, or does not fit into the rest of the budget.
        """
        size = self.bytes_of(expert)
        require(expert not in self._held, f"expert {expert} is in memory already")
        require(
            self._bytes + size <= self.budget,
            f"expert {expert} has {size:,} bytes, and {self.budget - self._bytes:,} of the budget of {self.budget:,} are free; evict first",
        )
        self._held[expert] = size
        self._bytes += size
        self._moved += size
        self._most_bytes = max(self._most_bytes, self._bytes)
        self.changes += 1
        return size

    def take_back(self, expert: int) -> None:
        """Undo an `insert` whose bytes were never moved: neither they nor an eviction are counted.

        Args:
            expert: Number of an expert in memory that is not pinned.

        Raises:
            InvalidInput: It is pinned or not in memory.
        """
        size = self._held.get(expert, 0)
        self.evict(expert)
        self._evictions -= 1
        self._moved -= size

    def access(self, expert: int, future: Iterable[int] = ()) -> bool:
        """Use an expert, and move it in if it is missing: what a trace of single accesses does.

        Args:
            expert: Number of the expert.
            future: Experts that will be used after it, in order, as far as they are known.

        Returns:
            Whether it was in memory.

        Raises:
            InvalidInput: It is larger than the budget, or pinned experts leave no room.
        """
        if self.use(expert):
            return True
        gone = self.victims(self.bytes_of(expert), future)
        require(gone is not None, f"pinned experts leave no room for expert {expert}; unpin what is not in use")
        for other in gone or ():
            self.evict(other)
        self.insert(expert)
        return False

    def _order(self, free: Sequence[int], future: Iterable[int]) -> list[int]:
        """Experts in the order in which they go; `free` begins with the one that was used longest ago."""
        if isinstance(self._eviction, Lru):
            return list(free)
        if isinstance(self._eviction, Lfu):
            return sorted(free, key=lambda expert: self._uses[expert])
        if self._random is not None:
            drawn = sorted(free)
            self._random.shuffle(drawn)
            return drawn
        look_ahead = self._eviction.look_ahead if isinstance(self._eviction, Belady) else 0
        soon: dict[int, None] = {}
        wanted = set(free)
        for expert in islice(future, look_ahead):
            if expert in wanted:
                wanted.discard(expert)
                soon[expert] = None
                if not wanted:
                    break
        return [expert for expert in free if expert not in soon] + list(reversed(soon))


def replay(accesses: Sequence[int], *, budget: int, eviction: Eviction, sizes: Callable[[int], int] | None = None) -> CacheCounts:
    """Run single accesses through a cache. The whole trace is known ahead; a rule looks as far as it may.

    Args:
        accesses: Experts in the order of their use.
        budget: Bytes of experts that memory holds.
        eviction: Decides which expert goes.
        sizes: Bytes of an expert; None gives each 1, so the budget is a number of experts.

    Returns:
        The counts.

    Example:
        print(replay([0, 1, 2, 0], budget=2, eviction=Belady()).hit_ratio)
    """
    cache = ExpertCache(budget=budget, sizes=sizes or (lambda expert: 1), eviction=eviction)
    for place, expert in enumerate(accesses):
        cache.access(expert, (accesses[later] for later in range(place + 1, len(accesses))))
    return cache.counts
