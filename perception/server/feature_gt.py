"""F-GT: ground-truth sampling on features (UpCycling, Hwang et al. 2023, known to us from its abstract; design.md section 5).

GT sampling pastes labelled objects into other scenes. On features it is safe where flips and rotations are not: an object keeps
its place, so its cells need no resampling, and the sparse convolutions spread an object by less than one cell. The objects are cut
from labelled scenes encoded by the same frozen encoder, so they are what the vehicle would have sent, and their boxes are exact.

    cut    cells of a labelled scene whose centre lies in an object's footprint, one cell wider on each side;
           of PV-RCNN also the keypoints in its box, 0.2 m larger in each full dimension
    paste  the same cells and keypoints of an unlabelled scene are removed, then the object's are written; never added.
           Keypoints beyond the number that the scene had are taken from its background at random
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...core.cut import CutSpec
from ...core.errors import InvalidInput
from ...core.features import CutFeatures, Keypoints
from ...core.structures import Boxes3D, Labels
from ...ops.iou3d import iou_bev
from ...ops.points_in_boxes import points_in_boxes_mask
from .upcycle_config import FeatureGtConfig


def footprint(boxes: Tensor, spec: CutSpec, margin_cells: float = 1.0) -> Tensor:
    """(N, H, W) bool: cells whose centre (``CutSpec.position``) lies in each box (N, 7) seen from above, widened by ``margin_cells``
    on each side."""
    _, height, width = spec.shape
    x, y = spec.position(torch.arange(height, device=boxes.device), torch.arange(width, device=boxes.device))
    dx = x[None, None, :] - boxes[:, 0, None, None]
    dy = y[None, :, None] - boxes[:, 1, None, None]
    cos, sin = torch.cos(boxes[:, 6])[:, None, None], torch.sin(boxes[:, 6])[:, None, None]
    along, across = dx * cos + dy * sin, dy * cos - dx * sin
    cell_x, cell_y = spec.cell_size()
    half = boxes[:, 3:5, None, None] / 2 + margin_cells * max(cell_x, cell_y)
    return (along.abs() <= half[:, 0]) & (across.abs() <= half[:, 1])


@dataclass(frozen=True, kw_only=True)
class FeatureObject:
    """One labelled object's features at their own place: box (7,), coords (K, 3) int32 z y x of the cut, features (K, C), and its
    keypoints (a batch of one; None where the cut has none)."""

    box: Tensor
    class_index: int
    num_points: int
    coords: Tensor
    features: Tensor
    keypoints: Keypoints | None = None


class ObjectDatabase(Protocol):
    """What sampling asks of a database of objects; `FeatureObjectDatabase` has it on disk."""

    boxes: Tensor
    classes: Tensor

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> FeatureObject: ...


def sample_objects(
    database: ObjectDatabase, labels: Labels, obstacles: Boxes3D, config: FeatureGtConfig, rng: np.random.Generator
) -> list[FeatureObject]:
    """Objects for one scene, at their own places, touching no label, no obstacle and no other pasted object.

    obstacles: every box the teacher sees at all; what it half believes in may be a real object. Each class is filled up to its
    maximum, counting the labels already there.
    """
    blocked = torch.cat([labels.boxes.data, obstacles.data]).cpu()  # the database is on the CPU
    chosen: list[int] = []
    for class_index, maximum in enumerate(config.max_objects):
        wanted = maximum - int((labels.classes == class_index).sum())
        candidates = (database.classes == class_index).nonzero().squeeze(1).numpy()
        if wanted <= 0 or len(candidates) == 0:
            continue
        # Three times as many as wanted: some will collide. Chosen one by one, so that no two pasted objects meet.
        drawn = rng.permutation(candidates)[: 3 * wanted]
        free = (iou_bev(database.boxes[drawn], blocked).sum(1) == 0).numpy() if len(blocked) else np.ones(len(drawn), bool)
        for index in drawn[free]:
            if wanted == 0:
                break
            box = database.boxes[index : index + 1]
            if not chosen or float(iou_bev(box, database.boxes[chosen]).sum()) == 0:
                chosen.append(int(index))
                wanted -= 1
    return [database[i] for i in chosen]


def cut_objects(split: CutFeatures, labels: Labels, config: FeatureGtConfig) -> list[FeatureObject]:
    """The learnable objects of one encoded labelled scene (a batch of one) that have cells and enough points."""
    if split.batch_size != 1:
        raise InvalidInput(f"objects are cut from one scene at a time, found a batch of {split.batch_size}")
    coords = split.voxels.coords[:, 1:]
    masks = footprint(labels.boxes.data, split.spec, config.margin_cells)
    owned = None if split.keypoints is None else keypoints_near(split.keypoints, labels.boxes.data, config)
    objects = []
    for i in range(len(labels)):
        rows = masks[i, coords[:, 1].long(), coords[:, 2].long()].nonzero().squeeze(1)
        if labels.weight[i] > 0 and labels.num_points[i] >= config.min_points and len(rows):
            objects.append(
                FeatureObject(
                    box=labels.boxes.data[i],
                    class_index=int(labels.classes[i]),
                    num_points=int(labels.num_points[i]),
                    coords=coords[rows],
                    features=split.voxels.features[rows],
                    keypoints=None if owned is None or split.keypoints is None else split.keypoints.select(owned[i]),
                )
            )
    return objects


def keypoints_near(keypoints: Keypoints, boxes: Tensor, config: FeatureGtConfig) -> Tensor:
    """(N, K) bool: which keypoints lie in each box (N, 7) enlarged by the keypoint margin."""
    margin = config.keypoint_margin
    return points_in_boxes_mask(keypoints.xyz, boxes + boxes.new_tensor([0, 0, 0, margin, margin, margin, 0]))


def paste_objects(
    split: CutFeatures,
    labels: Labels,
    objects: Sequence[FeatureObject],
    config: FeatureGtConfig,
    rng: np.random.Generator,
) -> tuple[CutFeatures, Labels]:
    """Write ``objects`` into one scene (a batch of one): their places are cleared first, other cells stay as they are.

    The pasted boxes join the labels as exact ones. rng: which background keypoints make room, if there would be too many.
    """
    if not objects:
        return split, labels
    boxes = torch.stack([o.box for o in objects]).to(labels.boxes.data)
    coords, features = split.voxels.coords, split.voxels.features
    owner = footprint(boxes, split.spec, config.margin_cells)
    keep = ~owner.any(0)[coords[:, 2].long(), coords[:, 3].long()]
    parts_c, parts_f = [coords[keep]], [features[keep]]
    taken = torch.zeros(split.spec.shape[1:], dtype=torch.bool, device=coords.device)
    for index, item in enumerate(objects):
        c, f = item.coords.to(coords.device), item.features.to(features)
        free = ~taken[c[:, 1].long(), c[:, 2].long()]  # two neighbours' margins may meet: the first one keeps the cell
        parts_c.append(torch.nn.functional.pad(c[free], (1, 0)))
        parts_f.append(f[free])
        taken |= owner[index]
    voxels = replace(split.voxels, coords=torch.cat(parts_c), features=torch.cat(parts_f))
    pasted = Labels.make(
        boxes,
        torch.tensor([o.class_index for o in objects], device=boxes.device),
        num_points=torch.tensor([o.num_points for o in objects], device=boxes.device),
    )
    keypoints = None if split.keypoints is None else _paste_keypoints(split.keypoints, boxes, objects, config, rng)
    return replace(split, voxels=voxels, keypoints=keypoints), Labels.concatenate([labels, pasted])


def _paste_keypoints(
    scene: Keypoints, boxes: Tensor, objects: Sequence[FeatureObject], config: FeatureGtConfig, rng: np.random.Generator
) -> Keypoints:
    pasted: list[Keypoints] = []
    for index, item in enumerate(objects):
        if item.keypoints is not None:  # two neighbours' rims may meet: the first one keeps what lies in both
            own = item.keypoints.to(scene.xyz.device)
            pasted.append(own.select(~keypoints_near(own, boxes[:index], config).any(0)))
    # First, so that the first n of a ball around a pasted object are its own.
    xyz = torch.cat([k.xyz for k in pasted])[: len(scene.xyz)]
    features = torch.cat([k.features for k in pasted])[: len(scene.xyz)]
    background = (~keypoints_near(scene, boxes, config).any(0)).nonzero().squeeze(1)
    room = len(scene.xyz) - len(xyz)
    if len(background) > room:
        picked = np.sort(rng.permutation(len(background))[:room])
        background = background[torch.from_numpy(picked).to(background.device)]
    rest = scene.select(background)
    total = len(xyz) + len(background)
    return Keypoints(
        xyz=torch.cat([xyz, rest.xyz]), features=torch.cat([features.to(rest.features), rest.features]), starts=(0, total)
    )
