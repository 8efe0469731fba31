"""GLC end to end on warped digits, from stored source weights, last epoch, compared with the released code's results.

    python benchmarks/studies/glc_digits.py --options paper|ours --reference DIR [--seeds 2021 1 2 3 4] [--json FILE]

DIR holds `e2e_SPLIT.npz` (target inputs, labels and outputs of the released code) and `e2e_SPLIT_source.pt` (its source weights) of each
split; they are not in this repository. A seed decides the order of the batches and the sample for the class number, and nothing else of
importance. "paper" takes the class number that the released code found; "ours" decides it. OPDA and OSDA give H, PDA and CLDA accuracy
without rejection. Target labels are read after adaptation, to score it. The official numbers are means of the released code over five
orders of the samples for OPDA and OSDA, and a single run for PDA and CLDA.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from upcycle3d.perception.adapt.glc.adapted_model import AdaptedModel, AdaptedPredictions
from upcycle3d.perception.adapt.glc.adapter import AdaptConfig, GLCAdapter
from upcycle3d.perception.adapt.glc.metrics import accuracy, auroc, open_set_scores
from upcycle3d.tools.console import print_table, write_json

OFFICIAL = {"OPDA": 0.684, "OSDA": 0.577, "PDA": 0.705, "CLDA": 0.512}
SHARED_CLASSES = {"OPDA": 5, "OSDA": 6}


def source_model(path: Path) -> tuple[nn.Sequential, nn.Linear]:
    """The released code's network and weights; the classifier with its weight norm folded in."""
    state = torch.load(path, weights_only=True)
    module = nn.Sequential(
        *(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64))
    )
    names = {"backbone_layer.": "", "feat_embed_layer.bottleneck.": "4.", "feat_embed_layer.bn.": "5."}
    module.load_state_dict(
        {new + k.removeprefix(old): v for old, new in names.items() for k, v in state.items() if k.startswith(old)}
    )
    direction = state["class_layer.fc.weight_v"]
    classifier = nn.Linear(64, len(direction))
    with torch.no_grad():
        classifier.weight.copy_(state["class_layer.fc.weight_g"] * direction / direction.norm(dim=1, keepdim=True))
        classifier.bias.copy_(state["class_layer.fc.bias"])
    return module, classifier


def score(split: str, prediction: AdaptedPredictions, truth: np.ndarray) -> dict[str, float]:
    unknown = prediction.probabilities.shape[1]
    if split not in SHARED_CLASSES:
        value = accuracy(prediction.nearest.numpy(), truth)
        return {"result": value}
    scores = open_set_scores(prediction.classes.numpy(), truth, range(SHARED_CLASSES[split]), unknown)
    area = auroc(prediction.unknown_scores.numpy(), truth == unknown)
    return {"result": scores.h, "os_star": scores.os_star, "unk": scores.unk, "auroc": area}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--options", choices=("paper", "ours"), required=True)
    parser.add_argument("--seeds", type=int, nargs="+", default=[2021, 1, 2, 3, 4])
    parser.add_argument("--reference", type=Path, required=True, help="folder with the released code's files")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    config = replace(AdaptConfig.paper() if arguments.options == "paper" else AdaptConfig(), slow_prefixes=("0.", "2."))
    runs, rows = [], []
    for split, official in OFFICIAL.items():
        data = np.load(arguments.reference / f"e2e_{split}.npz")
        module, classifier = source_model(arguments.reference / f"e2e_{split}_source.pt")
        chosen = int(classifier.out_features * json.loads(str(data["meta"]))["best_coeff"])
        for seed in arguments.seeds:
            given = chosen if arguments.options == "paper" else None
            adapter = GLCAdapter(
                feature_module=module, classifier=classifier, config=replace(config, seed=seed, class_number=given)
            )
            inputs = torch.from_numpy(data["x_tgt"])
            adapted: AdaptedModel = adapter.fit(inputs)
            result = score(split, adapted.predict(inputs), data["y_tgt"])
            runs.append(
                {"split": split, "seed": seed, "class_number": adapted.class_number, "threshold": adapted.threshold, **result}
            )
        values = [r["result"] for r in runs if r["split"] == split]
        numbers = sorted({r["class_number"] for r in runs if r["split"] == split})
        rows.append(
            (
                split,
                "H" if split in SHARED_CLASSES else "accuracy",
                f"{statistics.mean(values):.3f}",
                f"{min(values):.3f}-{max(values):.3f}",
                f"{official:.3f}",
                f"{statistics.mean(values) - official:+.3f}",
                ", ".join(map(str, numbers)),
            )
        )
    title = f"digits, options {arguments.options}, {len(arguments.seeds)} seeds, last epoch"
    print_table(title, ("split", "metric", "mean", "range", "official", "difference", "class number"), rows)
    write_json(arguments.json, {"options": arguments.options, "runs": runs})


if __name__ == "__main__":
    main()
