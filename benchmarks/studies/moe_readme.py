"""Read-ME's quality: experts carved out of one dense model, against pruning, other carvings, other routers and the dense model.

    python benchmarks/studies/moe_readme.py --out runs/moe_readme --csv docs/experiments/moe_readme/results.csv
    python benchmarks/studies/moe_readme.py --model tiny --out runs/moe_readme_tiny --csv docs/experiments/moe_readme_tiny/results.csv

`--model smollm2` carves all 30 FFNs of SmolLM2-135M for scripture, code, law and formal mathematics (it needs `transformers`, `gguf` and
`accelerate`; weights and texts come by `moe_assets.py`). `--model tiny` trains a decoder of bytes first and carves that: the mechanism in
minutes. Five seeds decide calibration rows, random units, clusters, routers and batches; for `tiny` the dense model, too. SmolLM2's test
rows are the same for all seeds, so its interval over the seeds says nothing of other texts.

Part (a), ratios 0.25, 0.5, 0.75 and 0.9 without training, decisions by the true domain where there are any:

    own            each domain's most active units (Read-ME)
    pooled         the most active units of all domains together: static pruning, the honest baseline
    wrong          those of Read-ME, each domain with another one's
    random         drawn units
    found          Read-ME on domains that are found by clustering; a test row has the cluster that its own activity resembles most
    shared_routed  as in CMoE: shared units, and groups of units that an analytic router of each layer chooses per token
    overlap        at 0.5: Read-ME where each token has the expert that shares most of its own top units: what the pre-gate learns to guess

Part (b), ratio 0.5, each with the same optimizer, steps, tokens and rates; embedding and output stay frozen:

    dense, pooled, random       the dense model, the pruned one, and random units with the true domain
    oracle                      Read-ME with the true domain: no router
    readme                      Read-ME: pre-gate and experts train in turn, two rounds; the pre-gate learns from the current model
    readme_once                 the same phases with the same rates, but those of the router first: no alternation
    context_free                as `readme`, with a pre-gate that sees the current token only
    layer_wise                  as `readme`, with a linear router in each layer
    pooled_seconds              `pooled` with as many steps as fit into all CPU seconds of `readme`, its router's included

Pooled pruning trains in its narrow form, which is cheaper than the masks of the others: that is its advantage in reality, too.

Part (c), from the arms of (b) that have routers: accuracy by position in the row; the cost of a switch in the middle of a row; the share of
tokens that keep the expert of the token before; mutual information of the decisions of adjacent layers; unique, active and stored parameters.

Written down before the run:

* Direction. Without training own < pooled < wrong < random in perplexity at every ratio, with `own` about a tenth below `pooled` at 0.5
  (a first look: 60.6, 70.0, 169.7; dense 21.5), `found` near `own`, and the gap closing towards ratio 0.9. After training `readme` lies
  between `dense` and `pooled`, near `oracle`; `context_free` is worse; alternation gains little. A pre-gate keeps its expert far more often
  than routers of layers do (71 % against 21 % in the paper, against another model), and adjacent layers say much the same.
* Falsifier. After training `pooled` ties `readme`: the 95 % interval of the paired difference of the mean loss over five seeds reaches
  zero. Then domains are not worth a router.
* Required. `readme` is strictly between `pooled` and the parent: both intervals of the paired differences exclude zero.
* Also reported. The same against `pooled_seconds`, which may undo the gain at equal compute.

The rates of SmolLM2 are from a first look at one seed and a few test rows: after 10 steps pooled pruning had 51.5, 48.2 and 59.3 at 1e-4,
3e-4 and 1e-3, and of the router's rates from 5e-4 to 1e-2 the largest learned most in 40 steps.

Every result is a file that appears when it is done, so the command can be stopped and given again. The CSV has one number per line. All
CPU seconds of a training are counted, by phase. `--estimate` measures one step of each arm and prints what the study will cost; `--quick`
checks the program in a minute (tiny) or some (smollm2), and its numbers mean nothing.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch
from moe_assets import default_cache
from moe_readme_arms import RATIO, RATIOS, ROUTED, TRAINED, UNTRAINED, Bench, alternating, oracle
from moe_readme_reading import Reader, decision_measures, mean_losses, read_tests, splice_measures
from moe_readme_tasks import ModelName, Sizes, task_of, text_digests
from paired import half_width

from upcycle3d.core.config_json import Json
from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.carving.units import Carving
from upcycle3d.perception.recipes.result_cache import ResultCache
from upcycle3d.perception.recipes.result_csv import CsvRow, read_rows, write_rows
from upcycle3d.tools.console import print_table

FULL: dict[ModelName, Sizes] = {
    "smollm2": Sizes(
        calibration=16, length=256, tests=5, batch=4, train_length=128, rounds=2, router_steps=15, expert_steps=10,
        router_lr=1e-2, expert_lr=3e-4, gate_width=128, parent_steps=0,
    ),
    "tiny": Sizes(
        calibration=16, length=128, tests=32, batch=8, train_length=128, rounds=2, router_steps=40, expert_steps=40,
        router_lr=5e-3, expert_lr=1e-3, gate_width=32, parent_steps=1200,
    ),
}  # fmt: skip
QUICK: dict[ModelName, Sizes] = {
    "smollm2": replace(FULL["smollm2"], calibration=2, length=64, tests=2, train_length=32, router_steps=1, expert_steps=1),
    "tiny": replace(FULL["tiny"], calibration=2, length=32, tests=2, router_steps=2, expert_steps=2, parent_steps=5),
}
DECISIONS = ("accuracy", "kept", "entropy", "adjacent_information")
OVERLAP_ARM = f"overlap-{round(100 * RATIO)}"
ARMS = (
    "dense",
    OVERLAP_ARM,
    *(f"{name}-{round(100 * ratio)}" for ratio in RATIOS for name in UNTRAINED),
    *(f"tuned-{n}" for n in TRAINED),
)


class Study:
    """The arms of one seed."""

    def __init__(self, bench: Bench, cache: ResultCache) -> None:
        self.bench, self.cache = bench, cache

    def measure(self, arm: str) -> Json:
        """Make an arm and measure it."""
        bench, task = self.bench, self.bench.task
        if arm == "dense":
            losses = mean_losses(read_tests(Reader(model=task.dense), task.tests, task.precision))
            return {"loss": self._named(losses)}
        name, _, ratio = arm.rpartition("-")
        if name == "tuned":
            return self._trained(ratio)
        start = time.process_time()
        reader, carving = bench.untrained(name, int(ratio) / 100)
        made = time.process_time() - start
        truth = bench.test_clusters if name == "found" else None
        readings = read_tests(reader, task.tests, task.precision, truth)
        found = {"loss": self._named(mean_losses(readings)), "cpu": {"making": made}, "parameters": parameters(carving)}
        return found | ({"decisions": decision_measures(readings, carving.experts)} if arm == OVERLAP_ARM else {})

    def _named(self, losses: Sequence[float]) -> dict[str, float]:
        return dict(zip(self.bench.task.domains, losses, strict=True))

    def _trained(self, name: str) -> Json:
        bench, task = self.bench, self.bench.task
        training = alternating(bench.sizes, task.precision, bench.seed)
        if name == "readme_once":
            training = training.once()
        elif name == "pooled_seconds":
            training = replace(training, expert_steps=self._equal_steps())
        arm = bench.trained(name, training)
        readings = read_tests(arm.reader, task.tests, task.precision)
        experts = len(task.domains)
        found: dict[str, Json] = {
            "loss": self._named(mean_losses(readings)),
            "cpu": {kind: arm.seconds(kind) for kind in ("router", "experts")},
            "steps": {
                kind: sum(p.phase.steps for p in arm.record.phases if p.phase.kind == kind) for kind in ("router", "experts")
            },
            "trained_loss": {f"{p.phase.kind} {p.phase.round}": p.losses[-1] for p in arm.record.phases},
        }
        if arm.carving is not None:
            found["parameters"] = parameters(arm.carving) | {"router": arm.router_parameters}
        known = replace(arm.reader, decide=oracle(experts))
        if name in ROUTED:
            found["decisions"] = decision_measures(readings, experts)
        if name == "readme":
            found["loss_with_oracle"] = self._named(mean_losses(read_tests(known, task.tests, task.precision)))
        if name in ("readme", "oracle"):
            found["splice"] = splice_measures(arm.reader, known, task.tests, readings, task.precision)
        return found

    def _equal_steps(self) -> int:
        """Steps of a round with which pooled pruning takes all CPU seconds of `readme`."""
        arms = ("tuned-readme", "tuned-pooled")
        readme, pooled = (self.cache.read_or_make(arm, self.bench.seed, partial(self.measure, arm))["cpu"] for arm in arms)
        return round(self.bench.sizes.expert_steps * sum(readme.values()) / sum(pooled.values()))


def parameters(carving: Carving) -> dict[str, int]:
    """The counts of a carving's FFNs."""
    counts = {"dense": carving.dense_parameters, "unique": carving.unique_parameters, "active": carving.active_parameters}
    return counts | {"stored": carving.stored_parameters(), "stored_fused": carving.stored_parameters(fuse=True)}


