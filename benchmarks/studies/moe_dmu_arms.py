"""The arms of a comparison of diversified multiplet upcycling (DMU), shared by `moe_shapes.py` and `moe_emoji.py`.

With T steps per stage and R steps of the routers, every trained arm gets 3 T + R steps of one batch size; what it costs in CPU seconds is a
result like the others. A dense step that trains everything costs more than a stage's step, which trains FFNs alone, so equal steps favor
the dense arm.

| arm | what |
|---|---|
| base | the model before |
| dense all, dense ffn | the base trained on, everything or the FFNs alone |
| sparse | sparse upcycling: 4 copies of each FFN; experts, routers and the rest train. With routers alone it would stay the base |
| cluster-aware | experts and routers from clusters of the tokens; then as sparse |
| dmu | three stages on cluster-pure batches, gathered; then routers alone |
| plain | the same with ordinary batches in the stages: "un-clustered experts", the control that decides |
| last only | as dmu, but batches follow the last clusters alone, not all stages' |
| dmu / plain: random router | the routers as they are drawn, never trained |
| dmu / plain: uniform | all experts weighted equally; computes 4 FFNs per token |
| dmu / plain: ensemble | base and stages side by side, similarities averaged; computes 4 models |
| dmu / plain: expert 1..3 | each stage's dense model alone |
"""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import shutil
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import Tensor, nn

from upcycle3d.core.config_json import first_difference
from upcycle3d.core.errors import require
from upcycle3d.core.files import write_atomically
from upcycle3d.perception.moe.contrastive.dmu import DmuResult, dmu, gather_experts, plan_dmu
from upcycle3d.perception.moe.contrastive.expert_stages import DmuConfig, with_ffns
from upcycle3d.perception.moe.contrastive.pair_training import PairTraining, train_pairs
from upcycle3d.perception.moe.contrastive.pairs import PairBatch, PairData, PairTowers
from upcycle3d.perception.moe.contrastive.stages import MixtureParts
from upcycle3d.perception.moe.layers.control_routers import UniformRouter
from upcycle3d.perception.moe.layers.losses import RouterLossConfig
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.surgery.replacement import ReplacementPlan
from upcycle3d.perception.moe.upcycling.cluster_aware import cluster_aware, collect_inputs
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, sparse_copy

Metrics = Mapping[str, float]


