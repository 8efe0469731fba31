"""The unlabeled half of a training batch: features for the student, and the pseudo labels that the teacher made for them.

    smashed scenes ─┬─ teacher ─ detections ─ label rule ─ F-GT ─ augmentation ─ mixing ─> features and labels   (smashed_half)
                    └──────────── features ─────────────────┴──────────┴───────────┘

    raw scans ─┬─ as they came ─ teacher ─ detections ─ label rule ─ boxes moved ─> labels      (raw_half)
               └─ moved ──────── student's encoder ───────────────────────────────> features

Both are plain functions of their arguments: labels and pasted objects can be looked at without a training. What the functions of a
method return is checked, because a caller's own function would otherwise train silently on wrong labels or cells.
Read next: `pseudo_labels.py` (the label rule), `feature_gt.py` (F-GT), `trainer.py`, which puts this half beside the labeled one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ...core.cut import cell_index
from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.structures import Boxes3D, Labels, Predictions
from ...core.tensor_value import shape_of
from ...datasets.augment import Movement
from ...datasets.batches import UnlabeledScan
from ..models.detector import Detector
from .feature_gt import FeatureObject, ObjectDatabase, paste_objects, sample_objects
from .feature_rotation import rotate_objects
from .methods import Method, function_name
from .pseudo_labels import labels_in_range
from .upcycle_config import UpcycleConfig
from .uploaded import only_seen


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

    Raises:
        InvalidInput: A function of the method returned labels or features that cannot be right; the message names it.

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
        found = [_pseudo_labels(p, teacher, method, config) for p in predictions]
    scenes, pasted = [], 0
    for index, (labels, prediction) in enumerate(zip(found, predictions, strict=True)):
        scene = features.scene(index)
        if pasted_objects is not None:
            objects = _objects_for(scene, labels, prediction, pasted_objects, method, config, rng)
            scene, labels = paste_objects(scene, labels, objects, config.f_gt, rng)
            pasted += len(objects)
        if method.augmentation is not None:
            changed = method.augmentation(scene, labels, rng)
            scene, labels = _checked_scene(changed, method.augmentation, "augmentation", teacher, (scene, labels))
        scenes.append((scene, labels))
    if method.mixing is not None:
        partners = [scenes[i] for i in rng.permutation(len(scenes))]
        scenes = [
            _checked_scene(method.mixing(*a, b[0], b[1], rng), method.mixing, "mixing", teacher, a, b)
            for a, b in zip(scenes, partners, strict=True)
        ]
    if not teacher.encoder.sends_everywhere:
        scenes = [(scene, only_seen(labels, scene)) for scene, labels in scenes]
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

    Raises:
        InvalidInput: The label rule returned labels that cannot be right; the message names it.
    """
    with torch.no_grad():
        clean = teacher.encode([scan.frame.points for scan in scans])
        found = [_pseudo_labels(p, teacher, method, config) for p in teacher.predict(teacher.decode(clean))]
    labels = [labels_in_range(_moved(labels, scan.movement), clean.spec.grid) for labels, scan in zip(found, scans, strict=True)]
    features = student.encode([scan.moved().points for scan in scans])
    return UnlabeledHalf(features=features, labels=tuple(labels), found=tuple(found))


def _pseudo_labels(predictions: Predictions, teacher: Detector, method: Method, config: UpcycleConfig) -> Labels:
    labels = method.label_rule(predictions, config)
    return _checked_labels(labels, method.label_rule, "label rule", teacher, predictions.boxes)


