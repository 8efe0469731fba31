"""Requests, their pieces of work, and the bounded queue in which they wait for the engine.

A *sequence* has a prompt, whose experts are known together (`prefill`), and then new tokens, whose experts are known one by one
(`decode`). A *frame* is one piece of work. A request has at most one piece of work at a time, so its order is kept.
Read next: `scheduling.py`, which makes batches of works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from threading import Condition
from typing import Literal, get_args

from ....core.errors import InvalidInput, UpcycleError, require, require_counts
from .clock import Clock

Kind = Literal["sequence", "frame"]
WorkStage = Literal["prefill", "decode", "frame"]
Status = Literal["served", "failed", "cancelled", "refused"]

_MOST_TOKENS = 2**31


class QueueFull(UpcycleError):
    """The queue holds as many requests as it may: try again later."""


class QueueClosed(UpcycleError):
    """The runtime shuts down and takes no request anymore."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Request:
    """What somebody wants computed."""

    id: str
    """Name that no other open request has."""
    kind: Kind
    """`sequence`: a prompt and new tokens; `frame`: one pass through the network."""
    tokens: int
    """Tokens of the prompt, or how much of a batch's token budget the frame takes."""
    new_tokens: int = 1
    """Largest number of tokens to generate; 1 for a frame. The first comes out of the prefill, each other of one decode step."""
    payload: object = None
    """What gate and computation read. The runtime does not look into it."""

    def __post_init__(self) -> None:
        require(bool(self.id), "a request needs an id, found an empty one")
        require(self.kind in get_args(Kind), f"Request.kind must be sequence or frame, found {self.kind!r}")
        require_counts("Request", most=_MOST_TOKENS, tokens=self.tokens, new_tokens=self.new_tokens)
        require(self.kind == "sequence" or self.new_tokens == 1, f"a frame has no new tokens, found {self.new_tokens}")


@dataclass(frozen=True, kw_only=True, eq=False)
class Work:
    """The next piece of work of a request: what one batch takes as a whole."""

    request: Request
    """The request."""
    stage: WorkStage
    """Part of the request."""
    experts: tuple[int, ...]
    """Chosen experts: one for each token, or k for each token. The tokens of a prefill attend to each other, so it needs them all."""
    tokens: int
    """Number of tokens; 1 for a decode step."""
    since: float
    """Moment from which it waits: arrival of the request, or end of its last step."""
    since_batch: int
    """Number of batches that had begun when its experts were known."""

    def __post_init__(self) -> None:
        require_counts("Work", most=_MOST_TOKENS, tokens=self.tokens)
        require(
            bool(self.experts) and min(self.experts) >= 0,
            f"the gate must name an expert for the {self.stage} of {self.request.id!r}, found {self.experts[:8]}",
        )

    @cached_property
    def unique(self) -> tuple[int, ...]:
        """Its experts without repetition, sorted."""
        return tuple(sorted(set(self.experts)))


@dataclass(frozen=True, kw_only=True)
class Finished:
    """The end of a request."""

    id: str
    """Name of the request."""
    kind: Kind
    """Kind of the request."""
    status: Status
    """`served`, `failed` (with the error), `cancelled` by its sender, or `refused` because the runtime shut down."""
    error: Exception | None
    """What went wrong; None if nothing did."""
    arrived: float
    """Moment of its arrival."""
    first_token: float | None
    """Moment at which its first token or its frame was computed; None if that never happened."""
    at: float
    """Moment of its end."""
    generated: int
    """Number of new tokens; 1 for a served frame."""
    longest_wait: float
    """Longest time in seconds for which one piece of its work waited."""
    longest_wait_batches: int
    """Largest number of batches that began while one piece of its work waited."""

    @property
    def latency(self) -> float:
        """Seconds from arrival to end."""
        return self.at - self.arrived

    @property
    def latency_per_token(self) -> float:
        """Seconds from arrival to end, divided by the number of new tokens."""
        return self.latency / max(1, self.generated)


@dataclass(kw_only=True, eq=False)
class OpenRequest:
    """A request between its arrival and its end. Only the engine writes to it, except `cancelled`."""

    request: Request
    """The request."""
    arrived: float
    """Moment of its arrival."""
    generated: int = 0
    """Number of new tokens until now."""
    ready: float = 0.0
    """Moment from which its next piece of work waits."""
    first_token: float | None = None
    """Moment of its first token."""
    cancelled: bool = False
    """Whether its sender wants it no longer."""
    longest_wait: float = 0.0
    """Longest time in seconds for which one piece of its work waited."""
    longest_wait_batches: int = 0
    """Largest number of batches that began while one piece of its work waited."""

    @property
    def stage(self) -> WorkStage:
        """Stage of its next piece of work."""
        if self.request.kind == "frame":
            return "frame"
        return "decode" if self.generated else "prefill"

    def end(self, status: Status, at: float, error: Exception | None = None) -> Finished:
        """Describe its end.

        Args:
            status: How it ended.
            at: Moment of its end.
            error: What went wrong.

        Returns:
            The end.
        """
        return Finished(
            id=self.request.id,
            kind=self.request.kind,
            status=status,
            error=error,
            arrived=self.arrived,
            first_token=self.first_token,
            at=at,
            generated=self.generated,
            longest_wait=self.longest_wait,
            longest_wait_batches=self.longest_wait_batches,
        )


