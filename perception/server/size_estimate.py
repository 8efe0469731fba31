"""Estimates how much the fleet's objects differ in size from the labeled ones, from smashed scenes alone: no label, no raw point of the fleet.

The boxes of a teacher cannot be averaged for this. A teacher that has learned large cars draws small cars too large, because it falls back
on what it knows wherever it sees little: its boxes move by a fifth to a third of the true difference. So the estimate asks what the *same*
instrument would have read on objects of known sizes (indirect inference; Gourieroux, Monfort and Renault, 1993):

    labeled frames, objects resized at random ─ encoder ─ teacher ─ patches of the map ─┬─ fit: size read from a patch (ridge regression)
                                                                                        └─ fit: mean reading of a true size (linear)
    smashed scenes of the fleet ─────────────── teacher ─ patches of the map ─ mean reading ─ solve: by how much must the labeled objects
                                                                                               be longer to be read like this?

The reading of a single object may be poor. Only the mean over hundreds of objects counts, and how strongly it follows the truth. The readings
of labeled objects are by a ridge regression that has not seen their frames. Errors come from a bootstrap over frames and scenes. The random
sizes are also what is expected beforehand: a side that cannot be read takes what goes with the others, or no difference.

What this cannot see: an effect of the sensor or the place that looks like a size, and objects that the teacher does not find.
Read next: `indirect_reading.py`, the arithmetic; `recipes/fleet_sizes.py`, which resizes labeled objects by the estimate.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ...core.features import CutFeatures
from ...core.frame import Frame, labels_of
from ...datasets.frame_source import FrameSource
from ...datasets.object_sizes import resize_objects, shift_sizes
from ...ops.iou3d import iou_bev
from ...ops.roi_grid import roi_grid_sample
from ..models.detector import Detector
from .indirect_reading import KnownReadings, indirect_difference, ridge_regression
from .joined_stores import FleetScenes
from .labeled_sizes import LabeledMean, joined_by_precision, mean_of_labels
from .store import collate_scenes
from .upcycle_config import SizeEstimateConfig
from .uploaded import features_as_uploaded

_FOLDS = 4
_MOST = 0.6
"""Largest difference that is believed, as a share of the size of the labeled objects. The random sizes do not cover more."""
_ENOUGH = 3.4
"""Length that three independent standard normal numbers together exceed with a probability of 1 %."""


@dataclass(frozen=True, kw_only=True)
class SizeEstimate:
    """How much larger the fleet's objects of one class are than the labeled ones. `print(estimate)` says it in a line."""

    class_name: str
    """The class."""
    labeled: tuple[float, float, float]
    """Mean length, width and height of the labeled objects, in meters."""
    difference: tuple[float, float, float]
    """Estimated mean of the fleet minus that of the labeled objects, in meters."""
    error: tuple[float, float, float]
    """Standard error of the difference, in meters."""
    follows: tuple[float, float, float]
    """By how much the mean reading of each side moves per meter: 1 for a perfect instrument, 0 for one that sees nothing."""
    labeled_objects: int
    """Labeled objects that were found, counted in each draw."""
    fleet_objects: int
    """Objects of the fleet that were found."""
    asked_objects: int = 0
    """Objects of the fleet's few labeled frames, where there are some. Their mean size is in `difference` with the weight of its precision."""
    shift: tuple[float, float, float]
    """What labeled objects are resized by: the difference, or zero where `reason` says why not."""
    reason: str = ""
    """Why the sizes stay as they are; empty where they are shifted."""
    true: tuple[float, float, float] | None = None
    """True difference where labels of the fleet were given. It measures the estimate and is never used."""

    def __str__(self) -> str:
        sides = ", ".join(
            f"{name} {value:+.2f} ± {error:.2f} m"
            for name, value, error in zip(("length", "width", "height"), self.difference, self.error, strict=True)
        )
        end = "" if self.true is None else f" (in truth {', '.join(f'{value:+.2f}' for value in self.true)})"
        end += f"; sizes stay as they are, because {self.reason}" if self.reason else ""
        labels = f" and {self.asked_objects} labeled ones" if self.asked_objects else ""
        return f"{self.class_name}: {self.fleet_objects} objects of the fleet{labels} differ by {sides}{end}"


