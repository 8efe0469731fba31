"""An engine with its thread, queue and memory, behind methods that any thread may call: what every server of a carved model is.

There is no global state: two servers serve two models in one process. `CompletionServer` derives from it for language models, and
`perception/moe/driving/detection_server.py` for detectors. Read next: `endpoints.py`, what their HTTP has in common.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, Thread
from typing import Protocol

from ....core.errors import UpcycleError, require_counts
from ..runtime.clock import SystemClock
from ..runtime.engine import Computation, Engine, EngineConfig, Gate
from ..runtime.expert_cache import Belady, Eviction
from ..runtime.expert_memory import ExpertLayout, ExpertMemory
from ..runtime.reports import RuntimeReport
from ..runtime.requests import Finished, QueueClosed, Request, RequestQueue
from ..runtime.scheduling import BatchLimits, BatchPolicy, expert_aware
from ..runtime.transfers import ExpertStore, ThreadedChannel


@dataclass(frozen=True, kw_only=True)
class RuntimeConfig:
    """How requests are served, whatever the model is."""

    budget: int
    """Bytes of experts that memory holds."""
    policy: BatchPolicy = expert_aware
    """Fills batches."""
    eviction: Eviction = Belady()
    """Decides which piece goes."""
    fetch_ahead: bool = True
    """Whether pieces are fetched ahead; False is the control without it."""
    foreseen: int = 1
    """Number of batches to foresee."""
    batch: BatchLimits = BatchLimits(tokens=2048)
    """What one batch may hold. A request with more tokens is refused."""
    most_requests: int = 64
    """Largest number of requests that are open at one time; more are refused."""

    def __post_init__(self) -> None:
        require_counts(type(self).__name__, most=2**60, budget=self.budget)
        require_counts(type(self).__name__, most=10_000_000, most_requests=self.most_requests)


class OwnedStore(ExpertStore, Protocol):
    """A store that a server owns and closes."""

    @property
    def resident_bytes(self) -> int:
        """Bytes of all experts in memory."""
        ...

    @property
    def layout(self) -> ExpertLayout:
        """How experts are numbered."""
        ...

    def close(self) -> None:
        """Free all memory and close the files."""
        ...


class EngineServer:
    """Serves one model until it is closed."""

    def __init__(self, config: RuntimeConfig, *, store: OwnedStore, computation: Computation, gate: Gate) -> None:
        """Start the threads of engine and transfers.

        Args:
            config: How requests are served.
            store: Where experts come from. The server closes it, also when this raises.
            computation: Runs the network.
            gate: Decides which experts serve a request.

        Raises:
            InvalidInput: A piece of an expert is larger than the budget.
        """
        clock = SystemClock()
        self._store = store
        self._queue = RequestQueue(most_requests=config.most_requests, clock=clock)
        self._memory = ExpertMemory(
            store=store,
            channel=ThreadedChannel(store, clock),
            budget=config.budget,
            eviction=config.eviction,
            clock=clock,
            fetch_ahead=config.fetch_ahead,
        )
        self._lock = Lock()
        self._listeners: dict[str, Callable[[Finished], None]] = {}
        self._fault: Exception | None = None
        self._closed = False
        try:
            self._engine = Engine(
                EngineConfig(policy=config.policy, limits=config.batch, layout=store.layout, foreseen=config.foreseen),
                clock=clock,
                queue=self._queue,
                gate=gate,
                memory=self._memory,
                computation=computation,
                ended=self._ended,
            )
        except Exception:
            self._memory.close()
            store.close()
            raise
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def healthy(self) -> bool:
        """Whether requests are taken and the engine runs."""
        return self._thread.is_alive() and not self._queue.closed

    @property
    def resident_bytes(self) -> int:
        """Bytes of experts in memory, as the buffers say."""
        return self._store.resident_bytes

    def submit(self, request: Request, ended: Callable[[Finished], None]) -> None:
        """Send a request.

        Args:
            request: The request, whose id no other one has.
            ended: Is called once at its end, from the engine's thread. It must not wait.

        Raises:
            InvalidInput: It could never be served; the message says why.
            QueueFull: It cannot be served now; the message says the bound.
            QueueClosed: The server is shutting down.
        """
        self.check_running()
        with self._lock:
            self._listeners[request.id] = ended
        try:
            self._queue.submit(request)
        except Exception:
            with self._lock:
                self._listeners.pop(request.id, None)
            raise

    def check_running(self) -> None:
        """Refuse requests of an engine that stopped with an error.

        Raises:
            QueueClosed: It did.
        """
        if self._fault is not None:
            raise QueueClosed(f"the engine stopped with an error, so nothing is served: {self._fault}")

    def cancel(self, id: str) -> bool:
        """End a request before its next step.

        Args:
            id: Its name.

        Returns:
            Whether it is open.
        """
        return self._queue.cancel(id)

    def report(self) -> RuntimeReport:
        """Summarize what happened until now.

        Returns:
            The report.
        """
        return self._engine.report()

    def close(self, *, grace: float = math.inf) -> RuntimeReport:
        """Take no request anymore, finish or refuse those that are open, and end the threads. A second call does nothing.

        Args:
            grace: Seconds in which open requests may still be served; what is open afterwards is refused.

        Returns:
            The last report.

        Raises:
            UpcycleError: The engine stopped with an error before.
        """
        if not self._closed:
            self._closed = True
            self._engine.shut_down(grace=grace)
            self._thread.join()
            self._memory.close()
            self._store.close()
        if self._fault is not None:
            raise UpcycleError(f"the engine stopped with an error: {self._fault}") from self._fault
        return self._engine.report()

    def _run(self) -> None:
        try:
            self._engine.run()
        except Exception as error:  # the engine has ended all requests with it
            self._fault = error

    def _ended(self, end: Finished) -> None:
        with self._lock:
            listener = self._listeners.pop(end.id, None)
        if listener is not None:
            listener(end)
