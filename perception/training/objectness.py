"""Trains the objectness head of a region upload on labeled frames, and sets its threshold on frames that it did not learn from.

The encoder is frozen, so its features are computed once and the small head learns from them within a minute.

Read next: `perception/models/defences/region.py`, which uses the head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.features import CutFeatures
from ...core.structures import Labels, PointCloud
from ..models.defences.region import RegionUpload
from ..models.footprint import footprint
from ..models.losses import sigmoid_focal_loss

HELD_OUT = 0.25
"""Share of the frames that set the threshold instead of training the head."""


@dataclass(frozen=True, kw_only=True)
class LabeledScene:
    """The features of one labeled frame."""

    features: CutFeatures
    """Features at the cut, a batch of one."""
    labels: Labels
    """The objects."""
    scan: PointCloud
    """The points that the features were computed from."""


@dataclass(frozen=True, kw_only=True)
class ObjectnessReport:
    """What the head keeps of frames that it did not learn from."""

    objects: int
    """Labeled objects with a cell at the cut in these frames."""
    objects_kept: int
    """Objects of which at least one cell is sent, by the regions alone."""
    object_cells_kept: float
    """Share of all cells of these objects that is sent, by the regions alone."""
    cells_kept: float
    """Share of all cells that is sent, by the regions alone."""
    threshold: float
    """Score from which a cell may be an object, 0..1."""


def train_objectness(defence: RegionUpload, scenes: Sequence[LabeledScene], *, steps: int, seed: int) -> ObjectnessReport:
    """Train the head and set the threshold, both in place.

    Args:
        defence: The defence with a fresh head.
        scenes: Labeled scenes, at least four; the last quarter sets the threshold.
        steps: Optimizer steps, four scenes each.
        seed: Order of the scenes.

    Returns:
        What the head keeps of the last quarter.

    Raises:
        InvalidInput: There are fewer than four scenes, or no object in one of the two parts.
    """
    split = len(scenes) - math.ceil(HELD_OUT * len(scenes))
    learning, held_out = scenes[:split], scenes[split:]
    for part, name in ((learning, "to learn from"), (held_out, "to set the threshold")):
        if not any(len(_shown(scene)) for scene in part):
            raise InvalidInput(
                f"the objectness head needs labeled objects in the frames {name}, and these {len(part)} frames have none; give "
                "more labeled frames"
            )
    torch.manual_seed(seed)
    device = defence.threshold.device
    optimizer = torch.optim.Adam(defence.head.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=2e-3, total_steps=steps + 1)
    defence.train()
    targets = [_target(scene) for scene in learning]
    for _ in range(steps):
        rows = torch.randint(len(learning), (4,)).tolist()
        batch = CutFeatures.collate([learning[row].features for row in rows]).to(device)
        target, weight = (torch.stack(parts).to(device) for parts in zip(*(targets[row] for row in rows), strict=True))
        loss = (sigmoid_focal_loss(defence.scores(batch), target) * weight).sum() / target.sum().clamp_min(1)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    defence.eval()
    return _calibrate(defence, held_out)


def _shown(scene: LabeledScene) -> Labels:
    """The objects that teach."""
    return scene.labels.select(scene.labels.weight > 0)


def _target(scene: LabeledScene) -> tuple[Tensor, Tensor]:
    """(H, W) 1 in an object, and (H, W) 1 where the head learns: not on ignored objects."""
    spec = scene.features.spec
    inside = footprint(_shown(scene).boxes.data, spec, 0.5).any(0)
    ignored = footprint(scene.labels.select(scene.labels.weight <= 0).boxes.data, spec, 0.5).any(0) & ~inside
    return inside.float(), (~ignored).float()


@torch.no_grad()
def _calibrate(defence: RegionUpload, scenes: Sequence[LabeledScene]) -> ObjectnessReport:
    device = defence.threshold.device
    best, occupied = [], []
    for scene in scenes:
        features = scene.features.to(device)
        scores = defence.scores(features)[0].sigmoid()
        coords = features.voxels.coords.long()
        cells = torch.zeros_like(scores, dtype=torch.int64)
        cells.index_put_((coords[:, 2], coords[:, 3]), torch.ones_like(coords[:, 0]), accumulate=True)
        inside = footprint(_shown(scene).boxes.data.to(device), features.spec, 0.0) & (cells > 0)
        best += [float(scores[mask].max()) for mask in inside if bool(mask.any())]
        occupied.append((features, inside, cells))
    if not best:
        raise InvalidInput(
            "no labeled object of the frames that set the threshold has a cell at the cut; give more labeled frames"
        )
    ordered = sorted(best)
    threshold = ordered[min(len(ordered) - 1, int((1 - defence.config.recall) * len(ordered)))]
    defence.threshold.fill_(threshold)
    kept_objects, object_cells, object_kept, all_cells, all_kept = 0, 0, 0, 0, 0
    for features, inside, cells in occupied:
        kept = defence.regions(features)[0]
        kept_objects += int((inside & kept).flatten(1).any(1).sum())
        object_cells += int((inside * cells).sum())
        object_kept += int((inside * (cells * kept)).sum())
        all_cells += int(cells.sum())
        all_kept += int((cells * kept).sum())
    return ObjectnessReport(
        objects=len(best),
        objects_kept=kept_objects,
        object_cells_kept=object_kept / max(object_cells, 1),
        cells_kept=all_kept / max(all_cells, 1),
        threshold=float(threshold),
    )
