"""GLC on a detector where domain and categories shift: simulated source and target, four scenarios, over seeds; resumable.

    python benchmarks/category_shift.py --target lyft --seeds 0 2 3 --out runs/category_shift_lyft           development: defaults may be chosen here
    python benchmarks/category_shift.py --target kitti --seeds 1 2 3 4 5 6 --out runs/category_shift_kitti  reported: once, after a freeze

A detector of cars, pedestrians and cyclists (``small_three_classes``) is trained on the source world, one a seed; so is the proposal
classifier. Each scenario's target adds trucks, trams, animals and trailers, lacks cyclists, or both (``simulation/category_shift.py``).
Adaptation sees the target's proposals without labels; labels measure it on the same frames. Every (scenario, seed) leaves a JSON file
as soon as it is known, and what is there is not done again: with the files of docs/experiments in ``--out`` the tables are printed at once.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, get_args

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch is loaded; see docs/decisions.md

import torch

from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.datasets.simulation.category_shift import PRIVATE_CLASSES, SOURCE_CLASSES, ShiftKind, category_shift, source_domain
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.datasets.simulation.stand_in import prepared_stand_in
from upcycle3d.perception.adapt.detection.adaptation import DetectorAdaptConfig, adapt_proposals
from upcycle3d.perception.adapt.detection.adaptation_report import adaptation_result
from upcycle3d.perception.adapt.detection.class_map import map_by_name
from upcycle3d.perception.adapt.detection.classifier_file import cached_classifier
from upcycle3d.perception.adapt.detection.measure import ADAPTED, measure_adaptation
from upcycle3d.perception.adapt.detection.proposal_cache import cached_on_split
from upcycle3d.perception.adapt.detection.proposal_classifier import ClassifierConfig, ProposalClassifier
from upcycle3d.perception.adapt.detection.proposal_matching import match_proposals
from upcycle3d.perception.adapt.detection.proposals import ProposalSelection
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.recipes.job_folder import RunOptions
from upcycle3d.perception.recipes.pipeline import train_source_model
from upcycle3d.perception.recipes.presets import SMALL_THREE_CLASSES
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.training.environment import describe_environment
from upcycle3d.tools.console import print_table, write_json

SCENARIOS: tuple[ShiftKind, ...] = get_args(ShiftKind)
ALL_CLASSES = (*SOURCE_CLASSES, *PRIVATE_CLASSES)


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Frames to train and to adapt on, steps of the detector's training."""

    source_frames: int
    target_frames: int
    steps: int


def source_side(folder: Path, source: str, seed: int, sizes: Sizes, workers: int) -> tuple[Detector, ProposalClassifier]:
    """Detector and proposal classifier of a seed, from the source world."""
    place = source_domain(domain(source))
    splits = {"train": sizes.source_frames}
    data = prepared_stand_in(folder / "source", place, splits, seed=9000 + seed, classes=SOURCE_CLASSES, workers=workers)
    train, split = SMALL_THREE_CLASSES.train, DataSplit(root=data, name="train")
    loop = replace(train.loop, optim=replace(train.loop.optim, total_steps=sizes.steps))
    preset = replace(SMALL_THREE_CLASSES, train=replace(train, loop=loop))
    train_source_model(folder / "run", split, preset, seed=seed, options=RunOptions())
    detector, frames = load_detector(folder / "run"), split.open()
    proposals = cached_on_split(folder / "source_proposals.safetensors", detector, split, ProposalSelection())

    def matches() -> Any:
        labels = [frames.labels(i) for i in range(len(frames))]
        return match_proposals(proposals, labels, frames.classes, map_by_name(SOURCE_CLASSES, frames.classes))

    config = ClassifierConfig(seed=seed)
    return detector, cached_classifier(folder / "classifier.safetensors", proposals, matches, config)


def cell(
    folder: Path,
    detector: Detector,
    classifier: ProposalClassifier,
    target: str,
    kind: ShiftKind,
    seed: int,
    sizes: Sizes,
    workers: int,
) -> dict[str, object]:
    """One scenario: adapt without labels, then measure the source's classifier and the adapted one."""
    place, splits = category_shift(domain(target), kind), {"train": sizes.target_frames}
    data = prepared_stand_in(folder / kind, place, splits, seed=9500 + seed, classes=ALL_CLASSES, workers=workers)
    split = DataSplit(root=data, name="train")
    frames = split.open()
    proposals = cached_on_split(folder / f"{kind}_proposals.safetensors", detector, split, ProposalSelection())
    config = DetectorAdaptConfig()
    config = replace(config, glc=replace(config.glc, seed=seed))
    adapted = adapt_proposals(classifier, proposals, config)
    names = map_by_name(SOURCE_CLASSES, frames.classes)
    measured = measure_adaptation(detector, classifier, proposals, adapted, frames, names, config.open_set)
    return adaptation_result(classifier, proposals, adapted, measured)


