"""The AP that a detector reaches on rebuilt scans, compared with raw ones: what an attacker can still use a rebuilt scan for.

The detector is one that was trained on raw scans; it never saw a rebuilt one. AP is KITTI's by the rules of ST3D, which need no camera
(`perception/evaluation/cross_dataset.py`), on the same frames and labels for raw and rebuilt scans. Those rules sample the recall at 41
places, so with fewer than 41 objects even a perfect detector stays below 100. Objects with fewer than five points in the true scan, such
as those outside the grid, count neither as found nor as missed.

Read next: `geometry_metrics.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...core.errors import InvalidInput, require
from ...core.frame import Frame
from ...core.structures import Labels, PointCloud
from ...ops.points_in_boxes import count_points_in_boxes
from ..evaluation.kitti import LOOSE, OFFICIAL, KittiResult
from ..evaluation.protocols import detect_labeled, score_cross_dataset
from ..models.detector import Detector
from .frames import AuditFrame

FEWEST_POINTS = 5
"""Points of the true scan that an object needs to count."""

_MODERATE = 1  # without a camera all difficulties are equal


@dataclass(frozen=True, kw_only=True)
class ClassAp:
    """AP of one class, R40, in percent."""

    name: str
    """KITTI's name of the class."""
    objects: int
    """Objects to find."""
    box_3d: float
    """3D AP at the official minimum overlap (0.7 for cars, 0.5 for the others)."""
    bev: float
    """BEV AP at the official minimum overlap."""
    box_3d_loose: float
    """3D AP at the loose minimum overlap (0.5 for cars, 0.25 for the others)."""
    bev_loose: float
    """BEV AP at the loose minimum overlap."""


@dataclass(frozen=True, kw_only=True)
class DetectionAp:
    """What a detector finds in the scans of some frames."""

    frames: int
    """Number of frames."""
    classes: tuple[ClassAp, ...]
    """AP of each class that detector and labels share and that has an object to find."""


def raw_scans(frames: Sequence[AuditFrame]) -> list[PointCloud]:
    """Give the true scans of frames, the upper bound of what a detector finds.

    Args:
        frames: The frames.

    Returns:
        The scans, in order.
    """
    return [frame.scan for frame in frames]


def rebuilt_scan(
    xyz: Tensor, feature_names: tuple[str, ...], *, constant: float = 0.0, guesses: Mapping[str, Tensor] | None = None
) -> PointCloud:
    """Give rebuilt points the point features that a detector reads.

    Args:
        xyz: (N, 3) points in the shifted frame, in meters, such as those that `OperatingPoint.select` gives.
        feature_names: Point features that the detector reads.
        constant: Value of each feature that nobody guessed. The mean intensity of the attacker's own scans is the fair choice.
        guesses: (N,) what the attack guessed, by the name of the feature.

    Returns:
        The scan.

    Raises:
        InvalidInput: A guess has another number of rows than `xyz`, or belongs to a feature that the detector does not read.
    """
    known = dict(guesses or {})
    unread = [name for name in known if name not in feature_names]
    require(not unread, f"there is a guess for {', '.join(unread)}, and the detector reads {feature_names or 'no point feature'}")
    wrong = [name for name, column in known.items() if column.shape != xyz.shape[:1]]
    require(not wrong, f"the guess for {', '.join(wrong)} needs one value for each of the {len(xyz)} points")
    columns = [known.get(name, xyz.new_full((len(xyz),), constant)).float() for name in feature_names]
    features = torch.stack(columns, 1) if columns else xyz.new_zeros(len(xyz), 0)
    return PointCloud(xyz=xyz.float(), features=features, feature_names=feature_names)


def detection_ap(
    detector: Detector, frames: Sequence[AuditFrame], scans: Sequence[PointCloud], classes: tuple[str, ...]
) -> DetectionAp:
    """Run a detector over scans, and score it with the labels of the frames that the scans belong to.

    Args:
        detector: The detector, on its device. It is put into evaluation mode.
        frames: Labeled frames.
        scans: One scan per frame: the true one (`raw_scans`) or a rebuilt one (`rebuilt_scan`).
        classes: Names of the class numbers of the labels.

    Returns:
        AP by class.

    Raises:
        InvalidInput: The numbers differ, there is no frame, a frame has no labels, or detector and labels share no class.
    """
    require(len(frames) == len(scans) > 0, f"each frame needs one scan, found {len(frames)} frames and {len(scans)} scans")
    shown = [Frame(id=frame.id, points=scan, labels=_countable(frame)) for frame, scan in zip(frames, scans)]
    found = detect_labeled(detector, shown, label_classes=classes)
    official, loose = (score_cross_dataset(found, min_overlaps=overlaps) for overlaps in (OFFICIAL, LOOSE))
    scored = [name for name in official.classes if official.classes[name].ground_truths[_MODERATE]]
    return DetectionAp(frames=len(frames), classes=tuple(_class_ap(name, official, loose) for name in scored))


def _countable(frame: AuditFrame) -> Labels:
    """The labels of a frame; weight 0 for objects of which the true scan shows too little."""
    if frame.labels is None:
        raise InvalidInput(f"frame {frame.id} has no labels to score against; take labeled frames")
    seen = count_points_in_boxes(frame.scan.xyz, frame.labels.boxes.data) >= FEWEST_POINTS
    return replace(frame.labels, weight=frame.labels.weight * seen)


def _class_ap(name: str, official: KittiResult, loose: KittiResult) -> ClassAp:
    strict, easy = official.classes[name], loose.classes[name]
    return ClassAp(
        name=name,
        objects=strict.ground_truths[_MODERATE],
        box_3d=strict.box_3d.r40[_MODERATE],
        bev=strict.bev.r40[_MODERATE],
        box_3d_loose=easy.box_3d.r40[_MODERATE],
        bev_loose=easy.bev.r40[_MODERATE],
    )
