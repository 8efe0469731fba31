"""Which labeled object each proposal lies on: trains the proposal classifier on the source and measures it on the target.

    on an object    BEV IoU of at least the class's minimum overlap, or centers within half a meter, or, for a class longer than
                    anything the detector proposes, at least half of the proposal inside the object
    background      touches nothing: IoU below 0.25 with every object, no center within a meter, hardly inside anything
    ignored         between the two, or on an object whose label or class is to be ignored

A proposal goes to the object that it matches best. Several may go to one object: each is classified on its own, and an object counts
as proposed if one of them is on it. A car-sized box on a 28 m tram has an IoU of 0.1 with it and is not background, hence the third
rule.

Read next: `proposal_classifier.py`, which learns from matches, and `proposal_metrics.py`, which measures with them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.structures import Labels
from ....core.tensor_value import TensorValue
from ....ops.iou3d import intersection_bev, iou_bev
from .class_map import ClassMap
from .proposals import DetectorProposals

BACKGROUND, IGNORED = -2, -1  # ids besides 0..C-1, a source class, and C, unknown


def _default_overlaps() -> Mapping[str, float]:
    return {"Car": 0.5, "Vehicle": 0.5, "car": 0.5}


@dataclass(frozen=True, kw_only=True)
class MatchRules:
    """When a proposal lies on an object, and when on background. Classes are those of the labels."""

    min_overlaps: Mapping[str, float] = field(default_factory=_default_overlaps)
    """Minimum BEV IoU of single classes."""

    min_overlap: float = 0.3
    """Minimum BEV IoU of all other classes."""

    center_distance: float = 0.5
    """Distance of the centers in m, in BEV, that also counts as a match."""

    long_classes: tuple[str, ...] = (
        "Truck",
        "Tram",
        "Trailer",
        "truck",
        "bus",
        "tram",
        "trailer",
        "other_vehicle",
        "emergency_vehicle",
    )
    """Classes on which a proposal also lies if at least `min_inside` of its area is inside the object."""

    min_inside: float = 0.5
    """Minimum share of the proposal's area inside an object of `long_classes`."""

    background_overlap: float = 0.25
    """Background has a BEV IoU, and a share inside, below this with every object."""

    background_distance: float = 1.0
    """Background has no object's center within this distance in m, in BEV."""

    def __post_init__(self) -> None:
        parts = (*self.min_overlaps.values(), self.min_overlap, self.min_inside)
        require(
            all(self.background_overlap <= p <= 1 for p in parts) and 0 <= self.center_distance <= self.background_distance,
            f"minimum overlaps and min_inside must lie between background_overlap ({self.background_overlap:g}) and 1, found {parts}; "
            f"center_distance ({self.center_distance:g}) must lie between 0 and background_distance ({self.background_distance:g})",
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Matches(TensorValue):
    """What N proposals lie on, among the L labels of all frames, for C source classes."""

    ids: Tensor
    """(N,) int64: 0..C-1 a source class, C unknown, `IGNORED` or `BACKGROUND`."""

    objects: Tensor
    """(N,) int64 row of the matched label among the L labels, -1 where there is none."""

    label_ids: Tensor
    """(L,) int64 what each label is: 0..C-1 a source class, C unknown, or `IGNORED`."""

    label_ranges: Tensor
    """(L,) distance of each label's center from the sensor in m, in BEV."""

    label_classes: Tensor
    """(L,) int64 class of each label, an index into `label_names`."""

    label_names: tuple[str, ...]
    """The classes of the labels."""

    def private_names(self, unknown: int) -> tuple[str, ...]:
        """List the classes of the labels that occur and are unknown to the source.

        Args:
            unknown: The id that means unknown, C.

        Returns:
            Their names.
        """
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
    """Find the labeled object that each proposal lies on.

    Args:
        proposals: N proposals.
        labels: Labels of each frame of `proposals.frame_ids`, in order, in the detector's frame. Labels of weight 0 are ignored objects.
        label_names: The classes of the labels.
        class_map: What these classes mean to the detector.
        rules: When a proposal lies on an object.

    Returns:
        The matches.

    Raises:
        InvalidInput: A frame has no labels, the numbers of frames differ, or the map lacks a class.
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
        if scene is None:
            raise InvalidInput(f"frame {proposals.frame_ids[index]} has no labels to match proposals with")
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
    """For proposals (n, 7): the row of the label that each matches best, and 1 on it, 0 ignored, -1 background."""
    truth = scene.boxes.data
    overlap = iou_bev(boxes, truth)
    apart = torch.cdist(boxes[:, :2], truth[:, :2])
    inside = intersection_bev(boxes, truth) / (boxes[:, 3] * boxes[:, 4]).clamp_min(1e-6)[:, None]
    long = torch.tensor([names[c] in rules.long_classes for c in scene.classes.tolist()])
    least = torch.tensor([rules.min_overlaps.get(names[c], rules.min_overlap) for c in scene.classes.tolist()])
    on = (overlap >= least) | (apart <= rules.center_distance) | (long & (inside >= rules.min_inside))
    # Pairs that count as a match rank first, by their overlap; on long classes by the share inside, where that is larger.
    rank = torch.where(on, 1 + torch.maximum(overlap, torch.where(long, inside, 0.0)), overlap)
    best = rank.argmax(1)
    far = (overlap < rules.background_overlap) & (apart > rules.background_distance) & (inside < rules.background_overlap)
    state = torch.where(on.any(1), 1, torch.where(far.all(1), -1, 0))
    return best, state
