"""Ground-truth sampling: paste labeled objects of other scenes into a scene.

It gives rare classes a chance (Yan et al., SECOND, 2018, section 3.3; OpenPCDet `database_sampler.py`). An object stays at the place
where it was recorded, because distance decides how many points it has. It goes only where it touches nothing, and it replaces the
scene's points in its box, as the real object would have hidden them.

Read next: `gt_database.py` for the objects, `augment.py` for the rest of an example.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch

from ..core.errors import InvalidInput
from ..core.frame import Frame
from ..core.structures import Labels, PointCloud
from ..ops.iou3d import iou_bev
from ..ops.points_in_boxes import points_in_boxes
from .gt_database import GtDatabase, GtObject


class GtSampler:
    """Chooses objects for a scene. It fills every class up to a count, but only where objects touch nothing.

    It has no state: what it chooses depends on the generator alone. Class numbers of scenes must be those of the database.

    Example:
        sampler = GtSampler(database, {"Car": 15})
        frame = paste(frame, sampler.sample(rng, frame.labels))
    """

    def __init__(self, database: GtDatabase, groups: Mapping[str, int]) -> None:
        """Set up a sampler.

        Args:
            database: The objects.
            groups: Class name -> number of objects of that class that a scene should hold. The reference setting on KITTI is Car
                15 to 20, Pedestrian 10 to 15, Cyclist 10 to 15 (OpenPCDet `pv_rcnn.yaml`, `kitti_dataset.yaml`).

        Raises:
            InvalidInput: The database does not name a class.
        """
        unknown = [name for name in groups if name not in database.class_names]
        if unknown:
            raise InvalidInput(
                f"GT sampling asks for {unknown}, but the database in {database.path} has the classes {database.class_names}"
            )
        self.database = database
        self.groups = {database.class_names.index(name): count for name, count in groups.items()}
        self._members = {c: torch.nonzero(database.classes == c)[:, 0].numpy() for c in self.groups}

    def sample(self, rng: np.random.Generator, labels: Labels) -> list[GtObject]:
        """Choose objects to paste into a scene.

        Candidates are drawn without replacement. A candidate that overlaps an earlier one is dropped and not replaced.

        Args:
            rng: Source of randomness.
            labels: Labels of the scene.

        Returns:
            Objects that overlap neither a labeled box (ignored ones included) nor each other in BEV.
        """
        taken = labels.boxes.data
        chosen: list[int] = []
        for class_index, count in self.groups.items():
            present = int(((labels.classes == class_index) & (labels.weight > 0)).sum())
            members = self._members[class_index]
            missing = min(count - present, len(members))
            if missing <= 0:
                continue
            candidates = rng.choice(members, size=missing, replace=False)
            boxes = self.database.boxes[torch.from_numpy(candidates)]
            free = ~(iou_bev(boxes, taken) > 0).any(1)
            among = iou_bev(boxes, boxes) > 0
            accepted: list[int] = []
            for i in range(missing):
                if free[i] and not among[i, accepted].any():
                    accepted.append(i)
            taken = torch.cat([taken, boxes[accepted]])
            chosen += candidates[accepted].tolist()
        return [self.database[i] for i in chosen]


def paste(frame: Frame, objects: Sequence[GtObject]) -> Frame:
    """Put objects at their own places into a scene: scene points in their boxes go, their own points come, labels are added.

    Args:
        frame: A labeled frame.
        objects: The objects, from `GtSampler.sample`.

    Returns:
        The frame with the objects.

    Raises:
        InvalidInput: The frame has no labels, so a pasted object could stand inside an object that nobody knows of.
    """
    if frame.labels is None:
        raise InvalidInput(
            f"frame {frame.id!r} has no labels, so objects cannot be pasted into it: they could stand inside others"
        )
    if not objects:
        return frame
    boxes = torch.stack([o.box for o in objects])
    scene = frame.points.select(points_in_boxes(frame.points.xyz, boxes) < 0)
    pasted = Labels.make(
        boxes,
        torch.tensor([o.class_index for o in objects]),
        num_points=torch.tensor([len(o.points) for o in objects]),
        difficulty=torch.tensor([o.difficulty for o in objects]),
    )
    return replace(
        frame,
        points=PointCloud.concatenate([scene, *(o.points for o in objects)]),
        labels=Labels.concatenate([frame.labels, pasted]),
    )
