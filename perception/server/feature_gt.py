"""F-GT: ground-truth sampling on features (UpCycling, Hwang et al., ICCV 2023). The whole method is in this file; its database is in `feature_object_database.py`.

GT sampling pastes labeled objects into other scenes. On features it is safe where flips and rotations are not: an object keeps
its place, so its cells need no resampling, and the strided convolutions spread an object by less than one cell. The objects are cut
from labeled scenes encoded by the same frozen encoder, so they are what the vehicle would have sent, and their boxes are exact.
Only the abstract of the paper was available to us, so the details below are ours; most follow GT sampling on points in OpenPCDet.

    cut     the cells of a labeled scene whose center lies in an object's footprint, one cell wider on each side;
            for PV-RCNN also the keypoints in its box, which is made 0.2 m larger in each full dimension
    sample  objects for an unlabeled scene that touch nothing the teacher sees, up to a number per class
    paste   remove the same cells and keypoints of the unlabeled scene, then write those of the object; features are never added up.
            The scene keeps its number of keypoints: the surplus is taken from its background at random

Read next: `feature_object_database.py`, which keeps cut objects on disk; `unlabeled_half.py`, which samples and pastes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.features import CutFeatures, Keypoints
from ...core.structures import Boxes3D, Labels
from ...ops.iou3d import iou_bev
from ...ops.points_in_boxes import points_in_boxes_mask
from ..models.footprint import footprint
from .upcycle_config import FeatureGtConfig


@dataclass(frozen=True, kw_only=True)
class FeatureObject:
    """Features of one labeled object, at the place where it was."""

    box: Tensor
    """(7,) its box."""

    class_index: int
    """Its class, from 0."""

    num_points: int
    """Number of LiDAR points in it."""

    coords: Tensor
    """(K, 3) int32 z, y, x of its cells at the cut."""

    features: Tensor
    """(K, C) features of its cells."""

    keypoints: Keypoints | None = None
    """Its keypoints as a batch of one; None where the cut has none."""


class ObjectDatabase(Protocol):
    """Labeled objects by position. `FeatureObjectDatabase` has them on disk."""

    boxes: Tensor
    """(M, 7) boxes of all objects, on the CPU."""

    classes: Tensor
    """(M,) int64 classes of all objects, on the CPU."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> FeatureObject: ...


class JoinedObjects:
    """Several databases read as one: the objects of the first, then those of the second, and so on.

    Example:
        objects = JoinedObjects([database_of_the_source, database_of_a_few_target_frames])
    """

    def __init__(self, databases: Sequence[ObjectDatabase]) -> None:
        """Join databases.

        Args:
            databases: At least one, all of one encoder and with objects cut alike.
        """
        self._databases = tuple(databases)
        self.boxes = torch.cat([d.boxes for d in databases])
        self.classes = torch.cat([d.classes for d in databases])
        self._ends = np.cumsum([len(d) for d in databases])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def __getitem__(self, index: int) -> FeatureObject:
        """Read object `index`."""
        if not 0 <= index < len(self):
            raise IndexError(f"the databases hold {len(self)} objects, asked for {index}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        database = self._databases[number]
        return database[index - int(self._ends[number]) + len(database)]


def sample_objects(
    database: ObjectDatabase, labels: Labels, obstacles: Boxes3D, config: FeatureGtConfig, rng: np.random.Generator
) -> list[FeatureObject]:
    """Choose objects to paste into one scene. They keep their places and overlap nothing, not even each other.

    Args:
        database: Labeled objects.
        labels: Labels of the scene so far. They count towards the maximum of their class.
        obstacles: Boxes to keep clear of: every box that the teacher sees at all. What it half believes in may be a real object.
        config: `max_objects` is the number of objects per class up to which the scene is filled; `clearance` stays free around each.
        rng: Draws the objects.

    Returns:
        The chosen objects, ordered by class. They may be fewer than asked for, because some that were drawn collide.
    """
    blocked = torch.cat([labels.boxes.data, obstacles.data]).cpu()  # the database is on the CPU
    chosen: list[int] = []
    for class_index, maximum in enumerate(config.max_objects):
        wanted = maximum - int((labels.classes == class_index).sum())
        candidates = (database.classes == class_index).nonzero().squeeze(1).numpy()
        if wanted <= 0 or len(candidates) == 0:
            continue
        # Three times the wanted number is drawn, because some will collide. They are chosen one by one, so that no two of them meet.
        drawn = rng.permutation(candidates)[: 3 * wanted]
        clear = database.boxes.new_tensor([0, 0, 0, 2 * config.clearance, 2 * config.clearance, 0, 0])
        room = database.boxes[drawn] + clear
        free = (iou_bev(room, blocked).sum(1) == 0).numpy() if len(blocked) else np.ones(len(drawn), bool)
        for index in drawn[free]:
            if wanted == 0:
                break
            box = database.boxes[index : index + 1] + clear
            if not chosen or float(iou_bev(box, database.boxes[chosen]).sum()) == 0:
                chosen.append(int(index))
                wanted -= 1
    return [database[i] for i in chosen]


def cut_objects(scene: CutFeatures, labels: Labels, config: FeatureGtConfig) -> list[FeatureObject]:
    """Cut the objects out of one labeled scene that can be pasted elsewhere.

    Args:
        scene: Features of the labeled scene, a batch of one.
        labels: Its labels, with numbers of points.
        config: Margins, and the minimum number of points.

    Returns:
        The objects that are not ignored (weight above 0), have enough points and own at least one cell.

    Raises:
        InvalidInput: `scene` is a batch of several.
    """
    if scene.batch_size != 1:
        raise InvalidInput(
            f"objects are cut from one scene at a time, found a batch of {scene.batch_size}; use scene(i) of the batch"
        )
    coords = scene.voxels.coords[:, 1:]
    masks = footprint(labels.boxes.data, scene.spec, config.margin_cells)
    owned = None if scene.keypoints is None else keypoints_near(scene.keypoints, labels.boxes.data, config)
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
                    features=scene.voxels.features[rows],
                    keypoints=None if owned is None or scene.keypoints is None else scene.keypoints.select(owned[i]),
                )
            )
    return objects