# ---- tables


def write_table(path: Path, cache: ResultCache) -> None:
    """Write all finished results. Rows of other seeds that the table has already stay: a study may be divided among machines."""
    stored = cache.stored()
    mine = {seed for _, seed in stored}
    kept: list[CsvRow] = []
    for row in read_rows(path) if path.exists() else ():
        if row["configuration"] != cache.digest:
            raise InvalidInput(f"{path} holds rows of other settings or texts ({row['configuration']}); give another --csv")
        kept += [row] if int(row["seed"]) not in mine else []
    made = [row for (name, seed), found in stored.items() for row in rows_of(name, seed, found["result"])]
    every: list[CsvRow] = [*kept, *({**row, "configuration": cache.digest} for row in made)]
    write_rows(path, sorted(every, key=lambda row: (int(str(row["seed"])), ARMS.index(str(row["arm"])))))


def read_table(path: Path) -> dict[str, dict[int, Json]]:
    """Read what the report needs: by arm and seed the losses, CPU seconds and decisions."""
    found: dict[str, dict[int, Json]] = {}
    for row in read_rows(path):
        result = found.setdefault(row["arm"], {}).setdefault(int(row["seed"]), {"loss": {}, "cpu": {}, "decisions": {}})
        measure, of, value = row["measure"], row.get("of", ""), float(row["value"])
        if measure == "perplexity" and of != "mean":
            result["loss"][of] = math.log(value)
        elif measure == "cpu":
            result["cpu"][of] = value
        elif measure in DECISIONS:
            result["decisions"][measure] = value
    return found


