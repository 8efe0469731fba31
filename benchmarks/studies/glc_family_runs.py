"""The default options, the paper's and no adaptation on families of problems (`glc_families.py`), as one CSV file and a table.

    python benchmarks/studies/glc_family_runs.py --set unseen --way features --csv docs/experiments/glc_families/unseen_features.csv
    python benchmarks/studies/glc_family_runs.py --report docs/experiments/glc_families/unseen_features.csv

`features` labels the target without training, as `upcycle3d adapt features` does. `training` trains the other source model on the target
and classifies with the last epoch. "none" is the source model, with the paper's threshold .55 on its normalized entropy. The score is H for
families with private classes of the target, otherwise the accuracy without rejection. Rows are written as they come, and a second call
goes on from them. Target labels are read after everything is decided.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from glc_families import DEVELOPMENT, UNSEEN, Family, Problem, draw
from torch import Tensor

from upcycle3d.perception.adapt.glc.adapter import AdaptConfig, GLCAdapter
from upcycle3d.perception.adapt.glc.feature_file import TargetFeatures
from upcycle3d.perception.adapt.glc.feature_labels import FeatureLabelConfig, label_features
from upcycle3d.perception.adapt.glc.guard import Guard
from upcycle3d.perception.adapt.glc.metrics import accuracy, open_set_scores
from upcycle3d.perception.adapt.glc.networks import features_and_probabilities
from upcycle3d.perception.adapt.glc.pseudo_labels import unadapted_labels
from upcycle3d.tools.console import print_table

SETS = {"development": DEVELOPMENT, "unseen": UNSEEN}


@dataclass(frozen=True, kw_only=True)
class Row:
    """Score of one way to decide on one problem."""

    family: str
    draw: int
    scenario: str
    samples: int
    options: str
    score: float
    known: float
    unknown: float
    certainty: float
    fell_back: bool


def row(family: Family, seed: int, problem: Problem, options: str, hard: Tensor, nearest: Tensor, guard: Guard | None) -> Row:
    if family.target_private:
        scores = open_set_scores(hard.numpy(), problem.truth, range(family.shared), family.classes)
        score, known, unknown = scores.h, scores.os_star, scores.unk
    else:
        score = known = accuracy(nearest.numpy(), problem.truth)
        unknown = float("nan")
    return Row(
        family=family.name,
        draw=seed,
        scenario=family.scenario,
        samples=family.n,
        options=options,
        score=round(score, 4),
        known=round(known, 4),
        unknown=round(unknown, 4),
        certainty=float("nan") if guard is None else round(guard.adapted, 4),
        fell_back=guard is not None and guard.fell_back,
    )


def labeled(family: Family, seed: int) -> Iterator[Row]:
    """Labels without training."""
    problem = draw(family, seed)
    alone = unadapted_labels(problem.probabilities)
    yield row(family, seed, problem, "none", alone.hard, alone.nearest, None)
    target = TargetFeatures(features=problem.inputs, probabilities=problem.probabilities)
    for options, config in (("paper", FeatureLabelConfig.paper()), ("ours", FeatureLabelConfig())):
        found = label_features(target, config)
        yield row(family, seed, problem, options, found.labels.hard, found.labels.nearest, found.guard)


def trained(family: Family, seed: int) -> Iterator[Row]:
    """Classes of the last epoch."""
    problem = draw(family, seed)
    alone = unadapted_labels(features_and_probabilities(problem.module, problem.classifier, problem.inputs)[1])
    yield row(family, seed, problem, "none", alone.hard, alone.nearest, None)
    for options, config in (("paper", AdaptConfig.paper()), ("ours", AdaptConfig())):
        adapter = GLCAdapter(feature_module=problem.module, classifier=problem.classifier, config=config)
        adapted = adapter.fit(problem.inputs)
        found = adapted.predict(problem.inputs)
        yield row(family, seed, problem, options, found.classes, found.nearest, adapted.guard)


def report(rows: list[Row]) -> None:
    """Print a line for each family: means over its draws, and how far ours lies from the better of the two others."""
    table, worst = [], []
    for name in dict.fromkeys(r.family for r in rows):
        mine = [r for r in rows if r.family == name]
        mean = {o: statistics.fmean(r.score for r in mine if r.options == o) for o in ("none", "paper", "ours")}
        gain = mean["ours"] - max(mean["none"], mean["paper"])
        backs = sum(r.fell_back for r in mine)
        open_set = mine[0].scenario in ("OPDA", "OSDA")
        table.append((name, mine[0].scenario, mine[0].samples, *(f"{v:.3f}" for v in mean.values()), f"{gain:+.3f}", backs))
        worst.append((open_set, gain, mean))
    for title, wanted in (("mean of families, H", True), ("mean of families, accuracy", False)):
        chosen = [(gain, mean) for open_set, gain, mean in worst if open_set == wanted]
        if chosen:
            means = (f"{statistics.fmean(m[o] for _, m in chosen):.3f}" for o in ("none", "paper", "ours"))
            table.append((title, "", "", *means, f"worst {min(g for g, _ in chosen):+.3f}", ""))
    columns = ("family", "scenario", "samples", "no adaptation", "paper's options", "ours", "ours - better one", "fell back")
    print_table("families", columns, table)


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    kinds = {f.name: {"int": int, "float": float, "bool": lambda text: text == "True"}.get(str(f.type), str) for f in fields(Row)}
    with path.open(newline="") as file:
        return [Row(**{name: kinds[name](value) for name, value in line.items()}) for line in csv.DictReader(file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", choices=list(SETS), default="development")
    parser.add_argument("--way", choices=("features", "training"), default="features")
    parser.add_argument("--draws", type=int, default=3)
    parser.add_argument("--most-samples", type=int, help="smaller targets, for a quick look at the development families")
    parser.add_argument("--csv", type=Path)
    parser.add_argument("--report", type=Path, help="print the table of a CSV file and run nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.report is not None:
        report(read(arguments.report))
        return
    if arguments.set == "unseen" and arguments.most_samples is not None:
        parser.error("the unseen families are run as they are")
    rows = [] if arguments.csv is None else read(arguments.csv)
    done = {(r.family, r.draw) for r in rows}
    for family in SETS[arguments.set]:
        smaller = replace(family, n=min(family.n, arguments.most_samples or family.n))
        for seed in range(arguments.draws):
            if (family.name, seed) in done:
                continue
            rows += labeled(smaller, seed) if arguments.way == "features" else trained(smaller, seed)
            if arguments.csv is not None:
                write(arguments.csv, rows)
    report(rows)


def write(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_suffix(".part")
    with partial.open("w", newline="") as file:
        writer = csv.DictWriter(file, [f.name for f in fields(Row)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(asdict(r) for r in rows)
    partial.replace(path)


if __name__ == "__main__":
    np.seterr(all="raise", under="ignore")
    main()
