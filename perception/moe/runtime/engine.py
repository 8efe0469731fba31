"""The loop that serves requests: gate, schedule, make resident, compute, complete.

Gate and computation are handed over, so the same engine simulates (`simulate.py`) and serves for real. One thread runs it; any thread may
send and cancel requests through its queue. An error ends the requests that it belongs to, and the others go on.
Read next: `simulate.py`.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from ....core.errors import InvalidInput, require, require_counts
from .clock import Clock
from .expert_memory import ExpertLayout, ExpertMemory
from .held_experts import HeldExperts, check_work
from .reports import Recorder, RuntimeReport, StepTimes
from .requests import Finished, OpenRequest, Request, RequestQueue, Status, Work
from .scheduling import BatchLimits, BatchPolicy, WorkBatch, following_batches, next_batch

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Ungated:
    """Tokens whose experts are not known yet: the next piece of work of a request."""

    request: Request
    """The request."""
    generated: int
    """New tokens until now. 0: the experts of the whole prompt, or of the frame, are wanted; else those of the last new token."""


Gate = Callable[[Sequence[Ungated]], Sequence[tuple[int, ...]]]
"""Decides before the network runs: for each piece of work the experts of its tokens. Only new tokens are asked for, in one call per step.
If a call raises an error, each piece is asked for alone, and only those that fail again end their requests."""


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What became of a work."""

    finished: bool = False
    """Whether its sequence has ended before its largest number of new tokens."""
    error: Exception | None = None
    """What went wrong with it alone."""


class Computation(Protocol):
    """What runs the network."""

    def run(self, batch: WorkBatch, experts: HeldExperts) -> Sequence[Outcome]:
        """Compute one step of every work of a batch. An error that is raised ends all its requests.

        Args:
            batch: The works.
            experts: Gives their experts, wave by wave; every wave must be taken.

        Returns:
            One outcome for each work, in order. For works in `experts.failed` it does not matter.
        """
        ...

    def release(self, request: Request) -> None:
        """Forget what is kept for a request. It is called once at the end of every request, even if it never ran.

        Args:
            request: The request.
        """
        ...


@dataclass(frozen=True, kw_only=True)
class EngineConfig:
    """How an engine works."""

    policy: BatchPolicy
    """Fills batches: one of the functions in `scheduling.py`, or your own."""
    limits: BatchLimits = BatchLimits()
    """What a batch may hold."""
    layout: ExpertLayout
    """How experts are numbered."""
    foreseen: int = 1
    """Number of batches to foresee for fetching ahead and for `Belady`. More cost time for choosing works."""

    def __post_init__(self) -> None:
        require_counts("EngineConfig", least=0, foreseen=self.foreseen)


def _ignore(end: Finished) -> None:
    """Nobody listens."""