def rows_of(name: str, seed: int, result: Json) -> Iterable[CsvRow]:
    """One row of the table for each number."""

    def row(measure: str, of: str, value: float) -> CsvRow:
        return {"arm": name, "seed": seed, "measure": measure, "of": of, "value": value}

    for kind in ("loss", "loss_with_oracle"):
        losses = result.get(kind, {})
        yield from (row(kind.replace("loss", "perplexity"), domain, math.exp(loss)) for domain, loss in losses.items())
        if losses:
            yield row(kind.replace("loss", "perplexity"), "mean", math.exp(statistics.fmean(losses.values())))
    for measure in ("cpu", "steps", "trained_loss", "parameters"):
        yield from (row(measure, of, value) for of, value in result.get(measure, {}).items())
    decisions = dict(result.get("decisions", {}))
    yield from (row("accuracy_from", of, value) for of, value in decisions.pop("accuracy_from", {}).items())
    yield from (row(measure, "", value) for measure, value in decisions.items())
    for kind, losses in result.get("splice", {}).items():
        yield from (row(f"splice_{kind}", of, loss) for of, loss in losses.items())


Found = Mapping[str, Mapping[int, Json]]


def _mean_loss(result: Json) -> float:
    return statistics.fmean(result["loss"].values())


def difference(found: Found, one: str, other: str) -> list[float]:
    """Differences of the mean loss, seed by seed."""
    seeds = [seed for seed in found.get(one, {}) if seed in found.get(other, {})]
    return [_mean_loss(found[one][seed]) - _mean_loss(found[other][seed]) for seed in seeds]


