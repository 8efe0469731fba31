"""Not a script: one request at a time, for `moe_serve_real.py`: speed, the runtime's overhead, what a miss costs, and the requests.

Everything is computed in turns, so a machine that becomes slower does so for all.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event

import torch
from moe_assets import default_cache
from moe_runtime_cells import Row
from moe_texts import split_texts
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.language.language_models import load_language_model
from upcycle3d.perception.moe.layers.dense_ffn import DenseFfn
from upcycle3d.perception.moe.serving.completion_server import CompletionServer, ServingConfig
from upcycle3d.perception.moe.serving.expert_files import open_experts
from upcycle3d.perception.moe.serving.expert_store import MappedExpertStore
from upcycle3d.perception.moe.serving.key_values import CacheSpan
from upcycle3d.perception.moe.serving.llama_backbone import LlamaShape, read_backbone
from upcycle3d.perception.moe.serving.llama_decoder import LlamaDecoder, PreGateDecoder
from upcycle3d.perception.moe.serving.llama_engine import Completion
from upcycle3d.perception.moe.serving.sampling import Sampling
from upcycle3d.perception.moe.serving.served_models import EXPERTS_NAME, ServedModel
from upcycle3d.perception.moe.serving.text_stream import TextCoder
from upcycle3d.perception.moe.surgery.ffn_sites import tensors_of
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.tools.console import print_table

GREEDY = Sampling(temperature=0)
NEW_TOKENS = 48
AddOwn = Callable[[list[int]], Callable[[int, Tensor, Tensor], None]]
OneRequest = Callable[[Sequence[int], int], list[int]]
"""Computes new tokens: gets the prompt and their number."""


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One request of the trace."""

    at: float
    """Seconds after the start."""
    prompt: tuple[int, ...]
    """Tokens."""
    new_tokens: int
    """Number of new tokens."""


def draw_requests(coder: TextCoder, count: int, rate: float, seed: int) -> tuple[Sent, ...]:
    """Draw the trace: beginnings of test documents of all domains in turn, in a Poisson process."""
    draw = random.Random(seed)
    texts = [parts["test"] for parts in split_texts(default_cache()).values()]
    at, found = 0.0, []
    for number in range(count):
        at += draw.expovariate(rate)
        ids = coder.encode(draw.choice(texts[number % len(texts)]))
        found.append(Sent(at=at, prompt=tuple(ids[: draw.randint(8, 48)]), new_tokens=draw.randint(12, 32)))
    return tuple(found)


def greedy(decoder: LlamaDecoder, prompt: Sequence[int], count: int, add_own: AddOwn) -> list[int]:
    """The plain forward pass: a loop around the decoder, with nothing that a server needs."""
    cache, ids = decoder.new_cache(len(prompt) + count), list(prompt)
    found: list[int] = []
    while len(found) < count:
        hidden = decoder.forward(torch.tensor(ids), [CacheSpan(cache=cache, first=0, count=len(ids))], add_own(ids))
        ids = [int(decoder.logits(hidden[-1:])[0].argmax())]
        found += ids
    return found


def carved_alone(served: ServedModel, store: MappedExpertStore) -> OneRequest:
    """The carved model under its pre-gate's decisions, all experts in memory."""
    decoder = LlamaDecoder(served.backbone)
    assert served.pre_gate is not None
    gate = PreGateDecoder(served.pre_gate)

    def run(prompt: Sequence[int], count: int) -> list[int]:
        gate_cache = gate.new_cache(len(prompt) + count)

        def add_own(ids: list[int]) -> Callable[[int, Tensor, Tensor], None]:
            chosen = gate.decide(torch.tensor(ids), [CacheSpan(cache=gate_cache, first=0, count=len(ids))])
            experts, every = sorted(set(chosen)), torch.tensor(chosen)
            rows = {e: None if len(experts) == 1 else (every == e).nonzero()[:, 0] for e in experts}

            def add(layer: int, x: Tensor, y: Tensor) -> None:
                for expert, own in rows.items():
                    part = store.part(expert=expert, layer=layer)
                    if own is None:
                        y += part.apply(x)
                    else:
                        y.index_add_(0, own, part.apply(x[own]))

            return add

        return greedy(decoder, prompt, count, add_own)

    return run


def served_alone(server: CompletionServer) -> OneRequest:
    """The same behind the whole runtime."""

    def run(prompt: Sequence[int], count: int) -> list[int]:
        found: list[int] = []
        done = Event()
        completion = Completion(prompt=tuple(prompt), sampling=GREEDY, told=lambda part: found.append(part.token))
        server.send(completion, new_tokens=count, ended=lambda end: done.set())
        done.wait()
        return found

    return run


