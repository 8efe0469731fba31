"""Three source classes, as a LiDAR detector has them. There the released GLC code calls every sample known (H = 0).

    python benchmarks/studies/glc_small_c.py [--seeds 10] [--json FILE]

There are two kinds of seeds: seeds of k-means and of the estimate on the set `gauss_lidar3_n6000` (drawn anew here, bit for bit), and
other draws of the same generator. The earlier default labels are compared with those of the paper's options without its fault, and with a threshold on the
entropy of the source model: the paper's 0.55, and Otsu's.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from glc_gaussian import SETS, gaussian_domains, train_linear
from torch import Tensor

from upcycle3d.perception.adapt.glc.class_number import ClassNumberConfig, class_number_candidates, estimate_class_number
from upcycle3d.perception.adapt.glc.metrics import open_set_scores
from upcycle3d.perception.adapt.glc.one_vs_all import OneVsAllConfig, one_vs_all_labels
from upcycle3d.perception.adapt.glc.unknown_rule import UnknownRule, is_unknown, normalized_entropy
from upcycle3d.tools.console import print_table, write_json

SPEC = SETS["lidar3"]


def results(features: Tensor, probabilities: Tensor, truth: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    """OS*, UNK and H of each method on one set with one seed."""
    found: dict[str, Tensor] = {}
    numbers: dict[str, int] = {}
    for name, guess, config in (
        ("earlier defaults", ClassNumberConfig(), OneVsAllConfig()),
        ("paper's options", ClassNumberConfig.paper(), OneVsAllConfig.paper()),
    ):
        candidates = class_number_candidates(SPEC.classes, guess.candidates)
        numbers[name] = estimate_class_number(features, candidates, guess, seed=seed).value
        found[name] = one_vs_all_labels(features, probabilities, numbers[name], replace(config, seed=config.seed + seed)).hard
    scores = normalized_entropy(probabilities)
    for name, rule in (("entropy > 0.55", UnknownRule(kind="fixed")), ("entropy, Otsu", UnknownRule(kind="otsu"))):
        found[name] = torch.where(is_unknown(scores, rule.threshold(scores)), SPEC.classes, probabilities.argmax(1))
    values = {name: open_set_scores(hard.numpy(), truth, range(SPEC.shared), SPEC.classes) for name, hard in found.items()}
    return {
        name: {"os_star": v.os_star, "unk": v.unk, "h": v.h, "class_number": numbers.get(name, 0)} for name, v in values.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=10)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    stored, other = [], []
    for seed in range(arguments.seeds):
        domains = gaussian_domains(replace(SPEC, seed=seed))
        features, probabilities, _ = train_linear(domains, SPEC.classes, seed=seed)
        if seed == 0:
            stored = [results(features, probabilities, domains.y, s) for s in range(arguments.seeds)]
        other.append(results(features, probabilities, domains.y, 0))
    for title, runs in (("the stored set, k-means seeds", stored), ("draws of the generator", other)):
        rows = []
        for name in runs[0]:
            columns = {k: [run[name][k] for run in runs] for k in ("os_star", "unk", "h")}
            means = [f"{statistics.mean(v):.3f}" for v in columns.values()]
            numbers = "/".join(str(run[name]["class_number"]) for run in runs) if "entropy" not in name else "-"
            rows.append((name, *means, f"{min(columns['h']):.3f}-{max(columns['h']):.3f}", numbers))
        rows.append(("released code (stored set)", "0.565", "0.000", "0.000", "-", "3 x 0.25 -> 0"))
        print_table(f"{title}: {len(runs)}", ("labels by", "OS*", "UNK", "H", "H, range", "class numbers"), rows)
    write_json(arguments.json, {"stored": stored, "draws": other})


if __name__ == "__main__":
    main()