@dataclass(frozen=True, kw_only=True)
class QueueCounts:
    """What came to a queue."""

    admitted: int
    """Requests that were taken."""
    overloaded: int
    """Requests that were refused because the queue was full."""
    late: int
    """Requests that were refused because the queue was closed."""
    open: int
    """Requests that have not ended."""
    most_open: int
    """Largest number of requests that were open at one time."""


@dataclass(kw_only=True)
class _Tally:
    admitted: int = 0
    overloaded: int = 0
    late: int = 0
    most_open: int = 0


class RequestQueue:
    """Takes requests from any thread, and never holds more than its bound: waiting and running ones count.

    Example:
        queue = RequestQueue(most_requests=256, clock=SystemClock())
        queue.submit(Request(id="7", kind="frame", tokens=1))
        queue.cancel("7")
        queue.close()
    """

    def __init__(self, *, most_requests: int, clock: Clock, check: Callable[[Request], None] | None = None) -> None:
        """Make an empty queue.

        Args:
            most_requests: Largest number of requests that are open at one time.
            clock: Tells when a request arrives.
            check: Raises `InvalidInput` for a request that could never be served; the engine sets it.
        """
        require_counts("RequestQueue", most=10_000_000, most_requests=most_requests)
        self.most_requests = most_requests
        self.changed = Condition()
        self.check = check
        self._clock = clock
        self._open: dict[str, OpenRequest] = {}
        self._new: list[OpenRequest] = []
        self._cancelled = False
        self._closed = False
        self._tally = _Tally()

    @property
    def closed(self) -> bool:
        """Whether it takes no request anymore."""
        return self._closed

    @property
    def counts(self) -> QueueCounts:
        """What came until now."""
        with self.changed:
            t = self._tally
            return QueueCounts(
                admitted=t.admitted, overloaded=t.overloaded, late=t.late, open=len(self._open), most_open=t.most_open
            )

    def submit(self, request: Request) -> None:
        """Take a request.

        Args:
            request: The request.

        Raises:
            QueueFull: As many requests as allowed are open. The message says the bound.
            QueueClosed: The runtime shuts down.
            InvalidInput: An open request has the same id, or the request could never be served.
        """
        if self.check is not None:
            self.check(request)
        with self.changed:
            if self._closed:
                self._tally.late += 1
                raise QueueClosed(f"request {request.id!r} came while the runtime shuts down; send it to another one")
            if len(self._open) >= self.most_requests:
                self._tally.overloaded += 1
                raise QueueFull(
                    f"request {request.id!r} is refused: {len(self._open)} requests are open, and the bound is {self.most_requests}; "
                    "try again later, or raise the bound"
                )
            require(request.id not in self._open, f"a request {request.id!r} is open already; give every request its own id")
            now = self._clock.now()
            admitted = OpenRequest(request=request, arrived=now, ready=now)
            self._open[request.id] = admitted
            self._new.append(admitted)
            self._tally.admitted += 1
            self._tally.most_open = max(self._tally.most_open, len(self._open))
            self.changed.notify_all()

    def cancel(self, id: str) -> bool:
        """Ask the engine to end a request before its next step. A step that runs is not stopped.

        Args:
            id: Name of the request.

        Returns:
            Whether such a request is open. False may mean that it has just ended.
        """
        with self.changed:
            found = self._open.get(id)
            if found is None:
                return False
            if not found.cancelled:
                found.cancelled = True
                self._cancelled = True
                self.changed.notify_all()
            return True

    def close(self) -> None:
        """Take no request anymore. Those that are open stay."""
        with self.changed:
            self._closed = True
            self.changed.notify_all()

    def has_news(self) -> bool:
        """Say whether something arrived or was cancelled since the engine asked, or whether nothing will come anymore.

        Returns:
            True if the engine has something to do.
        """
        return bool(self._new or self._cancelled or (self._closed and not self._open))

    def take_new(self) -> tuple[OpenRequest, ...]:
        """Hand over what arrived since the last call. Only the engine calls this.

        Returns:
            Requests in the order of their arrival.
        """
        with self.changed:
            new, self._new = tuple(self._new), []
        return new

    def take_cancelled(self) -> bool:
        """Say whether a request was cancelled since the last call. Only the engine calls this.

        Returns:
            Whether an `OpenRequest` is newly marked as cancelled.
        """
        with self.changed:
            cancelled, self._cancelled = self._cancelled, False
        return cancelled

    def open_requests(self) -> tuple[OpenRequest, ...]:
        """List what is open.

        Returns:
            Requests in the order of their arrival.
        """
        with self.changed:
            return tuple(self._open.values())

    def remove(self, ended: OpenRequest) -> None:
        """Forget a request that ended. Only the engine calls this.

        Args:
            ended: The request.

        Raises:
            InvalidInput: It is not open: it would end twice.
        """
        with self.changed:
            if self._open.get(ended.request.id) is not ended:
                raise InvalidInput(f"request {ended.request.id!r} ended twice")
            del self._open[ended.request.id]
            self.changed.notify_all()
