"""Which labelled object each proposal lies on: what trains the proposal classifier on the source and measures it on the target.

    on an object    IoU seen from above of at least the class's threshold, or centres within half a metre, or, for a class longer than
                    anything the detector proposes, at least half of the proposal inside the object
    background      touches nothing: IoU below 0.25 with every object, no centre within a metre, hardly inside anything
    ignored         between the two, or on an object whose label or class is to be ignored

A proposal goes to the object it meets best, and several may go to one object: each is judged on its own, and an object counts as
proposed if one of them is on it. A car-sized box on a 28 m tram has IoU 0.1 with it and is no background, hence the third way.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....core.errors import require
from ....core.structures import Labels, TensorValue
from ....ops.iou3d import intersection_bev, iou_bev
from ..glc.class_map import ClassMap
from .proposals import DetectorProposals

BACKGROUND, IGNORED = -2, -1  # besides 0..C-1, a source class, and C, unknown


def _default_overlaps() -> Mapping[str, float]:
    return {"Car": 0.5, "Vehicle": 0.5, "car": 0.5}


@dataclass(frozen=True, kw_only=True)
class MatchRules:
    """overlaps: IoU seen from above by label class, ``overlap`` for classes not named. centre: m between centres that suffices.

    long: classes on which a proposal also lies if at least ``inside`` of its area is in the object.
    """

    overlaps: Mapping[str, float] = field(default_factory=_default_overlaps)
    overlap: float = 0.3
    center: float = 0.5
    long: tuple[str, ...] = ("Truck", "Tram", "Trailer", "truck", "bus", "tram", "trailer", "other_vehicle", "emergency_vehicle")
    inside: float = 0.5
    background_overlap: float = 0.25
    background_center: float = 1.0

    def __post_init__(self) -> None:
        parts = (*self.overlaps.values(), self.overlap, self.inside)
        require(
            all(self.background_overlap <= p <= 1 for p in parts) and 0 <= self.center <= self.background_center,
            f"overlaps must lie between background_overlap and 1, and centre must not exceed background_center, found {self}",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Matches(TensorValue):
    """What N proposals lie on. ids: (N,) int64, a source class 0..C-1, C unknown, IGNORED or BACKGROUND.

    objects: (N,) int64 row among all labels of all frames, -1 where there is none. label_ids: (L,) int64 what each label is: 0..C, or
    IGNORED. label_ranges: (L,) m. label_classes: (L,) int64 among ``label_names``.
    """

    ids: Tensor
    objects: Tensor
    label_ids: Tensor
    label_ranges: Tensor
    label_classes: Tensor
    label_names: tuple[str, ...]

    def private_classes(self, unknown: int) -> tuple[str, ...]:
        """Names of the label classes that occur and are unknown to the source."""
        return tuple(
            name
            for k, name in enumerate(self.label_names)
            if bool(((self.label_classes == k) & (self.label_ids == unknown)).any())
        )


def match_proposals(
    proposals: DetectorProposals,
    labels: Sequence[Labels | None],
    label_names: tuple[str, ...],
    class_map: ClassMap,
    rules: MatchRules = MatchRules(),
) -> Matches:
    """labels: of ``proposals.frame_ids``, in order, their classes counted in ``label_names``. Labels of weight 0 are ignored objects.

    Raises InvalidInput for a frame without labels, another number of frames, and a class that the map misses.
    """
    require(
        len(labels) == len(proposals.frame_ids),
        f"{len(proposals.frame_ids)} frames of proposals need as many labels, found {len(labels)}",
    )
    meaning = torch.from_numpy(class_map.ids(label_names))
    ids = torch.full((len(proposals),), BACKGROUND)
    objects = torch.full((len(proposals),), -1)
    counts, first = torch.bincount(proposals.frame, minlength=len(labels)).tolist(), 0
    label_ids, label_ranges, label_classes, before = [], [], [], 0
    for index, scene in enumerate(labels):
        rows, first = slice(first, first + counts[index]), first + counts[index]
        require(scene is not None, f"frame {proposals.frame_ids[index]} has no labels to match proposals with")
        assert scene is not None
        longest = torch.tensor([class_map.longest.get(label_names[c], torch.inf) for c in scene.classes.tolist()])
        counted = (scene.weight > 0) & (scene.boxes.data[:, 3] <= longest)
        own = torch.where(counted, meaning[scene.classes], IGNORED)
        label_ids.append(own)
        label_classes.append(scene.classes)
        label_ranges.append(scene.boxes.data[:, :2].norm(dim=1))
        if len(scene) and counts[index]:
            best, state = _match_frame(proposals.boxes[rows], scene, label_names, rules)
            ids[rows] = torch.where(state == 1, own[best], torch.where(state == 0, IGNORED, BACKGROUND))
            objects[rows] = torch.where(state == 1, best + before, -1)
        before += len(scene)
    return Matches(
        ids=ids,
        objects=objects,
        label_ids=torch.cat([torch.zeros(0, dtype=torch.int64), *label_ids]),
        label_ranges=torch.cat([torch.zeros(0), *label_ranges]),
        label_classes=torch.cat([torch.zeros(0, dtype=torch.int64), *label_classes]),
        label_names=label_names,
    )


def _match_frame(boxes: Tensor, scene: Labels, names: tuple[str, ...], rules: MatchRules) -> tuple[Tensor, Tensor]:
    """For proposals (n, 7): the row of the label that each meets best, and 1 on it, 0 ignored, -1 background."""
    truth = scene.boxes.data
    overlap = iou_bev(boxes, truth)
    apart = torch.cdist(boxes[:, :2], truth[:, :2])
    inside = intersection_bev(boxes, truth) / (boxes[:, 3] * boxes[:, 4]).clamp_min(1e-6)[:, None]
    long = torch.tensor([names[c] in rules.long for c in scene.classes.tolist()])
    least = torch.tensor([rules.overlaps.get(names[c], rules.overlap) for c in scene.classes.tolist()])
    on = (overlap >= least) | (apart <= rules.center) | (long & (inside >= rules.inside))
    # Overlaps of what counts as a match come first; among those of long classes the share inside decides.
    rank = torch.where(on, 1 + torch.maximum(overlap, torch.where(long, inside, 0.0)), overlap)
    best = rank.argmax(1)
    far = (overlap < rules.background_overlap) & (apart > rules.background_center) & (inside < rules.background_overlap)
    state = torch.where(on.any(1), 1, torch.where(far.all(1), -1, 0))
    return best, state
