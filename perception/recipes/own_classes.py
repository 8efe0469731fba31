"""A preset for other classes: anchors of the mean sizes in the labeled split, everything else from the preset.

Read next: `presets.py`, and `perception/models/anchors.py` for what an anchor is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ...core.errors import InvalidInput
from ...datasets.prepared import PreparedDataset
from ..models.anchors import AnchorClass
from ..models.defended import DefendedDetectorConfig
from ..models.detectors import DetectorConfig
from ..models.narrow import NarrowDetectorConfig
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.upcycled import UpcycledDetectorConfig
from .presets import Preset

FEW_OBJECTS = 10
"""A class with fewer labeled objects than this has no reliable mean size, and too few examples to learn from."""


def preset_for_classes(preset: Preset, frames: PreparedDataset, classes: Sequence[str]) -> Preset:
    """Change a preset so that its detector finds other classes.

    Each class gets an anchor with the mean length, width and height of its labeled objects, at their mean height above the ground of
    the sensor frame's zero. Overlaps of matching, thresholds of pseudo labels and numbers of pasted objects are those of the preset's class
    whose area is nearest: what suits a car also suits a van, and not a pedestrian.

    Args:
        preset: The preset to change.
        frames: The labeled split, prepared for these classes in this order.
        classes: Names of the classes; case does not matter. The detector spells them as the dataset does.

    Returns:
        The preset. The same split gives the same anchors.

    Raises:
        InvalidInput: The split was prepared for other classes, or a class has fewer than `FEW_OBJECTS` objects.
    """
    asked, names = tuple(classes), frames.classes
    if [name.casefold() for name in asked] != [name.casefold() for name in names]:
        raise InvalidInput(
            f"the dataset {frames.root} was prepared for the classes {', '.join(names)}, and --classes asks for "
            f"{', '.join(asked)}; name the same classes in the same order, or prepare it again with --classes {' '.join(asked)}"
        )
    boxes, numbers = _labeled_boxes(frames)
    counts = {name: int((numbers == i).sum()) for i, name in enumerate(names)}
    few = [f"{name} ({count})" for name, count in counts.items() if count < FEW_OBJECTS]
    if few:
        raise InvalidInput(
            f"too few labeled objects in {frames.root} for a mean size: {', '.join(few)}; at least {FEW_OBJECTS} are needed for each class. "
            "Leave the class out, label more, or give the anchors yourself (--preset.detector.decoder.anchors and its fields)"
        )
    anchors, nearest = [], []
    for number, name in enumerate(names):
        own = boxes[numbers == number].double()
        length, width, height = own[:, 3:6].mean(0).tolist()
        bottom = float((own[:, 2] - own[:, 5] / 2).mean())
        like = _nearest(preset.detector.decoder.anchors, length * width)
        nearest.append(like)
        size = (round(length, 2), round(width, 2), round(height, 2))
        anchors.append(replace(preset.detector.decoder.anchors[like], name=name, size=size, bottom_z=round(bottom, 2)))
    old = preset.detector
    if isinstance(old, DefendedDetectorConfig):
        raise InvalidInput(
            "a detector with defences keeps its classes; train one without, then give it defences (`upcycle3d defend`)"
        )
    if isinstance(old, UpcycledDetectorConfig):
        raise InvalidInput(
            "a detector with an upcycled head keeps its classes; train dense ones, then join them (`upcycle3d moe detector`)"
        )
    if isinstance(old, NarrowDetectorConfig):
        raise InvalidInput(
            "a detector with fewer channels keeps its classes; train a dense one, then carve it (`upcycle3d moe carve`)"
        )
    detector: DetectorConfig
    if isinstance(old, PvRcnnDetectorConfig):
        detector = replace(old, decoder=replace(old.decoder, anchors=tuple(anchors)))
    else:
        detector = replace(old, decoder=replace(old.decoder, anchors=tuple(anchors)))
    sampling, upcycle = preset.train.gt_sampling, preset.upcycle
    return replace(
        preset,
        detector=detector,
        train=replace(preset.train, gt_sampling=tuple(sampling[i] for i in nearest) if sampling else ()),
        upcycle=replace(
            upcycle,
            thresholds=tuple(upcycle.thresholds[i] for i in nearest),
            f_gt=replace(upcycle.f_gt, max_objects=tuple(upcycle.f_gt.max_objects[i] for i in nearest)),
        ),
    )


def classes_with_objects(frames: PreparedDataset) -> tuple[str, ...]:
    """Name the classes of a split that have enough labeled objects for an anchor of their mean size.

    Args:
        frames: The split.

    Returns:
        Those with at least `FEW_OBJECTS` objects, in order.
    """
    numbers = _labeled_boxes(frames)[1]
    return tuple(name for i, name in enumerate(frames.classes) if int((numbers == i).sum()) >= FEW_OBJECTS)


def _labeled_boxes(frames: PreparedDataset) -> tuple[torch.Tensor, torch.Tensor]:
    """(M, 7) boxes and (M,) class numbers of all labeled frames."""
    known = [labels for i in range(len(frames)) if (labels := frames.labels(i)) is not None]
    if not known:
        return torch.zeros(0, 7), torch.zeros(0)
    return torch.cat([labels.boxes.data for labels in known]), torch.cat([labels.classes for labels in known])


def _nearest(anchors: Sequence[AnchorClass], area: float) -> int:
    """Index of the anchor whose area in BEV is nearest, by ratio."""
    ratios = [max(area / (a.size[0] * a.size[1]), a.size[0] * a.size[1] / area) for a in anchors]
    return ratios.index(min(ratios))
