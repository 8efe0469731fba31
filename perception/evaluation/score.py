"""Score a detector on a prepared split by the protocol of KITTI, Waymo, Lyft or ST3D. This is where a protocol is chosen.

A new protocol is one more branch in `score_detector` and in `EvaluationReport.headline`. Read next: `kitti.py`, `waymo.py`, `lyft.py` and
`cross_dataset.py` for the rules, `protocols.py` for the translation of class names.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal, get_args

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...datasets.kitti_text import KittiObjects
from ...datasets.prepared import PreparedDataset
from ..models.detector import Detector
from .accounts import Account, account_of_kitti, account_of_types, few_objects
from .class_translation import translate
from .cross_dataset import KITTI_NAMES, known_names
from .detect import detect_frames, kitti_detections
from .kitti import LOOSE, OFFICIAL, KittiResult, MinOverlap, evaluate_kitti, extended_overlaps, overlaps_of
from .lyft import LYFT_NAMES, LyftResult
from .protocols import LabeledDetections, count_labels, detect_labeled, score_cross_dataset, score_lyft, score_waymo
from .waymo import WAYMO_NAMES, WaymoResult

Protocol = Literal["kitti", "waymo", "lyft", "cross_dataset"]
Scores = Mapping[str, float]
"""Metric to percent, such as {"Car 3D 0.7": 43.1}, in the order of the detector's classes."""

_PROTOCOL_OF_LAYOUT: Mapping[str, Protocol] = {"kitti": "kitti", "waymo": "waymo", "lyft": "lyft"}


@dataclass(frozen=True, kw_only=True)
class EvaluationReport:
    """What a detector reached on one split."""

    protocol: Protocol
    """The rules that were applied."""
    frames: int
    """Number of frames."""
    result: KittiResult | WaymoResult | LyftResult
    """All metrics. KITTI's and ST3D's protocol: with the official minimum overlaps."""
    loose: KittiResult | None = None
    """KITTI's and ST3D's protocol: the same with the loose minimum overlaps (0.5 for cars)."""
    detections: LabeledDetections | None = None
    """Detections in the sensor frame, for all protocols but KITTI's."""
    kitti_files: Mapping[str, KittiObjects] = field(default_factory=dict)
    """KITTI's protocol: detections by frame id, in the fields of KITTI's text format."""
    account: Account | None = None
    """What was read and scored, and why the rest was not."""

    def headline(self) -> Scores:
        """The few numbers by which methods are compared.

        KITTI, ST3D: 3D and BEV AP, R40, moderate, at the official minimum overlaps, then at the loose ones; the threshold is part of the
        name. Waymo: AP and APH at LEVEL_1 and LEVEL_2 over all ranges. Lyft: mean AP, then that of each class. A class without an object
        to find has no score.
        """
        if isinstance(self.result, KittiResult):
            if self.loose is None:
                raise InvalidInput("this report lacks the loose minimum overlaps; make it with score_detector")
            return kitti_scores(self.result, self.loose)
        values: dict[str, float | None]
        if isinstance(self.result, WaymoResult):
            values = {
                f"{name} {metric} L{level}": getattr(ranges["all"][f"LEVEL_{level}"], metric.lower())
                for name, ranges in self.result.classes.items()
                for level in (1, 2)
                for metric in ("AP", "APH")
            }
        else:
            values = {"mAP": self.result.mean_ap} | {f"{name} AP": self.result.class_ap(name) for name in self.result.classes}
        return {name: value for name, value in values.items() if value is not None}


def own_protocol(frames: PreparedDataset) -> Protocol:
    """The protocol of the dataset that a prepared dataset was made from.

    Args:
        frames: A prepared dataset.

    Returns:
        The protocol.

    Raises:
        InvalidInput: The dataset's layout has no protocol of its own.
    """
    layout = frames.origin.layout
    if layout not in _PROTOCOL_OF_LAYOUT:
        raise InvalidInput(
            f"{frames.root} has the layout {layout!r}, which has no protocol of its own; choose one with --protocol: cross_dataset fits "
            "every dataset (KITTI's AP of 3D boxes and in BEV, without a camera); waymo and lyft score the classes that they know"
        )
    return _PROTOCOL_OF_LAYOUT[layout]