@dataclass(frozen=True, kw_only=True, eq=False)
class World:
    """One seed's base model and data."""

    base: PairTowers
    """The trained base."""
    base_seconds: float
    """CPU seconds of its training."""
    data: PairData
    """Training pairs."""
    evaluate: Callable[[PairTowers], Metrics]
    """Measures a model on the test data."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """How much every arm trains."""

    stage: PairTraining
    """One stage."""
    router: PairTraining
    """The routers."""
    full_lr: float
    """Learning rate where everything trains, as long as the stages and the routers together."""

    def long(self, *, everything: bool) -> PairTraining:
        """Training of an arm that trains on in one piece."""
        steps = 3 * self.stage.steps + self.router.steps
        return replace(self.stage, steps=steps, lr=self.full_lr if everything else self.stage.lr)


class Ensemble(PairTowers):
    """Several models side by side: the cosine similarity is the mean of theirs."""

    def __init__(self, members: Sequence[PairTowers]) -> None:
        super().__init__()
        self.members = nn.ModuleList(members)

    def embed_image(self, batch: PairBatch) -> Tensor:
        return torch.cat([F.normalize(m.embed_image(batch).float(), dim=1) for m in self.members], dim=1)

    def embed_text(self, batch: PairBatch) -> Tensor:
        return torch.cat([F.normalize(m.embed_text(batch).float(), dim=1) for m in self.members], dim=1)

    def scale(self) -> Tensor:
        return torch.tensor(100.0)


class SeedRun:
    """All arms of one seed; each is measured once and kept."""

    def __init__(self, out: Path, seed: int, budget: Budget, world: Callable[[], World]) -> None:
        self.folder, self.seed, self.budget = out / f"seed{seed}", seed, budget
        self._make, self._world = world, None

    @property
    def world(self) -> World:
        if self._world is None:
            self._world = self._make()
        return self._world

    def run(self) -> dict[str, Metrics]:
        """Measure what is missing.

        Returns:
            Metrics of each arm.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        found: dict[str, Metrics] = {}
        for name, arms in self._groups():
            path = self.folder / f"{name}.json"
            if not path.exists():
                torch.manual_seed(self.seed)
                measured = dict(arms())
                write_atomically(path, json.dumps(measured, indent=1).encode())
                for arm, metrics in measured.items():
                    shown = ", ".join(f"{key} {value:.3f}" for key, value in list(metrics.items())[:4])
                    print(f"seed {self.seed}: {arm}: {shown}, {metrics['cpu seconds']:.0f} CPU s", flush=True)
            found |= json.loads(path.read_text())
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        return found

    def _groups(self) -> Iterator[tuple[str, Callable[[], Iterator[tuple[str, Metrics]]]]]:
        yield "base", self._base
        yield "dense_all", lambda: self._dense(everything=True)
        yield "dense_ffn", lambda: self._dense(everything=False)
        yield "dmu", lambda: self._sets("dmu", self.config())
        yield "plain", lambda: self._sets("plain", replace(self.config(), pure_batches=False))
        yield "last_only", lambda: self._sets("last only", replace(self.config(), accumulate=False), controls=False)
        yield "sparse", self._sparse
        yield "cluster_aware", self._cluster_aware

    def config(self) -> DmuConfig:
        return DmuConfig(
            expert=self.budget.stage, router=self.budget.router, seed=self.seed, router_loss=RouterLossConfig(balance=0.01)
        )

    def _measure(self, towers: PairTowers, seconds: float, steps: int) -> Metrics:
        return {**self.world.evaluate(towers), "steps": float(steps), "cpu seconds": seconds}

    def _base(self) -> Iterator[tuple[str, Metrics]]:
        yield "base", {**self._measure(self.world.base, 0.0, 0), "base cpu seconds": self.world.base_seconds}

    def _dense(self, *, everything: bool) -> Iterator[tuple[str, Metrics]]:
        model = copy.deepcopy(self.world.base)
        parts = MixtureParts(ffn=_children(model) if everything else self._plan().ffn_modules)
        training = self.budget.long(everything=everything)
        report = train_pairs(model, self.world.data, self._ordinary(), training, "ffn", parts, seed=self.seed)
        yield f"dense {'all' if everything else 'ffn'}", self._measure(model, report.cpu_seconds, training.steps)

    def _sparse(self) -> Iterator[tuple[str, Metrics]]:
        config = self.config()
        routers = RandomRouters(experts=4, rule=config.rule, seed=self.seed, std=config.router_std)
        made = sparse_copy(self.world.base, self._plan(), routers).model
        yield "sparse", self._train_mixture(made)

    def _cluster_aware(self) -> Iterator[tuple[str, Metrics]]:
        data, rows = self.world.data, torch.randperm(len(self.world.data))[:1024]
        plan = self._plan()
        inputs = collect_inputs(
            self.world.base, plan, lambda model: [model(data.batch(part)) for part in rows.split(256)], seed=self.seed
        )
        made = cluster_aware(self.world.base, plan, inputs, self.config().rule, draw=self.seed).model
        yield "cluster-aware", self._train_mixture(made)

    def _train_mixture(self, made: nn.Module) -> Metrics:
        assert isinstance(made, PairTowers)
        training, loss = self.budget.long(everything=True), self.config().router_loss
        parts = MixtureParts(ffn=_children(made))
        report = train_pairs(made, self.world.data, self._ordinary(), training, "ffn", parts, router_loss=loss, seed=self.seed)
        _forget_use(made)
        return {**self._measure(made, report.cpu_seconds, training.steps), **usage_of(made)}

    def _sets(self, name: str, config: DmuConfig, *, controls: bool = True) -> Iterator[tuple[str, Metrics]]:
        base, data = self.world.base, self.world.data
        result = dmu(base, data, config, folder=self.folder / "work" / name.replace(" ", "_"))
        plan, mixture = result.upcycled.plan, result.upcycled.model
        assert plan is not None
        assert isinstance(mixture, PairTowers)
        stages = sum(stage.report.cpu_seconds for stage in result.stages) + result.encoding_cpu_seconds
        steps = 3 * config.expert.steps
        _forget_use(mixture)
        of_mixture = self._measure(mixture, result.cpu_seconds, steps + config.router.steps)
        yield name, {**of_mixture, **usage_of(mixture), **_facts(result)}
        if not controls:
            return
        ffns = [stage.ffns for stage in result.stages]
        untrained = gather_experts(base, ffns, plan, config).model
        assert isinstance(untrained, PairTowers)
        yield f"{name}: random router", self._measure(untrained, stages, steps)
        for _, layer in moe_layers(untrained):
            layer.router = UniformRouter(4)
        yield f"{name}: uniform", self._measure(untrained, stages, steps)
        alone = [with_ffns(base, each) for each in ffns]
        yield f"{name}: ensemble", self._measure(Ensemble([base, *alone]), stages, steps)
        for number, model in enumerate(alone, 1):
            yield f"{name}: expert {number}", self._measure(model, stages / 3, config.expert.steps)

    def _plan(self) -> ReplacementPlan:
        return plan_dmu(self.world.base, self.config())

    def _ordinary(self) -> Tensor:
        return torch.zeros(len(self.world.data), dtype=torch.int64)


