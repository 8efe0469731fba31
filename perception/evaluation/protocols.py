"""A detector on labelled frames, scored by the protocol of choice: the detections once, then Waymo's, Lyft's or ST3D's rules.

Protocols have their own class names; a detector's and a dataset's are translated to them, and classes a protocol does not know
take no part. KITTI's own protocol needs label files and a camera and lives in ``detect.py``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.structures import Labels, Predictions
from ...datasets.frame_source import FrameSource
from ..models.detector import Detector
from .cross_dataset import evaluate_cross_dataset
from .detect import detect_frames
from .kitti import OFFICIAL, KittiResult, MinOverlap
from .lyft import LYFT_NAMES, LyftBoxes, LyftResult, evaluate_lyft
from .waymo import WAYMO_NAMES, WaymoResult, WaymoTruth, evaluate_waymo


@dataclass(frozen=True, kw_only=True)
class LabeledDetections:
    """Frames with labels and detections in the sensor's frame. Class k of the labels is label_classes[k], and so for detections."""

    ids: tuple[str, ...]
    labels: tuple[Labels, ...]
    predictions: tuple[Predictions, ...]
    label_classes: tuple[str, ...]
    detector_classes: tuple[str, ...]


def detect_labeled(detector: Detector, frames: FrameSource, *, label_classes: tuple[str, ...]) -> LabeledDetections:
    """Run ``detector`` over ``frames``. Each frame's rig brings its boxes back to the sensor's frame.

    Raises InvalidInput naming a frame without labels.
    """
    ids, labels, predictions = [], [], []
    for frame, found in detect_frames(detector, frames):
        if frame.labels is None:
            raise InvalidInput(f"frame {frame.id} has no labels to score against; choose a labelled split")
        ids.append(frame.id)
        labels.append(replace(frame.labels, boxes=frame.rig.to_sensor(frame.labels.boxes)))
        predictions.append(replace(found, boxes=frame.rig.to_sensor(found.boxes)))
    return LabeledDetections(
        ids=tuple(ids),
        labels=tuple(labels),
        predictions=tuple(predictions),
        label_classes=label_classes,
        detector_classes=detector.class_names,
    )


def score_waymo(detections: LabeledDetections, *, difficulty_is_level: bool) -> WaymoResult:
    """``evaluate_waymo`` of the detector's classes; see ``WaymoTruth.from_labels``. Labels of weight 0 are dropped: Waymo has none."""
    classes = _known(detections.detector_classes, WAYMO_NAMES, "Waymo")
    truths = []
    for labels in detections.labels:
        truth = WaymoTruth.from_labels(labels.select(labels.weight > 0), difficulty_is_level=difficulty_is_level)
        truths.append(replace(truth, classes=_renumbered(truth.classes, detections.label_classes, WAYMO_NAMES, classes)))
    found = [
        replace(p, classes=_renumbered(p.classes, detections.detector_classes, WAYMO_NAMES, classes))
        for p in detections.predictions
    ]
    return evaluate_waymo(truths, found, classes=classes)


def score_lyft(detections: LabeledDetections) -> LyftResult:
    """``evaluate_lyft`` of the detector's classes. Labels of weight 0 are dropped: Lyft has none."""
    classes = _known(detections.detector_classes, LYFT_NAMES, "Lyft")
    labels = [f.select(f.weight > 0) for f in detections.labels]
    truths = _lyft_boxes(detections.ids, labels, detections.label_classes)
    found = _lyft_boxes(detections.ids, detections.predictions, detections.detector_classes)
    scores = torch.cat([torch.zeros(0), *(p.scores for p in detections.predictions)])
    return evaluate_lyft(truths, replace(found, scores=scores), classes=classes)


def score_cross_dataset(detections: LabeledDetections, *, min_overlaps: Mapping[str, MinOverlap] = OFFICIAL) -> KittiResult:
    """``evaluate_cross_dataset`` of the detector's classes."""
    return evaluate_cross_dataset(
        detections.labels,
        detections.predictions,
        label_classes=detections.label_classes,
        detector_classes=detections.detector_classes,
        min_overlaps=min_overlaps,
    )


def _known(own: tuple[str, ...], names: Mapping[str, str], protocol: str) -> tuple[str, ...]:
    classes = tuple(dict.fromkeys(names[c] for c in own if c in names))
    if not classes:
        raise InvalidInput(f"none of the detector's classes {', '.join(own)} is {protocol}'s; known names are {', '.join(names)}")
    return classes


def _renumbered(numbers: Tensor, own: tuple[str, ...], names: Mapping[str, str], classes: tuple[str, ...]) -> Tensor:
    """Class numbers among ``classes`` of numbers among ``own``, -1 for those not there."""
    table = [classes.index(names[c]) if c in names and names[c] in classes else -1 for c in own]
    return torch.tensor(table, dtype=torch.int64)[numbers]


def _lyft_boxes(ids: tuple[str, ...], frames: Sequence[Labels | Predictions], own: tuple[str, ...]) -> LyftBoxes:
    return LyftBoxes(
        frames=tuple(frame_id for frame_id, f in zip(ids, frames, strict=True) for _ in range(len(f))),
        names=tuple(LYFT_NAMES.get(own[c], own[c]) for f in frames for c in f.classes.tolist()),
        boxes=torch.cat([torch.zeros(0, 7), *(f.boxes.data for f in frames)]),
    )
