"""The few numbers by which methods are compared: a detector on a labelled split by one protocol, as name -> percent."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

from ...core.errors import InvalidInput
from ...datasets.kitti_text import KittiObjects
from ...datasets.prepared import PreparedDataset
from ..models.detector import Detector
from .detect import detect_frames, kitti_detections
from .kitti import LOOSE, OFFICIAL, KittiResult, evaluate_kitti
from .protocols import detect_labeled, score_cross_dataset, score_lyft, score_waymo

Protocol = Literal["kitti", "waymo", "lyft", "cross_dataset"]
Scores = Mapping[str, float]
"""Metric -> percent, as {"Car 3D 0.7": 43.1}; in the order of the detector's classes."""

_OWN: Mapping[str, Protocol] = {"kitti": "kitti", "waymo": "waymo", "lyft": "lyft"}  # by a dataset's layout


def own_protocol(frames: PreparedDataset) -> Protocol:
    """The protocol of the dataset that ``frames`` were prepared from. Raises InvalidInput if its layout has none."""
    layout = frames.origin.layout
    if layout not in _OWN:
        raise InvalidInput(
            f"{frames.root} has the layout {layout!r}, which has no protocol of its own; choose one with --protocol"
        )
    return _OWN[layout]


def kitti_truths(frames: PreparedDataset) -> Callable[[str], KittiObjects]:
    """Label files by frame id. Raises InvalidInput for a dataset that holds none, before any frame is run."""
    frames.kitti_objects(frames.ids[0])
    return frames.kitti_objects


def headline(detector: Detector, frames: PreparedDataset, protocol: Protocol) -> Scores:
    """Scores of ``detector``, on its device; puts it into evaluation mode.

    kitti, cross_dataset: 3D and BEV AP, R40, moderate, by the official least overlaps, then by the loose ones, which the names tell.
    waymo: AP and APH at LEVEL_1 and LEVEL_2 over all ranges. lyft: mean AP, then that of each class.
    A class without an object to find has no score.
    """
    if protocol == "kitti":
        truth_of = kitti_truths(frames)
        found = list(detect_frames(detector, frames))
        truths = [truth_of(frame.id) for frame, _ in found]
        detections = [kitti_detections(frame, p, detector.class_names) for frame, p in found]
        return kitti_scores(
            *(
                evaluate_kitti(truths, detections, classes=detector.class_names, min_overlaps=overlaps)
                for overlaps in (OFFICIAL, LOOSE)
            )
        )
    labeled = detect_labeled(detector, frames, label_classes=frames.classes)
    if protocol == "cross_dataset":
        return kitti_scores(*(score_cross_dataset(labeled, min_overlaps=overlaps) for overlaps in (OFFICIAL, LOOSE)))
    if protocol == "waymo":
        waymo = score_waymo(labeled, difficulty_is_level=frames.origin.layout == "waymo")
        values = {
            f"{name} {metric} L{level}": getattr(ranges["all"][f"LEVEL_{level}"], metric.lower())
            for name, ranges in waymo.classes.items()
            for level in (1, 2)
            for metric in ("AP", "APH")
        }
    else:
        lyft = score_lyft(labeled)
        values = {"mAP": lyft.mean_ap} | {f"{name} AP": lyft.class_ap(name) for name in lyft.classes}
    return {name: value for name, value in values.items() if value is not None}


def kitti_scores(official: KittiResult, loose: KittiResult) -> Scores:
    """3D and BEV AP, R40, moderate, of every class with an object: by ``OFFICIAL``, then by ``LOOSE``, as the names tell."""
    scores = {}
    for name in official.classes:
        for result, overlaps in ((official, OFFICIAL), (loose, LOOSE)):
            if result.classes[name].ground_truths[1]:
                scores[f"{name} 3D {overlaps[name].box_3d:g}"] = result.classes[name].box_3d.r40[1]
                scores[f"{name} BEV {overlaps[name].bev:g}"] = result.classes[name].bev.r40[1]
    return scores
