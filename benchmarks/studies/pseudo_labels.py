"""How good a detector's boxes are as pseudo labels, by class, range and score, and in which direction they are wrong.

    python benchmarks/studies/pseudo_labels.py --detector RUN --data DIR:SPLIT [--preset small] [--json FILE]

Precision is the share of boxes that match a true object of their class with a 3D IoU of 0.5 and 0.7. Recall is the share of true objects
(5 points or more) that are matched by a box which reaches the preset's thresholds. Offset is box minus truth, for boxes with IoU above 0.3.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.ops.iou3d import iou_3d
from upcycle3d.perception.evaluation.detect import detect_frames
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.server.pseudo_labels import hybrid_labels, labels_in_range
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table, write_json

RANGES = ((0, 15), (15, 30), (30, 52))
SCORES = ((0.05, 0.25), (0.25, 0.4), (0.4, 0.5), (0.5, 0.6), (0.6, 0.7), (0.7, 1.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--detector", type=Path, required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--split", default="fleet")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    detector = load_detector(arguments.detector)
    frames = PreparedDataset(arguments.data, arguments.split)
    settings = PRESETS[arguments.preset].upcycle
    boxes, truths = [], []  # rows: class, distance, score, used, iou, six offsets / class, distance, found 0.5, found 0.7
    for frame, found in detect_frames(detector, frames):
        assert frame.labels is not None
        truth = labels_in_range(frame.labels.select(frame.labels.weight > 0), detector.spec.grid)
        used = hybrid_labels(found, settings)
        used = used.select(used.weight > 0)
        overlap, match = best(found.boxes.data, found.classes, truth.boxes.data, truth.classes)
        reached = torch.tensor([[bool((used.boxes.data == b).all(1).any())] for b in found.boxes.data]).view(-1, 1).float()
        offset = found.boxes.data[:, :6] - truth.boxes.data[match, :6] if len(truth) else torch.zeros(len(found), 6)
        distance = found.boxes.data[:, :2].norm(dim=1, keepdim=True)
        boxes.append(
            torch.cat([found.classes[:, None].float(), distance, found.iou_scores[:, None], reached, overlap[:, None], offset], 1)
        )
        met, _ = best(truth.boxes.data, truth.classes, used.boxes.data, used.classes)
        counted = truth.num_points >= 5
        distance = truth.boxes.data[:, :2].norm(dim=1, keepdim=True)
        row = torch.cat(
            [truth.classes[:, None].float(), distance, (met >= 0.5)[:, None].float(), (met >= 0.7)[:, None].float()], 1
        )
        truths.append(row[counted])
    report(torch.cat(boxes), torch.cat(truths), detector.class_names, arguments)


def best(a: Tensor, a_classes: Tensor, b: Tensor, b_classes: Tensor) -> tuple[Tensor, Tensor]:
    """Largest same-class IoU of each box of `a` with `b`, and with which."""
    if len(a) == 0 or len(b) == 0:
        return torch.zeros(len(a)), torch.zeros(len(a), dtype=torch.int64)
    return (iou_3d(a, b) * (a_classes[:, None] == b_classes[None])).max(1)


def report(boxes: Tensor, truths: Tensor, names: tuple[str, ...], arguments: argparse.Namespace) -> None:
    """Print and write the tables."""
    rows, summary = [], {}
    for index, name in enumerate(names):
        mine, real = boxes[boxes[:, 0] == index], truths[truths[:, 0] == index]
        groups = [(f"{name}, all labels", mine[:, 3] > 0, torch.ones(len(real), dtype=torch.bool))]
        groups += [
            (
                f"{name}, {low}-{high} m",
                (mine[:, 3] > 0) & (mine[:, 1] >= low) & (mine[:, 1] < high),
                (real[:, 1] >= low) & (real[:, 1] < high),
            )
            for low, high in RANGES
        ]
        groups += [(f"{name}, score {low}-{high}", (mine[:, 2] >= low) & (mine[:, 2] < high), None) for low, high in SCORES]
        for title, chosen, among in groups:
            part = mine[chosen]
            near = part[part[:, 4] > 0.3]
            offset = near[:, 5:].mean(0).tolist() if len(near) else [float("nan")] * 6
            values = [len(part), *((part[:, 4] >= t).float().mean().item() if len(part) else float("nan") for t in (0.5, 0.7))]
            recall = [real[among][:, k].mean().item() if among is not None and among.any() else float("nan") for k in (2, 3)]
            rows.append((title, values[0], *(f"{v:.2f}" for v in (*values[1:], *recall)), *(f"{o:+.2f}" for o in offset)))
            summary[title] = {"boxes": values[0], "precision_50": values[1], "precision_70": values[2], "recall_50": recall[0], "recall_70": recall[1], "offset_x_y_z_l_w_h": offset}  # fmt: skip
    header = (
        "boxes",
        "number",
        "prec. 0.5",
        "prec. 0.7",
        "recall 0.5",
        "recall 0.7",
        "dx",
        "dy",
        "dz",
        "length",
        "width",
        "height",
    )
    print_table(f"pseudo labels of {arguments.detector} on {arguments.split}; offsets in m", header, rows)
    write_json(arguments.json, summary)


if __name__ == "__main__":
    main()