def summary(cells: Mapping[tuple[str, int], dict[str, Any]], kinds: tuple[str, ...]) -> None:
    """Tables: mean and deviation over the seeds that are there."""
    rows, aps = [], []
    for kind in kinds:
        found = [value for (name, _), value in cells.items() if name == kind]
        for way in found[0]["metrics"] if found else ():
            reports = [f["metrics"][way] for f in found]
            columns = ("os_star", "unk", "h", "auroc", "fpr95", "closed_accuracy", "accuracy")
            matched = (_mean([r["matched"][c] for r in reports], 3) for c in columns)
            rows.append((kind, way, *matched, _mean([_ap_change(f, way) for f in found], 1), *_shares(reports)))
        for name in found[0]["detector_ap"] if found else ():
            before = [f["detector_ap"][name] for f in found]
            after = [f["metrics"][ADAPTED]["known_ap"][name] for f in found]
            aps.append((kind, name, _mean(before, 1), _mean(after, 1), _mean([a - b for a, b in zip(after, before)], 1)))
        aps.append((kind, "mean of these", "", "", _mean([_ap_change(f, ADAPTED) for f in found], 1)))
    header = (
        "OS*",
        "UNK",
        "H",
        "AUROC",
        "FPR95",
        "closed acc.",
        "acc.",
        "known AP",
        "proposed",
        "novel",
        "private among unknown",
    )
    print_table(f"proposals on objects, {len({s for _, s in cells})} seeds", ("scenario", "judged by", *header), rows)
    print_table("AP R40 of the known classes", ("scenario", "metric", "detector", "adapted", "change"), aps)


def _ap_change(result: dict[str, Any], way: str) -> float:
    """Mean change of the known classes' AP against the detector's own labels."""
    return statistics.fmean(result["metrics"][way]["known_ap"][n] - ap for n, ap in result["detector_ap"].items())


def _shares(reports: list[dict[str, Any]]) -> tuple[str, str, str]:
    """Recall of private objects by proposals, novel-category accuracy, share of private objects among what is called unknown."""
    proposed, among = [], []
    for report in reports:
        objects = sum(p["objects"] for p in report["private"].values())
        called = report["called_unknown"]
        proposed.append(sum(p["proposed"] for p in report["private"].values()) / objects if objects else None)
        among.append(called["private"] / max(1, sum(called.values())) if objects else None)
    return _mean(proposed, 3), _mean([r["novel_category_accuracy"] for r in reports], 3), _mean(among, 3)


def _mean(values: list[float | None], digits: int) -> str:
    there = [v for v in values if v is not None]
    if not there:
        return "-"
    deviation = f" ± {statistics.stdev(there):.{digits}f}" if len(there) > 1 else ""
    return f"{statistics.fmean(there):.{digits}f}{deviation}"


def read_or_make(path: Path, settings: dict[str, object], make: Callable[[], dict[str, object]]) -> dict[str, Any]:
    """The result in ``path``, or a new one, written there with how it was made. A result of other sizes is refused."""
    if not path.exists():
        write_json(path, {"settings": settings, "result": make(), "environment": describe_environment(command=sys.argv, seed=0)})
    stored = json.loads(path.read_text())
    if stored["settings"] != settings:
        sys.exit(f"{path} was made with {stored['settings']}, asked for {settings}; choose another folder with --out")
    found: dict[str, Any] = stored["result"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--source", default="waymo")
    parser.add_argument("--target", default="lyft")
    parser.add_argument("--scenarios", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--source-frames", type=int, default=700)
    parser.add_argument("--target-frames", type=int, default=250)
    parser.add_argument("--steps", type=int, default=SMALL_THREE_CLASSES.train.loop.total_steps)
    parser.add_argument("--workers", type=int, default=2, help="processes that simulate and prepare frames")
    parser.add_argument("--out", type=Path, required=True)
    a = parser.parse_args()
    torch.set_num_threads(1)
    sizes = Sizes(source_frames=a.source_frames, target_frames=a.target_frames, steps=a.steps)
    cells: dict[tuple[str, int], dict[str, Any]] = {}
    for seed in a.seeds:
        folder = a.out / f"seed{seed}"
        source: list[tuple[Detector, ProposalClassifier]] = []
        for kind in a.scenarios:
            settings = {"source": a.source, "target": a.target, "scenario": kind, "seed": seed, **asdict(sizes)}

            def make(
                folder: Path = folder, kind: ShiftKind = kind, seed: int = seed, source: list[Any] = source
            ) -> dict[str, object]:
                if not source:
                    source.append(source_side(folder, a.source, seed, sizes, a.workers))
                return cell(folder, *source[0], a.target, kind, seed, sizes, a.workers)

            cells[kind, seed] = read_or_make(a.out / f"{kind}_seed{seed}.json", settings, make)
            print(f"{kind}, seed {seed}: done", flush=True)
    summary(cells, tuple(a.scenarios))


if __name__ == "__main__":
    main()
