"""Which cache and which look-ahead bring something? Hit ratios, bytes, stalls and latency of experts in simulated time (M6).

    python benchmarks/studies/moe_runtime_cache.py --out runs/moe_runtime --csv docs/experiments/moe_runtime

Three traces: uniform accesses to 6 experts, and sticky ones to 7, which repeat the last expert with probability 0.7 or 0.95. Five seeds.

* *Hits*: 20,000 single accesses through the cache, room for 2 to 5 experts, the whole trace known ahead.
* *Stalls*: 600 frames in a Poisson process through the whole runtime, one frame per batch, room for 3 experts, with and without fetching
  ahead. Only what waits in the queue is known ahead. A frame takes 6.2 ms and moving an expert 5.1 ms; both are assumed, not measured.

Written before the run:

* Direction. On the uniform trace LRU equals Random, and Belady is above both; one to four accesses of look-ahead bring most of it. On
  sticky traces **LRU is near the optimum already, and no gain of Belady is claimed there.** Fetching ahead hides part of each stall.
* Falsifier. Belady with the whole trace known is below any other rule on any trace: then the program is wrong, because that is a theorem.
  Fetching ahead moves more bytes without a lower latency: then it is useless.

The hit ratios are compared with those that another program, which is not in this repository, gave for the same kinds of traces (`KNOWN`).
Takes about a CPU-minute.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

from moe_dmu_arms import keep_options
from moe_runtime_cells import COLORS, Row, cell, change, mean, panels, save_figure, write_rows

from upcycle3d.perception.moe.runtime.engine import EngineConfig
from upcycle3d.perception.moe.runtime.expert_cache import Belady, Eviction, Lfu, Lru, RandomVictim, replay
from upcycle3d.perception.moe.runtime.expert_memory import ExpertLayout
from upcycle3d.perception.moe.runtime.recorded_decisions import DecisionSource, RecordedDecisions
from upcycle3d.perception.moe.runtime.scheduling import BatchLimits, first_in_first_out
from upcycle3d.perception.moe.runtime.simulate import Simulation, StepCost, simulate
from upcycle3d.perception.moe.runtime.traces import TraceConfig, draw_trace, sticky_accesses
from upcycle3d.perception.moe.runtime.transfers import TransferCost
from upcycle3d.tools.console import print_table

TRACES = {"uniform": (6, 0.0), "sticky 0.7": (7, 0.7), "sticky 0.95": (7, 0.95)}
"""Number of experts, and probability of a repetition."""
CAPACITIES = (2, 3, 4, 5)
LOOK_AHEAD = (1, 2, 4, 8)
KNOWN = {
    ("uniform", 2): {"random": 33.4, "lru": 33.3, "belady 1": 42.8, "belady 2": 47.3, "belady 4": 49.7, "belady full": 49.9},
    ("uniform", 3): {"random": 50.1, "lru": 50.0, "belady 1": 57.2, "belady 2": 62.7, "belady 4": 67.7, "belady full": 69.3},
    ("uniform", 4): {"random": 66.5, "lru": 66.9, "belady 1": 71.7, "belady 2": 75.2, "belady 4": 79.8, "belady full": 82.8},
    ("uniform", 5): {"random": 83.4, "lru": 83.4, "belady 1": 85.6, "belady 2": 87.5, "belady 4": 89.9, "belady full": 92.7},
    ("sticky 0.7", 2): {"random": 78.8, "lru": 79.0, "belady 1": 79.8, "belady 2": 80.6, "belady 4": 81.7, "belady full": 83.9},
    ("sticky 0.7", 5): {"random": 91.7, "lru": 91.8, "belady 1": 92.1, "belady 2": 92.4, "belady 4": 92.9, "belady full": 96.1},
    ("sticky 0.95", 2): {"random": 96.4, "lru": 96.4, "belady 1": 96.4, "belady 2": 96.4, "belady 4": 96.5, "belady full": 97.2},
    ("sticky 0.95", 5): {"random": 98.5, "lru": 98.5, "belady 1": 98.5, "belady 2": 98.5, "belady 4": 98.5, "belady full": 99.3},
}
"""Hit ratios in percent of the other program."""
EXPERT_BYTES, ROOM = 10_000_000, 3


def rules(seed: int) -> dict[str, Eviction]:
    """Rules of the cache by name."""
    belady = {f"belady {n}": Belady(look_ahead=n) for n in LOOK_AHEAD}
    return {"random": RandomVictim(seed=seed), "lru": Lru(), "lfu": Lfu(), **belady}


def hits(trace: str, seed: int) -> Iterator[Row]:
    """Hit ratios of single accesses."""
    experts, repeat = TRACES[trace]
    accesses = sticky_accesses(20_000, experts=experts, repeat=repeat, seed=seed)
    arms = [(c, name, rule) for c in CAPACITIES for name, rule in {**rules(seed), "belady full": Belady()}.items()]
    arms += [(1, "on demand", Lru()), (experts, "all resident", Lru())]
    for capacity, name, rule in arms:
        counts = replay(accesses, budget=capacity, eviction=rule)
        yield {
            "trace": trace,
            "capacity": capacity,
            "cache": name,
            "seed": seed,
            "hit_ratio": counts.hit_ratio,
            "moved_mb": counts.bytes_moved * EXPERT_BYTES / 1e6,
        }


def stalls(trace: str, seed: int, frames: int) -> Iterator[Row]:
    """What the whole runtime makes of it."""
    experts, repeat = TRACES[trace]
    source = DecisionSource(name=trace, experts=sticky_accesses(frames, experts=experts, repeat=repeat, seed=seed))
    config = TraceConfig(requests=frames, rate=90.0, experts=experts, frames=1.0, seed=seed)
    arrivals = draw_trace(config, RecordedDecisions(experts=experts, sources=(source,)))
    arms = [(ROOM, name, rule) for name, rule in {**rules(seed), "belady 16": Belady(look_ahead=16)}.items()]
    arms += [(1, "on demand", Lru()), (experts, "all resident", Lru())]
    for room, name, rule in arms:
        for ahead in (True, False):
            foreseen = rule.look_ahead if isinstance(rule, Belady) and rule.look_ahead else 1
            engine = EngineConfig(
                policy=first_in_first_out,
                limits=BatchLimits(works=1),
                layout=ExpertLayout(experts=experts),
                foreseen=foreseen,
            )
            setup = Simulation(
                engine=engine,
                piece_bytes=EXPERT_BYTES,
                budget=room * EXPERT_BYTES,
                eviction=rule,
                fetch_ahead=ahead,
                transfer=TransferCost(),
                step=StepCost(),
                most_requests=frames,
            )
            report = simulate(arrivals, setup)
            memory = report.memory
            yield {
                "trace": trace,
                "cache": name,
                "fetched_ahead": int(ahead),
                "seed": seed,
                "hit_ratio": memory.hit_ratio,
                "moved_mb": (memory.demand_bytes + memory.ahead_bytes) / 1e6,
                "useless_mb": memory.useless_bytes / 1e6,
                "stall_ms_per_frame": 1000 * report.times.stall / frames,
                "latency_mean_ms": 1000 * report.latency.mean,
                "latency_p95_ms": 1000 * report.latency.p95,
            }


def print_hits(rows: list[Row]) -> None:
    """Print hit ratios, their largest distance from the other program's, and whether the theorem holds."""
    names = list(dict.fromkeys(str(row["cache"]) for row in rows if row["cache"] not in ("on demand", "all resident")))
    lines = []
    for trace in TRACES:
        for capacity in CAPACITIES:
            values = [mean(rows, {"trace": trace, "capacity": capacity, "cache": name}, "hit_ratio") for name in names]
            lines.append((trace, capacity, *(f"{100 * value:.1f}" for value in values)))
    print_table("hit ratio in %, mean over the seeds", ("trace", "room", *names), lines)
    far = max(
        abs(100 * mean(rows, {"trace": trace, "capacity": capacity, "cache": name}, "hit_ratio") - known)
        for (trace, capacity), values in KNOWN.items()
        for name, known in values.items()
    )
    print(f"largest distance from the other program: {far:.2f} points")
    best = [
        row["hit_ratio"] >= max(float(o["hit_ratio"]) for o in rows if all(o[k] == row[k] for k in ("trace", "capacity", "seed")))
        for row in rows
        if row["cache"] == "belady full"
    ]
    print(f"Belady with the whole trace known is best in {sum(best)} of {len(best)} cases (all of them, or the program is wrong)")


