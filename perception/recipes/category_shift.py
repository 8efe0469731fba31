"""GLC on a detector where domain and categories shift: a simulated source and target domain, four scenarios, over seeds.

    seed ─ source domain ─ detector ─ proposals ─ proposal classifier ─┐
           target domain of each scenario ─ proposals ─────────────────┴─ adapted without labels ─ measured with labels

A detector of cars, pedestrians and cyclists is trained on the source domain, one per seed, and so is the proposal classifier. The target
domain of a scenario adds trucks, trams, animals and trailers, lacks cyclists, or both (`datasets/simulation/category_shift.py`).
Adaptation sees the target's proposals without labels; the labels of the same frames only measure it. Each (scenario, seed) is stored as
soon as it is known.

Read next: `perception/adapt/detection/adaptation.py` for the adaptation, `category_shift_report.py` for the tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import get_args

from ...core.config_json import Json, config_to_json
from ...datasets.data_split import DataSplit
from ...datasets.simulation.category_shift import PRIVATE_CLASSES, SOURCE_CLASSES, ShiftKind, category_shift, source_domain
from ...datasets.simulation.places import domain
from ...datasets.simulation.stand_in import prepared_stand_in
from ..adapt.detection.adaptation import DetectorAdaptConfig, adapt_proposals
from ..adapt.detection.adaptation_report import adaptation_result
from ..adapt.detection.class_map import map_by_name
from ..adapt.detection.classifier_file import cached_classifier
from ..adapt.detection.measure import measure_adaptation
from ..adapt.detection.proposal_cache import cached_on_split
from ..adapt.detection.proposal_classifier import ClassifierConfig, ProposalClassifier
from ..adapt.detection.proposal_matching import Matches, match_proposals
from ..adapt.detection.proposals import ProposalSelection
from ..models.detector import Detector
from ..training.detector_files import load_detector
from .experiment_data import DatasetName
from .job_folder import RunOptions
from .pipeline import train_source_model
from .presets import SMALL_THREE_CLASSES, Preset
from .result_cache import ResultCache

SHIFTS: tuple[ShiftKind, ...] = get_args(ShiftKind)
"""The scenarios, in the order of the tables."""
_SOURCE_STREETS, _TARGET_STREETS = 9000, 9500  # added to the seed, so that no other experiment has these streets


@dataclass(frozen=True, kw_only=True)
class CategoryShiftComparison:
    """What all results of one comparison share. It is stored beside them as `comparison.json`."""

    source: DatasetName = "waymo"
    """Simulated source domain."""
    target: DatasetName = "lyft"
    """Simulated target domain, to which each scenario adds or lacks classes."""
    source_frames: int = 700
    """Labeled frames that the detector and the proposal classifier are trained on."""
    target_frames: int = 250
    """Frames to adapt to and to measure on."""
    preset: Preset = SMALL_THREE_CLASSES
    """Detector and its training."""
    adapt: DetectorAdaptConfig = DetectorAdaptConfig()
    """Settings of the adaptation; its seed is set by the experiment."""

    def cache(self, folder: Path) -> ResultCache:
        """Open the folder with this comparison's results.

        Args:
            folder: Folder of the results.

        Returns:
            The results by scenario and seed.

        Raises:
            InvalidInput: The folder holds results of another comparison.
        """
        return ResultCache(folder, config_to_json(self))


def run_category_shift(
    comparison: CategoryShiftComparison,
    scenarios: Sequence[ShiftKind],
    seed: int,
    *,
    jobs: Path,
    results: Path,
    options: RunOptions,
    data_workers: int = 2,
) -> None:
    """Run the missing results of one seed. Each is stored as soon as it is known.

    Args:
        comparison: What all results share.
        scenarios: The scenarios to run.
        seed: Seed of the streets, the detector, the classifier and the adaptation.
        jobs: Folder for data, detectors and proposals, by seed. What is there is kept.
        results: Folder of the results.
        options: How the detector is trained.
        data_workers: Processes that simulate and prepare frames.

    Raises:
        InvalidInput: `results` belongs to another comparison.
    """
    cache, folder = comparison.cache(results), jobs / f"seed{seed}"
    missing = [scenario for scenario in scenarios if not cache.has(scenario, seed)]
    if not missing:
        return
    detector, classifier = _train_on_source(comparison, folder, seed, options, data_workers)
    for scenario in missing:
        cache.write(scenario, seed, _adapt_to_target(comparison, folder, detector, classifier, scenario, seed, data_workers))
        options.say(f"{scenario}, seed {seed}: done")


def _train_on_source(
    comparison: CategoryShiftComparison, folder: Path, seed: int, options: RunOptions, workers: int
) -> tuple[Detector, ProposalClassifier]:
    place, splits = source_domain(domain(comparison.source)), {"train": comparison.source_frames}
    streets = _SOURCE_STREETS + seed
    root = prepared_stand_in(folder / "source", place, splits, seed=streets, classes=SOURCE_CLASSES, workers=workers)
    split, run = DataSplit(root=root, name="train"), folder / "run"
    train_source_model(run, split, comparison.preset, seed=seed, options=options)
    detector, frames = load_detector(run), split.open()
    proposals = cached_on_split(folder / "source_proposals.safetensors", detector, split, ProposalSelection())

    def matches() -> Matches:
        labels = [frames.labels(i) for i in range(len(frames))]
        return match_proposals(proposals, labels, frames.classes, map_by_name(SOURCE_CLASSES, frames.classes))

    return detector, cached_classifier(folder / "classifier.safetensors", proposals, matches, ClassifierConfig(seed=seed))


def _adapt_to_target(
    comparison: CategoryShiftComparison,
    folder: Path,
    detector: Detector,
    classifier: ProposalClassifier,
    scenario: ShiftKind,
    seed: int,
    workers: int,
) -> dict[str, Json]:
    place, splits = category_shift(domain(comparison.target), scenario), {"train": comparison.target_frames}
    classes, streets = (*SOURCE_CLASSES, *PRIVATE_CLASSES), _TARGET_STREETS + seed
    root = prepared_stand_in(folder / scenario, place, splits, seed=streets, classes=classes, workers=workers)
    split = DataSplit(root=root, name="train")
    frames = split.open()
    proposals = cached_on_split(folder / f"{scenario}_proposals.safetensors", detector, split, ProposalSelection())
    config = replace(comparison.adapt, glc=replace(comparison.adapt.glc, seed=seed))
    adapted = adapt_proposals(classifier, proposals, config)
    names = map_by_name(SOURCE_CLASSES, frames.classes)
    measured = measure_adaptation(detector, classifier, proposals, adapted, frames, names, config.open_set)
    return adaptation_result(classifier, proposals, adapted, measured)