class Engine:
    """Serves the requests of a queue until it is shut down.

    Example:
        engine = Engine(config, clock=clock, queue=queue, gate=gate, memory=memory, computation=model, ended=print)
        Thread(target=engine.run).start()
        queue.submit(Request(id="1", kind="frame", tokens=1))
        engine.shut_down()
        print(engine.report())
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        clock: Clock,
        queue: RequestQueue,
        gate: Gate,
        memory: ExpertMemory,
        computation: Computation,
        ended: Callable[[Finished], None] = _ignore,
    ) -> None:
        """Join the parts. Nothing runs yet.

        Args:
            config: How it works.
            clock: The clock of queue and memory.
            queue: Where requests wait. From now on it refuses requests that no batch can hold.
            gate: Decides which experts serve new tokens.
            memory: Holds the experts.
            computation: Runs the network.
            ended: Is called once at the end of every request, from the engine's thread.

        Raises:
            InvalidInput: A piece of an expert is larger than the budget.
        """
        for piece in range(config.layout.pieces):
            memory.bytes_of(piece)
        self.config, self.queue, self.memory = config, queue, memory
        self._clock, self._gate, self._computation, self._ended = clock, gate, computation, ended
        self._recorder = Recorder(begin=clock.now())
        self._waiting: list[Work] = []
        self._ungated: list[OpenRequest] = []
        self._open: dict[Work, OpenRequest] = {}
        self._batches = 0
        self._until = math.inf
        self._running = False
        queue.check = self._check

    def report(self) -> RuntimeReport:
        """Summarize what happened until now. Any thread may ask.

        Returns:
            The report.
        """
        bound = self.config.limits.longest_wait(self.queue.most_requests)
        return self._recorder.report(now=self._clock.now(), queue=self.queue.counts, memory=self.memory.counts, wait_bound=bound)

    def shut_down(self, *, grace: float = math.inf) -> None:
        """Take no request anymore, and let `run` return when nothing is open. Any thread may call this.

        Args:
            grace: Seconds in which open requests may still be served. What is open afterwards is refused between two steps; 0 refuses
                all that wait now.
        """
        self._until = min(self._until, self._clock.now() + grace)
        self.queue.close()

    def run(self) -> None:
        """Serve until the queue is closed and nothing is open, or `shut_down` says so.

        Raises:
            InvalidInput: It runs already, or the policy breaks its contract. All open requests have failed then, and the queue is closed.
        """
        require(not self._running, "the engine runs already; one thread may run it")
        self._running = True
        try:
            while True:
                if self.step():
                    continue
                if self.queue.closed and not self.queue.open_requests():
                    return
                self._clock.wait_for(self.queue.has_news, self.queue.changed)
        except Exception as error:  # nobody will serve what is open: say so instead of letting it wait forever
            self.queue.close()
            for opened in self.queue.open_requests():
                self._end(opened, "failed", error)
            raise
        finally:
            self._running = False

    def step(self) -> bool:
        """Run one batch, if something waits.

        Returns:
            Whether a batch ran.
        """
        begin = self._clock.now()
        self._ungated.extend(self.queue.take_new())
        if self.queue.take_cancelled():
            self._end_waiting(lambda opened: opened.cancelled, "cancelled")
        if begin >= self._until:
            self._end_waiting(lambda opened: True, "refused")
        self._gate_new()
        gated = self._clock.now()
        batch, following = self._choose()
        chosen = self._clock.now()
        if not batch.works:
            return False
        held = HeldExperts(batch, following, memory=self.memory, layout=self.config.layout, clock=self._clock)
        stall = self.memory.stall_seconds
        outcomes = self._compute(batch, held)
        stall = self.memory.stall_seconds - stall
        self._recorder.add_batch(
            batch,
            StepTimes(
                gate=gated - begin,
                schedule=chosen - gated,
                stall=stall,
                routed=held.routed_seconds,
                rest=max(0.0, self._clock.now() - chosen - stall - held.routed_seconds),
            ),
        )
        for work, outcome in zip(batch.works, outcomes):
            error = held.failed.get(work, outcome.error)
            self._complete(work, outcome if error is None else Outcome(error=error))
        return True

    def _check(self, request: Request) -> None:
        most = self.config.limits.tokens
        require(
            request.tokens <= most,
            f"request {request.id!r} has {request.tokens} tokens, and a batch holds {most}; shorten it, or raise BatchLimits.tokens",
        )

    def _gate_new(self) -> None:
        """Ask the gate for the experts of everything new, and let the works wait."""
        for opened in [opened for opened in self._ungated if opened.cancelled]:
            self._end(opened, "cancelled")
        new, self._ungated = [opened for opened in self._ungated if not opened.cancelled], []
        asked = [Ungated(request=o.request, generated=o.generated) for o in new]
        for opened, experts in zip(new, self._ask(asked) if asked else ()):
            if isinstance(experts, Exception):
                self._end(opened, "failed", experts)
                continue
            stage = opened.stage
            try:
                work = Work(
                    request=opened.request,
                    stage=stage,
                    experts=tuple(experts),
                    tokens=1 if stage == "decode" else opened.request.tokens,
                    since=opened.ready,
                    since_batch=self._batches,
                )
                check_work(work, self.config.layout, self.memory)
            except InvalidInput as error:
                self._end(opened, "failed", error)
                continue
            self._open[work] = opened
            self._waiting.append(work)

    def _ask(self, asked: Sequence[Ungated]) -> Sequence[tuple[int, ...] | Exception]:
        try:
            answers = self._gate(asked)
            require(len(answers) == len(asked), f"the gate was asked for {len(asked)} works and answered for {len(answers)}")
            return answers
        except Exception as error:
            if len(asked) == 1:
                return [error]
            return [self._ask([one])[0] for one in asked]

    def _choose(self) -> tuple[WorkBatch, tuple[WorkBatch, ...]]:
        """Take the works of the next batch out of those that wait, and foresee the batches after it."""
        config = self.config
        resident = self._resident()
        batch = next_batch(config.policy, self._waiting, config.limits, number=self._batches, resident=resident)
        if not batch.works:
            return batch, ()
        taken = set(batch.works)
        self._waiting = [work for work in self._waiting if work not in taken]
        now = self._clock.now()
        for work in batch.works:
            self._note_wait(work, now)
        self._batches += 1
        following = following_batches(
            config.policy, self._waiting, config.limits, number=self._batches, count=config.foreseen, resident=batch.experts
        )
        return batch, following

    def _resident(self) -> set[int]:
        """Experts all of whose pieces are in memory."""
        layout, pieces = self.config.layout, self.memory.resident
        return {
            expert for expert in range(layout.experts) if all(layout.piece(expert, n) in pieces for n in range(layout.layers))
        }

    def _note_wait(self, work: Work, now: float) -> None:
        opened, batches = self._open[work], self._batches - work.since_batch
        opened.longest_wait = max(opened.longest_wait, now - work.since)
        opened.longest_wait_batches = max(opened.longest_wait_batches, batches)
        self._recorder.add_wait(now - work.since, batches)

    def _compute(self, batch: WorkBatch, held: HeldExperts) -> Sequence[Outcome]:
        try:
            outcomes = self._computation.run(batch, held)
            require(
                len(outcomes) == len(batch.works),
                f"the computation got {len(batch.works)} works and gave {len(outcomes)} outcomes; it must give one for each",
            )
            return outcomes
        except Exception as error:
            log.exception("a batch of %d works failed", len(batch.works))
            return [Outcome(error=error)] * len(batch.works)
        finally:
            held.close()

    def _complete(self, work: Work, outcome: Outcome) -> None:
        """End the request of a work that ran, or let its next token wait."""
        opened, now = self._open.pop(work), self._clock.now()
        if outcome.error is not None:
            self._end(opened, "failed", outcome.error)
            return
        opened.generated += 1
        opened.ready = now
        if opened.first_token is None:
            opened.first_token = now
        if outcome.finished or opened.generated >= opened.request.new_tokens:
            self._end(opened, "served")
        elif opened.cancelled:
            self._end(opened, "cancelled")
        else:
            self._ungated.append(opened)

    def _end_waiting(self, chosen: Callable[[OpenRequest], bool], status: Status) -> None:
        """End requests that are between two steps."""
        now = self._clock.now()
        ends = [opened for opened in self._ungated if chosen(opened)]
        self._ungated = [opened for opened in self._ungated if not chosen(opened)]
        for work in [work for work in self._waiting if chosen(self._open[work])]:
            self._note_wait(work, now)
            ends.append(self._open.pop(work))
        self._waiting = [work for work in self._waiting if work in self._open]
        for opened in ends:
            self._end(opened, status)

    def _end(self, opened: OpenRequest, status: Status, error: Exception | None = None) -> None:
        """End a request: exactly once, because the queue refuses a second time."""
        end = opened.end(status, self._clock.now(), error)
        self.queue.remove(opened)
        self._recorder.add_end(end)
        for notify in (lambda: self._computation.release(opened.request), lambda: self._ended(end)):
            try:
                notify()
            except Exception:  # whoever listens must not stop the others' requests
                log.exception("the end of request %r could not be passed on", opened.request.id)
