"""Score a detector on a prepared split by the protocol of KITTI, Waymo, Lyft or ST3D. This is where a protocol is chosen.

A new protocol is one more branch in `score_detector` and in `EvaluationReport.headline`. Read next: `kitti.py`, `waymo.py`, `lyft.py` and
`cross_dataset.py` for the rules, `protocols.py` for the translation of class names.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, get_args

from ...core.errors import InvalidInput
from ...datasets.kitti_text import KittiObjects
from ...datasets.prepared import PreparedDataset
from ..models.detector import Detector
from .detect import detect_frames, kitti_detections
from .kitti import LOOSE, OFFICIAL, KittiResult, evaluate_kitti
from .lyft import LyftResult
from .protocols import LabeledDetections, detect_labeled, score_cross_dataset, score_lyft, score_waymo
from .waymo import WaymoResult

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
            f"{frames.root} has the layout {layout!r}, which has no protocol of its own; choose one with --protocol"
        )
    return _PROTOCOL_OF_LAYOUT[layout]


def score_detector(detector: Detector, frames: PreparedDataset, protocol: Protocol | None = None) -> EvaluationReport:
    """Run a detector over labeled frames and score it.

    Args:
        detector: The detector, on its device. It is put into evaluation mode.
        frames: Labeled frames of a prepared dataset. KITTI's protocol needs the label files that `prepare kitti` stores.
        protocol: The rules; the dataset's own by default.

    Returns:
        All metrics, and the detections.

    Raises:
        InvalidInput: The dataset has no protocol, frames have no labels or no calibration, or no class is known to both sides.

    Example:
        report = score_detector(detector, PreparedDataset("data/kitti", "val"))
        print(report.headline()["Car 3D 0.7"])
    """
    protocol = protocol or own_protocol(frames)
    if protocol not in get_args(Protocol):
        raise InvalidInput(f"there is no protocol {protocol!r}; choose one of {', '.join(get_args(Protocol))}")
    if protocol == "kitti":
        return _score_kitti(detector, frames)
    found = detect_labeled(detector, frames, label_classes=frames.classes)
    loose: KittiResult | None = None
    result: KittiResult | WaymoResult | LyftResult
    if protocol == "waymo":
        result = score_waymo(found, difficulty_is_level=frames.origin.layout == "waymo")
    elif protocol == "lyft":
        result = score_lyft(found)
    else:
        result, loose = score_cross_dataset(found), score_cross_dataset(found, min_overlaps=LOOSE)
    return EvaluationReport(protocol=protocol, frames=len(frames), result=result, loose=loose, detections=found)


def _score_kitti(detector: Detector, frames: PreparedDataset) -> EvaluationReport:
    frames.kitti_objects(frames.ids[0])  # a dataset without label files is refused before any frame is run
    found = {f.id: kitti_detections(f, p, detector.class_names) for f, p in detect_frames(detector, frames)}
    truths = [frames.kitti_objects(frame_id) for frame_id in found]
    official, loose = (
        evaluate_kitti(truths, list(found.values()), classes=detector.class_names, min_overlaps=overlaps)
        for overlaps in (OFFICIAL, LOOSE)
    )
    return EvaluationReport(protocol="kitti", frames=len(found), result=official, loose=loose, kitti_files=found)


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
