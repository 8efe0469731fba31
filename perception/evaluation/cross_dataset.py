"""KITTI's metric on datasets that are not KITTI's: the protocol of ST3D and its successors for Waymo and Lyft as targets.

Papers on domain adaptation report one number on every target, KITTI's AP, so that targets can be compared (ST3D,
`pcdet/datasets/lyft/lyft_dataset.py`, `kitti_eval`; `tools/cfgs/dataset_configs/da_lyft_dataset.yaml`). KITTI's rules need a camera. Here each box
gets the same 2D box of 50 px, occlusion 0 and truncation 0, so that every object counts as easy and the three difficulties are equal. Objects and
detections without a corner within 75.2 m to each side and 10 m in height are dropped, and classes carry KITTI's names. Everything else is
`evaluate_kitti`. The metrics bbox and aos mean nothing here.

ST3D drops by range on Lyft only; its Waymo evaluation keeps everything. It turns other classes into Person_sitting, which only matters to pedestrians;
we drop them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ...core.boxes import corners_3d, lidar_to_kitti_camera, wrap_angle
from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.structures import Labels, Predictions
from ...datasets.kitti_text import KittiObjects
from .class_translation import translate
from .kitti import BOX_METRICS, OFFICIAL, KittiResult, MinOverlap, evaluate_kitti

# To KITTI's names; the maps of ST3D for Waymo and Lyft. A class not named here takes no part.
KITTI_NAMES: Mapping[str, str] = {
    "Car": "Car",
    "Pedestrian": "Pedestrian",
    "Cyclist": "Cyclist",
    "Vehicle": "Car",
    "car": "Car",
    "pedestrian": "Pedestrian",
    "truck": "Truck",
}
RANGE = (-75.2, -75.2, -10.0, 75.2, 75.2, 10.0)  # m, LiDAR frame: low x y z, high x y z

_LOOKING_AHEAD = torch.tensor(  # a camera at the LiDAR: x right, y down, z forward
    [[0.0, -1.0, 0.0, 0.0], [0.0, 0.0, -1.0, 0.0], [1.0, 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0]], dtype=torch.float64
)
_FAKE_BOX = (0.0, 0.0, 50.0, 50.0)  # px


def evaluate_cross_dataset(
    labels: Sequence[Labels],
    predictions: Sequence[Predictions],
    *,
    label_classes: tuple[str, ...],
    detector_classes: tuple[str, ...],
    names: Mapping[str, str] = KITTI_NAMES,
    limits: tuple[float, ...] | None = RANGE,
    min_overlaps: Mapping[str, MinOverlap] = OFFICIAL,
) -> KittiResult:
    """Compute KITTI's AP for the classes that the detector knows.

    Args:
        labels: Labels per frame, in the LiDAR frame. A label of weight 0 counts neither as correct nor as wrong.
        predictions: Detections of the same frames.
        label_classes: Names of the class numbers of the labels.
        detector_classes: Names of the class numbers of the detections.
        names: KITTI's name of each class name.
        limits: Low x y z and high x y z in m; None keeps everything.
        min_overlaps: Minimum overlap by class.

    Returns:
        KITTI's result with BEV and 3D as its `metrics`.

    Raises:
        InvalidInput: The numbers of frames differ, or no class with a minimum overlap is known to both sides.
    """
    names = known_names(names, min_overlaps)
    known = {translate(c, names) for c in label_classes}
    shared = dict.fromkeys(kitti for c in detector_classes if (kitti := translate(c, names)) is not None)
    classes = tuple(c for c in shared if c in known and c in min_overlaps)
    if not classes:
        raise InvalidInput(
            f"the detector's classes {', '.join(map(shown, detector_classes))} and the labels' {', '.join(map(shown, label_classes))} "
            f"share none with a minimum overlap ({', '.join(min_overlaps)}); known names are {', '.join(names)}. Give one with --overlap "
            "CLASS VALUE"
        )
    truths = [
        cross_dataset_objects(f.boxes.data, _kitti_types(f.classes, label_classes, names), ignored=f.weight == 0, limits=limits)
        for f in labels
    ]
    found = [
        cross_dataset_objects(f.boxes.data, _kitti_types(f.classes, detector_classes, names), scores=f.scores, limits=limits)
        for f in predictions
    ]
    return replace(evaluate_kitti(truths, found, classes=classes, min_overlaps=min_overlaps), metrics=BOX_METRICS)


def known_names(names: Mapping[str, str], min_overlaps: Mapping[str, MinOverlap]) -> Mapping[str, str]:
    """Add the classes that have a minimum overlap and no name of KITTI's: they keep their own.

    Args:
        names: KITTI's name of each class name.
        min_overlaps: Minimum overlap by class.

    Returns:
        KITTI's name, or the class's own, by class name.
    """
    return {**{c: c for c in min_overlaps if translate(c, names) is None}, **names}


def without_camera(objects: KittiObjects) -> KittiObjects:
    """Make the content of a label or detection file ready for ST3D's rules: every object gets the same 2D box and counts.

    Args:
        objects: Content of a file.

    Returns:
        The objects without DontCare regions and objects that have no 3D box. Nothing is dropped by range.
    """
    keep = torch.tensor([kind.casefold() != "dontcare" for kind in objects.types], dtype=torch.bool)
    kept = objects.select(keep & (objects.dimensions > 0).all(1))
    return replace(
        kept,
        truncated=torch.zeros_like(kept.truncated),
        occluded=torch.zeros_like(kept.occluded),
        bbox=torch.tensor(_FAKE_BOX, dtype=torch.float64).expand(len(kept), 4),
    )


def cross_dataset_objects(
    boxes: Tensor,
    types: Sequence[str | None],
    *,
    scores: Tensor | None = None,
    ignored: Tensor | None = None,
    limits: tuple[float, ...] | None = RANGE,
) -> KittiObjects:
    """Boxes as KITTI's objects in front of a camera that does not exist.

    Args:
        boxes: (N, 7) boxes in the LiDAR frame.
        types: KITTI's name per box; None leaves the box out.
        scores: (N,) scores of detections.
        ignored: (N,) bool, objects beyond all difficulties: finding them is neither correct nor wrong.
        limits: Low x y z and high x y z in m; None keeps everything.

    Returns:
        The objects that are kept.
    """
    location, dimensions, rotation_y = lidar_to_kitti_camera(boxes, _LOOKING_AHEAD)
    keep = torch.tensor([t is not None for t in types], dtype=torch.bool)
    if limits is not None:
        corners = corners_3d(boxes.double())
        low, high = corners.new_tensor(limits[:3]), corners.new_tensor(limits[3:])
        keep &= ((corners >= low) & (corners <= high)).all(-1).any(-1)
    n = len(types)
    hidden = torch.zeros(n, dtype=torch.bool) if ignored is None else ignored
    return KittiObjects(
        types=tuple(t or "" for t in types),
        truncated=hidden.double(),
        occluded=torch.zeros(n, dtype=torch.int64),
        alpha=wrap_angle(rotation_y - torch.atan2(location[:, 0], location[:, 2])),
        bbox=torch.tensor(_FAKE_BOX, dtype=torch.float64).expand(n, 4),
        dimensions=dimensions,
        location=location,
        rotation_y=rotation_y,
        scores=None if scores is None else scores.double(),
    ).select(keep)


def _kitti_types(classes: Tensor, class_names: tuple[str, ...], names: Mapping[str, str]) -> list[str | None]:
    kitti = [translate(name, names) for name in class_names]
    return [kitti[c] for c in classes.tolist()]