@dataclass(frozen=True, kw_only=True, eq=False)
class _Seen:
    """N objects that the teacher found."""

    patches: Tensor
    """(N, P) float32 patches of the map, flat."""
    classes: Tensor
    """(N,) int64."""
    group: Tensor
    """(N,) int64 number of the frame or scene."""
    sizes: Tensor
    """(N, 3) true sizes; not used for the fleet."""
    original: Tensor
    """(N, 3) sizes before they were changed; not used for the fleet."""

    def of(self, rows: Tensor) -> _Seen:
        return _Seen(
            patches=self.patches[rows],
            classes=self.classes[rows],
            group=self.group[rows],
            sizes=self.sizes[rows],
            original=self.original[rows],
        )

    def __len__(self) -> int:
        return len(self.classes)


@torch.no_grad()
def estimate_sizes(
    teacher: Detector,
    frames: FrameSource,
    store: FleetScenes,
    config: SizeEstimateConfig,
    *,
    codec: str,
    seed: int,
    about: Sequence[float] = (0.0, 0.0, 0.0),
    asked: FrameSource | None = None,
) -> tuple[SizeEstimate, ...]:
    """Estimate the difference of the mean sizes of the fleet's and the labeled objects, for each class of the teacher.

    Args:
        teacher: The source model, or a student that was trained from it: its encoder made the scenes. It is put into evaluation mode.
        frames: The labeled split.
        store: The fleet's smashed scenes.
        config: How it is done.
        codec: Codec of the scenes; labeled frames pass it and the encoder's defences, too.
        seed: Decides the random sizes and the bootstrap.
        about: An earlier estimate, three numbers for all classes or for each: random sizes are drawn around the labeled ones moved by it,
            because how a reading follows a size is linear only nearby. The result is the difference from the labeled sizes all the same.
        asked: A few labeled frames of the fleet. Their mean sizes are joined with what the scenes say, each with the weight of its precision:
            few labels change little, many decide.

    Returns:
        One estimate per class.

    Example:
        for estimate in estimate_sizes(teacher, frames, store, SizeEstimateConfig(), codec="fp16", seed=0):
            print(estimate)
    """
    teacher.eval()
    mean = _mean_sizes(frames, len(teacher.class_names), config)
    patch = config.patch * mean[:, :2]
    with torch.random.fork_rng(devices=[]):  # random defences draw from torch's generator
        torch.manual_seed(seed)
        labeled = _joined(_labeled_objects(teacher, frames, patch, config, codec, seed, about))
    fleet = _joined(_fleet_objects(teacher, store, patch, config))
    given = None if asked is None else [labels_of([asked[i]])[0] for i in range(len(asked))]
    found = []
    for number, name in enumerate(teacher.class_names):
        one, other = (None if seen is None else seen.of(seen.classes == number) for seen in (labeled, fleet))
        known = None if given is None else mean_of_labels(given, number, mean[number])
        found.append(_estimate(name, mean[number], one, other, known, config, seed))
    return tuple(found)


def shift_of(estimates: Sequence[SizeEstimate]) -> tuple[float, ...]:
    """Join the shifts of all classes.

    Args:
        estimates: One per class, in the order of the classes.

    Returns:
        Three numbers per class: a `size_shift`.
    """
    return tuple(side for estimate in estimates for side in estimate.shift)


# ---- what the teacher sees


def _spread(count: int, most: int) -> list[int]:
    """At most `most` of `count` positions, evenly spread."""
    return sorted({int(i) for i in np.linspace(0, count - 1, min(count, most)).round()}) if count else []


