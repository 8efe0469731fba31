"""One trace through one runtime, without waiting: the engine that serves for real, with a clock that is moved by hand.

Read next: `reports.py`, which explains the numbers that come out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from ....core.errors import require, require_counts, require_numbers
from .clock import Clock, ManualClock
from .engine import Engine, EngineConfig, Outcome
from .expert_cache import Eviction, Lru
from .expert_memory import ExpertMemory
from .held_experts import HeldExperts
from .reports import RuntimeReport
from .requests import Finished, QueueFull, Request, RequestQueue
from .scheduling import WorkBatch
from .traces import Arrival, traced_gate
from .transfers import SimulatedChannel, SizedStore, TransferCost


@dataclass(frozen=True, kw_only=True)
class StepCost:
    """Time that one step of the network takes. Measure yours: the default is no machine's."""

    batch: float = 5e-3
    """Seconds for each batch, whatever it holds: reading the weights that all tokens share."""
    token: float = 1e-4
    """Seconds for each token outside the experts."""
    expert: float = 1e-3
    """Seconds for each unique expert of a batch: reading its weights."""
    routed_token: float = 1e-4
    """Seconds for each choice of a token inside its expert."""

    def __post_init__(self) -> None:
        require_numbers(
            "StepCost", least=0, most=1e6, batch=self.batch, token=self.token, expert=self.expert, routed_token=self.routed_token
        )


class SimulatedComputation:
    """Lets the clock pass instead of computing."""

    def __init__(self, cost: StepCost, clock: Clock) -> None:
        """Make it.

        Args:
            cost: Time of one step.
            clock: The clock that passes.
        """
        self._cost, self._clock = cost, clock

    def run(self, batch: WorkBatch, experts: HeldExperts) -> Sequence[Outcome]:
        """Let the time of one step pass, layer by layer.

        Args:
            batch: The works.
            experts: Gives their experts.

        Returns:
            Outcomes without errors: sequences end at their largest number of new tokens.
        """
        cost, layers = self._cost, experts.layout.layers
        for layer in range(layers):
            self._clock.wait((cost.batch + cost.token * batch.tokens) / layers)
            for wave in experts.waves(layer):
                here = set(wave.experts)
                choices = sum(e in here for work in wave.works for e in work.experts)
                self._clock.wait((cost.expert * len(here) + cost.routed_token * choices) / layers)
        return [Outcome()] * len(batch.works)

    def release(self, request: Request) -> None:
        """Do nothing: nothing is kept.

        Args:
            request: The request.
        """


@dataclass(frozen=True, kw_only=True)
class Simulation:
    """A runtime to simulate: policy, cache, fetching ahead, costs."""

    engine: EngineConfig
    """Policy, limits and layout of the experts."""
    piece_bytes: int | tuple[int, ...]
    """Bytes of each piece of an expert; one number if all are equal."""
    budget: int
    """Bytes of experts that memory holds."""
    eviction: Eviction = Lru()
    """Decides which expert goes."""
    fetch_ahead: bool = True
    """Whether experts are fetched ahead; False is the control without it."""
    transfer: TransferCost = TransferCost()
    """Time of one transfer."""
    step: StepCost = StepCost()
    """Time of one step."""
    most_requests: int = 256
    """Bound of the request queue."""

    def __post_init__(self) -> None:
        require_counts("Simulation", most=2**60, piece_bytes=self.piece_bytes)
        pieces = self.engine.layout.pieces
        require(
            isinstance(self.piece_bytes, int) or len(self.piece_bytes) == pieces,
            f"Simulation.piece_bytes must be one number or {pieces}, found {self.piece_bytes!r:.80}",
        )

    def bytes_of(self, piece: int) -> int:
        """Get the size of a piece.

        Args:
            piece: Number of the piece.

        Returns:
            Its bytes.
        """
        return self.piece_bytes if isinstance(self.piece_bytes, int) else self.piece_bytes[piece]


def _ignore_end(end: Finished) -> None:
    """Nobody listens."""


def simulate(
    trace: Sequence[Arrival], simulation: Simulation, *, ended: Callable[[Finished], None] = _ignore_end
) -> RuntimeReport:
    """Serve a trace in simulated time. Requests that find the queue full are counted and do not come again.

    Args:
        trace: Requests with the times at which they come.
        simulation: The runtime.
        ended: Is called at the end of every request.

    Returns:
        The report. The same trace and runtime give the same report, whatever the machine.

    Raises:
        InvalidInput: A piece is larger than the budget.

    Example:
        engine = EngineConfig(policy=expert_aware, layout=ExpertLayout(experts=7))
        runtime = Simulation(engine=engine, piece_bytes=10**7, budget=4 * 10**7, eviction=Belady())
        print(simulate(draw_trace(TraceConfig()), runtime))
    """
    clock = ManualClock()
    queue = RequestQueue(most_requests=simulation.most_requests, clock=clock)
    store = SizedStore(simulation.bytes_of)
    memory = ExpertMemory(
        store=store,
        channel=SimulatedChannel(store, simulation.transfer, clock),
        budget=simulation.budget,
        eviction=simulation.eviction,
        clock=clock,
        fetch_ahead=simulation.fetch_ahead,
    )
    engine = Engine(
        simulation.engine,
        clock=clock,
        queue=queue,
        gate=traced_gate,
        memory=memory,
        computation=SimulatedComputation(simulation.step, clock),
        ended=ended,
    )
    for arrival in trace:
        clock.at(arrival.at, partial(_send, queue, arrival.request))
        if arrival.cancelled_at is not None:
            clock.at(arrival.cancelled_at, partial(_cancel, queue, arrival.request.id))
    clock.at(max((arrival.at for arrival in trace), default=0.0), queue.close)
    engine.run()
    return engine.report()


def _send(queue: RequestQueue, request: Request) -> None:
    try:
        queue.submit(request)
    except QueueFull:
        return  # the queue has counted it


def _cancel(queue: RequestQueue, id: str) -> None:
    queue.cancel(id)  # it may have ended, or have been refused