def _against(values: Sequence[float]) -> str:
    """Difference of the perplexity in percent with the half width of its 95 % interval."""
    if not values:
        return "-"
    mean, half = statistics.fmean(values), half_width(values)
    interval = f" ± {100 * math.exp(mean) * half:.2f}" if len(values) > 1 else ""
    return f"{100 * math.expm1(mean):+.2f}{interval} %"


def report(found: Found) -> None:
    """Print the tables, and what was found against the expectations."""
    rows = []
    for arm in [arm for arm in ARMS if arm in found]:
        results = found[arm].values()
        ratio = arm.rpartition("-")[2]
        baseline = "tuned-pooled" if arm.startswith("tuned-") else f"pooled-{ratio}"
        seconds = statistics.fmean(sum(r.get("cpu", {}).values()) for r in results)
        perplexity = math.exp(statistics.fmean(map(_mean_loss, results)))
        rows.append((arm, f"{perplexity:.2f}", _against(difference(found, arm, baseline)), f"{seconds:.0f}"))
    seeds = sorted({seed for results in found.values() for seed in results})
    print_table(f"perplexity, geometric mean over domains, seeds {seeds}", ("arm", "perplexity", "against pooled", "CPU s"), rows)
    routed = [arm for arm in (OVERLAP_ARM, *(f"tuned-{name}" for name in ROUTED)) if arm in found]
    cells = [(arm, *(_mean_decision(found[arm], measure) for measure in DECISIONS)) for arm in routed]
    print_table("decisions; entropy and information in nats", ("arm", *DECISIONS), cells)
    for line in verdicts(found):
        print(line)


def _mean_decision(results: Mapping[int, Json], measure: str) -> str:
    values = [result["decisions"][measure] for result in results.values() if measure in result["decisions"]]
    return f"{statistics.fmean(values):.3f}" if values else "-"


def verdicts(found: Found) -> list[str]:
    """What was found against what was written down before the run."""
    lines = []
    claims = [(f"own-{r}", f"pooled-{r}", f"ratio 0.{r}: a domain's own units beat pooled ones") for r in (25, 50, 75, 90)]
    claims += [
        ("tuned-readme", "tuned-pooled", "Read-ME beats pooled pruning after equal training"),
        ("dense", "tuned-readme", "Read-ME stays below the parent"),
        ("tuned-dense", "tuned-readme", "Read-ME stays below the parent with the same training"),
        ("tuned-readme", "tuned-pooled_seconds", "Read-ME beats pooled pruning at equal seconds"),
        ("tuned-readme", "tuned-readme_once", "alternation helps"),
        ("tuned-readme", "tuned-context_free", "context helps the pre-gate"),
        ("tuned-readme", "tuned-layer_wise", "one decision is better than one for each layer"),
        ("tuned-readme", "tuned-random", "activity matters"),
    ]
    shown = {}
    for one, other, claim in claims:
        if values := difference(found, one, other):
            shown[one, other] = len(values) > 1 and statistics.fmean(values) < -half_width(values)
            said = "shown" if shown[one, other] else "not shown"
            lines.append(f"{claim}: {one} against {other} {_against(values)}: {said}")
    if ("tuned-readme", "tuned-pooled") in shown:
        fired = not shown["tuned-readme", "tuned-pooled"]
        lines.append(f"the falsifier {'fired: pooled pruning with training ties Read-ME' if fired else 'did not fire'}")
        for parent, said in (("dense", "as it was"), ("tuned-dense", "with the same training")):
            between = not fired and shown.get((parent, "tuned-readme"), False)
            lines.append(f"strictly between pooled pruning and the parent {said}: {'yes' if between else 'no'}")
    return lines


