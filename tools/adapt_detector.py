"""``upcycle3d adapt detector``: new labels and unknown scores for what a detector proposes on an unlabelled target domain."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..core.errors import InvalidInput
from ..core.rig import RigSpec
from ..datasets.prepared import PreparedDataset
from ..perception.adapt.detection.adaptation import (
    DetectorAdaptConfig,
    adapt_proposals,
    cached_classifier,
    save_adapted,
    write_detections,
)
from ..perception.adapt.detection.open_set import baselines, judge_by_source
from ..perception.adapt.detection.proposal_classifier import ClassifierConfig, ProposalClassifier, load_classifier
from ..perception.adapt.detection.proposal_matching import Matches, match_proposals
from ..perception.adapt.detection.proposal_metrics import ProposalReport, known_ap, proposal_report, seen_region
from ..perception.adapt.detection.proposals import (
    DetectorProposals,
    ProposalSelection,
    cached_on_frames,
    cached_proposals,
    collect_from_store,
)
from ..perception.adapt.detection.report import detector_facts, detector_page
from ..perception.adapt.glc.class_map import IGNORE, UNKNOWN, ClassMap, map_by_name, pair_map
from ..perception.adapt.glc.unknown import UnknownRule
from ..perception.evaluation.headline import Scores
from ..perception.models.detector import Detector
from ..perception.recipes.assembly import fleet_store
from ..perception.server.store import SmashedStore
from ..perception.training.detector_files import load_detector
from ..perception.viz.html import write_html
from .console import console, device, print_table, progress_bar, run_command, write_json

DEFAULTS = DetectorAdaptConfig()


@dataclass(frozen=True, kw_only=True)
class AdaptDetector:
    """Adapt what a detector calls its proposals to a target with other categories. Target labels are never learnt from."""

    detector: Path
    """run folder, or a detector.safetensors"""
    source: tuple[Path, str] | None = None
    """prepared dataset and split with labels: trains the proposal classifier, once"""
    trained: Path | None = None
    """instead of --source: classifier.safetensors of an earlier adaptation with this detector; no source data are needed then"""
    out: Path
    """folder for proposals, classifier, detections, result.json and report.html; goes on where it was stopped"""
    target: tuple[Path, str] | None = None
    """prepared dataset and split of the target"""
    target_store: Path | None = None
    """instead of --target: a store of the fleet's smashed scenes; no point counts then"""
    rig: RigSpec = field(default_factory=RigSpec)
    """of the fleet, with --target-store"""
    target_labels_for_metrics: bool = False
    """measure against the target's labels, after everything is decided"""
    classes_of: tuple[str, str] | None = None
    """datasets whose class map applies to the metrics, as in waymo kitti; without it a class of the same name is the same"""
    class_map: tuple[str, ...] = ()
    """NAME=MEANING of target classes, for the metrics: a class of the detector, unknown or ignore; overrules the above"""
    proposals: ProposalSelection = ProposalSelection()
    """which proposals of a frame count"""
    classifier: ClassifierConfig = ClassifierConfig()
    """of the source's proposals; points are left out by themselves with --target-store"""
    class_number: int | None = None
    """clusters of the target to assume, if not three for each of the detector's classes and background"""
    threshold: Literal["fixed", "otsu", "yen", "two_means"] = "otsu"
    """rule of the unknown's threshold"""
    fixed_threshold: float = 0.55
    """with the rule "fixed\""""
    epochs: int = DEFAULTS.adapt.epochs
    """of adaptation"""
    lr: float = DEFAULTS.adapt.lr
    """of adaptation"""
    seed: int = 0
    """of classifier and adaptation"""
    device: str = "cpu"
    """cpu or cuda, for the detector"""


