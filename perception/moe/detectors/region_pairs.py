"""Experts of a region head by diversified multiplet upcycling: features of the same region in two views, told apart from regions like it.

The loss of a detector is not contrastive, so this is our reading of the method: the two views are two augmentations of one frame, a pair
is one region in both, and negatives are regions of one cluster. Only the branches of the region head train, on features that are computed
once. Read next: `../dmu.py`, the method; `upcycle.py`, which joins the experts.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.frame import Frame, labels_of
from ....datasets.augment import AugmentationRanges, Movement, sample_augmentation
from ...models.detector import Detector
from ..contrastive.expert_stages import DmuConfig, ExpertStage, expert_stage, labels_of_stage, with_ffns
from ..contrastive.loss import LogitScale
from ..contrastive.pairs import PairTensors, SharedTower
from ..surgery.replacement import plan_replacement


@dataclass(frozen=True, kw_only=True)
class RegionPairsConfig:
    """Which regions of a labeled frame become pairs."""

    near: int = 2
    """Regions beside each object that overlap it: its box moved by up to half its size."""
    empty: int = 2
    """Regions per object at a random place of the range, which mostly hold no object."""
    keep_points: float = 0.7
    """Smallest share of the points that a view keeps; each view draws its own share. It stands for other sensors and weather."""

    def __post_init__(self) -> None:
        require_counts("RegionPairsConfig", least=0, most=1000, near=self.near, empty=self.empty)
        require_numbers("RegionPairsConfig", least=0.01, most=1.0, keep_points=self.keep_points)


@torch.no_grad()
def region_pairs(
    detector: Detector,
    frames: Sequence[Frame],
    ranges: AugmentationRanges,
    config: RegionPairsConfig | None = None,
    *,
    seed: int = 0,
) -> PairTensors:
    """Compute the features of regions in two views of each frame.

    Args:
        detector: A dense two-stage detector, in evaluation mode.
        frames: Labeled frames.
        ranges: How far a view is moved.
        config: Which regions; None takes the defaults.
        seed: Decides views and regions.

    Returns:
        The pairs. Regions of one object count as equal captions, so they are no negatives of each other.

    Raises:
        InvalidInput: There is no frame with an object, or the detector is in training mode.
    """
    config = config or RegionPairsConfig()
    require(not detector.training, "features of regions need a detector in evaluation mode; call eval() first")
    rng = np.random.default_rng(seed)
    views: tuple[list[Tensor], list[Tensor]] = ([], [])
    objects: list[Tensor] = []
    first_free = 0
    for frame in frames:
        boxes, owner = _regions(frame, config, detector.spec.grid.range, rng)
        moves = [sample_augmentation(rng, ranges) for _ in views]
        inside = torch.stack([_inside(move.boxes(boxes), detector.spec.grid.range) for move in moves]).all(0)
        boxes, owner = boxes[inside], owner[inside]
        if not len(boxes):
            continue
        for view, move in zip(views, moves, strict=True):
            view.append(_features(detector, frame, move, boxes, config, rng))
        objects.append(owner + first_free)
        first_free += int(owner.max()) + 1
    if not objects:
        raise InvalidInput("no frame has a region inside the range in both views; give labeled frames with objects")
    return PairTensors(image=torch.cat(views[0]), text=torch.cat(views[1]), caption=torch.cat(objects))


def _features(
    detector: Detector, frame: Frame, move: Movement, boxes: Tensor, config: RegionPairsConfig, rng: np.random.Generator
) -> Tensor:
    moved = move.frame(replace(frame, labels=None)).points
    share = rng.uniform(config.keep_points, 1.0)
    kept = torch.from_numpy(rng.random(len(moved)) < share).nonzero()[:, 0]
    return detector.decoder.region_features(detector.encode([moved.select(kept)]), [move.boxes(boxes)])


def _regions(
    frame: Frame, config: RegionPairsConfig, limits: tuple[float, ...], rng: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """(R, 7) regions, and (R,) which object each belongs to; an empty region is an object of its own."""
    (labels,) = labels_of([frame])
    truth = labels.boxes.data
    count = len(truth)
    near = truth.repeat_interleave(config.near, 0).clone()
    near[:, :3] += torch.from_numpy(rng.uniform(-0.5, 0.5, (len(near), 3))).to(truth.dtype) * near[:, 3:6]
    empty = truth.repeat_interleave(config.empty, 0).clone()
    low, high = np.array(limits[:2]), np.array(limits[3:5])
    empty[:, :2] = torch.from_numpy(rng.uniform(low, high, (len(empty), 2))).to(truth.dtype)
    owner = torch.arange(count)
    own = count + torch.arange(len(empty))
    return torch.cat([truth, near, empty]), torch.cat([owner, owner.repeat_interleave(config.near), own])


def _inside(boxes: Tensor, limits: tuple[float, ...]) -> Tensor:
    low, high = boxes.new_tensor(limits[:2]), boxes.new_tensor(limits[3:5])
    return ((boxes[:, :2] >= low) & (boxes[:, :2] < high)).all(1)


class BranchTower(nn.Module):
    """The branches of a region head without their last map, side by side: features of a region in, their hidden features out."""

    def __init__(self, detector: Detector) -> None:
        """Copy the branches of a detector.

        Args:
            detector: A dense two-stage detector.

        Raises:
            InvalidInput: It has no branches.
        """
        super().__init__()
        parts = detector.decoder.branch_parts
        if not parts:
            raise InvalidInput(f"this {detector.label} names no branches of a region head")
        self.parts = parts
        chains = [copy.deepcopy(detector.decoder.get_submodule(part)) for part in parts]
        self.branches = nn.ModuleList(nn.Sequential(*list(chain.children())[:-1]) for chain in chains)

    def forward(self, x: Tensor) -> Tensor:
        """Run all branches.

        Args:
            x: (N, C) features of regions.

        Returns:
            (N, branches * C') hidden features.
        """
        return torch.cat([branch(x[..., None])[..., 0] for branch in self.branches], 1)

    def decoder_name(self, name: str) -> str:
        """Translate the name of a tensor of this tower.

        Args:
            name: Name within the tower, such as `branches.0.4.weight`.

        Returns:
            Name within the decoder, such as `roi_head.iou_layers.4.weight`.
        """
        _, number, rest = name.split(".", 2)
        return f"{self.parts[int(number)]}.{rest}"


def contrastive_specialists(
    detector: Detector, pairs: PairTensors, config: DmuConfig, *, scale: float = 20.0
) -> tuple[list[Detector], list[ExpertStage]]:
    """Train the branches of a region head in the stages of diversified multiplet upcycling.

    Args:
        detector: The dense detector. It is not changed.
        pairs: What `region_pairs` computed with it.
        config: The method. The training of the routers is not used: they are trained with the losses of the detector.
        scale: Factor of the cosine similarities.

    Returns:
        The detector itself and one copy per stage, whose branches alone differ, for `upcycle_head(…, rest="seed")`; and the stages.

    Raises:
        InvalidInput: As for `expert_stage`.
    """
    tower = SharedTower(BranchTower(detector), logit_scale=LogitScale(scale)).eval()
    plan = plan_replacement(tower, experts=config.stages + 1, active=config.rule.k, widest_input=None)
    stages: list[ExpertStage] = []
    for number in range(1, config.stages + 1):
        labels, _ = labels_of_stage(with_ffns(tower, stages[-1].ffns) if stages else tower, pairs, config, number)
        stages.append(expert_stage(tower, plan, pairs, labels, [stage.labels for stage in stages], config, number))
    made = [detector]
    branches = tower.tower
    assert isinstance(branches, BranchTower)
    for stage in stages:
        twin = copy.deepcopy(detector)
        own = twin.decoder.state_dict()
        with torch.no_grad():
            for name, tensor in stage.ffns.items():
                own[branches.decoder_name(name.removeprefix("tower."))].copy_(tensor)
        made.append(twin)
    return made, stages
