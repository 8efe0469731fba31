"""What does the runtime bring on a real machine? A carved SmolLM2 behind `moe serve`'s engine, with memory for half of its experts.

    python benchmarks/studies/moe_serve_real.py carved/model --out runs/moe_serve_real --csv docs/experiments/moe_serve

`carved/model` is a folder that `upcycle3d moe readme` wrote; the dense SmolLM2 comes from `moe_texts.py`. Needs an idle machine.

* *Alone*: one request at a time, all experts in memory, in turns: the dense model of Hugging Face; the dense model in our decoder; the
  carved model in our decoder (the plain forward pass, pre-gate included); the same behind queue, scheduler and memory. The difference of
  the last two is the runtime's overhead. `promise` is the dense model's active parameters divided by the carved one's.
* *Replay*: policies as in `moe_runtime_batching.py`. One trace of requests in real time, their prompts from test documents of four domains, again and again in turns. Texts do not end
  before their largest number of tokens, so all arms do the same work. Every arm starts with no expert in memory.

What a miss costs depends on where experts lie. `cached`: the file is in the system's page cache, and a miss copies memory. `disk`: pages are
forgotten after each read (`--no-keep-cached` of `moe serve`), so a miss reads the disk, if the system obeys.

Written before the run:

* Direction. With at most 8 works in a batch and more of them waiting, `expert_aware` needs at least 25 % fewer unique experts per batch than
  `first_in_first_out`; its p95 latency is lower, and its mean latency is at least 6.1 % below `first_in_first_out`, `decoding_first` and
  `prefill_first`. Where a batch holds everything that waits, only `oldest_leads` can gain, and only from the disk.
* Overhead of the runtime without misses: at most 5 %. The carved model alone is faster than the dense one in the same decoder by at least
  half of what its active parameters promise.
* Falsifier. Fewer experts but no lower mean latency, or a work that waits longer than the bound of ageing. Then the bound is printed:
  the share of the busy time in which the choice of experts matters at all (stalls, and computing with experts).

The replay repeats all its arms as long as --minutes last, at least once. About 8 minutes on two idle cores.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from moe_runtime_batching import arrival_order
from moe_runtime_cells import Row, change, mean, write_rows
from moe_serve_alone import GREEDY, Sent, alone, bytes_per_second, draw_requests, print_alone
from moe_texts import smollm2_folder

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.runtime.requests import Finished
from upcycle3d.perception.moe.runtime.scheduling import (
    BatchLimits,
    BatchPolicy,
    decoding_first,
    expert_aware,
    first_in_first_out,
    oldest_leads,
    prefill_first,
    resident_first,
)
from upcycle3d.perception.moe.serving.completion_server import CompletionServer, ServingConfig
from upcycle3d.perception.moe.serving.expert_files import open_experts
from upcycle3d.perception.moe.serving.hugging_face_coder import HuggingFaceCoder
from upcycle3d.perception.moe.serving.llama_backbone import LlamaBackbone
from upcycle3d.perception.moe.serving.llama_engine import Completion
from upcycle3d.perception.moe.serving.served_models import EXPERTS_NAME, ServedModel, open_served
from upcycle3d.perception.moe.serving.text_stream import TextCoder
from upcycle3d.tools.console import print_table


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way to serve the trace."""

    policy: BatchPolicy
    """Fills batches."""
    works: int | None = 8
    """Largest number of works in a batch."""
    cached: bool = True
    """Whether pages of experts stay in the page cache."""
    ahead: bool = True
    """Whether experts are fetched ahead."""
    all_resident: bool = False
    """Whether memory holds all experts, and not half of them."""

    @property
    def labels(self) -> dict[str, str | int]:
        """Columns that name the arm."""
        return {
            "policy": self.policy.__name__,
            "bound": "no bound" if self.works is None else f"{self.works} works",
            "from": "cached" if self.cached else "disk",
            "ahead": int(self.ahead),
            "room": "all" if self.all_resident else "half",
        }


PLAIN = (first_in_first_out, decoding_first, prefill_first)
POLICIES: tuple[BatchPolicy, ...] = (*PLAIN, arrival_order, expert_aware, resident_first, oldest_leads)
ARMS = (
    *(Arm(policy=policy, cached=cached) for cached in (True, False) for policy in POLICIES),
    *(
        Arm(policy=policy, cached=cached, ahead=False)
        for cached in (True, False)
        for policy in (first_in_first_out, expert_aware)
    ),
    *(Arm(policy=p, cached=c, works=None) for c in (True, False) for p in (first_in_first_out, expert_aware, oldest_leads)),
    *(Arm(policy=policy, all_resident=True) for policy in (first_in_first_out, expert_aware)),
)


# ---- the trace


