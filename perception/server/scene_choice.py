"""Which stored scenes to ask labels for: active learning from smashed scenes, without a raw point.

A driver may consent to give a few raw frames for labeling. The server chooses them by their smashed scenes, and the vehicles find the frames
by their receipts. A label teaches most where the teacher doubts, where the scene is unlike those that are chosen already, and where it shows
classes that are still rare among the chosen ones. So the next scene is the one with the largest product

    distance to the nearest chosen scene  x  doubt of the teacher  x  need for its classes

of which each is divided by its largest value among the scenes that are left. The frames of a standing vehicle are all alike: a scene nearer
to a chosen one than `SceneChoiceConfig.duplicate` of the usual distance is left out, and counted.

Three simple rules are there to compare with: at random, by doubt alone, by distance alone (k-center greedy; Sener and Savarese, ICLR 2018).
Read next: `scene_views.py`, which looks at the scenes of a store.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ...core.errors import InvalidInput, require, require_counts, require_numbers
from ...core.tensor_value import shape_of

ChoiceRule = Literal["informative", "doubt", "diverse", "random"]
"""`informative` is the product above; the others are what it is compared with."""
_PAIRS = 4096
"""Pairs of scenes from which the usual distance is taken."""


@dataclass(frozen=True, kw_only=True)
class SceneChoiceConfig:
    """How scenes are chosen."""

    number: int = 20
    """Scenes to choose."""
    rule: ChoiceRule = "informative"
    """What counts: `informative` (distance, doubt and need for the classes), `doubt` alone, `diverse` (distance alone), or `random`."""
    duplicate: float = 0.25
    """Scenes nearer to a chosen one than this share of the median distance of two scenes are left out, with `informative` and `diverse`."""
    seed: int = 0
    """Decides `random`, and nothing else but the pairs from which the median distance is taken."""

    def __post_init__(self) -> None:
        require_counts("SceneChoiceConfig", most=1_000_000, number=self.number)
        require_numbers("SceneChoiceConfig", least=0.0, most=1.0, duplicate=self.duplicate)
        require(self.rule in get_args(ChoiceRule), f"rule must be one of {', '.join(get_args(ChoiceRule))}, found {self.rule!r}")


@dataclass(frozen=True, kw_only=True, eq=False)
class SceneViews:
    """What the choice knows of S scenes with K classes."""

    described: Tensor
    """(S, D) description. The Euclidean distance of two rows says how unlike two scenes are."""
    doubt: Tensor
    """(S,) how much the teacher doubts: the sum of the entropies of its detections, in bits."""
    objects: Tensor
    """(S, K) number of objects of each class that the teacher expects: the sum of its scores."""
    usable: Tensor
    """(S,) bool, False for scenes that hold nothing and are never chosen."""

    def __post_init__(self) -> None:
        count = len(self.described)
        parts = {
            "described": (self.described, 2),
            "doubt": (self.doubt, 1),
            "objects": (self.objects, 2),
            "usable": (self.usable, 1),
        }
        for name, (value, axes) in parts.items():
            if value.ndim != axes or len(value) != count:
                raise InvalidInput(
                    f"SceneViews.{name} must have {axes} axes and one row per scene ({count}), found {shape_of(value)}"
                )
            if value.is_floating_point() and not bool(value.isfinite().all()):
                raise InvalidInput(f"SceneViews.{name} holds NaN or inf; the detector or a scene is damaged")

    def __len__(self) -> int:
        return len(self.described)


@dataclass(frozen=True, kw_only=True)
class ChosenScene:
    """One chosen scene and why."""

    position: int
    """Its position in the store."""
    distance: float
    """Distance to the nearest scene that was chosen before, divided by the median distance of two scenes; inf for the first."""
    doubt: float
    """Doubt of the teacher, in bits."""
    objects: tuple[float, ...]
    """Expected objects of each class."""


@dataclass(frozen=True, kw_only=True)
class SceneChoice:
    """The chosen scenes, most informative first, and what was left out."""

    chosen: tuple[ChosenScene, ...]
    """Chosen scenes in order. The first n are the choice of n scenes."""
    scenes: int
    """Scenes that there were to choose from."""
    unusable: int
    """Scenes that hold nothing."""
    duplicates: int
    """Scenes that were left out because they are nearly the same as a chosen one."""


def choose_scenes(views: SceneViews, config: SceneChoiceConfig) -> SceneChoice:
    """Choose scenes one by one.

    Args:
        views: What is known of the scenes.
        config: How many, and by which rule.

    Returns:
        The choice. It is shorter than asked for where too few scenes are usable and different. Of equal scenes the first wins.

    Example:
        choice = choose_scenes(view_scenes(store, detector), SceneChoiceConfig(number=20))
    """
    spread_out = config.rule in ("informative", "diverse")
    described = views.described.double()
    usual = _usual_distance(described, config.seed)
    draw = torch.Generator().manual_seed(config.seed)
    lottery = torch.rand(len(views), generator=draw, dtype=torch.float64)
    free = views.usable.clone()
    distance = torch.full((len(views),), torch.inf, dtype=torch.float64)
    have = torch.zeros(views.objects.shape[1], dtype=torch.float64)
    chosen: list[ChosenScene] = []
    duplicates = 0
    while len(chosen) < config.number and bool(free.any()):
        value = lottery if config.rule == "random" else _value(config.rule, distance, views, have, free)
        best = int(value.masked_fill(~free, -torch.inf).argmax())
        chosen.append(
            ChosenScene(
                position=best,
                distance=float(distance[best]),
                doubt=float(views.doubt[best]),
                objects=tuple(views.objects[best].tolist()),
            )
        )
        free[best] = False
        have += views.objects[best].double()
        distance = torch.minimum(distance, (described - described[best]).norm(dim=1) / usual)
        if spread_out:
            alike = free & (distance < config.duplicate)
            duplicates += int(alike.sum())
            free &= ~alike
    unusable = int((~views.usable).sum())
    return SceneChoice(chosen=tuple(chosen), scenes=len(views), unusable=unusable, duplicates=duplicates)


def _value(rule: ChoiceRule, distance: Tensor, views: SceneViews, have: Tensor, free: Tensor) -> Tensor:
    """(S,) what a label of each scene would bring."""
    far = _relative(distance, free)
    doubt = _relative(views.doubt.double(), free)
    if rule == "doubt":
        return doubt
    if rule == "diverse":
        return far
    need = (views.objects.double() / (1 + have)).sum(1)
    return far * doubt * _relative(need, free)


def _relative(value: Tensor, free: Tensor) -> Tensor:
    """Divide by the largest value of the free scenes. All are 1 where none is finite (no scene was chosen yet) or all are zero."""
    most = float(value[free].max())
    return torch.ones_like(value) if most == torch.inf or most <= 0 else value / most


def _usual_distance(described: Tensor, seed: int) -> float:
    """Median distance of two different scenes, from a sample of pairs; 1 where scenes do not differ."""
    count = len(described)
    if count < 2:
        return 1.0
    draw = torch.Generator().manual_seed(seed)
    one = torch.randint(0, count, (_PAIRS,), generator=draw)
    other = (one + torch.randint(1, count, (_PAIRS,), generator=draw)) % count
    found = float((described[one] - described[other]).norm(dim=1).median())
    return found if found > 0 else 1.0
