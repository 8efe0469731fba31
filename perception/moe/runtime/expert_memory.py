"""The experts in memory while batches run: cache and transfers together, with or without fetching ahead.

`hold` brings experts in and pins them, and the time that it waits is the stall. `fetch_ahead` starts transfers that a later `hold` will
find done. It walks the known future until the budget is full, and evicts only what lies outside of that: never what is needed sooner
than what it brings. Read next: `held_experts.py`, which hands a batch its experts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from ....core.errors import require, require_counts
from .clock import Clock
from .expert_cache import Eviction, ExpertCache
from .transfers import ExpertStore, TransferChannel


@dataclass(frozen=True, kw_only=True)
class ExpertLayout:
    """How experts are numbered. A piece is what is loaded at once: a whole expert, or its weights of one layer."""

    experts: int
    """Number of experts, E."""
    layers: int = 1
    """1 if an expert is loaded as a whole; else the number of layers that have pieces of their own."""

    def __post_init__(self) -> None:
        require_counts("ExpertLayout", experts=self.experts, layers=self.layers)

    @property
    def pieces(self) -> int:
        """Number of pieces."""
        return self.experts * self.layers

    def piece(self, expert: int, layer: int) -> int:
        """Number one piece.

        Args:
            expert: Expert, 0 to E - 1.
            layer: Layer, 0 where experts are loaded as a whole.

        Returns:
            Its number: all experts of layer 0, then those of layer 1.
        """
        return layer * self.experts + expert


@dataclass(frozen=True, kw_only=True)
class MemoryCounts:
    """What happened between memory and store."""

    hits: int
    """Accesses to a piece that was in memory."""
    late: int
    """Accesses to a piece that was on its way: fetched ahead, but not early enough."""
    misses: int
    """Accesses to a piece that was not there."""
    failures: int
    """Transfers that failed."""
    evictions: int
    """Pieces that were dropped."""
    demand_bytes: int
    """Bytes that were moved while a batch waited for them."""
    ahead_bytes: int
    """Bytes that were fetched ahead."""
    useless_bytes: int
    """Part of them that was dropped before anything used it."""
    unused_bytes: int
    """Part of them that is in memory and not used yet."""
    withdrawn: int
    """Transfers that were queued ahead and taken back before they began; they moved nothing."""
    stall_seconds: float
    """Time in which batches waited for transfers."""
    resident_bytes: int
    """Bytes in memory now."""
    most_bytes: int
    """Largest number of bytes in memory at one time."""
    budget: int
    """Bytes that memory may hold."""

    @property
    def accesses(self) -> int:
        """Number of accesses. A batch accesses a piece once in each layer."""
        return self.hits + self.late + self.misses

    @property
    def hit_ratio(self) -> float:
        """Share of the accesses to pieces that were there completely; 0 before the first access."""
        return self.hits / max(1, self.accesses)


class ExpertMemory:
    """Brings pieces of experts into memory. One thread, the engine's, may use it.

    Example:
        memory = ExpertMemory(store=store, channel=channel, budget=10**9, eviction=Lru(), clock=clock, fetch_ahead=True)
        failed = memory.hold((0, 3), ())
        memory.fetch_ahead((5, 1))
        memory.let_go((0, 3))
    """

    def __init__(
        self,
        *,
        store: ExpertStore,
        channel: TransferChannel,
        budget: int,
        eviction: Eviction,
        clock: Clock,
        fetch_ahead: bool,
    ) -> None:
        """Make an empty memory.

        Args:
            store: Where pieces come from.
            channel: Moves them.
            budget: Bytes that memory may hold.
            eviction: Decides which piece goes.
            clock: Measures stalls.
            fetch_ahead: Whether `fetch_ahead` does something; False is the control without it.
        """
        self.fetches_ahead = fetch_ahead
        self._store, self._channel, self._clock = store, channel, clock
        self._cache = ExpertCache(budget=budget, sizes=store.bytes_of, eviction=eviction)
        self._arriving: dict[int, bool] = {}  # pieces on their way, each pinned; True for those fetched ahead
        self._unused: set[int] = set()  # pieces fetched ahead that nothing used yet
        self._holding: dict[int, Exception | None] = {}  # pieces that a running `hold` has pinned, and what went wrong with them
        self._late = self._failures = self._demand = self._ahead = self._useless = self._withdrawn = 0
        self._stall = 0.0

    @property
    def budget(self) -> int:
        """Bytes that memory may hold."""
        return self._cache.budget

    @property
    def resident(self) -> frozenset[int]:
        """Pieces in memory, those on their way included."""
        return self._cache.resident

    @property
    def changes(self) -> int:
        """Grows whenever a piece comes or goes."""
        return self._cache.changes

    @property
    def stall_seconds(self) -> float:
        """Time in which batches waited for transfers until now."""
        return self._stall

    @property
    def counts(self) -> MemoryCounts:
        """What happened until now."""
        cache = self._cache.counts
        return MemoryCounts(
            hits=cache.hits - self._late,
            late=self._late,
            misses=cache.misses,
            failures=self._failures,
            evictions=cache.evictions,
            demand_bytes=self._demand,
            ahead_bytes=self._ahead,
            useless_bytes=self._useless,
            unused_bytes=sum(self._store.bytes_of(piece) for piece in tuple(self._unused)),
            withdrawn=self._withdrawn,
            stall_seconds=self._stall,
            resident_bytes=self._cache.resident_bytes,
            most_bytes=cache.most_bytes,
            budget=self._cache.budget,
        )

    def __contains__(self, piece: int) -> bool:
        return piece in self._cache

    def there(self, piece: int) -> bool:
        """Say whether a piece is in memory and not only on its way.

        Args:
            piece: Number of the piece.

        Returns:
            Whether it can be used without waiting.
        """
        return piece in self._cache and piece not in self._arriving

    def bytes_of(self, piece: int) -> int:
        """Get the size of a piece, and refuse one that is larger than the budget.

        Args:
            piece: Number of the piece.

        Returns:
            Its bytes.

        Raises:
            InvalidInput: It is larger than the budget.
        """
        return self._cache.bytes_of(piece)

    def hold(self, pieces: Sequence[int], future: Callable[[], Iterator[int]]) -> dict[int, Exception]:
        """Bring pieces into memory, wait for them, and pin them.

        Args:
            pieces: Numbers of different pieces that fit into the budget together.
            future: Gives the pieces that will be used after them, in order, as far as they are known.

        Returns:
            What went wrong with pieces that could not be loaded. They are not pinned; all others are.

        Raises:
            InvalidInput: The pieces do not fit into the budget together with those that are held.
        """
        self._note_ended()
        self._holding = {}
        begin = self._clock.now()
        for piece in pieces:
            if self._cache.use(piece):
                self._cache.pin(piece)
                self._holding[piece] = None
                self._unused.discard(piece)
                if piece in self._arriving:
                    self._late += 1
                    self._channel.urge(piece)
        for piece in pieces:
            if piece not in self._holding:
                self._make_room(piece, future)
                self._demand += self._cache.insert(piece)
                self._cache.pin(piece)
                self._holding[piece] = None
                self._start(piece, ahead=False)
        for piece in pieces:
            if piece in self._arriving:
                self._channel.wait(piece)
        self._note_ended()
        self._stall += self._clock.now() - begin
        held, self._holding = self._holding, {}
        return {piece: error for piece, error in held.items() if error is not None}

    def let_go(self, pieces: Iterable[int]) -> None:
        """Unpin pieces that `hold` pinned. They stay in memory until their place is needed.

        Args:
            pieces: Their numbers.
        """
        for piece in pieces:
            self._cache.unpin(piece)

    def fetch_ahead(self, future: Iterable[int]) -> bool:
        """Start transfers of what will be used soon, and take back those that were queued for something else. It never waits.

        Args:
            future: Pieces that will be used, in order, as far as they are known.

        Returns:
            Whether nothing was missing: then a later call with the rest of the same future has nothing to do, until a piece goes.
        """
        if not self.fetches_ahead:
            return True
        self._note_ended()
        soon = self._working_set(future)
        for piece, ahead in tuple(self._arriving.items()):
            if ahead and piece not in soon and piece in self._unused:
                self._withdraw(piece)
        settled = True
        for piece in soon:
            if piece in self._cache:
                continue
            settled = False
            gone = self._cache.victims(self._cache.bytes_of(piece), soon, keep=soon)
            if gone is None:
                break
            self._evict(gone)
            self._ahead += self._cache.insert(piece)
            self._unused.add(piece)
            self._start(piece, ahead=True)
        return settled

    def close(self) -> None:
        """Stop the channel. Pieces in memory stay with the store."""
        self._channel.close()

    def _working_set(self, future: Iterable[int]) -> dict[int, None]:
        """The first pieces of the future that fit into the budget together with what is held now, in order of use."""
        soon: dict[int, None] = {}
        room = self.budget - sum(
            self._cache.bytes_of(p) for p in self.resident if self._cache.pinned(p) and p not in self._arriving
        )
        for piece in future:
            if piece in soon or (self._cache.pinned(piece) and piece not in self._arriving):
                continue
            room -= self._cache.bytes_of(piece)
            if room < 0:
                break
            soon[piece] = None
        return soon

    def _make_room(self, piece: int, future: Callable[[], Iterator[int]]) -> None:
        size = self._cache.bytes_of(piece)
        while True:
            self._note_ended()
            gone = self._cache.victims(size, future())
            if gone is not None:
                self._evict(gone)
                return
            ahead = [p for p in self._arriving if p in self._unused]
            require(
                bool(ahead),
                f"piece {piece} of {size:,} bytes does not fit beside the pieces that are in use; the budget is {self.budget:,} bytes",
            )
            if not self._withdraw(ahead[-1]):
                self._channel.wait(ahead[-1])

    def _start(self, piece: int, *, ahead: bool) -> None:
        self._cache.pin(piece)
        self._arriving[piece] = ahead
        self._channel.submit(piece, urgent=not ahead)

    def _withdraw(self, piece: int) -> bool:
        if not self._channel.withdraw(piece):
            return False
        del self._arriving[piece]
        self._unused.discard(piece)
        self._cache.unpin(piece)
        self._ahead -= self._cache.bytes_of(piece)
        self._cache.take_back(piece)
        self._withdrawn += 1
        return True

    def _evict(self, pieces: Iterable[int]) -> None:
        for piece in pieces:
            if piece in self._unused:
                self._unused.discard(piece)
                self._useless += self._cache.bytes_of(piece)
            self._cache.evict(piece)
            self._store.drop(piece)

    def _note_ended(self) -> None:
        """Unpin what arrived, and forget what failed. A failed piece that is being held loses its second pin too."""
        for piece, error in self._channel.take_ended().items():
            ahead = self._arriving.pop(piece)
            self._cache.unpin(piece)
            if error is None:
                continue
            self._failures += 1
            self._unused.discard(piece)
            if piece in self._holding:
                self._holding[piece] = error
                self._cache.unpin(piece)
            if ahead:
                self._ahead -= self._cache.bytes_of(piece)
            else:
                self._demand -= self._cache.bytes_of(piece)
            self._cache.take_back(piece)
