"""The unlabeled half of a training batch: features for the student, and the pseudo labels that the teacher made for them.

    smashed scenes ─┬─ teacher ─ detections ─ label rule ─ F-GT ─ augmentation ─ mixing ─> features and labels   (smashed_half)
                    └──────────── features ─────────────────┴──────────┴───────────┘

    raw scans ─┬─ as they came ─ teacher ─ detections ─ label rule ─ boxes moved ─> labels      (raw_half)
               └─ moved ──────── student's encoder ───────────────────────────────> features

Both are plain functions of their arguments: labels and pasted objects can be looked at without a training.
Read next: `pseudo_labels.py` (the label rule), `feature_gt.py` (F-GT), `trainer.py`, which puts this half beside the labeled one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from ...core.features import CutFeatures
from ...core.structures import Boxes3D, Labels, Predictions
from ...datasets.augment import Movement
from ...datasets.batches import UnlabeledScan
from ..models.detector import Detector
from .feature_gt import FeatureObject, ObjectDatabase, paste_objects, sample_objects
from .feature_rotation import rotate_objects
from .methods import Method
from .pseudo_labels import labels_in_range
from .upcycle_config import UpcycleConfig


@dataclass(frozen=True, kw_only=True)
class UnlabeledHalf:
    """What the student is trained on in the unlabeled half of a batch of B scenes."""

    features: CutFeatures
    """Features of the B scenes, after pasting, augmentation and mixing."""

    labels: tuple[Labels, ...]
    """B sets of labels that fit `features`: pseudo labels and pasted objects."""

    found: tuple[Labels, ...]
    """B sets of pseudo labels as the teacher made them, in scenes as they came. For the log."""

    pasted: int = 0
    """Number of objects pasted into the B scenes. For the log."""


def smashed_half(
    features: CutFeatures,
    teacher: Detector,
    *,
    method: Method,
    config: UpcycleConfig,
    pasted_objects: ObjectDatabase | None,
    rng: np.random.Generator,
) -> UnlabeledHalf:
    """Label smashed scenes with the teacher, then paste objects, augment and mix as the method says.

    Args:
        features: Features of B smashed scenes (`collate_scenes`), without gradient, on any device.
        teacher: The EMA teacher, in evaluation mode. It sees the scenes as they are.
        method: `label_rule`, `max_paste_rotation`, `augmentation` and `mixing` are used.
        config: Thresholds and F-GT settings.
        pasted_objects: Objects that F-GT pastes; None pastes nothing.
        rng: Draws everything that is random here, scene by scene.

    Returns:
        Features on the teacher's device, with labels.

    Example:
        scenes = collate_scenes([store[0], store[1]])
        half = smashed_half(
            scenes, teacher, method=METHODS["hybrid"], config=config, pasted_objects=None, rng=np.random.default_rng(0)
        )
        half.labels[0].boxes.data  # (N, 7): what the teacher says about the first scene
    """
    with torch.no_grad():
        features = features.to(next(teacher.parameters()).device)
        predictions = teacher.predict(teacher.decode(features))
        found = [method.label_rule(p, config) for p in predictions]
    scenes, pasted = [], 0
    for index, (labels, prediction) in enumerate(zip(found, predictions, strict=True)):
        scene = features.scene(index)
        if pasted_objects is not None:
            objects = _objects_for(scene, labels, prediction, pasted_objects, method, config, rng)
            scene, labels = paste_objects(scene, labels, objects, config.f_gt, rng)
            pasted += len(objects)
        if method.augmentation is not None:
            scene, labels = method.augmentation(scene, labels, rng)
        scenes.append((scene, labels))
    if method.mixing is not None:
        partners = [scenes[i] for i in rng.permutation(len(scenes))]
        pairs = zip(scenes, partners, strict=True)
        scenes = [method.mixing(scene, labels, other, others, rng) for (scene, labels), (other, others) in pairs]
    return UnlabeledHalf(
        features=CutFeatures.collate([scene for scene, _ in scenes]),
        labels=tuple(labels for _, labels in scenes),
        found=tuple(found),
        pasted=pasted,
    )


def _objects_for(
    scene: CutFeatures,
    labels: Labels,
    prediction: Predictions,
    database: ObjectDatabase,
    method: Method,
    config: UpcycleConfig,
    rng: np.random.Generator,
) -> list[FeatureObject]:
    """Objects to paste into one scene, clear of its labels and of what the teacher half believes in."""
    obstacles = Boxes3D(data=prediction.boxes.data[prediction.iou_scores >= config.obstacle_score])
    objects = sample_objects(database, labels, obstacles, config.f_gt, rng)
    if method.max_paste_rotation:
        blocked = torch.cat([labels.boxes.data, obstacles.data])
        objects = rotate_objects(objects, blocked, scene.spec, config.f_gt, limit=method.max_paste_rotation, rng=rng)
    return objects


def raw_half(
    scans: Sequence[UnlabeledScan], teacher: Detector, student: Detector, *, method: Method, config: UpcycleConfig
) -> UnlabeledHalf:
    """Label raw scans with the teacher, and move scans and labels for the student.

    Args:
        scans: B raw scans, each with the movement under which the student sees it.
        teacher: The EMA teacher, in evaluation mode. It sees the scans as they came.
        student: Its encoder computes the features, with gradient unless the encoder is frozen.
        method: `label_rule` is used.
        config: Thresholds.

    Returns:
        Features of the moved scans, with the moved labels that are still in the detector's range.
    """
    with torch.no_grad():
        clean = teacher.encode([scan.frame.points for scan in scans])
        found = [method.label_rule(p, config) for p in teacher.predict(teacher.decode(clean))]
    labels = [labels_in_range(_moved(labels, scan.movement), clean.spec.grid) for labels, scan in zip(found, scans, strict=True)]
    features = student.encode([scan.moved().points for scan in scans])
    return UnlabeledHalf(features=features, labels=tuple(labels), found=tuple(found))


def _moved(labels: Labels, movement: Movement) -> Labels:
    return replace(labels, boxes=Boxes3D(data=movement.boxes(labels.boxes.data)))
