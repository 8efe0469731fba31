"""A detector on labeled frames, scored by the rules of Waymo, Lyft or ST3D: detections are made once, then translated.

Protocols have their own class names. Those of a detector and of a dataset are translated to them, and classes that a protocol does not know take
no part. KITTI's own protocol needs label files and a camera and is in `detect.py`. Read next: `score.py`, which chooses a protocol.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.frame import Frame, count_ignored
from ...core.ledger import Ledger
from ...core.structures import Labels, Predictions
from ...datasets.frame_source import FrameSource
from ..models.detector import Detector
from .class_translation import translate
from .cross_dataset import evaluate_cross_dataset
from .detect import detect_frames
from .kitti import OFFICIAL, KittiResult, MinOverlap
from .lyft import LYFT_NAMES, LyftBoxes, LyftResult, evaluate_lyft
from .waymo import WAYMO_NAMES, WaymoResult, WaymoTruth, evaluate_waymo
from .waymo_objects import WaymoDetections


@dataclass(frozen=True, kw_only=True)
class LabeledDetections:
    """Frames with labels and detections, boxes in the sensor frame."""

    ids: tuple[str, ...]
    """Frame ids."""
    labels: tuple[Labels, ...]
    """Labels per frame."""
    predictions: tuple[Predictions, ...]
    """Detections per frame."""
    label_classes: tuple[str, ...]
    """Names of the class numbers of the labels."""
    detector_classes: tuple[str, ...]
    """Names of the class numbers of the detections."""
    ledger: Ledger = Ledger()
    """Labels by class; how many hold no point or lie outside the detector's range."""


def count_labels(frame: Frame, classes: tuple[str, ...], detector: Detector) -> Ledger:
    """Count the labels of a frame that a detector can find.

    Args:
        frame: The frame in the frame of the detector's points. Labels of weight 0 are counted by type (`Ledger.types_ignored`).
        classes: Names of the class numbers.
        detector: The detector whose range matters.

    Returns:
        Labels by class, those without a point, and those outside the range; nothing for a frame without labels.
    """
    if frame.labels is None:
        return Ledger()
    _, types = count_ignored(frame.labels, classes, frame.reading)
    labels = frame.labels.select(frame.labels.weight > 0)
    spec = getattr(detector, "spec", None)  # a detector of the user's own may have no grid
    low, high = (-math.inf,) * 3, (math.inf,) * 3
    if spec is not None:
        low, high = spec.grid.range[:3], spec.grid.range[3:]
    centers = labels.boxes.data[:, :3]
    within = (centers >= centers.new_tensor(low)) & (centers < centers.new_tensor(high))
    outside = ~within.all(1)

    def by_class(keep: Tensor) -> dict[str, int]:
        return {name: n for i, name in enumerate(classes) if (n := int((labels.classes[keep] == i).sum()))}

    return Ledger(
        boxes=by_class(torch.ones_like(outside)),
        boxes_empty=by_class(labels.num_points == 0),
        boxes_outside_range=by_class(outside),
        boxes_outside_height=int((within[:, :2].all(1) & ~within[:, 2]).sum()),
        types_ignored=types,
    )


def detect_labeled(detector: Detector, frames: FrameSource, *, label_classes: tuple[str, ...]) -> LabeledDetections:
    """Run a detector over labeled frames. Each frame's rig brings its boxes back to the sensor frame.

    Args:
        detector: The detector, on its device.
        frames: The frames.
        label_classes: Names of the class numbers of the labels.

    Returns:
        Labels and detections.

    Raises:
        InvalidInput: A frame has no labels; the message names it.
    """
    ids, labels, predictions = [], [], []
    ledger = Ledger()
    for frame, found in detect_frames(detector, frames):
        if frame.labels is None:
            raise InvalidInput(f"frame {frame.id} has no labels to score against; choose a labeled split")
        ids.append(frame.id)
        ledger = ledger + count_labels(frame, label_classes, detector)
        labels.append(replace(frame.labels, boxes=frame.rig.to_sensor(frame.labels.boxes)))
        predictions.append(replace(found, boxes=frame.rig.to_sensor(found.boxes)))
    return LabeledDetections(
        ids=tuple(ids),
        labels=tuple(labels),
        predictions=tuple(predictions),
        label_classes=label_classes,
        detector_classes=detector.class_names,
        ledger=ledger,
    )


