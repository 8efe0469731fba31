"""The entry for detectors: from a detector, a source and a target to new detections, numbers and a page in one folder.

Read next: `adaptation.py`, the adaptation itself, and `proposal_cache.py`, which makes a second call go on where the first stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ....core.errors import InvalidInput
from ....core.files import write_atomically
from ....core.rig import RigSpec
from ....datasets.data_split import DataSplit
from ....datasets.prepared import PreparedDataset
from ...models.detector import Detector
from ...server.store import SmashedStore
from ...training.detector_files import load_detector
from ...viz.html import write_html
from .adaptation import AdaptedProposals, DetectorAdaptConfig, adapt_proposals, save_adapted
from .adaptation_report import adaptation_page, adaptation_result
from .class_map import IGNORE, ClassMap
from .classifier_file import cached_classifier
from .detections_file import write_detections
from .measure import AdaptationMeasurement, measure_adaptation
from .proposal_cache import cached_on_split, cached_on_store
from .proposal_classifier import ClassifierConfig, ProposalClassifier
from .proposal_matching import Matches, match_proposals
from .proposals import DetectorProposals, ProposalSelection

StageProgress = Callable[[str, int, int], None]
"""Called with "source" or "target", the number of frames whose proposals are collected, and the number of all frames."""


@dataclass(frozen=True, kw_only=True)
class DetectorAdaptation:
    """Everything that an adaptation of a detector found."""

    proposals: DetectorProposals
    """The target's proposals: boxes, scores and the detector's classes."""

    classifier: ProposalClassifier
    """The source's classifier of proposals."""

    adapted: AdaptedProposals
    """New classes and unknown scores, and the adapted classifier."""

    measured: AdaptationMeasurement | None
    """Measurements against the target's labels, or None where none were asked for."""


def adapt_detector(
    detector: Detector | str | Path,
    target: str | Path | DataSplit | SmashedStore,
    out: str | Path,
    *,
    source: str | Path | DataSplit | ProposalClassifier,
    config: DetectorAdaptConfig | None = None,
    selection: ProposalSelection | None = None,
    classifier: ClassifierConfig | None = None,
    rig: RigSpec | None = None,
    class_map: ClassMap | None = None,
    on_progress: StageProgress | None = None,
) -> DetectorAdaptation:
    """Give the proposals of a detector new classes and unknown scores on an unlabeled target. Boxes and scores stay.

    The folder `out` receives `detections/FRAME.json`, `result.json`, `report.html`, `adapted.safetensors` (the adapted classifier) and
    the caches of proposals and of the source's classifier. A second call with the same folder uses these caches.

    Args:
        detector: A detector in memory, the run folder of one, or its `detector.safetensors`.
        target: Split of a prepared dataset as `DIR[:SPLIT]` (`train` where none is named), or a store of a fleet's smashed scenes made by this detector's encoder.
        out: Folder for the results.
        source: Labeled split of the source, written in the same way, which trains the proposal classifier; or this classifier from an earlier
            adaptation of the same detector (`load_classifier`), which needs no source data.
        config: Settings of the adaptation, or None for the defaults.
        selection: Which proposals of a frame are kept, or None for the defaults.
        classifier: Settings of the proposal classifier, where it is trained, or None for the defaults. Point counts are left out where
            the target is a store.
        rig: Rig of the fleet, to write detections in the sensor frame. None: the rig of the target's dataset; for a store that
            of the detector's training data, or no shift where its file does not say.
        class_map: What the target's classes mean to the detector (`map_by_name`, `pair_map`). If given, the target's labels are used to
            measure, after everything is decided. None: they are never looked at.
        on_progress: Called after each batch of frames.

    Returns:
        What was found; the same is in the files.

    Raises:
        InvalidInput: An input is refused, or a cache in `out` belongs to another detector, data or settings. Nothing is computed then.

    Example:
        found = adapt_detector("runs/source", "kitti_prepared:train", "adapted", source="waymo_prepared:train")
        print(int(found.adapted.classified.unknown.sum()), "proposals are unknown")
    """
    out, config, selection = Path(out), config or DetectorAdaptConfig(), selection or ProposalSelection()
    if not isinstance(detector, Detector):
        detector = load_detector(Path(detector))
    check_classes_to_adapt(detector)
    target, frames = _opened(target, class_map)
    if rig is None:
        trained = RigSpec() if detector.trained_on is None else detector.trained_on.rig
        rig = trained if frames is None else frames.rig
    if not isinstance(source, ProposalClassifier):
        settings = classifier or ClassifierConfig()
        settings = replace(settings, points=settings.points and frames is not None)
        source = _source_classifier(detector, _split(source), out, settings, selection, on_progress)
    if isinstance(target, SmashedStore):
        path, progress = out / "target_proposals.safetensors", _stage("target", on_progress)
        proposals = cached_on_store(path, detector, target, selection, on_progress=progress)
    else:
        proposals = _proposals_on(detector, target, out, "target", selection, on_progress)
    adapted = adapt_proposals(source, proposals, config)
    write_detections(out / "detections", proposals, adapted.classified, rig=rig)
    save_adapted(out / "adapted.safetensors", adapted, source)
    measured = None
    if frames is not None and class_map is not None:
        measured = measure_adaptation(detector, source, proposals, adapted, frames, class_map, config.open_set)
    result = json.dumps(adaptation_result(source, proposals, adapted, measured), indent=1) + "\n"
    write_atomically(out / "result.json", result.encode())
    write_html(out / "report.html", adaptation_page(out.name, proposals, adapted, measured))
    return DetectorAdaptation(proposals=proposals, classifier=source, adapted=adapted, measured=measured)


