"""A small carved decoder as files to serve, and engines that serve it: what the tests of serving share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import moe_lookalikes as look
from upcycle3d.perception.moe.carving.activity import measure_activity
from upcycle3d.perception.moe.carving.carved_ffn import materialize
from upcycle3d.perception.moe.carving.masked_ffn import mask_ffns
from upcycle3d.perception.moe.carving.pre_gate import PreGate, PreGateConfig
from upcycle3d.perception.moe.carving.splits import pooled_units, readme_split
from upcycle3d.perception.moe.carving.units import Carving
from upcycle3d.perception.moe.checkpoints.carved_models import LoadedCarved, save_carved
from upcycle3d.perception.moe.language.small_lm import SmallLmConfig
from upcycle3d.perception.moe.layers.control_routers import given_routing
from upcycle3d.perception.moe.runtime.clock import ManualClock
from upcycle3d.perception.moe.runtime.engine import Engine, EngineConfig
from upcycle3d.perception.moe.runtime.expert_cache import Lru
from upcycle3d.perception.moe.runtime.expert_memory import ExpertMemory
from upcycle3d.perception.moe.runtime.requests import Request, RequestQueue
from upcycle3d.perception.moe.runtime.scheduling import BatchLimits, expert_aware
from upcycle3d.perception.moe.runtime.transfers import SimulatedChannel, TransferCost
from upcycle3d.perception.moe.serving.expert_store import MappedExpertStore
from upcycle3d.perception.moe.serving.llama_backbone import LlamaShape
from upcycle3d.perception.moe.serving.llama_engine import Completion, LlamaComputation, LlamaLimits
from upcycle3d.perception.moe.serving.sampling import Sampling
from upcycle3d.perception.moe.serving.served_models import open_served, write_served
from upcycle3d.perception.moe.surgery.replacement import plan_replacement

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!0123456789"
VOCABULARY = len(LETTERS)
GREEDY = Sampling(temperature=0)


class LetterCoder:
    """One token per letter."""

    def encode(self, text: str) -> list[int]:
        return [LETTERS.index(letter) for letter in text]

    def decode(self, ids) -> str:
        return "".join(LETTERS[i] for i in ids)


@dataclass(frozen=True)
class Carved:
    """A carved decoder in memory and on disk."""

    masked: nn.Module
    gate: PreGate | None
    carving: Carving
    folder: Path
    loaded: LoadedCarved
    shape: LlamaShape
    speeds: Tensor

    def logits(self, ids: list[int]) -> Tensor:
        """The oracle: the whole text through the masked model, without any cache, under the pre-gate's decisions."""
        row = torch.tensor([ids])
        with torch.no_grad():
            if self.gate is None:
                return self.masked(row).logits[0]
            with given_routing(self.masked, self.gate.decide(row)):
                return self.masked(row).logits[0]

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        ids = list(prompt)
        for _ in range(count):
            ids.append(int(self.logits(ids)[-1].argmax()))
        return ids[len(prompt) :]


def carved_lm(
    folder: Path, *, ratio: float = 0.4, experts: int = 3, form: str = "masked", dtype=torch.float64, end: tuple[int, ...] = ()
) -> Carved:
    sizes = SmallLmConfig(vocabulary=VOCABULARY, width=16, hidden=24, layers=3, heads=4, kv_heads=2, layout="sequential")
    model = look.randomized(sizes.build(0)).to(dtype)
    draw = torch.Generator().manual_seed(1)
    width = VOCABULARY // max(1, experts)
    texts = {f"d{n}": [torch.randint(n * width, (n + 1) * width, (4, 20), generator=draw)] for n in range(experts)}
    plan = plan_replacement(model, experts=experts, active=1)
    activity = measure_activity(model, plan, texts, lambda m, ids: m(ids), least_tokens=0)
    carving = readme_split(activity, ratio) if experts > 1 else pooled_units(activity, ratio)
    gate = None
    if experts > 1:
        gate = PreGateConfig(vocabulary=VOCABULARY, experts=experts, width=8, heads=2).build(1).to(dtype).eval()
    masked = mask_ffns(model, carving).eval()
    made = masked if form == "masked" else materialize(masked, fuse=form == "fused")
    said = save_carved(folder / "carved.safetensors", made, carving, pre_gate=gate)
    loaded = LoadedCarved(model=made, carving=carving, pre_gate=gate, description=said)
    shape = LlamaShape(
        vocabulary=VOCABULARY, width=16, layers=3, heads=4, kv_heads=2, head_dim=4, eps=1e-5, longest=64, end_tokens=end
    )
    speeds = sizes.base ** (-torch.arange(0, 4, 2, dtype=torch.float32) / 4)
    write_served(folder, loaded, name="small", shape=shape, speeds=speeds)
    return Carved(masked, gate, carving, folder, loaded, shape, speeds)


def computation_of(folder: Path, *, whole: bool, limits: LlamaLimits | None = None) -> tuple[LlamaComputation, MappedExpertStore]:
    served = open_served(folder)
    store = MappedExpertStore(served.experts, whole=whole)
    return LlamaComputation(served.backbone, store, served.pre_gate, LetterCoder(), limits or LlamaLimits()), store


def engine_for(computation: LlamaComputation, store: MappedExpertStore, *, budget: int, tokens: int = 64, store_of=None):
    """An engine in simulated time whose transfers load for real."""
    clock = ManualClock()
    seen = store if store_of is None else store_of(store)
    memory = ExpertMemory(
        store=seen,
        channel=SimulatedChannel(seen, TransferCost(), clock),
        budget=budget,
        eviction=Lru(),
        clock=clock,
        fetch_ahead=True,
    )
    ends = []
    engine = Engine(
        EngineConfig(policy=expert_aware, layout=store.layout, limits=BatchLimits(tokens=tokens)),
        clock=clock,
        queue=RequestQueue(most_requests=64, clock=clock),
        gate=computation.gate,
        memory=memory,
        computation=computation,
        ended=ends.append,
    )
    return engine, ends


class Told:
    """What one request was told."""

    def __init__(self) -> None:
        self.parts = []

    def __call__(self, part) -> None:
        self.parts.append(part)

    @property
    def tokens(self) -> list[int]:
        return [part.token for part in self.parts]

    @property
    def text(self) -> str:
        return "".join(part.text for part in self.parts)

    @property
    def finish(self):
        return self.parts[-1].finish


def send(engine, computation, id: str, prompt: list[int], count: int, *, sampling=GREEDY, stop=()) -> Told:
    told = Told()
    payload = Completion(prompt=tuple(prompt), sampling=sampling, stop=tuple(stop), told=told)
    request = Request(id=id, kind="sequence", tokens=len(prompt), new_tokens=count, payload=payload)
    computation.open(request)
    engine.queue.submit(request)
    return told


@contextmanager
def listening(app: Any) -> Iterator[str]:
    """An application behind a real socket; gives its address, and stops it at the end. Skips where uvicorn is not installed."""
    uvicorn = pytest.importorskip("uvicorn", reason="uvicorn is not installed; the extra `serve` brings it")
    running = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
    thread = Thread(target=running.run)
    thread.start()
    try:
        while not running.started:
            assert thread.is_alive()
        yield f"http://127.0.0.1:{running.servers[0].sockets[0].getsockname()[1]}"
    finally:
        running.should_exit = True
        thread.join(20)