def score_waymo(detections: LabeledDetections, *, difficulty_is_level: bool) -> WaymoResult:
    """Score the detector's classes by Waymo's protocol. Labels of weight 0 are dropped, because Waymo has none.

    Args:
        detections: Labels and detections.
        difficulty_is_level: Whether the labels' difficulty holds Waymo's level; see `WaymoTruth.from_labels`.

    Returns:
        AP and APH.

    Raises:
        InvalidInput: Waymo knows none of the detector's classes.
    """
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
    """Score the detector's classes by Lyft's mAP. Labels of weight 0 are dropped, because Lyft has none.

    Args:
        detections: Labels and detections.

    Returns:
        AP by class and minimum overlap.

    Raises:
        InvalidInput: Lyft knows none of the detector's classes.
    """
    classes = _known(detections.detector_classes, LYFT_NAMES, "Lyft")
    labels = [f.select(f.weight > 0) for f in detections.labels]
    truths = _lyft_boxes(detections.ids, labels, detections.label_classes)
    found = _lyft_boxes(detections.ids, detections.predictions, detections.detector_classes)
    scores = torch.cat([torch.zeros(0), *(p.scores for p in detections.predictions)])
    return evaluate_lyft(truths, replace(found, scores=scores), classes=classes)


def score_cross_dataset(detections: LabeledDetections, *, min_overlaps: Mapping[str, MinOverlap] = OFFICIAL) -> KittiResult:
    """Score the detector's classes by ST3D's protocol.

    Args:
        detections: Labels and detections.
        min_overlaps: Minimum overlap by class.

    Returns:
        KITTI's AP in BEV and 3D.

    Raises:
        InvalidInput: Both sides share no class with a minimum overlap.
    """
    return evaluate_cross_dataset(
        detections.labels,
        detections.predictions,
        label_classes=detections.label_classes,
        detector_classes=detections.detector_classes,
        min_overlaps=min_overlaps,
    )


def waymo_objects(detections: LabeledDetections) -> tuple[list[WaymoDetections], tuple[str, ...]]:
    """Name the detections of a prepared Waymo dataset for Waymo's own programs.

    Args:
        detections: Detections whose frame ids are CONTEXT_TIMESTAMP, as `prepare waymo` makes them.

    Returns:
        The detections per frame, and Waymo's names of the detector's classes.

    Raises:
        InvalidInput: A frame has another kind of id.
    """
    frames = []
    for frame_id, boxes in zip(detections.ids, detections.predictions, strict=True):
        context, _, time = frame_id.rpartition("_")
        if not (context and time.isdecimal()):
            raise InvalidInput(
                f"Waymo's programs need frame ids CONTEXT_TIMESTAMP, as `prepare waymo` makes them; found {frame_id!r}"
            )
        frames.append(WaymoDetections(context_name=context, timestamp_micros=int(time), predictions=boxes))
    return frames, tuple(translate(c, WAYMO_NAMES) or c for c in detections.detector_classes)


def _known(own: tuple[str, ...], names: Mapping[str, str], protocol: str) -> tuple[str, ...]:
    classes = tuple(dict.fromkeys(known for c in own if (known := translate(c, names)) is not None))
    if not classes:
        raise InvalidInput(f"none of the detector's classes {', '.join(own)} is {protocol}'s; known names are {', '.join(names)}")
    return classes


def _renumbered(numbers: Tensor, own: tuple[str, ...], names: Mapping[str, str], classes: tuple[str, ...]) -> Tensor:
    """Class numbers among `classes` of numbers among `own`, -1 for those not there."""
    known = [translate(c, names) for c in own]
    table = [classes.index(name) if name in classes else -1 for name in known]
    return torch.tensor(table, dtype=torch.int64)[numbers]


def _lyft_boxes(ids: tuple[str, ...], frames: Sequence[Labels | Predictions], own: tuple[str, ...]) -> LyftBoxes:
    return LyftBoxes(
        frames=tuple(frame_id for frame_id, f in zip(ids, frames, strict=True) for _ in range(len(f))),
        names=tuple(translate(own[c], LYFT_NAMES) or own[c] for f in frames for c in f.classes.tolist()),
        boxes=torch.cat([torch.zeros(0, 7), *(f.boxes.data for f in frames)]),
    )
