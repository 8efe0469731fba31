"""Looks at the scenes of a store with a teacher, for the choice of scenes to label. Read next: `scene_choice.py`."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ...core.features import CutFeatures
from ...core.structures import Predictions
from ..models.detector import Detector
from .joined_stores import FleetScenes
from .scene_choice import SceneViews
from .store import collate_scenes

BANDS = (15.0, 30.0, 45.0)
"""Distances from the sensor, in meters, between the bands in which expected objects are counted."""


@torch.no_grad()
def view_scenes(
    store: FleetScenes, teacher: Detector, *, batch: int = 4, on_progress: Callable[[int, int], None] | None = None
) -> SceneViews:
    """Let a teacher look at every scene of a store.

    A scene is described by the mean of its BEV cells at each height, the mean and root mean square of each channel, and the objects that the
    teacher expects by class and distance. Each of these parts counts the same, however many numbers it has.

    Args:
        store: The fleet's scenes, made by the teacher's encoder.
        teacher: The detector that doubts. It is put into evaluation mode.
        batch: Scenes that are decoded at once.
        on_progress: Is told scenes done and scenes in all.

    Returns:
        What the choice needs, on the CPU.
    """
    teacher.eval()
    device = next(teacher.parameters()).device
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]] = []
    for first in range(0, len(store), batch):
        rows = range(first, min(first + batch, len(store)))
        scenes = collate_scenes([store.readable(i) for i in rows], encoders=store.fingerprints).to(device)
        features = teacher.encoder.restore(scenes)
        for index, found in enumerate(teacher.predict(teacher.decode(features))):
            parts.append(_view(features.scene(index), found, len(teacher.class_names)))
        if on_progress is not None:
            on_progress(rows.stop, len(store))
    layers, channels, objects, doubt, cells = (
        (torch.stack(column).cpu() for column in zip(*parts, strict=True)) if parts else _none()
    )
    described = torch.cat([_balanced(part) for part in (layers, channels, objects.flatten(1))], 1)
    return SceneViews(described=described, doubt=doubt, objects=objects.sum(2), usable=cells > 0)


def entropy(probability: Tensor) -> Tensor:
    """Entropy of a yes-or-no decision, elementwise.

    Args:
        probability: Numbers in 0..1.

    Returns:
        Bits, 0 for a sure decision and 1 for a half.
    """
    p = probability.double().clamp(0, 1)
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)) / torch.log(p.new_tensor(2.0))


def _view(scene: CutFeatures, found: Predictions, classes: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Cells by height, channel statistics, expected objects (K, bands), doubt and number of cells of one scene."""
    voxels = scene.voxels
    features = voxels.features.double()
    layers = F.one_hot(voxels.coords[:, 1].long(), voxels.shape[0]).double().sum(0) / 1000
    count = features.new_tensor(float(len(features)))
    channels = torch.cat([features.sum(0), features.square().sum(0)]) / count.clamp_min(1)
    band = torch.bucketize(found.boxes.data[:, :2].norm(dim=1), found.boxes.data.new_tensor(BANDS))
    place = found.classes * (len(BANDS) + 1) + band
    objects = features.new_zeros(classes * (len(BANDS) + 1)).index_add(0, place, found.scores.double())
    return layers, channels, objects.unflatten(0, (classes, -1)), entropy(found.scores).sum(), count


def _none() -> tuple[Tensor, ...]:
    """The columns of no scene at all."""
    return torch.zeros(0, 0), torch.zeros(0, 0), torch.zeros(0, 0, 0), torch.zeros(0), torch.zeros(0)


def _balanced(part: Tensor) -> Tensor:
    """Standard scores divided by the root of their number, so that parts of few and of many numbers weigh the same.

    A column that differs by rounding alone counts nothing.
    """
    spread, mean = part.std(0, correction=0), part.mean(0)
    return (part - mean) / torch.where(spread > 1e-5 * (1 + mean.abs()), spread, torch.inf) / max(1, part.shape[1]) ** 0.5
