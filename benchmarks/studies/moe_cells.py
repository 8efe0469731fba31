"""Not a script: the resumable cells in which `moe_bam_tiny.py` and `moe_smollm.py` run the arms of `moe_arms.py`, and their tables.

A *cell* is one arm with one seed. Its result is a JSON file that appears when the cell is done, and branches are kept as weights, so a study
may be stopped and started again. Every arm is measured at two marks of its mixing phase:

    data      after T steps, the same tokens for all arms
    seconds   after T * c_btx / c_arm steps, where c is the CPU time of one training step and btx the cheapest mixture: the same seconds
              for all arms, so expensive arms see fewer tokens, as in the paper's comparison at equal compute

The costs c are measured once per study, in turns, and kept. The learning rate is constant after a warm-up, so one run has both marks.
"""

from __future__ import annotations

import copy
import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from moe_arms import ARMS, REFERENCE, TOP2, Branches, Budget, Task, evaluate, untrained_losses, usage_of
from paired import half_width
from torch import nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.files import write_atomically
from upcycle3d.core.tensor_file import fill_module, read_tensors, write_tensors
from upcycle3d.perception.moe.language.text_training import TextTraining, train_phase
from upcycle3d.perception.moe.surgery.replacement import plan_replacement
from upcycle3d.perception.moe.upcycling.joined_mixtures import join_mixtures
from upcycle3d.perception.moe.upcycling.owner_training import freeze_for_owner
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, sparse_copy
from upcycle3d.tools.console import print_table


