"""One served model as a running whole: files, memory, queue and engine with its thread, behind methods that any thread may call.

There is no global state: two `CompletionServer` objects serve two models in one process. Read next: `completions.py`, which puts it behind
HTTP.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock, Thread

from ....core.errors import UpcycleError, require, require_counts
from ..runtime.clock import SystemClock
from ..runtime.engine import Engine, EngineConfig
from ..runtime.expert_cache import Belady, Eviction
from ..runtime.expert_memory import ExpertMemory
from ..runtime.reports import RuntimeReport
from ..runtime.requests import Finished, QueueClosed, Request, RequestQueue
from ..runtime.scheduling import BatchLimits, BatchPolicy, expert_aware
from ..runtime.transfers import ThreadedChannel
from .expert_store import MappedExpertStore
from .llama_engine import Completion, LlamaComputation, LlamaLimits
from .served_models import ServedDescription, ServedModel
from .text_stream import TextCoder


@dataclass(frozen=True, kw_only=True)
class ServingConfig:
    """How a model is served."""

    budget: int
    """Bytes of experts that memory holds."""
    whole: bool = False
    """Whether experts are loaded as a whole. Layer by layer works with any budget of one piece, and waits more often."""
    policy: BatchPolicy = expert_aware
    """Fills batches."""
    eviction: Eviction = Belady()
    """Decides which piece goes."""
    fetch_ahead: bool = True
    """Whether pieces are fetched ahead; False is the control without it."""
    foreseen: int = 1
    """Number of batches to foresee."""
    batch: BatchLimits = BatchLimits(tokens=2048)
    """What one batch may hold. A prompt with more tokens is refused."""
    memory: LlamaLimits = LlamaLimits()
    """Length of requests, and bytes of their keys and values."""
    most_requests: int = 64
    """Largest number of requests that are open at one time; more are refused."""
    keep_cached: bool = True
    """Whether the system may keep pages of experts that were read. False measures as if its memory was full."""

    def __post_init__(self) -> None:
        require_counts("ServingConfig", most=2**60, budget=self.budget)
        require_counts("ServingConfig", most=10_000_000, most_requests=self.most_requests)


class CompletionServer:
    """Serves a carved language model until it is closed.

    Example:
        server = CompletionServer(open_served("model"), coder, ServingConfig(budget=200_000_000))
        server.send(Completion(prompt=tuple(coder.encode("Once")), told=print), new_tokens=20, ended=print)
        server.close()
    """

    def __init__(self, served: ServedModel, coder: TextCoder, config: ServingConfig) -> None:
        """Start the threads of engine and transfers.

        Args:
            served: The model. The server closes its file.
            coder: The tokenizer.
            config: How it is served.

        Raises:
            InvalidInput: A piece of an expert is larger than the budget, or the parts do not belong together.
        """
        self.coder, self.config, self.longest = coder, config, min(config.memory.longest, served.backbone.shape.longest)
        self.description: ServedDescription = served.description
        clock = SystemClock()
        self._store = MappedExpertStore(served.experts, whole=config.whole, keep_cached=config.keep_cached)
        self._computation = LlamaComputation(served.backbone, self._store, served.pre_gate, coder, config.memory)
        self._queue = RequestQueue(most_requests=config.most_requests, clock=clock)
        self._memory = ExpertMemory(
            store=self._store,
            channel=ThreadedChannel(self._store, clock),
            budget=config.budget,
            eviction=config.eviction,
            clock=clock,
            fetch_ahead=config.fetch_ahead,
        )
        self._lock = Lock()
        self._listeners: dict[str, Callable[[Finished], None]] = {}
        self._numbers = itertools.count()
        self._fault: Exception | None = None
        self._closed = False
        try:
            self._engine = Engine(
                EngineConfig(policy=config.policy, limits=config.batch, layout=self._store.layout, foreseen=config.foreseen),
                clock=clock,
                queue=self._queue,
                gate=self._computation.gate,
                memory=self._memory,
                computation=self._computation,
                ended=self._ended,
            )
        except Exception:
            self._memory.close()
            self._store.close()
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

    def send(self, completion: Completion, *, new_tokens: int, ended: Callable[[Finished], None]) -> str:
        """Send a request.

        Args:
            completion: What is completed, and who is told about every step.
            new_tokens: Largest number of new tokens.
            ended: Is called once at its end, from the engine's thread. It must not wait.

        Returns:
            Name of the request.

        Raises:
            InvalidInput: It could never be served; the message says why.
            QueueFull: It cannot be served now; the message says the bound.
            QueueClosed: The server is shutting down.
        """
        id = f"cmpl-{next(self._numbers)}"
        if self._fault is not None:
            raise QueueClosed(f"the engine stopped with an error, so nothing is served: {self._fault}")
        require(bool(completion.prompt), "the prompt has no token; give a text that is not empty")
        request = Request(id=id, kind="sequence", tokens=len(completion.prompt), new_tokens=new_tokens, payload=completion)
        self._computation.open(request)
        with self._lock:
            self._listeners[id] = ended
        try:
            self._queue.submit(request)
        except Exception:
            with self._lock:
                self._listeners.pop(id, None)
            self._computation.release(request)
            raise
        return id

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
