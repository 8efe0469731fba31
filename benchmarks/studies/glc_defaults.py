"""How the options of training were chosen that are no labels, and the earlier default labels: end to end on Gaussian domains, with one option changed at a time.

    python benchmarks/studies/glc_defaults.py [--rows paper earlier ...] [--draws 2] [--json FILE]

Four splits (shared / source-private / target-private classes): OPDA 5/2/3, OSDA 6/0/4, PDA 5/5/0, CLDA 10/0/0; four families of shifts,
`draws` draws each, 1,500 target samples, d = 64, the digits' network trained on 6,000 source samples. The score is H of the last epoch for
the first two splits and accuracy for the others. No digit, no image and no scan was looked at. A row takes about a minute with two draws;
docs/adapt.md has the table.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from glc_gaussian import Domains, GaussianSet, gaussian_domains, train_source
from torch import nn

from upcycle3d.perception.adapt.glc.adapter import AdaptConfig, GLCAdapter
from upcycle3d.perception.adapt.glc.class_number import ClassNumberConfig
from upcycle3d.perception.adapt.glc.kmeans import KMeansConfig
from upcycle3d.perception.adapt.glc.metrics import accuracy, open_set_scores
from upcycle3d.perception.adapt.glc.one_vs_all import OneVsAllConfig
from upcycle3d.perception.adapt.glc.unknown_rule import UnknownRule
from upcycle3d.tools.console import print_table, write_json

SPLITS = {"OPDA": (5, 2, 3), "OSDA": (6, 0, 4), "PDA": (5, 5, 0), "CLDA": (10, 0, 0)}
FAMILIES = (
    {"rot": 1.0, "shift": 2.0, "sep": 2.2},
    {"rot": 0.8, "shift": 1.2, "sep": 1.6},  # classes overlap; without such sets the affinity term looks harmless
    {"rot": 1.0, "shift": 2.0, "sep": 1.6},
    {"rot": 0.8, "shift": 1.2, "sep": 1.3},
)
LABELS = OneVsAllConfig()
# The defaults before the labels on which clusters and classifier agree.
EARLIER = AdaptConfig(steps_per_epoch=None, labeling=LABELS, estimate=ClassNumberConfig(), unknown=UnknownRule(), fall_back=False)
CAREFUL = KMeansConfig(init="plusplus", restarts=3, points_per_centroid=0)
ROWS: Mapping[str, AdaptConfig] = {
    "paper": AdaptConfig.paper(),
    "earlier": EARLIER,
    "no affinity term": replace(EARLIER, affinity_weight=0.0),
    "4 neighbors": replace(EARLIER, neighbors=4),
    "16 neighbors": replace(EARLIER, neighbors=16),
    "uniform positives": replace(EARLIER, labeling=replace(LABELS, positives="uniform")),
    "affinity term 0.3": replace(EARLIER, affinity_weight=0.3),
    "K negatives": replace(EARLIER, labeling=replace(LABELS, negatives=(1.0,))),
    "K negatives, 3 votes": replace(EARLIER, labeling=replace(LABELS, negatives=(1.0, 1.0, 1.0))),
    "K, 1.25 K, 1.5 K": replace(EARLIER, labeling=replace(LABELS, negatives=(1.0, 1.25, 1.5))),
    "1.5 to 2.5 K": replace(EARLIER, labeling=replace(LABELS, negatives=(1.5, 2.0, 2.5))),
    "rho 0.9": replace(EARLIER, labeling=replace(LABELS, rho=0.9)),
    "k-means++ on all": replace(EARLIER, labeling=replace(LABELS, kmeans=CAREFUL)),
    "batch norm kept": replace(EARLIER, refresh_batch_norm=False),
    "no smoothing": replace(EARLIER, estimate=ClassNumberConfig(rounds=0)),
    "threshold 0.55": replace(EARLIER, unknown=UnknownRule(kind="fixed")),
    "threshold Yen": replace(EARLIER, unknown=UnknownRule(kind="yen")),
}


def worlds(draws: int) -> Iterator[tuple[str, GaussianSet, Domains, nn.Module, nn.Module]]:
    for family in FAMILIES:
        for split, (shared, source_private, target_private) in SPLITS.items():
            for seed in range(draws):
                spec = GaussianSet(
                    n=1500, shared=shared, source_private=source_private, target_private=target_private, d=64, seed=seed, **family
                )
                domains = gaussian_domains(spec)
                yield split, spec, domains, *train_source(domains, spec.classes)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--draws", type=int, default=2)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    values: dict[str, dict[str, list[float]]] = {row: {split: [] for split in SPLITS} for row in arguments.rows}
    for split, spec, domains, module, classifier in worlds(arguments.draws):
        inputs = torch.from_numpy(domains.x)
        for row in arguments.rows:
            config = replace(ROWS[row], slow_prefixes=("0.", "2."), seed=0)
            found = GLCAdapter(feature_module=module, classifier=classifier, config=config).fit(inputs).predict(inputs)
            if spec.target_private:
                value = open_set_scores(found.classes.numpy(), domains.y, range(spec.shared), spec.classes).h
            else:
                value = accuracy(found.nearest.numpy(), domains.y)
            values[row][split].append(value)
    table = []
    for row, splits in values.items():
        means = [statistics.mean(v) for v in splits.values()]
        table.append((row, *(f"{m:.3f}" for m in (*means, statistics.mean(means)))))
    print_table("Gaussian domains, last epoch", ("options", "OPDA H", "OSDA H", "PDA acc.", "CLDA acc.", "mean"), table)
    write_json(arguments.json, values)


if __name__ == "__main__":
    main()