def command(config: AdaptDetector) -> None:
    """New labels and unknown scores for a detector's proposals on an unlabelled target domain."""
    if (config.source is None) == (config.trained is None):
        raise InvalidInput(
            "give the source either as --source PREPARED SPLIT or, where its data are not at hand, as --trained FILE"
        )
    if (config.target is None) == (config.target_store is None):
        raise InvalidInput("give the target either as --target PREPARED SPLIT or as --target-store STORE")
    if config.target_labels_for_metrics and config.target is None:
        raise InvalidInput("smashed scenes have no labels to measure against; give --target PREPARED SPLIT")
    detector = load_detector(config.detector)[0].to(device(config.device))
    frames = None if config.target is None else PreparedDataset(*config.target)
    store = None if config.target_store is None else fleet_store(config.target_store, detector, config.rig)
    # What could be wrong with the target and the metrics is found before anything is computed.
    if store is not None and len(store) == 0:
        raise InvalidInput(
            f"{config.target_store} holds no scene of the encoder {store.fingerprint[:16]}; `upcycle3d ingest` shards of it first"
        )
    measured = frames if config.target_labels_for_metrics else None
    classes = None if measured is None else target_map(config, detector.class_names, measured.classes)
    classifier = _classifier(config, detector)
    target = _of_target(config, detector, frames if store is None else store)
    adapt = replace(
        DEFAULTS,
        adapt=replace(DEFAULTS.adapt, epochs=config.epochs, lr=config.lr, seed=config.seed, class_number=config.class_number),
        judge=replace(DEFAULTS.judge, unknown=UnknownRule(method=config.threshold, value=config.fixed_threshold)),
    )
    adapted = adapt_proposals(classifier, target, adapt)
    rig = config.rig if frames is None else RigSpec.of(frames.notes)
    write_detections(config.out / "detections", target, adapted.judged, z_shift=rig.z_shift)
    save_adapted(config.out / "adapted.safetensors", adapted, classifier)
    metrics: dict[str, ProposalReport] = {}
    detector_ap: Scores = {}
    if measured is not None and classes is not None:
        labels = [measured.labels(i) for i in range(len(measured))]
        matches = match_proposals(target, labels, measured.classes, classes)
        ways = {
            **{name: judge_by_source(classifier, target, way) for name, way in baselines(adapt.judge).items()},
            "adapted": adapted.judged,
        }
        limits = seen_region(detector)
        metrics = {n: proposal_report(target, judged, matches, labels, classes, limits=limits) for n, judged in ways.items()}
        detector_ap = known_ap(target, None, labels, measured.classes, classes, limits=limits)
    write_json(config.out / "result.json", detector_facts(classifier, target, adapted, metrics, detector_ap))
    write_html(config.out / "report.html", detector_page(config.out.name, target, adapted, metrics, detector_ap))
    unknown = int(adapted.judged.unknown.sum())
    print_table(
        "adapted",
        ("frames", "proposals", "target classes", "called unknown", "threshold"),
        [(len(target.frame_ids), len(target), adapted.model.class_number, unknown, f"{adapted.judged.threshold:.3f}")],
    )
    if metrics:
        rows = [(n, *(_shown(v) for v in (m.os_star, m.unk, m.h, m.auroc))) for n, r in metrics.items() for m in (r.matched,)]
        print_table("matched proposals", ("judged by", "OS*", "UNK", "H", "AUROC"), rows)
    console.print(f"detections: {config.out / 'detections'}; report: {config.out / 'report.html'}")


def _classifier(config: AdaptDetector, detector: Detector) -> ProposalClassifier:
    if config.source is None:
        assert config.trained is not None
        return load_classifier(config.trained)
    source, names = PreparedDataset(*config.source), detector.class_names
    proposals = _of_frames(config, detector, source, config.source[1], "source")

    def matches() -> Matches:
        meaning = {name: name if name in names else IGNORE for name in source.classes}
        labels = [source.labels(i) for i in range(len(source))]
        return match_proposals(proposals, labels, source.classes, ClassMap(source=names, meaning=meaning))

    settings = replace(config.classifier, seed=config.seed, points=config.classifier.points and config.target_store is None)
    return cached_classifier(config.out / "classifier.safetensors", proposals, matches, settings)


def target_map(config: AdaptDetector, classes: tuple[str, ...], target: tuple[str, ...]) -> ClassMap:
    """What the target's class names mean. Raises InvalidInput naming every class that neither a table nor the options explain."""
    base = map_by_name(classes, target) if config.classes_of is None else pair_map(*config.classes_of, classes)
    pairs = [text.partition("=") for text in config.class_map]
    wrong = [name + sign + meaning for name, sign, meaning in pairs if not (name and sign and meaning)]
    strangers = [name for name, _, _ in pairs if name not in target]
    if wrong or strangers:
        raise InvalidInput(
            f"--class-map takes NAME=MEANING for classes of the target ({', '.join(target)}); found {', '.join(wrong or strangers)}. "
            f"A meaning is one of {', '.join((*classes, UNKNOWN, IGNORE))}"
        )
    whole = replace(base, meaning={**base.meaning, **{name: meaning for name, _, meaning in pairs}})
    whole.ids(target)  # complains of what is missing
    return replace(whole, meaning={name: whole.meaning[name] for name in target})


def _shown(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _of_frames(config: AdaptDetector, detector: Detector, frames: PreparedDataset, split: str, name: str) -> DetectorProposals:
    with progress_bar(f"proposals on the {name}", len(frames)) as advance:
        path = config.out / f"{name}_proposals.safetensors"
        return cached_on_frames(path, detector, frames, config.proposals, split=split, on_progress=advance)


def _of_target(config: AdaptDetector, detector: Detector, target: PreparedDataset | SmashedStore | None) -> DetectorProposals:
    assert target is not None  # one of the two is given
    if isinstance(target, PreparedDataset):
        assert config.target is not None
        return _of_frames(config, detector, target, config.target[1], "target")
    data = f"store: {len(target)} scenes of the encoder {target.fingerprint[:16]}"
    with progress_bar("proposals on the target", len(target)) as advance:
        return cached_proposals(
            config.out / "target_proposals.safetensors",
            detector,
            config.proposals,
            data=data,
            collect=lambda: collect_from_store(detector, target, config.proposals, data=data, on_progress=advance),
        )


if __name__ == "__main__":
    sys.exit(run_command(command))