def dense_alone(folder: Path) -> tuple[dict[str, OneRequest], int]:
    """The dense model in Hugging Face's code and in ours, and its number of parameters."""
    model = load_language_model(folder).model.eval()
    plan = plan_replacement(model, experts=1, active=1)
    ffns: list[DenseFfn | None] = [site.read(tensors_of(model)) for site in plan.sites]
    speeds = model.get_submodule("model.rotary_emb").get_buffer("inv_freq")
    decoder = LlamaDecoder(read_backbone(model, LlamaShape.of(model), ffns, speeds=speeds))

    def library(prompt: Sequence[int], count: int) -> list[int]:
        ids, exactly = torch.tensor([list(prompt)]), {"max_new_tokens": count, "min_new_tokens": count}
        made: Tensor = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **exactly)  # type: ignore[operator]
        return made[0, len(prompt) :].tolist()

    def ours(prompt: Sequence[int], count: int) -> list[int]:
        return greedy(decoder, prompt, count, lambda ids: lambda layer, x, y: None)

    return {"dense, Hugging Face": library, "dense": ours}, sum(p.numel() for p in model.parameters())


def alone(served: ServedModel, folder: Path, coder: TextCoder, dense: Path, repetitions: int) -> list[Row]:
    """Seconds of one request in each way, in turns."""
    sizes = served.experts.form.expert_bytes
    store = MappedExpertStore(open_experts(folder / EXPERTS_NAME), whole=False)
    for piece in range(store.layout.pieces):
        store.load(piece)
    server = CompletionServer(served, coder, ServingConfig(budget=sum(sizes)))
    arms, dense_parameters = dense_alone(dense)
    arms |= {"carved, plain": carved_alone(served, store), "carved, served": served_alone(server)}
    gate = served.pre_gate
    unread = (
        0 if gate is None else gate.embed.weight.nbytes
    )  # a token reads one row of the pre-gate's embedding and multiplies nothing
    active = (served.resident_bytes - unread + sum(sizes) // len(sizes)) // served.experts.form.dtype.itemsize
    prompt = draw_requests(coder, 4, 1.0, 0)[1].prompt[:8]
    rows: list[Row] = []
    order = list(arms)
    for name in order:
        arms[name](prompt, 4)  # first calls are slower
    if arms["carved, plain"](prompt, NEW_TOKENS) != arms["carved, served"](prompt, NEW_TOKENS):
        raise InvalidInput("the served model wrote another text than the plain forward pass")
    for turn in range(repetitions):
        for name in order[turn % len(order) :] + order[: turn % len(order)]:
            begin, cpu = time.perf_counter(), time.process_time()
            arms[name](prompt, NEW_TOKENS)
            spent, used = time.perf_counter() - begin, time.process_time() - cpu
            parameters = dense_parameters if name.startswith("dense") else active
            rows.append(
                {
                    "arm": name,
                    "seed": turn,
                    "seconds": spent,
                    "cpu_seconds": used,
                    "tokens_per_s": NEW_TOKENS / spent,
                    "active": parameters,
                }
            )
    server.close()
    store.close()
    return rows


def print_alone(rows: list[Row]) -> None:
    """Print speed, what was promised, and the runtime's overhead."""

    def median(arm: str, column: str = "seconds") -> float:
        return statistics.median(float(row[column]) for row in rows if row["arm"] == arm)

    names = list(dict.fromkeys(str(row["arm"]) for row in rows))
    dense = median("dense")
    lines = [
        (n, f"{median(n, 'active'):,.0f}", f"{1000 * median(n):.0f}", f"{NEW_TOKENS / median(n):.1f}", f"{dense / median(n):.2f}")
        for n in names
    ]
    print_table(
        f"one request alone, 8 tokens and {NEW_TOKENS} new ones, medians",
        ("", "active parameters", "ms", "tokens/s", "speed"),
        lines,
    )
    promise, found = median("dense", "active") / median("carved, plain", "active"), dense / median("carved, plain")
    print(
        f"the carved model promises {promise:.2f} times the dense speed and reaches {found:.2f}: {(found - 1) / (promise - 1):.0%} of the gain"
    )
    for what, column in (("time", "seconds"), ("CPU time", "cpu_seconds")):
        ratio = median("carved, served", column) / median("carved, plain", column) - 1
        print(f"overhead of the runtime without misses, {what}: {100 * ratio:+.1f} %")


def bytes_per_second(folder: Path, *, cached: bool) -> float:
    """Measure how fast experts are loaded, piece by piece, from the page cache or from the disk."""
    file = open_experts(folder / EXPERTS_NAME)
    store = MappedExpertStore(file, whole=False, keep_cached=cached)
    for _ in range(2):  # the first time fills the page cache, or makes the system forget
        begin = time.perf_counter()
        for piece in range(store.layout.pieces):
            store.load(piece)
            store.drop(piece)
        spent = time.perf_counter() - begin
    store.close()
    return sum(file.form.expert_bytes) / spent
