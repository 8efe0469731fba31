"""`upcycle3d adapt detector`: new labels and unknown scores for the proposals of a detector on an unlabeled target domain.

Read next: `perception/adapt/detection/adapt_detector.py`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from ..core.device import find_device
from ..core.errors import InvalidInput
from ..core.scan_options import ScanOptions
from ..datasets.data_split import DataSplit
from ..perception.adapt.detection.adapt_detector import DetectorAdaptation, StageProgress, adapt_detector, check_classes_to_adapt
from ..perception.adapt.detection.adaptation import DetectorAdaptConfig
from ..perception.adapt.detection.class_map import ClassMap, changed_map, map_by_name, pair_map
from ..perception.adapt.detection.classifier_file import load_classifier
from ..perception.adapt.detection.proposal_classifier import ClassifierConfig, ProposalClassifier
from ..perception.adapt.detection.proposals import ProposalSelection
from ..perception.adapt.glc.unknown_rule import ThresholdKind, UnknownRule
from ..perception.models.detector import Detector
from ..perception.recipes.assembly import fleet_store
from ..perception.recipes.scan_survey import data_warnings, survey_split
from ..perception.server.store import SmashedStore
from ..perception.training.detector_files import load_detector
from .console import console, print_table, print_warning, progress_bar, run_command
from .data_option import DataOption

DEFAULTS = DetectorAdaptConfig()


@dataclass(frozen=True, kw_only=True)
class AdaptDetector:
    """Adapt the classes of a detector's proposals to a target with other categories. Nothing is learned from target labels."""

    detector: Path
    """Run folder of the detector, or its detector.safetensors. It must know two classes or more."""
    source: DataOption | None = None
    """Labeled split of the source, `train` where none is named. It trains the proposal classifier, once."""
    trained: Path | None = None
    """Instead of --source: classifier.safetensors of an earlier adaptation of this detector. No source data are needed then."""
    out: Path
    """Folder for proposals, classifier, detections, result.json and report.html. A stopped adaptation goes on from it."""
    target: DataOption | None = None
    """Split of the target, `train` where none is named."""
    target_store: Path | None = None
    """Instead of --target: a store of the fleet's smashed scenes. There are no point counts then."""
    z_shift: float | None = None
    """With --target-store: the fleet's z shift, where `extract` got another one than the detector's training data."""
    intensity_scale: float | None = None
    """With --target-store: the fleet's intensity scale, where `extract` got another one than the detector's training data."""
    target_labels_for_metrics: bool = False
    """Measure against the target's labels, after everything is decided."""
    classes_of: tuple[str, str] | None = None
    """Source and target dataset whose class map the metrics use, as in `waymo kitti`. Without it classes of the same name match."""
    class_map: tuple[str, ...] = ()
    """Changes of the class map, NAME=MEANING. NAME is a class of the target, MEANING a class of the detector, `unknown` or `ignore`."""
    proposals: ProposalSelection = ProposalSelection()
    """Which proposals of a frame are kept."""
    classifier: ClassifierConfig = ClassifierConfig()
    """Training of the proposal classifier. Point counts are left out with --target-store; the seed is --seed."""
    class_number: int | None = None
    """Number of target classes to assume, if not three for each class of the detector and for background."""
    threshold: ThresholdKind = "otsu"
    """How the threshold of the unknown score is chosen."""
    fixed_threshold: float = 0.55
    """Unknown score above which a proposal is unknown, with the threshold `fixed`."""
    epochs: int = DEFAULTS.glc.epochs
    """Epochs of the adaptation."""
    lr: float = DEFAULTS.glc.lr
    """Learning rate of the adaptation at its first step."""
    seed: int = 0
    """Decides the proposal classifier and the adaptation."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`, for the detector."""


def command(config: AdaptDetector) -> None:
    """New labels and unknown scores for a detector's proposals on an unlabeled target domain."""
    source: DataSplit | ProposalClassifier
    if config.source is not None and config.trained is None:
        source = config.source.or_split("train")
    elif config.trained is not None and config.source is None:
        source = load_classifier(config.trained)
    else:
        raise InvalidInput("give the source either as --source DIR[:SPLIT] or, where its data are not at hand, as --trained FILE")
    if config.target_labels_for_metrics and config.target is None:
        raise InvalidInput("smashed scenes have no labels to measure against; give --target DIR[:SPLIT]")
    detector = load_detector(config.detector).to(find_device(config.device))
    check_classes_to_adapt(detector)
    given = ScanOptions(z_shift=config.z_shift, intensity_scale=config.intensity_scale)
    if config.target_store is None and given != ScanOptions():
        raise InvalidInput("--z-shift and --intensity-scale belong to --target-store; --target was shifted when it was prepared")
    rig = given.rig(None if detector.trained_on is None else detector.trained_on.rig)
    target: DataSplit | SmashedStore
    if config.target is not None and config.target_store is None:
        target = config.target.or_split("train")
        frames = target.open()
        for text in data_warnings(detector, frames, survey_split(frames, detector.encoder).statistics):
            print_warning(text)
    elif config.target_store is not None and config.target is None:
        target = fleet_store(config.target_store, detector, rig)
    else:
        raise InvalidInput("give the target either as --target DIR[:SPLIT] or as --target-store STORE")
    glc = replace(DEFAULTS.glc, epochs=config.epochs, lr=config.lr, seed=config.seed, class_number=config.class_number)
    unknown = UnknownRule(kind=config.threshold, value=config.fixed_threshold)
    with _bars() as on_progress:
        found = adapt_detector(
            detector,
            target,
            config.out,
            source=source,
            config=replace(DEFAULTS, glc=glc, open_set=replace(DEFAULTS.open_set, unknown=unknown)),
            selection=config.proposals,
            classifier=replace(config.classifier, seed=config.seed),
            rig=None if config.target_store is None else rig,
            class_map=_class_map(config, detector),
            on_progress=on_progress,
        )
    _print(found, config.out)


def _class_map(config: AdaptDetector, detector: Detector) -> ClassMap | None:
    if config.target is None or not config.target_labels_for_metrics:
        return None
    names, classes = detector.class_names, config.target.or_split("train").open().classes
    base = map_by_name(names, classes) if config.classes_of is None else pair_map(*config.classes_of, names)
    return changed_map(base, classes, config.class_map)


def _print(found: DetectorAdaptation, out: Path) -> None:
    proposals, classified = found.proposals, found.adapted.classified
    row = (len(proposals.frame_ids), len(proposals), found.adapted.model.class_number, int(classified.unknown.sum()))
    header = ("frames", "proposals", "target classes", "called unknown", "threshold")
    print_table("adapted", header, [(*row, f"{classified.threshold:.3f}")])
    if found.measured is not None:
        reports = [(name, report.matched) for name, report in found.measured.reports.items()]
        rows = [(name, *(_shown(v) for v in (m.os_star, m.unk, m.h, m.auroc))) for name, m in reports]
        print_table("matched proposals", ("classified by", "OS*", "UNK", "H", "AUROC"), rows)
    console.print(f"detections: {out / 'detections'}; report: {out / 'report.html'}")


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


@contextmanager
def _bars() -> Iterator[StageProgress]:
    """One progress bar at a time, for the source's proposals and then for the target's."""
    with ExitStack() as stack:
        bars: dict[str, Callable[[int, int], None]] = {}

        def advance(stage: str, done: int, total: int) -> None:
            if stage not in bars:
                stack.close()
                bars[stage] = stack.enter_context(progress_bar(f"proposals on the {stage}", total))
            bars[stage](done, total)

        yield advance


if __name__ == "__main__":
    sys.exit(run_command(command))