def _mean_sizes(frames: FrameSource, classes: int, config: SizeEstimateConfig) -> Tensor:
    """(K, 3) float64 mean size of the labeled objects of each class; 0 where none is labeled."""
    total, count = torch.zeros(classes, 3, dtype=torch.float64), torch.zeros(classes, dtype=torch.float64)
    for i in _spread(len(frames), config.frames):
        (labels,) = labels_of([frames[i]])
        own = labels.weight > 0
        total.index_add_(0, labels.classes[own], labels.boxes.data[own, 3:6].double())
        count.index_add_(0, labels.classes[own], torch.ones(int(own.sum()), dtype=torch.float64))
    return total / count.clamp_min(1)[:, None]


def _labeled_objects(
    teacher: Detector,
    frames: FrameSource,
    patch: Tensor,
    config: SizeEstimateConfig,
    codec: str,
    seed: int,
    about: Sequence[float],
) -> Iterator[_Seen]:
    for i in _spread(len(frames), config.frames):
        frame = frames[i]
        (unchanged,) = labels_of([frame])
        old_sizes = unchanged.boxes.data[:, 3:6]
        if any(about):
            frame = shift_sizes(frame, about)
        for draw in range(config.draws):
            changed = _with_random_sizes(frame, config, np.random.default_rng([seed, draw, i]))
            scene = features_as_uploaded(teacher, [changed.points], codec)  # the same instrument, defences included
            (labels,) = labels_of([changed])
            own = labels.weight > 0
            device = scene.voxels.coords.device
            truth, classes, old = (x[own].to(device) for x in (labels.boxes.data, labels.classes, old_sizes))
            boxes, found, patches = _read(teacher, scene, patch, config)
            if not len(boxes) or not len(truth):
                continue
            overlap = iou_bev(boxes, truth).masked_fill(found[:, None] != classes, 0)
            best, row = overlap.max(1)
            hit = best > 0.2
            yield _Seen(
                patches=patches[hit].cpu(),
                classes=found[hit].cpu(),
                group=torch.full((int(hit.sum()),), i),
                sizes=truth[row[hit], 3:6].cpu().double(),
                original=old[row[hit]].cpu().double(),
            )


def _with_random_sizes(frame: Frame, config: SizeEstimateConfig, rng: np.random.Generator) -> Frame:
    """The frame with every object resized."""
    (labels,) = labels_of([frame])
    sizes = labels.boxes.data[:, 3:6]
    factor = rng.uniform(-config.common, config.common, (len(sizes), 1)) + rng.uniform(-config.own, config.own, (len(sizes), 3))
    return resize_objects(frame, sizes * torch.from_numpy(np.exp(factor)).to(sizes))


def _fleet_objects(teacher: Detector, store: FleetScenes, patch: Tensor, config: SizeEstimateConfig) -> Iterator[_Seen]:
    device = next(teacher.parameters()).device
    for i in _spread(len(store), config.scenes):
        scene = collate_scenes([store.readable(i)], encoders=store.fingerprints).to(device)
        boxes, classes, patches = _read(teacher, teacher.encoder.restore(scene), patch, config)
        unknown = torch.zeros(len(boxes), 3, dtype=torch.float64)
        yield _Seen(
            patches=patches.cpu(), classes=classes.cpu(), group=torch.full((len(boxes),), i), sizes=unknown, original=unknown
        )


def _read(teacher: Detector, scene: CutFeatures, patch: Tensor, config: SizeEstimateConfig) -> tuple[Tensor, Tensor, Tensor]:
    """Boxes (N, 7), classes and patches of the sure detections of one scene. A patch lies at its detection and is turned with it, but its
    size is that of the class: the box's own size is what must not be trusted."""
    (found,) = teacher.predict(teacher.decode(scene))
    size = patch.to(found.boxes.data)[found.classes]
    keep = (found.iou_scores >= config.iou_score) & (size > 0).all(1)
    boxes, classes = found.boxes.data[keep], found.classes[keep]
    where = torch.cat([boxes[:, :3], size[keep], boxes[:, 5:]], 1)
    cell = scene.spec.cell_size()
    x0, y0 = scene.spec.grid.range[:2]
    patches = roi_grid_sample(
        teacher.decoder.bev_map(scene),
        where[None],
        origin=(x0 + cell[0] / 2, y0 + cell[1] / 2),
        cell=cell,
        grid_size=5,
        faithful=False,
    )
    return boxes, classes, patches[0].flatten(1).float()


