"""How well the number of target classes is estimated on Gaussian sets: with and without a lower limit, with and without smoothing.

    python benchmarks/studies/glc_class_number.py [--reference DIR]

The sets are 24 drawn ones: four splits, three distances between the classes, two draws, features of the digits' network with batch norm
refreshed on the target; and with --reference also the stored sets `gauss_n4000` and `gauss_lidar3_n6000` of that folder. The table shows the
mean absolute log error; 0 is perfect. "floor" keeps only candidates of at least half the number of source classes, like the default.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from glc_defaults import SPLITS
from glc_gaussian import GaussianSet, gaussian_domains, train_source
from torch import Tensor

from upcycle3d.perception.adapt.glc.class_number import ClassNumberConfig, class_number_candidates, estimate_class_number
from upcycle3d.perception.adapt.glc.networks import features_and_probabilities, refresh_batch_norm
from upcycle3d.tools.console import print_table


def sets(stored_sets: Path | None) -> Iterator[tuple[Tensor, int, int]]:
    """Features (N, D), source classes, true number of target classes."""
    for name in ("gauss_n4000", "gauss_lidar3_n6000"):
        if stored_sets is not None:
            stored = np.load(stored_sets / f"{name}.npz")
            yield torch.from_numpy(stored["feat"]), int(stored["n_class"]), int(stored["shared"] + stored["tpriv"])
    for sep in (1.4, 1.8, 2.4):
        for shared, source_private, target_private in SPLITS.values():
            for seed in (0, 1):
                kinds = {"shared": shared, "source_private": source_private, "target_private": target_private}
                spec = GaussianSet(n=1500, d=64, rot=1.1, shift=2.0, sep=sep, seed=seed, **kinds)
                domains = gaussian_domains(spec)
                module, classifier = train_source(domains, spec.classes)
                inputs = torch.from_numpy(domains.x)
                refresh_batch_norm(module, inputs)
                yield features_and_probabilities(module, classifier, inputs)[0], spec.classes, shared + target_private


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, help="folder with the stored Gaussian sets, which are not in this repository")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ways = {f"{floor}, {r} rounds": (floor, r) for floor in ("no floor", "floor") for r in (0, 5)}
    errors: dict[str, list[float]] = {way: [] for way in ways}
    for features, classes, true in sets(arguments.reference):
        floored = class_number_candidates(classes, "dense")
        free = tuple(range(2, floored[0])) + floored
        for way, (floor, rounds) in ways.items():
            config = replace(ClassNumberConfig(), rounds=rounds)
            found = estimate_class_number(features, floored if floor == "floor" else free, config)
            errors[way].append(abs(math.log(found.value / true)))
    rows = [(way, f"{statistics.fmean(values):.3f}", len(values)) for way, values in errors.items()]
    print_table("class number, mean absolute log error", ("way", "error", "sets"), rows)


if __name__ == "__main__":
    main()