def serve_trace(arm: Arm, served: ServedModel, folder: Path, coder: TextCoder, trace: Sequence[Sent]) -> Row:
    """Send every request at its moment and wait for the last."""
    fresh = replace(served, experts=open_experts(folder / EXPERTS_NAME))
    sizes = served.experts.form.expert_bytes
    budget = sum(sizes) if arm.all_resident else sum(sizes) // 2
    settings = ServingConfig(
        budget=budget,
        policy=arm.policy,
        fetch_ahead=arm.ahead,
        batch=BatchLimits(tokens=2048, works=arm.works),
        most_requests=len(trace),
        keep_cached=arm.cached,
    )
    server = CompletionServer(fresh, coder, settings)
    ends: list[Finished] = []
    begin = time.monotonic()
    for sent in trace:
        time.sleep(max(0.0, begin + sent.at - time.monotonic()))
        completion = Completion(prompt=sent.prompt, sampling=GREEDY, told=lambda part: None)
        server.send(completion, new_tokens=sent.new_tokens, ended=ends.append)
    report = server.close()
    memory, times = report.memory, report.times
    if report.served != len(trace):
        raise InvalidInput(f"{report.served} of {len(trace)} requests were served; first end: {ends[0]}")
    assert report.wait_bound is not None
    return {
        **arm.labels,
        "latency_mean_s": report.latency.mean,
        "latency_p95_s": report.latency.p95,
        "latency_per_token_mean_s": report.latency_per_token.mean,
        "first_token_p95_s": report.first_token.p95,
        "unique_experts": report.unique_experts,
        "works_per_batch": report.works_per_batch,
        "hit_ratio": memory.hit_ratio,
        "moved_mb": (memory.demand_bytes + memory.ahead_bytes) / 1e6,
        "useless_mb": memory.useless_bytes / 1e6,
        "most_mb": memory.most_bytes / 1e6,
        "stall_share": report.stall_share,
        "routed_share": report.routed_share,
        "gate_share": times.gate / times.busy,
        "schedule_share": times.schedule / times.busy,
        "longest_wait_batches": report.longest_wait_batches,
        "starved": int(report.longest_wait_batches > report.wait_bound),
        "tokens_per_s": report.throughput,
        "generated": report.generated,
    }


def replay(minutes: float, one: Callable[[Arm], Row]) -> Iterator[Row]:
    """Serve the trace with all arms in turns, until the time is over."""
    begin, turn, longest = time.monotonic(), 0, 0.0
    while not turn or time.monotonic() + longest < begin + 60 * minutes:
        start = time.monotonic()
        for arm in ARMS[turn % len(ARMS) :] + ARMS[: turn % len(ARMS)]:
            yield {"seed": turn, **one(arm)}
        longest = max(longest, time.monotonic() - start)
        turn += 1
        print(f"turn {turn}: {longest:.0f} s", flush=True)


def print_replay(rows: list[Row]) -> None:
    """Print all arms, and what became of the direction."""
    lines = []
    for arm in ARMS:
        plain = {"policy": "first_in_first_out", "ahead": 1}
        numbers = [
            mean(rows, arm.labels, c)
            for c in ("latency_mean_s", "latency_p95_s", "unique_experts", "works_per_batch", "moved_mb")
        ]
        shares = [100 * mean(rows, arm.labels, c) for c in ("stall_share", "routed_share")]
        changes = [change(rows, arm.labels, plain, c) for c in ("latency_mean_s", "latency_p95_s")]
        lines.append((*map(str, arm.labels.values()), *(f"{n:.2f}" for n in numbers), *(f"{s:.0f}" for s in shares), *changes))
    header = (
        "policy",
        "bound",
        "from",
        "ahead",
        "room",
        "mean s",
        "p95 s",
        "experts",
        "works",
        "MB",
        "stall %",
        "influence %",
        "mean",
        "p95",
    )
    print_table("replay; changes against first_in_first_out with the same bound, source and room", header, lines)
    for cached in (True, False):
        aware = Arm(policy=expert_aware, cached=cached).labels
        for policy in (*PLAIN, arrival_order):
            other: dict[str, str | int] = {"policy": policy.__name__}
            told = [change(rows, aware, other, c) for c in ("unique_experts", "latency_mean_s", "latency_p95_s")]
            print(f"{aware['from']}: expert_aware against {policy.__name__}: experts {told[0]}, mean {told[1]}, p95 {told[2]}")
    print(f"works that waited longer than the bound: {sum(int(row['starved']) for row in rows)} runs of {len(rows)}")


def without_end(backbone: LlamaBackbone) -> LlamaBackbone:
    """The backbone of a model whose texts do not end by themselves."""
    return replace(backbone, shape=replace(backbone.shape, end_tokens=()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="folder that `upcycle3d moe readme` wrote")
    parser.add_argument("--out", type=Path, required=True, help="folder of the tables")
    parser.add_argument("--csv", type=Path, help="another folder of the tables")
    parser.add_argument("--dense", type=Path, help="folder of the dense model; SmolLM2 of moe_texts.py by default")
    parser.add_argument("--minutes", type=float, default=6.5, help="time of the replay")
    parser.add_argument("--requests", type=int, default=24)
    parser.add_argument(
        "--rate", type=float, default=8.0, help="arrivals per second: more than the machine serves, so that works wait"
    )
    parser.add_argument("--repetitions", type=int, default=12, help="of each way to compute one request alone")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch; another core loads experts meanwhile")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    folder, tables = arguments.model, arguments.csv or arguments.out
    coder, served = HuggingFaceCoder(folder), open_served(folder)
    served = replace(served, backbone=without_end(served.backbone))
    print(served.description)
    for cached in (True, False):
        speed = bytes_per_second(folder, cached=cached)
        print(f"a miss loads {speed / 1e9:.2f} GB/s {'from the page cache' if cached else 'from the disk, if the system obeys'}")
    rows = alone(served, folder, coder, arguments.dense or smollm2_folder(), arguments.repetitions)
    write_rows(tables / "alone.csv", rows)
    print_alone(rows)
    trace = draw_requests(coder, arguments.requests, arguments.rate, seed=0)
    served_rows: list[Row] = []
    for row in replay(arguments.minutes, lambda arm: serve_trace(arm, served, folder, coder, trace)):
        served_rows.append(row)
        write_rows(tables / "replay.csv", served_rows)
    print_replay(served_rows)


if __name__ == "__main__":
    main()