def _joined(parts: Iterator[_Seen]) -> _Seen | None:
    every = list(parts)
    if not every:
        return None
    names = ("patches", "classes", "group", "sizes", "original")
    return _Seen(**{name: torch.cat([getattr(part, name) for part in every]) for name in names})


# ---- the arithmetic


def _estimate(
    name: str,
    mean: Tensor,
    labeled: _Seen | None,
    fleet: _Seen | None,
    asked: LabeledMean | None,
    config: SizeEstimateConfig,
    seed: int,
) -> SizeEstimate:
    counts = [0 if seen is None else len(seen) for seen in (labeled, fleet)]
    difference, error = torch.zeros(3, dtype=torch.float64), torch.full((3,), torch.inf, dtype=torch.float64)
    follows, distance, reason = torch.zeros(3, dtype=torch.float64), 0.0, ""
    if labeled is None or fleet is None or min(counts) < config.fewest:
        reason = (
            f"the teacher finds {counts[0]} labeled objects and {counts[1]} of the fleet with a predicted IoU of {config.iou_score:g} or more, "
            f"and {config.fewest} are needed"
        )
    else:
        readings, read = _readings(labeled, fleet, config.ridge)
        known = KnownReadings(readings=readings, sizes=labeled.sizes, original=labeled.original)
        found = indirect_difference(known, labeled.group, read, fleet.group, least_error=config.least_error, seed=seed)
        difference, error, follows, distance = found.difference, found.error, found.follows, found.distance
    if asked is not None and bool(asked.error.isfinite().all()) and bool((mean > 0).all()):
        difference, error = joined_by_precision(difference, error, asked, config.least_error)
        distance, reason = float((difference / error).square().sum()) ** 0.5, ""
    if bool(error.isfinite().all()):
        error = error.clamp_min(config.least_error)
    reason = reason or _reason_against(difference, distance, mean)
    return SizeEstimate(
        class_name=name,
        labeled=_three(mean),
        difference=_three(difference),
        error=_three(error),
        follows=_three(follows),
        labeled_objects=counts[0],
        fleet_objects=counts[1],
        asked_objects=0 if asked is None else asked.objects,
        shift=(0.0, 0.0, 0.0) if reason else _three(difference),
        reason=reason,
    )


def _reason_against(difference: Tensor, distance: float, labeled: Tensor) -> str:
    if not (bool(difference.isfinite().all()) and math.isfinite(distance)):
        return "the readings are no numbers"
    if distance < _ENOUGH:
        return f"a difference of {distance:.1f} standard errors is no evidence ({_ENOUGH} are asked for)"
    if bool(((difference / labeled).abs() > _MOST).any()):
        return f"a side would differ by {_MOST:.0%} or more, which the random sizes do not cover"
    return ""


def _three(values: Tensor) -> tuple[float, float, float]:
    a, b, c = values.tolist()
    return a, b, c


def _readings(labeled: _Seen, fleet: _Seen, strength: float) -> tuple[Tensor, Tensor]:
    """(N, 3) reading of each labeled object by a regression that has not seen its frame, and (F, M, 3) those of the fleet's objects by the F
    regressions, so that the same instruments read both."""
    groups = labeled.group.unique()
    fold = torch.bucketize(labeled.group, groups) % _FOLDS
    readings, read = torch.zeros(len(labeled), 3, dtype=torch.float64), []
    for number in range(min(_FOLDS, len(groups))):
        own = fold == number if len(groups) > 1 else torch.zeros_like(fold, dtype=torch.bool)
        fit = ridge_regression(labeled.patches[~own].double(), labeled.sizes[~own], strength)
        readings[own] = fit(labeled.patches[own].double())
        read.append(fit(fleet.patches.double()))
    return readings, torch.stack(read)
