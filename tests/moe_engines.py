"""Engines with a simulated computation that notes what it does: what the tests of the runtime share."""

import itertools
from collections import Counter

from upcycle3d.perception.moe.runtime.clock import ManualClock, SystemClock
from upcycle3d.perception.moe.runtime.engine import Engine, EngineConfig, Outcome
from upcycle3d.perception.moe.runtime.expert_cache import Lru
from upcycle3d.perception.moe.runtime.expert_memory import ExpertLayout, ExpertMemory
from upcycle3d.perception.moe.runtime.requests import Request, RequestQueue
from upcycle3d.perception.moe.runtime.scheduling import BatchLimits, first_in_first_out
from upcycle3d.perception.moe.runtime.simulate import SimulatedComputation, StepCost
from upcycle3d.perception.moe.runtime.traces import TracedDecisions, traced_gate
from upcycle3d.perception.moe.runtime.transfers import SimulatedChannel, SizedStore, ThreadedChannel, TransferCost


def sequence(id: str, prompt, later=()) -> Request:
    decisions = TracedDecisions(first=tuple(prompt), later=tuple(later))
    return Request(id=id, kind="sequence", tokens=len(prompt), new_tokens=1 + len(later), payload=decisions)


def frame(id: str, expert: int) -> Request:
    return Request(id=id, kind="frame", tokens=1, payload=TracedDecisions(first=(expert,)))


class Recorded:
    """A simulated computation that notes every step, and can be told to do something in the middle of one."""

    def __init__(self, clock) -> None:
        self.inner = SimulatedComputation(StepCost(), clock)
        self.steps, self.released, self.batches = [], [], []
        self.memory, self.during, self.outcomes = None, None, {}

    def run(self, batch, experts):
        self.batches.append(tuple((w.request.id, w.stage) for w in batch.works))
        self.steps += [(w.request.id, w.stage, w.experts) for w in batch.works]
        if self.during:
            self.during(batch)
        seen = Counter()
        waves = experts.waves

        def watched(layer=0):
            for wave in waves(layer):
                pieces = {experts.layout.piece(e, layer) for e in wave.experts}
                assert pieces <= self.memory.resident
                for work in wave.works:
                    seen.update((layer, work, e) for e in work.experts if e in wave.experts)
                yield wave

        experts.waves = watched
        self.inner.run(batch, experts)
        for work in batch.works:  # every choice of every token was served once in each layer
            for layer, (expert, count) in itertools.product(range(experts.layout.layers), Counter(work.experts).items()):
                assert work in experts.failed or seen[layer, work, expert] == count
        return [self.outcomes.get(w.request.id, Outcome()) for w in batch.works]

    def release(self, request):
        self.released.append(request.id)


def engine_of(
    *, policy=first_in_first_out, budget=30, experts=5, layers=1, clock=None, store=None, bound=64, gate=traced_gate, **limits
):
    clock = clock or ManualClock()
    queue = RequestQueue(most_requests=bound, clock=clock)
    store = store or SizedStore(lambda piece: 10)
    threads = isinstance(clock, SystemClock)
    cost = TransferCost(latency=1e-3, bandwidth=1e5)
    channel = ThreadedChannel(store, clock) if threads else SimulatedChannel(store, cost, clock)
    memory = ExpertMemory(store=store, channel=channel, budget=budget, eviction=Lru(), clock=clock, fetch_ahead=True)
    computation, ends = Recorded(clock), []
    computation.memory = memory
    layout = ExpertLayout(experts=experts, layers=layers)
    engine = Engine(
        EngineConfig(policy=policy, layout=layout, limits=BatchLimits(**limits)),
        clock=clock,
        queue=queue,
        gate=gate,
        memory=memory,
        computation=computation,
        ended=ends.append,
    )
    return engine, computation, ends


def run_all(engine, requests) -> None:
    for request in requests:
        engine.queue.submit(request)
    engine.shut_down()
    engine.run()
