"""How a computation gets the experts of its batch: in waves that fit into the budget together, layer by layer where pieces are layers.

Read next: `engine.py`, which runs the computation.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from ....core.errors import InvalidInput, require
from .clock import Clock
from .expert_memory import ExpertLayout, ExpertMemory
from .requests import Work
from .scheduling import WorkBatch


@dataclass(frozen=True, kw_only=True, eq=False)
class Wave:
    """Experts that are in memory together, and the works that they serve."""

    layer: int
    """Layer; 0 where experts are loaded as a whole."""
    experts: tuple[int, ...]
    """Experts, sorted."""
    works: tuple[Work, ...]
    """Works with tokens for these experts. Where experts are loaded as a whole, they need no others, so each work is in one wave."""


class HeldExperts:
    """Gives a computation the experts of one batch. They are in memory while the body of its loop runs, and may go afterwards.

    `routed_seconds` is the time in the bodies of the loop. A computation whose body is more than the experts, as a whole network is,
    measures its experts itself and sets the attribute at the end.

    Example:
        for layer in range(experts.layout.layers):
            attention(layer)
            for wave in experts.waves(layer):
                ffn(layer, wave)
    """

    def __init__(
        self, batch: WorkBatch, following: Sequence[WorkBatch], *, memory: ExpertMemory, layout: ExpertLayout, clock: Clock
    ) -> None:
        """Take over a batch; nothing is loaded yet.

        Args:
            batch: What is computed.
            following: Batches that are foreseen after it.
            memory: Holds the experts.
            layout: How they are numbered.
            clock: Measures the loop's bodies.
        """
        self.batch, self.layout = batch, layout
        self.failed: dict[Work, Exception] = {}
        self.routed_seconds = 0.0
        self._memory, self._clock = memory, clock
        self._following = tuple(following)
        self._held: tuple[int, ...] = ()
        self._settled_at: int | None = None
        self._whole: bool | None = None

    def waves(self, layer: int = 0) -> Iterator[Wave]:
        """Bring the experts of one layer into memory, wave by wave. What is there already comes first, and the next ones are fetched.

        A work one of whose experts cannot be loaded is left out from then on, and `failed` says why.

        Args:
            layer: Layer, in rising order; 0 where experts are loaded as a whole.

        Yields:
            Waves. Together they serve every token of the batch once.

        Raises:
            InvalidInput: There is no such layer, or the last wave is still in use.
        """
        require(0 <= layer < self.layout.layers, f"layer {layer} is not one of {self.layout.layers}")
        if self._whole is None:
            self._whole = self._hold_everything()
        if self._whole:
            begin = self._clock.now()
            try:
                yield Wave(layer=layer, experts=self.batch.experts, works=self.batch.works)
            finally:
                self.routed_seconds += self._clock.now() - begin
            return
        planned = self._by_expert(layer) if self.layout.layers > 1 else self._by_work()
        for place, wave in enumerate(planned):
            require(not self._held, "a wave must be finished before the next one is taken")
            later = planned[place + 1 :]
            pieces = tuple(self.layout.piece(expert, layer) for expert in wave.experts)
            errors = self._memory.hold(pieces, partial(self._future, layer, later))
            self._held = tuple(piece for piece in pieces if piece not in errors)
            for work in wave.works if errors else ():
                lost = [error for e in work.unique if (error := errors.get(self.layout.piece(e, layer))) is not None]
                if lost:
                    self.failed[work] = lost[0]
            self._fetch(layer, later)
            kept = Wave(
                layer=layer,
                experts=tuple(e for e, piece in zip(wave.experts, pieces) if piece not in errors),
                works=tuple(work for work in wave.works if work not in self.failed),
            )
            begin = self._clock.now()
            try:
                if kept.works:
                    yield kept
            finally:
                self.routed_seconds += self._clock.now() - begin
                self.close()

    def _hold_everything(self) -> bool:
        """Hold the experts of all layers at once if nothing must be moved, for this batch or for those after it.

        So a step without a miss costs one call and not one for each layer. A step that must move something lets each layer go when it is
        done, because its place may be wanted.
        """
        layers = range(self.layout.layers)
        if self.layout.layers == 1 or not all(
            self._memory.there(self.layout.piece(expert, layer))
            for batch in (self.batch, *self._following)
            for layer in layers
            for expert in batch.experts
        ):
            return False
        pieces = tuple(self.layout.piece(expert, layer) for layer in layers for expert in self.batch.experts)
        errors = self._memory.hold(pieces, partial(iter, ()))
        assert not errors  # nothing was loaded
        self._held = pieces
        return True

    def close(self) -> None:
        """Let go of what is held. The engine calls it after the computation, however that ended."""
        held, self._held = self._held, ()
        self._memory.let_go(held)

    def _by_work(self) -> list[Wave]:
        """Groups of works whose experts fit into the budget together; works whose experts are in memory come first."""
        resident = self._memory.resident
        left = sorted(self.batch.works, key=lambda work: not resident.issuperset(work.unique))  # stable: else in their order
        waves: list[Wave] = []
        while left:
            experts: set[int] = set()
            works: list[Work] = []
            rest: list[Work] = []
            for work in left:
                fits = (
                    experts.issuperset(work.unique) or not works or self._bytes(experts.union(work.unique)) <= self._memory.budget
                )
                if fits:
                    experts.update(work.unique)
                (works if fits else rest).append(work)
            waves.append(Wave(layer=0, experts=tuple(sorted(experts)), works=tuple(works)))
            left = rest
        return waves

    def _by_expert(self, layer: int) -> list[Wave]:
        """Those in memory together, then one by one, so that each can be moved while the one before it computes."""
        needed: Sequence[int] = self.batch.experts
        if self.failed:
            needed = sorted({e for work in self.batch.works if work not in self.failed for e in work.unique})
        there = [e for e in needed if self.layout.piece(e, layer) in self._memory]
        groups = [there] if there else []
        groups += [[e] for e in needed if e not in there]
        return [
            Wave(layer=layer, experts=tuple(g), works=tuple(w for w in self.batch.works if not set(g).isdisjoint(w.unique)))
            for g in groups
        ]

    def _bytes(self, experts: set[int]) -> int:
        return sum(self._memory.bytes_of(e) for e in experts)

    def _fetch(self, layer: int, later: Sequence[Wave]) -> None:
        if self._settled_at == self._memory.changes:
            return  # all that is known ahead was there, and nothing has gone since
        settled = self._memory.fetch_ahead(self._future(layer, later))
        self._settled_at = self._memory.changes if settled else None

    def _future(self, layer: int, later: Sequence[Wave]) -> Iterator[int]:
        """Pieces that will be used, in order: the rest of this layer, later layers, and the batches that are foreseen.

        In each layer those in memory come first, as in `waves`. So what is fetched ahead never evicts what the next batch can use.
        """
        for wave in later:
            yield from (self.layout.piece(e, layer) for e in wave.experts)
        for batch, first in ((self.batch, layer + 1), *((batch, 0) for batch in self._following)):
            for further in range(first, self.layout.layers):
                pieces = [self.layout.piece(e, further) for e in batch.experts]
                there = [piece for piece in pieces if piece in self._memory]
                yield from there
                yield from (piece for piece in pieces if piece not in there)


def check_work(work: Work, layout: ExpertLayout, memory: ExpertMemory) -> None:
    """Refuse a work that no wave can hold.

    Args:
        work: A work.
        layout: How experts are numbered.
        memory: Holds the experts.

    Raises:
        InvalidInput: It names an expert that does not exist, or experts that do not fit into the budget where they must be together.
    """
    if work.unique[-1] >= layout.experts:
        raise InvalidInput(f"the gate named expert {work.unique[-1]} for {work.request.id!r}, and there are {layout.experts}")
    if layout.layers == 1:
        size = sum(memory.bytes_of(expert) for expert in work.unique)
        require(
            size <= memory.budget,
            f"the {work.stage} of {work.request.id!r} needs {len(work.unique)} experts of {size:,} bytes together, and the budget is "
            f"{memory.budget:,}; raise it, or load experts layer by layer",
        )