def _checked_labels(labels: object, function: Callable[..., object], role: str, teacher: Detector, *given: Boxes3D) -> Labels:
    """Labels as `function` returned them, unless they would train something wrong.

    Boxes outside the grid are legal. Odd boxes are not blamed on a function that was `given` such boxes: an untrained teacher may find
    infinite ones.
    """
    who = f"the {role} {function_name(function)}"
    if not isinstance(labels, Labels):
        raise InvalidInput(f"{who} must return Labels, found {shape_of(labels)}; make them with Labels.make")
    if not len(labels):
        return labels
    device, count = next(teacher.parameters()).device, len(teacher.class_names)
    columns = (labels.boxes.data, labels.classes, labels.weight, labels.exact, labels.box_weight)
    wrong = sorted({str(column.device) for column in columns if column.device != device})
    if wrong:
        raise InvalidInput(f"{who} must return labels on {device}, where its input lies, found some on {', '.join(wrong)}")
    odd = _odd_boxes(labels.boxes)
    faults = {
        f"a class outside 0 to {count - 1}": (labels.classes < 0) | (labels.classes >= count),
        "a weight that is negative or not finite": ~(labels.weight >= 0) | labels.weight.isinf(),
        "a box_weight that is negative or not finite": ~(labels.box_weight >= 0) | labels.box_weight.isinf(),
        "a box with a value that is not finite or a size that is zero or negative": odd,
    }
    if not torch.stack(list(faults.values())).any():
        return labels
    for fault, rows in faults.items():
        if rows.any() and not (rows is odd and any(_odd_boxes(boxes).any() for boxes in given)):
            raise InvalidInput(f"{who} returned {fault} (label {int(rows.nonzero()[0])} of {len(labels)}); correct the function")
    return labels


def _odd_boxes(boxes: Boxes3D) -> Tensor:
    """(N,) bool, boxes with a value that is not finite or a size that is not positive."""
    return ~(boxes.data.isfinite().all(1) & (boxes.data[:, 3:6] > 0).all(1))


def _checked_scene(
    result: object,
    function: Callable[..., object],
    role: str,
    teacher: Detector,
    *given: tuple[CutFeatures, Labels],
) -> tuple[CutFeatures, Labels]:
    """Scene and labels as `function` made them of the scenes `given`, unless the scene is none that a decoder can read."""
    who = f"the {role} {function_name(function)}"
    if not isinstance(result, tuple | list) or len(result) != 2 or not isinstance(result[0], CutFeatures):
        kinds = [type(part).__name__ for part in result] if isinstance(result, tuple | list) else type(result).__name__
        raise InvalidInput(f"{who} must return a pair of CutFeatures and Labels, found {kinds}")
    scene = result[0]
    fault = _fault_of_scene(scene, given[0][0])  # also of a scene that the function changed in place
    if fault is None and not _finite(scene) and all(_finite(before) for before, _ in given):
        fault = "features or keypoints that are not finite"
    if fault is not None:
        raise InvalidInput(f"{who} returned {fault}; correct the function")
    return scene, _checked_labels(result[1], function, role, teacher, *(labels.boxes for _, labels in given))


def _fault_of_scene(scene: CutFeatures, old: CutFeatures) -> str | None:
    """What is wrong with the form and the cells of a scene that was made of `old`; None where nothing is."""
    if scene.spec != old.spec:
        return f"features of another cut ({scene.spec.layer!r}) than it was given"
    if scene.batch_size != 1:
        return f"a batch of {scene.batch_size} scenes instead of one scene"
    for what, new, before in (("the cells", scene.voxels, old.voxels), ("the keypoints", scene.keypoints, old.keypoints)):
        if new is None or before is None:
            continue
        a, b = new.features, before.features
        if (a.dtype, a.device) != (b.dtype, b.device):
            return f"features of {what} of type {a.dtype} on {a.device} instead of {b.dtype} on {b.device}"
    coords = scene.voxels.coords
    if coords.device != old.voxels.coords.device:
        return f"cells on {coords.device} instead of {old.voxels.coords.device}"
    limits = coords.new_tensor([1, *scene.voxels.shape])
    outside = ((coords < 0) | (coords >= limits)).any(1)
    if outside.any():
        row = int(outside.nonzero()[0])
        return f"a cell outside the grid: (batch, z, y, x) = {coords[row].tolist()}, in a grid of {limits.tolist()}"
    if len(cell_index(coords[:, 1:], scene.voxels.shape).unique()) < len(coords):
        return "the same cell more than once"
    return None


def _finite(scene: CutFeatures) -> bool:
    """Whether all features and keypoints of a scene are finite."""
    tensors = [scene.voxels.features]
    if scene.keypoints is not None:
        tensors += [scene.keypoints.features, scene.keypoints.xyz]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def _moved(labels: Labels, movement: Movement) -> Labels:
    return replace(labels, boxes=Boxes3D(data=movement.boxes(labels.boxes.data)))