def _forget_use(model: nn.Module) -> None:
    for _, layer in moe_layers(model):
        layer.usage.reset()


def usage_of(model: nn.Module) -> Metrics:
    """How evenly the experts were used since the last reset: the mean over the layers of the entropy of their shares."""
    layers = moe_layers(model)
    return {
        "use entropy": statistics.mean(layer.usage.value.entropy for _, layer in layers),
        "dead experts": float(sum(len(layer.usage.value.dead) for _, layer in layers)),
    }


def _facts(result: DmuResult) -> Metrics:
    """Clusters of the last stage, pairs in merged ones, and the losses of the stages."""
    out = {f"loss stage {i}": stage.report.last for i, stage in enumerate(result.stages, 1)}
    last = result.stages[-1]
    return {**out, "loss router": result.router.last, "clusters": float(last.clusters), "moved pairs": float(last.moved)}


def _children(model: nn.Module) -> tuple[str, ...]:
    return tuple(name for name, child in model.named_children() if any(True for _ in child.parameters()))


def keep_options(out: Path, options: Mapping[str, object]) -> None:
    """Write the options of a study into its folder, and refuse a folder with results of other options.

    Args:
        out: Folder of the study.
        options: Name and value of what changes results; seeds, which are added one by one, do not.

    Raises:
        InvalidInput: The folder holds results of other options.
    """
    path, now = out / "options.json", {name: str(value) for name, value in options.items()}
    if path.exists():
        difference = first_difference(json.loads(path.read_text()), now)
        require(difference is None, f"{out} holds results with other options: {difference}. Give another folder")
    else:
        write_atomically(path, json.dumps(now, indent=1).encode())


# ---- tables


def write_csv(path: Path, results: Mapping[int, Mapping[str, Metrics]]) -> None:
    """Write all numbers: one row per seed, arm and metric."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["seed", "arm", "metric", "value"])
    for seed, arms in sorted(results.items()):
        for arm, metrics in arms.items():
            writer.writerows([seed, arm, metric, f"{value:.6g}"] for metric, value in metrics.items())
    write_atomically(path, text.getvalue().encode())


def with_rows_of_others(path: Path, results: Mapping[int, Mapping[str, Metrics]]) -> dict[int, Mapping[str, Metrics]]:
    """Add the seeds that a table of `write_csv` has already: a study may be divided among machines."""
    found: dict[int, dict[str, dict[str, float]]] = {}
    if path.exists():
        with path.open() as file:
            for row in csv.DictReader(file):
                found.setdefault(int(row["seed"]), {}).setdefault(row["arm"], {})[row["metric"]] = float(row["value"])
    return {**found, **results}


def print_tables(results: Mapping[int, Mapping[str, Metrics]], metrics: Sequence[str], against: Sequence[str]) -> None:
    """Print means over the seeds, and paired differences from some arms with 95 % intervals."""
    seeds = sorted(results)
    arms = list(results[seeds[0]])
    values = {(arm, m): [results[s][arm].get(m, math.nan) for s in seeds] for arm in arms for m in (*metrics, "cpu seconds")}
    print(
        f"\n{len(seeds)} seeds: mean (standard deviation), shares in %\n{'arm':24}"
        + "".join(f"{m:>20}" for m in metrics)
        + "   CPU s"
    )
    for arm in arms:
        cells = [f"{100 * statistics.mean(v):.1f} ({100 * _sd(v):.1f})" for v in (values[arm, m] for m in metrics)]
        print(f"{arm:24}" + "".join(f"{cell:>20}" for cell in cells) + f"{statistics.mean(values[arm, 'cpu seconds']):8.0f}")
    for other in against:
        print(f"\npaired difference from {other!r}, in points, with 95 % interval")
        for arm in arms:
            if arm != other:
                pairs = ([a - b for a, b in zip(values[arm, m], values[other, m])] for m in metrics)
                print(f"{arm:24}" + "".join(f"{interval(d):>20}" for d in pairs))


def interval(differences: Sequence[float]) -> str:
    """Mean of differences and half the width of its 95 % interval, in points."""
    mean = 100 * statistics.mean(differences)
    if len(differences) < 2:
        return f"{mean:+.1f}"
    half = float(student.ppf(0.975, len(differences) - 1)) * 100 * _sd(differences) / math.sqrt(len(differences))
    return f"{mean:+.1f} ± {half:.1f}"


def _sd(values: Sequence[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0