def keypoints_near(keypoints: Keypoints, boxes: Tensor, config: FeatureGtConfig) -> Tensor:
    """Find the keypoints that belong to each box.

    Args:
        keypoints: K keypoints of one scene.
        boxes: (N, 7) boxes.
        config: `keypoint_margin` is added to each full size of a box.

    Returns:
        (N, K) bool, True where a keypoint lies in the enlarged box.
    """
    margin = config.keypoint_margin
    return points_in_boxes_mask(keypoints.xyz, boxes + boxes.new_tensor([0, 0, 0, margin, margin, margin, 0]))


def paste_objects(
    scene: CutFeatures,
    labels: Labels,
    objects: Sequence[FeatureObject],
    config: FeatureGtConfig,
    rng: np.random.Generator,
) -> tuple[CutFeatures, Labels]:
    """Write objects into one scene. Their places are cleared first; all other cells stay as they are.

    Args:
        scene: Features of the scene, a batch of one.
        labels: Labels of the scene so far.
        objects: Objects of the same cut, for example from `sample_objects`. Their boxes must not overlap.
        config: Margins, the same as the objects were cut with.
        rng: Draws the background keypoints that make room, if there would be too many.

    Returns:
        The new scene, and its labels with those of the pasted objects after them, which are exact.
    """
    if not objects:
        return scene, labels
    boxes = torch.stack([o.box for o in objects]).to(labels.boxes.data)
    coords, features = scene.voxels.coords, scene.voxels.features
    owner = footprint(boxes, scene.spec, config.margin_cells)
    keep = ~owner.any(0)[coords[:, 2].long(), coords[:, 3].long()]
    parts_c, parts_f = [coords[keep]], [features[keep]]
    taken = torch.zeros(scene.spec.shape[1:], dtype=torch.bool, device=coords.device)
    for index, item in enumerate(objects):
        c, f = item.coords.to(coords.device), item.features.to(features)
        free = ~taken[c[:, 1].long(), c[:, 2].long()]  # margins of two neighbors may meet: the first one keeps the cell
        parts_c.append(torch.nn.functional.pad(c[free], (1, 0)))
        parts_f.append(f[free])
        taken |= owner[index]
    voxels = replace(scene.voxels, coords=torch.cat(parts_c), features=torch.cat(parts_f))
    pasted = Labels.make(
        boxes,
        torch.tensor([o.class_index for o in objects], device=boxes.device),
        num_points=torch.tensor([o.num_points for o in objects], device=boxes.device),
    )
    keypoints = None if scene.keypoints is None else _paste_keypoints(scene.keypoints, boxes, objects, config, rng)
    return replace(scene, voxels=voxels, keypoints=keypoints), Labels.concatenate([labels, pasted])


def _paste_keypoints(
    scene: Keypoints, boxes: Tensor, objects: Sequence[FeatureObject], config: FeatureGtConfig, rng: np.random.Generator
) -> Keypoints:
    pasted: list[Keypoints] = []
    for index, item in enumerate(objects):
        if item.keypoints is not None:  # margins of two neighbors may meet: the first one keeps what lies in both
            own = item.keypoints.to(scene.xyz.device)
            pasted.append(own.select(~keypoints_near(own, boxes[:index], config).any(0)))
    # Pasted keypoints come first, so that the first n in a ball around a pasted object are its own.
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
