"""Does a detector carved by driving context pay on a vehicle? Read-ME against pooled pruning and the dense detector, on simulated drives.

    python benchmarks/studies/moe_drive.py --out runs/moe_drive --seeds 0 1 2 3 4 --csv docs/experiments/moe_drive/results.csv

Three contexts with one mounting height: a clear city, a small town with other cars and a quarter of the beams, and a suburb in rain and fog
(`moe_domain_bench.py`). A small SECOND-IoU is trained on all of them; every arm starts from it and gets the same steps of recovery on labels
of all contexts, with a frozen encoder. Arms, at several shares of the decoder's channels:

    dense           all channels
    pooled_R        one set of channels for all contexts: the baseline to beat
    readme_R        the most active channels of each context; scored with the true context (oracle), the one that the gate finds in each
                    scan alone (predicted), the mean over the wrong ones (wrong), and the worst of them (worst: chosen afterwards, so it
                    is too low by chance)
    random_50       drawn channels of each context, with the true context

On drives (streets of 8 frames, contexts change 13 times) the gate decides with hysteresis (3 frames in a row), with a margin at which one
frame is enough, or without. The vehicle's runtime replays a drive within a memory budget of 1, 2 or 3 contexts. Main number: Car 3D AP at
an IoU of 0.5 (R40, ST3D's rules).

Expected, written before the first run:
 1. At equal width and equal recovery, readme with the true context is above pooled pruning, and below dense. Falsified if the paired 95 %
    interval of readme_50 - pooled_50 over seeds reaches 0.
 2. The predicted context costs less than 1 AP against the true one, and a wrong one costs more than 1 AP. Falsified if the paired interval
    of oracle - wrong reaches 0: then contexts do not matter.
 3. AP in the 3 frames after a switch is below that of the other frames with hysteresis, and not without it; without it there are more
    switches. Falsified if hysteresis does not lower the number of switches.
 4. Two contexts of ratio 0.5 in memory take fewer bytes than the dense detector, and with them only the first frame waits. Falsified if
    there is a stall at every switch.
No gain of a better cache rule than LRU is claimed: frames repeat their context, and a vehicle cannot see future frames.

Results are stored one by one, so the command can be stopped and given again. `--quick` is a run of a few minutes that checks the program; its
numbers mean nothing. Times of frames are valid on an idle machine only.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from functools import partial
from itertools import pairwise
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch
from moe_domain_bench import Bench
from moe_drive_bench import (
    CONTEXTS,
    RULES,
    DriveArms,
    DrivePlan,
    arm_name,
    chosen,
    cpu_seconds,
    report_json,
    scores,
    some,
)
from paired import half_width

from upcycle3d.core.config_json import Json
from upcycle3d.perception.moe.runtime.recorded_decisions import DecisionSource, RecordedDecisions, write_decisions
from upcycle3d.perception.recipes.result_cache import ResultCache
from upcycle3d.perception.recipes.result_csv import RESULTS_FILE, CsvRow, publish
from upcycle3d.tools.console import print_table

MAIN = "Car 3D 0.5"
DECISIONS_FILE = "decisions.json"
DECIDED = ("oracle", "predicted", "wrong", "worst")
"""Contexts with which Read-ME is scored."""
QUICK = {
    "train": 6,
    "validation": 4,
    "base_steps": 3,
    "recover_steps": 2,
    "measured": 3,
    "segments": 4,
    "segment": 4,
    "replayed": 10,
}
CPU_SECONDS = 650
"""CPU seconds of one seed, extrapolated from a quick run: 0.21 s per training step, 0.08 s per frame that is scored or driven, 0.12 s per simulated frame."""


# ---- cells


def fixed_arm(method: str, ratio: float, arms: DriveArms) -> Json:
    """An arm with one detector for all contexts, or with the true context for each frame."""
    began = time.process_time()
    detectors = [arms.trained(method, ratio).detector] if method in ("dense", "pooled") else arms.narrow(method, ratio)
    ap = {}
    for number, context in enumerate(CONTEXTS):
        frames = arms.bench.split(context, "val").open()
        ap[context] = scores(arms.tables([detectors[number % len(detectors)]], frames)[0])
    size = sum(t.nbytes for t in detectors[0].state_dict().values())
    return {"oracle": ap, "bytes": size, "cpu": cpu_seconds(began)}


def readme_arm(ratio: float, arms: DriveArms) -> Json:
    """Read-ME with the true, the predicted and the worst context."""
    began = time.process_time()
    detectors, carving = arms.narrow("readme", ratio), arms.carving("readme", ratio)
    found: dict[str, Json] = {"oracle": {}, "predicted": {}, "wrong": {}, "worst": {}, "gate": {}}
    for number, context in enumerate(CONTEXTS):
        frames = arms.bench.split(context, "val").open()
        tables = arms.tables(detectors, frames)
        best = [arms.best(frames[i].points) for i in range(len(frames))]
        each = [scores(table) for table in tables]
        wrong = [one for i, one in enumerate(each) if i != number]
        found["oracle"][context] = each[number]
        found["predicted"][context] = scores(chosen(tables, best))
        found["wrong"][context] = {name: statistics.fmean(one.get(name, 0.0) for one in wrong) for name in each[number]}
        found["worst"][context] = min(wrong, key=lambda one: one.get(MAIN, 0.0))
        found["gate"][context] = best.count(number) / len(best)
    whole = detectors[0].state_dict()
    changing = {f"decoder.{n}" for site in carving.sites for n in site.tensors}
    own = sum(t.nbytes for name, t in whole.items() if name in changing)
    common = sum(t.nbytes for t in whole.values()) - own
    shares = {"shared": carving.shared_share, "used": carving.union_share}
    return {**found, **shares, "bytes": common + own, "context bytes": own, "cpu": cpu_seconds(began)}


def drive_arm(arms: DriveArms) -> Json:
    """AP on a drive, after switches and elsewhere, of every way to decide."""
    drive, ratio = arms.drive, arms.plan.main
    near = drive.after_switch(arms.plan.after)
    tables = arms.tables(arms.narrow("readme", ratio), drive)
    ways = {
        "oracle": drive.contexts,
        "wrong": tuple((c + 1) % len(CONTEXTS) for c in drive.contexts),
        **{name: arms.decisions(drive, rule) for name, rule in RULES.items()},
    }
    found = {name: chosen(tables, decisions) for name, decisions in ways.items()}
    for method in ("dense", "pooled"):
        found[method] = arms.tables([arms.trained(method, 1.0 if method == "dense" else ratio).detector], drive)[0]
    told: dict[str, Json] = {"contexts": list(drive.contexts), "ways": {}, "decisions": {n: list(d) for n, d in ways.items()}}
    for name, one in found.items():
        decisions = ways.get(name)
        told["ways"][name] = {
            "all": scores(one).get(MAIN),
            "after": scores(some(one, near)).get(MAIN),
            "steady": scores(some(one, [not n for n in near])).get(MAIN),
            "switches": None if decisions is None else sum(a != b for a, b in pairwise(decisions)),
            "right": None if decisions is None else sum(map(int.__eq__, decisions, drive.contexts)) / len(drive),
        }
    return told


def runtime_arm(arms: DriveArms) -> Json:
    """What a drive costs on the vehicle, within several budgets."""
    count = len(CONTEXTS)
    runs: dict[str, Callable[[], Json]] = {
        "all_resident": lambda: report_json(arms.replay(count, all_resident=True)),
        "budget_2": lambda: report_json(arms.replay(2)),
        "budget_1": lambda: report_json(arms.replay(1)),
        "no_prefetch": lambda: report_json(arms.replay(2, fetch_ahead=False)),
        "no_hysteresis": lambda: report_json(arms.replay(2, hysteresis=RULES["no_hysteresis"])),
        "margin": lambda: report_json(arms.replay(2, hysteresis=RULES["margin"])),
        "oracle": lambda: report_json(arms.replay(2, shift=0)),
        "wrong": lambda: report_json(arms.replay(2, shift=1)),
        "pooled": lambda: report_json(arms.replay_plain(arms.trained("pooled", arms.plan.main).detector)),
        "dense": lambda: report_json(arms.replay_plain(arms.trained("dense").detector)),
    }
    return {name: run() for name, run in runs.items()}


def cells(plan: DrivePlan) -> dict[str, Callable[[DriveArms], Json]]:
    """Every result of one seed by its name, in the order in which they are made."""
    found: dict[str, Callable[[DriveArms], Json]] = {"dense": partial(fixed_arm, "dense", 1.0)}
    for ratio in plan.ratios:
        found[arm_name("pooled", ratio)] = partial(fixed_arm, "pooled", ratio)
        found[arm_name("readme", ratio)] = partial(readme_arm, ratio)
    found[arm_name("random", plan.main)] = partial(fixed_arm, "random", plan.main)
    return {**found, "drive": drive_arm, "runtime": runtime_arm}


# ---- the published table


def rows_of(name: str, seed: int, result: Json) -> Iterable[CsvRow]:
    """Rows of the published table: one per context of an arm, per way to decide, or per arm of the runtime."""
    if name == "drive":
        for way, told in result["ways"].items():
            yield {"arm": f"drive_{way}", "seed": seed, **told}
        return
    if name == "runtime":
        for arm, told in result.items():
            memory = told["memory"] or {}
            yield {
                "arm": f"runtime_{arm}",
                "seed": seed,
                "resident_bytes": told["resident_bytes"],
                "frame_mean": told["frame"]["mean"],
                "frame_p95": told["frame"]["p95"],
                "gate_mean": told["gate"]["mean"],
                "stalled": told["stalled"],
                "switch_stall_mean": told["switch_stall"].get("mean"),
                "demand_bytes": memory.get("demand_bytes"),
                "ahead_bytes": memory.get("ahead_bytes"),
            }
        return
    for decided in DECIDED:
        for context, found in result.get(decided, {}).items():
            gate = result.get("gate", {}).get(context)
            yield {
                "arm": name, "seed": seed, "decided": decided, "context": context, **found, "bytes": result["bytes"],
                "context_bytes": result.get("context bytes"), "gate": gate, "cpu": result["cpu"],
            }  # fmt: skip


def write_trace(path: Path, found: dict[int, Json]) -> None:
    """Write the decisions of the gate with hysteresis on all drives as a file that `upcycle3d moe simulate --recorded` reads."""
    sources = tuple(
        DecisionSource(name=f"drive {seed}", experts=tuple(told["decisions"]["hysteresis"]))
        for seed, told in sorted(found.items())
    )
    if sources:
        write_decisions(path, RecordedDecisions(experts=len(CONTEXTS), sources=sources))


# ---- the report


def main_ap(result: Json, decided: str = "oracle") -> float:
    """Mean over the contexts of the main number."""
    return statistics.fmean(result[decided][c].get(MAIN, 0.0) for c in CONTEXTS)


def said(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return (
        f"{statistics.fmean(values):.2f}" + (f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else "") if values else "-"
    )


def verdicts(found: dict[str, dict[int, Json]], main: float) -> list[str]:
    """What was found against the expectations, one line each; nothing where results are missing."""
    readme, pooled = found.get(arm_name("readme", main), {}), found.get(arm_name("pooled", main), {})
    dense, drives, runtime = found.get("dense", {}), found.get("drive", {}), found.get("runtime", {})
    lines = []

    def paired(claim: str, values: Sequence[float], *, above: float = 0.0, falsifies: bool = False) -> None:
        if len(values) == 1:
            lines.append(f"{claim}: {said(values)}; one seed has no interval")
        elif values:
            half = half_width(values)
            verdict = "shown" if statistics.fmean(values) - half > above else "FALSIFIED" if falsifies else "not shown"
            lines.append(f"{claim}: {said(values)} (95 % half width {half:.2f}; must be above {above:g}): {verdict}")

    both = sorted(set(readme) & set(pooled))
    paired("1. own channels above pooled pruning, AP", [main_ap(readme[s]) - main_ap(pooled[s]) for s in both], falsifies=True)
    paired("1. dense above own channels, AP", [main_ap(dense[s]) - main_ap(readme[s]) for s in sorted(set(readme) & set(dense))])
    paired("2. the gate loses less than 1 AP, 1 - loss", [1 - main_ap(r) + main_ap(r, "predicted") for r in readme.values()])
    losses = [main_ap(r) - main_ap(r, "wrong") for r in readme.values()]
    paired("2. a wrong context costs AP, loss", losses, falsifies=True)
    paired("2. a wrong context costs more than 1 AP, loss", losses, above=1.0)
    ways = [told["ways"] for told in drives.values()]
    saved = [w["no_hysteresis"]["switches"] - w["hysteresis"]["switches"] for w in ways]
    paired("3. hysteresis saves switches", saved, falsifies=True)
    paired(
        "3. AP after a switch is lower with hysteresis",
        [(w["oracle"]["after"] or 0) - (w["hysteresis"]["after"] or 0) for w in ways],
    )
    runs = list(runtime.values())
    paired(
        "4. two contexts are smaller than dense, MB",
        [(r["dense"]["resident_bytes"] - r["budget_2"]["resident_bytes"]) / 1e6 for r in runs],
    )
    waits = [r["no_prefetch"]["stalled"] - r["budget_2"]["stalled"] for r in runs]
    paired("4. fetching ahead saves waiting frames", waits, falsifies=True)
    return lines


def report(cache: ResultCache, plan: DrivePlan) -> None:
    """Print the tables and the verdicts."""
    found: dict[str, dict[int, Json]] = {}
    for (name, seed), stored in cache.stored().items():
        found.setdefault(name, {})[seed] = stored["result"]
    rows = []
    for name, results in found.items():
        if name in ("drive", "runtime"):
            continue
        for decided in DECIDED:
            told = [r for r in results.values() if r.get(decided)]
            if told:
                cells_ = [said([r[decided][c].get(MAIN, 0.0) for r in told]) for c in CONTEXTS]
                rows.append((name, decided, said([main_ap(r, decided) for r in told]), *cells_, f"{told[0]['bytes'] / 1e6:.2f}"))
    print_table(f"{MAIN} on validation frames", ("arm", "context", "mean", *CONTEXTS, "MB"), rows)
    ways = [told["ways"] for told in found.get("drive", {}).values()]
    columns = ("all", "after", "steady", "switches", "right")
    rows = [
        (way, *(said([w[way][c] for w in ways if w[way][c] is not None]) for c in columns)) for way in (ways[0] if ways else ())
    ]
    print_table(f"{MAIN} on drives, in all frames, those after a switch and the others", ("decided by", *columns), rows)
    runs = list(found.get("runtime", {}).values())
    rows = []
    for arm in runs[0] if runs else ():
        own = [r[arm] for r in runs]
        stalls = [1000 * r["switch_stall"]["mean"] for r in own if r["switch_stall"]["count"]]
        moved = [((r["memory"] or {}).get("demand_bytes", 0) + (r["memory"] or {}).get("ahead_bytes", 0)) / 1e6 for r in own]
        numbers = (
            [r["resident_bytes"] / 1e6 for r in own],
            [1000 * r["frame"]["p95"] for r in own],
            [r["stalled"] for r in own],
            stalls,
            moved,
        )
        rows.append((arm, *(said(one) for one in numbers)))
    header = ("arm", "resident MB", "p95 ms", "frames that waited", "stall of a switch, ms", "moved MB")
    print_table(f"the vehicle, {plan.replayed} frames", header, rows)
    print("\n".join(verdicts(found, plan.main)))


def main() -> None:
    """Run what is missing, publish, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument(
        "--csv", type=Path, help=f"the published table; its name is {RESULTS_FILE}, and the trace of decisions lies beside it"
    )
    parser.add_argument("--quick", action="store_true", help="a few steps and frames, to check the program")
    options = parser.parse_args()
    published = options.csv or options.out / "published" / RESULTS_FILE
    if published.name != RESULTS_FILE:
        parser.error(f"--csv must be a file with the name {RESULTS_FILE}, found {published.name}")
    torch.set_num_threads(1)
    plan = DrivePlan(**(QUICK if options.quick else {}))
    print(f"about {CPU_SECONDS / 60:.0f} CPU minutes of one thread per seed in a full run", flush=True)
    cache = ResultCache(options.out / "results", {"plan": asdict(plan), "contexts": list(CONTEXTS)})
    for seed in options.seeds:
        if all(cache.has(name, seed) for name in cells(plan)):
            continue
        arms = DriveArms(Bench(options.out, plan, seed), plan)
        for name, make in cells(plan).items():
            began = time.process_time()
            cache.read_or_make(name, seed, partial(make, arms))
            print(f"seed {seed} {name}: {cpu_seconds(began):.0f} CPU s now", flush=True)
            publish(published.parent, cache, rows_of)
    stored = {seed: told["result"] for (name, seed), told in cache.stored().items() if name == "drive"}
    publish(published.parent, cache, rows_of)
    write_trace(published.parent / DECISIONS_FILE, stored)
    report(cache, plan)


if __name__ == "__main__":
    main()