def _split(data: str | Path | DataSplit) -> DataSplit:
    split = data if isinstance(data, DataSplit) else DataSplit.parse(str(data))
    return split.or_split("train")


def _opened(
    target: str | Path | DataSplit | SmashedStore, class_map: ClassMap | None
) -> tuple[DataSplit | SmashedStore, PreparedDataset | None]:
    """The target and, of a split, its frames. What is wrong with the target is found here, before anything is computed."""
    if isinstance(target, SmashedStore):
        if class_map is not None:
            raise InvalidInput(
                "smashed scenes have no labels to measure against; give a split of a prepared dataset, or no class map"
            )
        if len(target) == 0:
            raise InvalidInput(
                f"the store holds no scene of the encoder {target.fingerprint[:16]}; `upcycle3d ingest` shards of it first"
            )
        return target, None
    split = _split(target)
    frames = split.open()
    if class_map is not None:
        class_map.ids(frames.classes)  # raises for a class that the map lacks
    return split, frames


def _source_classifier(
    detector: Detector,
    source: DataSplit,
    out: Path,
    settings: ClassifierConfig,
    selection: ProposalSelection,
    on_progress: StageProgress | None,
) -> ProposalClassifier:
    """The classifier in `out`, or one trained on the source. A class of the source that the detector lacks is ignored."""
    frames, names = source.open(), detector.class_names
    proposals = _proposals_on(detector, source, out, "source", selection, on_progress)

    def matches() -> Matches:
        meaning = {name: name if name in names else IGNORE for name in frames.classes}
        labels = [frames.labels(i) for i in range(len(frames))]
        return match_proposals(proposals, labels, frames.classes, ClassMap(source=names, meaning=meaning))

    return cached_classifier(out / "classifier.safetensors", proposals, matches, settings)


def _proposals_on(
    detector: Detector,
    data: DataSplit,
    out: Path,
    stage: str,
    selection: ProposalSelection,
    on_progress: StageProgress | None,
) -> DetectorProposals:
    path = out / f"{stage}_proposals.safetensors"
    return cached_on_split(path, detector, data, selection, on_progress=_stage(stage, on_progress))


def _stage(stage: str, on_progress: StageProgress | None) -> Callable[[int, int], None] | None:
    return None if on_progress is None else lambda done, total: on_progress(stage, done, total)


def check_classes_to_adapt(detector: Detector) -> None:
    """Refuse a detector of one class.

    Args:
        detector: The detector.

    Raises:
        InvalidInput: It knows one class only.
    """
    if len(detector.class_names) < 2:
        raise InvalidInput(
            f"this detector knows one class, {', '.join(detector.class_names)}, and unknown scores of proposals need two: with one known "
            "class every object that is not background looks known. Train a detector of more classes, such as the preset small_three_classes"
        )
