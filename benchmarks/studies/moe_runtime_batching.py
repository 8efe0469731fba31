"""Which rule should fill batches when memory holds half of the experts? Policies in simulated time (M5).

    python benchmarks/studies/moe_runtime_batching.py --out runs/moe_runtime --csv docs/experiments/moe_runtime

Requests arrive in a Poisson process, prompts of 8 to 48 tokens and answers of 16 to 64, prefill and decode. Five seeds. Traces:

* `mixed`: 7 experts; half of the requests draw an expert for every token, the other half repeat the last one with probability 0.95;
* one more for each `--recorded FILE` of decisions that a gate made (`perception/moe/runtime/recorded_decisions.py`): for documents
  `docs/experiments/moe_runtime/documents.json`, which `moe_runtime_documents.py` writes. Drives of vehicles are such a file, too.

A step takes 30 ms and 0.5 ms per token, 10 ms per unique expert and 0.3 ms per token in its expert. Moving an expert of 90 MB takes 24 ms
from the system's page cache (`copied`, 4 GB/s) or 180 ms from a disk (`disk`, 0.5 GB/s). These are round numbers of the size of a carved
SmolLM2-135M on one core, assumed and not measured; `--step` and `--bandwidth` take yours.

| policy | |
|---|---|
| `first_in_first_out` | works in the order in which they became ready: all requests advance in turn |
| `arrival_order` | requests in the order of their arrival: those that began are finished first. A stronger plain rule |
| `decoding_first`, `prefill_first` | as servers of language models do |
| `expert_aware` | after Read-ME's algorithm 1, with ageing |
| `resident_first` | the same, but experts in memory cost nothing |
| `oldest_leads` | the oldest work, and what needs no other experts than it and memory |
| `shortest_leads` | an offline oracle that knows how long every answer will be: the same, led by the shortest. Not an optimum |

Written before the run:

* Direction. With at most 8 works in a batch and more of them waiting, `expert_aware` needs at least 25 % fewer unique experts per batch
  than `first_in_first_out` on the mixed trace, and its mean and p95 latency are lower. **Where a batch holds everything that waits, policies
  have nothing to choose, and no gain is claimed for any that fills batches.**
* Falsifier. Fewer experts, but the 95 % interval of the paired difference in mean latency reaches zero; or starvation: a work waits longer
  than the bound of ageing.
* `oldest_leads` was found with this simulator on seeds 1 and 2, at four experts. So seeds 10 to 14 are reported, which nobody looked at.

Takes about 5 CPU-minutes.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from pathlib import Path

from moe_dmu_arms import keep_options
from moe_runtime_cells import COLORS, Row, cell, change, mean, panels, save_figure, write_rows

from upcycle3d.perception.moe.runtime.engine import EngineConfig
from upcycle3d.perception.moe.runtime.expert_cache import Belady
from upcycle3d.perception.moe.runtime.expert_memory import ExpertLayout
from upcycle3d.perception.moe.runtime.recorded_decisions import RecordedDecisions, read_decisions
from upcycle3d.perception.moe.runtime.requests import Work
from upcycle3d.perception.moe.runtime.scheduling import (
    BatchLimits,
    BatchPolicy,
    OpenBatch,
    decoding_first,
    expert_aware,
    first_in_first_out,
    oldest_leads,
    prefill_first,
    resident_first,
)
from upcycle3d.perception.moe.runtime.simulate import Simulation, StepCost, simulate
from upcycle3d.perception.moe.runtime.traces import TraceConfig, draw_trace
from upcycle3d.perception.moe.runtime.transfers import TransferCost
from upcycle3d.tools.console import print_table

LAYERS, EXPERT_BYTES, AGE, REQUESTS = 6, 90_000_000, 16, 100
LOADS = {"copied": (3.0, 10.0), "disk": (0.5, 3.0)}
"""Arrivals per second: what the machine can serve, and more than that."""
BOUNDS = {"8 works": 8, "no bound": None}
"""Largest number of works in a batch; its tokens are bounded by 256."""


def arrival_order(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """Requests in the order of their arrival: traces and servers number them so."""
    first_in_first_out(sorted(waiting, key=lambda work: int(work.request.id.removeprefix("cmpl-"))), batch)


def shortest_leads(waiting: Sequence[Work], batch: OpenBatch) -> None:
    """What a server cannot know decides who leads: the length of the answers."""
    oldest_leads(sorted(waiting, key=lambda work: work.request.new_tokens), batch)


POLICIES: tuple[BatchPolicy, ...] = (
    first_in_first_out,
    arrival_order,
    decoding_first,
    prefill_first,
    expert_aware,
    resident_first,
    oldest_leads,
    shortest_leads,
)


def arms(trace: str, seed: int, recorded: RecordedDecisions | None, step: StepCost, bandwidth: dict[str, float]) -> Iterator[Row]:
    """Serve one trace in every way."""
    experts = 7 if recorded is None else recorded.experts
    piece = EXPERT_BYTES // LAYERS
    for source, rates in LOADS.items():
        for rate in rates:
            shape = TraceConfig(requests=REQUESTS, rate=rate, experts=experts, prompt=(8, 48), new_tokens=(16, 64), seed=seed)
            arrivals = draw_trace(shape, recorded)
            for bound, works in BOUNDS.items():
                for policy in POLICIES:
                    engine = EngineConfig(
                        policy=policy,
                        limits=BatchLimits(works=works, age=AGE),
                        layout=ExpertLayout(experts=experts, layers=LAYERS),
                    )
                    setup = Simulation(
                        engine=engine,
                        piece_bytes=piece,
                        budget=piece * LAYERS * experts // 2,
                        eviction=Belady(),
                        transfer=TransferCost(bandwidth=bandwidth[source]),
                        step=step,
                    )
                    report = simulate(arrivals, setup)
                    memory, wait_bound = report.memory, report.wait_bound
                    assert report.served == REQUESTS
                    assert wait_bound is not None
                    yield {
                        "trace": trace,
                        "from": source,
                        "rate": rate,
                        "bound": bound,
                        "policy": policy.__name__,
                        "seed": seed,
                        "unique_experts": report.unique_experts,
                        "works_per_batch": report.works_per_batch,
                        "latency_mean_s": report.latency.mean,
                        "latency_p95_s": report.latency.p95,
                        "latency_per_token_mean_s": report.latency_per_token.mean,
                        "latency_per_token_p95_s": report.latency_per_token.p95,
                        "first_token_p95_s": report.first_token.p95,
                        "longest_wait_s": report.longest_wait,
                        "longest_wait_batches": report.longest_wait_batches,
                        "starved": int(report.longest_wait_batches > wait_bound),
                        "moved_mb": (memory.demand_bytes + memory.ahead_bytes) / 1e6,
                        "stall_share": report.stall_share,
                        "routed_share": report.routed_share,
                        "tokens_per_s": report.throughput,
                    }


def print_arms(rows: list[Row]) -> None:
    """Print each load as a table, and say what became of the direction."""
    plain: dict[str, str | int] = {"policy": "first_in_first_out"}
    for trace, source, rate, bound in dict.fromkeys(tuple(str(r[k]) for k in ("trace", "from", "rate", "bound")) for r in rows):
        lines = []
        for policy in POLICIES:
            arm: dict[str, str | int] = {
                "trace": trace,
                "from": source,
                "rate": float(rate),
                "bound": bound,
                "policy": policy.__name__,
            }  # type: ignore[dict-item]
            numbers = [mean(rows, arm, c) for c in ("unique_experts", "works_per_batch", "latency_mean_s", "latency_p95_s")]
            changes = [change(rows, arm, plain, c) for c in ("unique_experts", "latency_mean_s", "latency_p95_s")]
            waits = f"{mean(rows, arm, 'longest_wait_s'):.1f} s, {mean(rows, arm, 'longest_wait_batches'):.0f}"
            stall = f"{100 * mean(rows, arm, 'stall_share'):.0f}"
            lines.append((policy.__name__, *(f"{n:.2f}" for n in numbers), *changes, waits, stall))
        header = ("policy", "experts", "works", "mean s", "p95 s", "experts", "mean", "p95", "longest wait, batches", "stall %")
        print_table(f"{trace}, {source}, {rate} requests/s, {bound}; changes against first_in_first_out", header, lines)
    print(f"works that waited longer than the bound: {sum(int(row['starved']) for row in rows)} runs of {len(rows)}")


def draw(rows: list[Row], trace: str, path: Path) -> None:
    """Draw mean latency against first-in-first-out, for each load."""
    loads = [(source, rate, bound) for source, rates in LOADS.items() for rate in rates for bound in BOUNDS]
    figure, axes = panels(["at most 8 works in a batch", "everything that waits in a batch"], height=3.6)
    for axis, bound in zip(axes, BOUNDS):
        shown = [load for load in loads if load[2] == bound]
        for number, policy in enumerate(POLICIES[1:]):
            heights = []
            for source, rate, _ in shown:
                arm: dict[str, str | int] = {"trace": trace, "from": source, "rate": rate, "bound": bound}  # type: ignore[dict-item]
                own, plain = (mean(rows, {**arm, "policy": p.__name__}, "latency_mean_s") for p in (policy, first_in_first_out))
                heights.append(100 * (own / plain - 1))
            places = [place + 0.12 * (number - 3) for place in range(len(shown))]
            axis.bar(places, heights, width=0.11, color=COLORS[number], label=policy.__name__)
        axis.set_xticks(range(len(shown)), [f"{source}\n{rate:g}/s" for source, rate, _ in shown])
        axis.axhline(0, color="#1B2228", linewidth=0.8)
    axes[0].set_ylabel("mean latency against\nfirst_in_first_out, %", fontsize=9)
    axes[1].legend(fontsize=7, frameon=False, loc="lower left")
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--csv", type=Path, help="folder of the table; OUT by default")
    parser.add_argument("--figure", type=Path, help="also draw the mean latency on the mixed trace into this PNG file")
    parser.add_argument("--recorded", type=Path, nargs="*", default=[], help="files of decisions, each one more trace")
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument(
        "--step",
        type=float,
        nargs=4,
        default=[0.03, 5e-4, 0.01, 3e-4],
        help="seconds per batch, token, unique expert, routed token",
    )
    parser.add_argument("--bandwidth", type=float, nargs=2, default=[4e9, 0.5e9], help="bytes per second: copied, from the disk")
    arguments = parser.parse_args()
    folder = arguments.out / "batching"
    folder.mkdir(parents=True, exist_ok=True)
    keep_options(folder, {"step": arguments.step, "bandwidth": arguments.bandwidth})
    batch, token, expert, routed = arguments.step
    step = StepCost(batch=batch, token=token, expert=expert, routed_token=routed)
    bandwidth = dict(zip(LOADS, arguments.bandwidth))
    traces = {"mixed": None, **{path.stem: read_decisions(path) for path in arguments.recorded}}
    rows: list[Row] = []
    for trace, recorded in traces.items():
        for seed in arguments.seeds:
            rows += cell(
                folder,
                f"{trace} {seed}",
                lambda t=trace, s=seed, r=recorded: arms(t, s, r, step, bandwidth),  # type: ignore[misc]
            )
    write_rows((arguments.csv or arguments.out) / "batching.csv", rows)
    print_arms(rows)
    if arguments.figure:
        draw(rows, "mixed", arguments.figure)


if __name__ == "__main__":
    main()