def score_detector(
    detector: Detector,
    frames: PreparedDataset,
    protocol: Protocol | None = None,
    *,
    overlaps: Mapping[str, float] | None = None,
) -> EvaluationReport:
    """Run a detector over labeled frames and score it.

    Args:
        detector: The detector, on its device. It is put into evaluation mode.
        frames: Labeled frames of a prepared dataset. KITTI's protocol needs the label files that `prepare kitti` stores.
        protocol: The rules; the dataset's own by default.
        overlaps: KITTI's and ST3D's rules: minimum overlap by class, for classes that have none or for another value.

    Returns:
        All metrics, the detections, and an account of what was scored.

    Raises:
        InvalidInput: The dataset has no protocol, frames have no labels or no calibration, or no class is known to both sides.

    Example:
        report = score_detector(detector, PreparedDataset("data/kitti", "val"))
        print(report.headline()["Car 3D 0.7"])
    """
    protocol = protocol or own_protocol(frames)
    if protocol not in get_args(Protocol):
        raise InvalidInput(f"there is no protocol {protocol!r}; choose one of {', '.join(get_args(Protocol))}")
    frames.check_labeled()
    given = dict(overlaps or {})
    if given and protocol not in ("kitti", "cross_dataset"):
        raise InvalidInput(f"minimum overlaps can be given for the rules of KITTI and ST3D only; the protocol here is {protocol}")
    official, loose_ones = extended_overlaps(OFFICIAL, given), extended_overlaps(LOOSE, given)
    if protocol == "kitti":
        return _score_kitti(detector, frames, official, loose_ones)
    found = detect_labeled(detector, frames, label_classes=frames.classes)
    loose: KittiResult | None = None
    result: KittiResult | WaymoResult | LyftResult
    if protocol == "waymo":
        result, names = score_waymo(found, difficulty_is_level=frames.origin.layout == "waymo"), WAYMO_NAMES
    elif protocol == "lyft":
        result, names = score_lyft(found), LYFT_NAMES
    else:
        result, loose = score_cross_dataset(found, min_overlaps=official), score_cross_dataset(found, min_overlaps=loose_ones)
        names = known_names(KITTI_NAMES, official)
    account = _account(found, result, names)
    return EvaluationReport(protocol=protocol, frames=len(frames), result=result, loose=loose, detections=found, account=account)


def _account(found: LabeledDetections, result: KittiResult | WaymoResult | LyftResult, names: Mapping[str, str]) -> Account:
    labels = Counter(found.label_classes[c] for f in found.labels for c in f.select(f.weight > 0).classes.tolist())
    detections = Counter(found.detector_classes[c] for f in found.predictions for c in f.classes.tolist())
    label_classes, detection_classes = (
        {own: name for own in classes if (name := translate(own, names)) is not None and name in result.classes}
        for classes in (found.label_classes, found.detector_classes)
    )
    account = account_of_types(
        labels=labels,
        detections=detections,
        label_classes=label_classes,
        detection_classes=detection_classes,
        classes=tuple(result.classes),
        frames=len(found.ids),
        frames_without_detections=sum(not len(p) for p in found.predictions),
        neighbors=found.label_classes,
    )
    account = replace(account, ledger=replace(found.ledger, scans=len(found.ids), types_dropped=account.ledger.types_dropped))
    if not isinstance(result, KittiResult):
        return account
    in_range = sum(scores.labels for scores in result.classes.values())
    beyond = sum(1 for f in found.labels for c in f.classes.tolist() if found.label_classes[c] in label_classes) - in_range
    far = [f"{beyond} labels lie more than 75.2 m to a side, so ST3D's rules leave them out"] if beyond else []
    return account.told(warnings=_classes_left_out(found.detector_classes, detection_classes), notes=[*far, *few_objects(result)])


def _classes_left_out(classes: tuple[str, ...], scored: Container[str]) -> list[str]:
    left = [name for name in classes if name not in scored]
    if not left:
        return []
    return [
        f"not scored, because the labels lack the class or it has no minimum overlap: {', '.join(map(shown, left))}. "
        f"--overlap {shown(left[0])} 0.7 gives it one"
    ]


def _score_kitti(
    detector: Detector, frames: PreparedDataset, official: Mapping[str, MinOverlap], loose: Mapping[str, MinOverlap]
) -> EvaluationReport:
    frames.kitti_objects(frames.ids[0])  # a dataset without label files is refused before any frame is run
    known = {name.casefold() for name in official}
    classes = tuple(name for name in detector.class_names if name.casefold() in known) or detector.class_names
    overlaps_of(classes, official)  # nothing to score is refused, too
    found: dict[str, KittiObjects] = {}
    ledger = Ledger()
    for frame, predictions in detect_frames(detector, frames):
        found[frame.id] = kitti_detections(frame, predictions, detector.class_names)
        ledger = ledger + count_labels(frame, frames.classes, detector)
    truths, detections = [frames.kitti_objects(frame_id) for frame_id in found], list(found.values())
    results = [evaluate_kitti(truths, detections, classes=classes, min_overlaps=overlaps) for overlaps in (official, loose)]
    account = account_of_kitti(results[0], truths, detections)
    account = replace(account, ledger=replace(ledger, scans=len(found), types_dropped=account.ledger.types_dropped))
    account = account.told(warnings=_classes_left_out(detector.class_names, classes))
    return EvaluationReport(
        protocol="kitti", frames=len(found), result=results[0], loose=results[1], kitti_files=found, account=account
    )


def kitti_scores(official: KittiResult, loose: KittiResult) -> Scores:
    """3D and BEV AP, R40, moderate, of every class that has an object.

    Args:
        official: Result with `OFFICIAL` minimum overlaps.
        loose: Result with `LOOSE` ones.

    Returns:
        Percent by name, such as "Car 3D 0.7".
    """
    scores = {}
    for name in official.classes:
        for result in (official, loose):
            if result.classes[name].ground_truths[1]:
                scores[f"{name} 3D {result.min_overlaps[name].box_3d:g}"] = result.classes[name].box_3d.r40[1]
                scores[f"{name} BEV {result.min_overlaps[name].bev:g}"] = result.classes[name].bev.r40[1]
    return scores