def print_stalls(rows: list[Row]) -> None:
    """Print what a hit ratio does not say."""
    lines = []
    for trace, name in dict.fromkeys((str(row["trace"]), str(row["cache"])) for row in rows):
        for ahead in (1, 0):
            arm: dict[str, str | int] = {"trace": trace, "cache": name, "fetched_ahead": ahead}
            numbers = [mean(rows, arm, c) for c in ("moved_mb", "useless_mb", "stall_ms_per_frame", "latency_p95_ms")]
            against = change(rows, arm, {"fetched_ahead": 0}, "latency_p95_ms") if ahead else "-"
            lines.append((trace, name, "yes" if ahead else "no", *(f"{n:.2f}" for n in numbers), against))
    header = ("trace", "cache", "ahead", "MB", "useless", "stall ms", "p95 ms", "p95 against not ahead")
    print_table(f"room for {ROOM} experts", header, lines)


def draw(rows: list[Row], path: Path) -> None:
    """Draw hit ratios over the room."""
    figure, axes = panels([f"{trace}, {experts} experts" for trace, (experts, _) in TRACES.items()])
    shown = ("random", "lru", "lfu", "belady 1", "belady 4", "belady full")
    for axis, trace in zip(axes, TRACES):
        for number, name in enumerate(shown):
            y = [100 * mean(rows, {"trace": trace, "capacity": c, "cache": name}, "hit_ratio") for c in CAPACITIES]
            axis.plot(CAPACITIES, y, color=COLORS[number], marker="osD^vx"[number], markersize=4, linewidth=1.2, label=name)
        axis.set_xticks(CAPACITIES)
        axis.set_xlabel("experts in memory", fontsize=9)
    axes[0].set_ylabel("hit ratio in %", fontsize=9)
    axes[0].legend(fontsize=8, frameon=False)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the cells")
    parser.add_argument("--csv", type=Path, help="folder of the tables; OUT by default")
    parser.add_argument("--figure", type=Path, help="also draw the hit ratios into this PNG file")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--frames", type=int, default=600)
    arguments = parser.parse_args()
    folder = arguments.out / "cache"
    folder.mkdir(parents=True, exist_ok=True)
    keep_options(folder, {"frames": arguments.frames})
    hit_rows: list[Row] = []
    stall_rows: list[Row] = []
    for trace in TRACES:
        for seed in arguments.seeds:
            hit_rows += cell(folder, f"hits {trace} {seed}", lambda t=trace, s=seed: hits(t, s))  # type: ignore[misc]
            stall_rows += cell(folder, f"stalls {trace} {seed}", lambda t=trace, s=seed: stalls(t, s, arguments.frames))  # type: ignore[misc]
    tables = arguments.csv or arguments.out
    write_rows(tables / "cache_hits.csv", hit_rows)
    write_rows(tables / "cache_stalls.csv", stall_rows)
    print_hits(hit_rows)
    print_stalls(stall_rows)
    if arguments.figure:
        draw(hit_rows, arguments.figure)


if __name__ == "__main__":
    main()