# ---- the command


def estimate(bench: Bench, seeds: int) -> str:
    """Say what the study will cost, from one step of each kind of each arm and from reading one row of each domain.

    On a busy machine CPU seconds are longer, and so is the estimate.
    """
    task, sizes = bench.task, bench.sizes
    few = replace(alternating(sizes, task.precision, bench.seed), rounds=1, router_steps=1, expert_steps=1)
    some = [rows[:1] for rows in task.tests]
    costs: dict[str, tuple[float, float]] = {}
    for name in TRAINED:
        bench.trained(name, few)  # the first step of an arm allocates
        arm = bench.trained(name, few)
        start = time.process_time()
        read_tests(arm.reader, some, task.precision)
        reading = (time.process_time() - start) * sizes.tests
        training = sizes.rounds * (sizes.router_steps * arm.seconds("router") + sizes.expert_steps * arm.seconds("experts"))
        costs[name] = training, reading
    costs["pooled_seconds"] = sum(costs["readme"][:1]), costs["pooled"][1]
    more = {"readme": 3.0, "oracle": 2.0}  # spliced rows, and the oracle beside the router
    trained = sum(training + more.get(name, 1.0) * reading for name, (training, reading) in costs.items())
    start = time.process_time()
    bench.untrained("shared_routed", RATIO)  # the only carving that takes long to make
    making = time.process_time() - start
    untrained = len(RATIOS) * (making + len(UNTRAINED) * (costs["dense"][1] + costs["pooled"][1]) / 2)
    total = trained + untrained + bench.calibration_seconds * 3
    each = ", ".join(f"{name} {training:.0f} + {reading:.0f}" for name, (training, reading) in costs.items())
    return (
        f"CPU-s of training and of reading the tests: {each}\ncalibration {bench.calibration_seconds:.0f}; part (a) {untrained:.0f}; "
        f"each seed about {total:,.0f} CPU-s; seeds: {seeds}, together {seeds * total / 60:.0f} CPU-minutes on one thread"
    )


def main() -> None:
    """Run what is missing, publish the table, and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--csv", type=Path, help="the table; OUT/results.csv by default. Seeds that it has already stay in it")
    parser.add_argument("--model", choices=get_args(ModelName), default="smollm2")
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder of weights and texts")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), choices=ARMS)
    parser.add_argument("--quick", action="store_true", help="a few rows and steps, to check the program")
    parser.add_argument("--estimate", action="store_true", help="measure one step of each arm, print the cost and stop")
    options = parser.parse_args()
    table = options.csv or options.out / "results.csv"
    torch.set_num_threads(1)
    sizes = (QUICK if options.quick else FULL)[options.model]
    if options.estimate:
        print(estimate(Bench(task_of(options.model, sizes, options.cache, 0), sizes, 0), len(options.seeds)))
        return
    settings = {"model": options.model, "ratio": RATIO, "sizes": asdict(sizes), "texts": text_digests(options.model)}
    cache = ResultCache(options.out / "results", settings)
    for seed in options.seeds:
        arms = [arm for arm in options.arms if not cache.has(arm, seed)]
        if not arms:
            continue
        study = Study(Bench(task_of(options.model, sizes, options.cache, seed), sizes, seed), cache)
        for arm in arms:
            start = time.process_time()
            result = cache.read_or_make(arm, seed, partial(study.measure, arm))
            spent = time.process_time() - start
            print(f"seed {seed} {arm:22} perplexity {math.exp(_mean_loss(result)):10.2f}, {spent:6.1f} CPU-s", flush=True)
            write_table(table, cache)
    write_table(table, cache)
    report(read_table(table))
    print(f"written to {table}; this run used {time.process_time():.0f} CPU-s")


if __name__ == "__main__":
    main()