class Study:
    """The cells of one study in a folder."""

    def __init__(
        self, folder: Path, task_of: Callable[[], Task], budget: Budget, settings: Mapping[str, Any], cost_steps: int
    ) -> None:
        self.folder, self.task_of, self.budget, self.cost_steps = folder, task_of, budget, cost_steps
        self._task: Task | None = None
        folder.mkdir(parents=True, exist_ok=True)
        stored, now = folder / "settings.json", json.loads(json.dumps(dict(settings) | asdict(budget)))
        if stored.exists() and json.loads(stored.read_text()) != now:
            raise SystemExit(f"error: {folder} holds cells of other settings ({stored}); give another folder")
        write_atomically(stored, json.dumps(now, indent=1).encode())

    @property
    def task(self) -> Task:
        """The task, made when the first cell needs it."""
        if self._task is None:
            self._task = self.task_of()
        return self._task

    def cell(self, seed: int, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Give the result of a cell, computed if it is not there."""
        path = self.folder / f"seed{seed}" / f"{name}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        start = time.process_time()
        found = compute() | {"process_seconds": time.process_time() - start}
        write_atomically(path, json.dumps(found).encode())
        shown = {k: round(v, 2) for k, v in found.get("perplexity", {}).items()}
        print(f"seed {seed} {name:20} {found['process_seconds']:7.1f} CPU-s  {shown}", flush=True)
        return found

    def branches(self, seed: int) -> Branches:
        """Train the branches of a seed, or read them."""
        task, budget = self.task, self.budget
        model = task.seed_model(seed)
        made = []
        for index, domain in enumerate(task.specialties):
            path = self.folder / f"seed{seed}" / f"branch_{domain}.safetensors"
            other = copy.deepcopy(model)
            shares = {domain: 1 - budget.seed_share, task.domains[0]: budget.seed_share}

            def train(
                other: nn.Module = other, shares: dict[str, float] = shares, path: Path = path, index: int = index
            ) -> dict[str, Any]:
                config = TextTraining(steps=budget.branch_steps, lr=budget.branch_lr, precision=task.precision)
                record = train_phase(other, lambda step: task.batch(shares, seed * 31 + index, step), task.loss, config)
                write_tensors(path, other.state_dict())
                return {"cpu_seconds": record.cpu_seconds, "first": record.losses[0], "last": record.losses[-1]}

            self.cell(seed, f"branch_{domain}", train)
            fill_module(other, read_tensors(path).tensors, path)
            made.append(other.eval())
        return Branches(seed=model.eval(), specialists=tuple(made), number=seed)

    def branch_seconds(self, seed: int) -> float:
        """CPU time of all branches of a seed."""
        return sum(float(self.cell(seed, f"branch_{d}", dict)["cpu_seconds"]) for d in self.task.specialties)

    def costs(self, branches: Branches) -> dict[str, float]:
        """CPU seconds of one training step of each arm: the smallest of several, in turns, because a busy machine only adds."""

        def measure() -> dict[str, Any]:
            task, config = self.task, TextTraining(steps=self.cost_steps, lr=0.0, weight_decay=0.0, precision=self.task.precision)
            shares = {name: 1.0 for name in task.domains}
            found: dict[str, list[float]] = {name: [] for name in ARMS}
            for turn in range(2):
                for name, build in ARMS.items():
                    record = train_phase(
                        build(task, branches), lambda s, t=turn: task.batch(shares, 5000 + t, s), task.loss, config
                    )
                    found[name].append(record.cpu_seconds / config.steps)
            return {"costs": {name: min(values) for name, values in found.items()}}

        costs: dict[str, float] = self.cell(0, "costs", measure)["costs"]
        return costs

    def trained_arm(self, seed: int, name: str, branches: Callable[[], Branches], costs: Mapping[str, float]) -> dict[str, Any]:
        """Run one trained arm."""

        def run() -> dict[str, Any]:
            task, budget = self.task, self.budget
            model = ARMS[name](task, branches())
            start = evaluate(task, model, share=0.25)  # before training, on a quarter of the tests
            data = budget.mix_steps
            seconds = round(data * costs[REFERENCE] / costs[name])
            if name == "dense_all_compute":  # what all branches cost goes into the one dense model, too
                extra = round(self.branch_seconds(seed) / costs[name])
                data, seconds = data + extra, seconds + extra
            else:
                seconds = min(seconds, round(budget.longest * data))
            marks: dict[str, Any] = {}
            shares = {domain: 1.0 for domain in task.domains}

            def at_mark(step: int, cpu: float) -> None:
                losses = evaluate(task, model)
                for mark, wanted in (("data", data), ("seconds", seconds)):
                    if step == wanted:
                        marks[mark] = {"steps": step, "cpu_seconds": cpu, "loss": losses}

            config = TextTraining(steps=max(data, seconds), lr=budget.mix_lr, precision=task.precision)
            train_phase(
                model,
                lambda step: task.batch(shares, seed * 31 + 7, step),
                task.loss,
                config,
                marks=(data, seconds),
                at_mark=at_mark,
            )
            last = marks["data"]["loss"]
            return {
                "marks": marks,
                "start_loss": start,
                "parameters": sum(p.numel() for p in model.parameters()),
                "usage": usage_of(task, model),
                "perplexity": {domain: math.exp(loss) for domain, loss in last.items()},
            }

        return self.cell(seed, name, run)

    def untrained_arm(self, seed: int, name: str, branches: Callable[[], Branches]) -> dict[str, Any]:
        """Run one arm without a joint phase."""

        def run() -> dict[str, Any]:
            task, found = self.task, branches()
            owners = 0.0
            if name == "flexolmo":
                model, owners = self._flexolmo(seed, found)
                losses, parameters = evaluate(task, model), sum(p.numel() for p in model.parameters())
            else:
                losses, parameters = untrained_losses(task, found, name)
            mark = {"steps": 0, "cpu_seconds": owners, "loss": losses}
            return {
                "marks": {"none": mark},
                "start_loss": losses,
                "parameters": parameters,
                "perplexity": {domain: math.exp(loss) for domain, loss in losses.items()},
            }

        return self.cell(seed, name, run)

    def _flexolmo(self, seed: int, branches: Branches) -> tuple[nn.Module, float]:
        """Each owner trains one expert and its rows of the routers beside the frozen seed; then the parts are joined and nothing is trained."""
        task, budget = self.task, self.budget
        owners, seconds = [], 0.0
        for index, domain in enumerate(task.specialties):
            plan = plan_replacement(branches.seed, experts=2, active=2)
            routers = RandomRouters(experts=2, rule=TOP2, seed=seed * 31 + index)
            model = sparse_copy(branches.seed, plan, routers).model
            held = freeze_for_owner(model)
            shares = {domain: 1 - budget.seed_share, task.domains[0]: budget.seed_share}
            config = TextTraining(steps=budget.branch_steps, lr=budget.branch_lr, weight_decay=0.0, precision=task.precision)
            config = replace(config, router=replace(config.router, balance=0.0))
            record = train_phase(model, lambda s, sh=shares, i=index: task.batch(sh, seed * 31 + i, s), task.loss, config)
            held.restore(model)
            seconds += record.cpu_seconds
            owners.append(model)
        return join_mixtures(owners, TOP2).model, seconds


HEADER = ("seed", "arm", "mark", "steps", "mix_cpu_seconds", "branch_cpu_seconds", "parameters", "start_perplexity", "perplexity")


def write_csv(path: Path, study: Study, seeds: Sequence[int], arms: Sequence[str], domains: Sequence[str]) -> None:
    """Write all finished cells as one table; perplexities are geometric means, and one column per domain.

    Rows of other seeds that the table has already stay: a study may be divided among machines.
    """
    header = [*HEADER, *(f"perplexity_{d}" for d in domains)]
    lines: list[list[Any]] = []
    for seed in seeds:
        for arm in arms:
            file = study.folder / f"seed{seed}" / f"{arm}.json"
            if not file.exists():
                continue
            cell = json.loads(file.read_text())
            uses = not arm.startswith(("dense", "wide", "sparse", "drop", "cluster", "seed", "flexolmo"))
            spent = study.branch_seconds(seed) if uses else 0.0
            for mark, found in cell["marks"].items():
                loss = found["loss"]
                mean, first = (math.exp(statistics.fmean(x.values())) for x in (loss, cell["start_loss"]))
                numbers = (found["cpu_seconds"], spent, cell["parameters"], first, mean, *(math.exp(loss[d]) for d in domains))
                lines.append([seed, arm, mark, found["steps"], *(f"{n:.6g}" for n in numbers)])
    lines += _rows_of_others(path, header, seeds)
    lines.sort(key=lambda line: int(line[0]))  # stable: arms keep their order
    write_atomically(path, "".join(",".join(map(str, line)) + "\n" for line in (header, *lines)).encode())


def _rows_of_others(path: Path, header: list[str], seeds: Sequence[int]) -> list[list[str]]:
    """Rows of a table that belong to other seeds than those given."""
    if not path.exists():
        return []
    with path.open() as file:
        found, *rows = list(csv.reader(file))
    if found != header:
        raise InvalidInput(f"{path} has other columns than this study writes; move it away")
    return [row for row in rows if int(row[0]) not in seeds]


def summary(path: Path, *, baseline: str = "btx_soft") -> list[tuple[str, ...]]:
    """Mean perplexity per arm and mark, and the difference to a baseline at the same mark, seed by seed, with a 95 % interval."""
    with path.open() as file:
        rows = list(csv.DictReader(file))
    values = {(r["arm"], r["mark"], int(r["seed"])): math.log(float(r["perplexity"])) for r in rows}
    lines = []
    for arm, mark in dict.fromkeys((r["arm"], r["mark"]) for r in rows):
        mine = {s: v for (a, m, s), v in values.items() if (a, m) == (arm, mark)}
        against = [100 * (math.exp(v - values[baseline, mark, s]) - 1) for s, v in mine.items() if (baseline, mark, s) in values]
        text = "-"
        if len(against) > 1:
            text = f"{statistics.fmean(against):+.2f} ± {half_width(against):.2f} %"
        elif against:
            text = f"{against[0]:+.2f} %"
        lines.append((arm, mark, f"{math.exp(statistics.fmean(mine.values())):.3f}", text))
    return lines


def run_study(study: Study, seeds: Sequence[int], arms: Sequence[str], table: Path, domains: Sequence[str]) -> None:
    """Run every cell that is missing, then write and print the table."""
    for seed in seeds:
        kept: list[Branches] = []

        def branches(seed: int = seed, kept: list[Branches] = kept) -> Branches:
            if not kept:
                kept.append(study.branches(seed))
            return kept[0]

        costs = study.costs(branches()) if any(a in ARMS for a in arms) else {}
        for arm in arms:
            if arm in ARMS:
                study.trained_arm(seed, arm, branches, costs)
            else:
                study.untrained_arm(seed, arm, branches)
            write_csv(table, study, seeds, arms, domains)
    print_table("perplexity (geometric mean over domains)", ("arm", "mark", "perplexity", "against btx_soft"), summary(table))
    print(f"written to {table}; this run used {time.process_time():.0f} CPU-s")
