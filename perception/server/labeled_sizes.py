"""What a few labeled frames of the fleet say about the sizes of its objects, beside what its smashed scenes say.

Read next: `size_estimate.py`, which joins both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...core.structures import Labels


@dataclass(frozen=True, kw_only=True, eq=False)
class LabeledMean:
    """What a few labeled frames of the fleet say about the difference of one class."""

    difference: Tensor
    """(3,) float64 mean size of their objects minus that of the labeled split, in meters."""
    error: Tensor
    """(3,) its standard error, over frames; infinite with less than two frames that show the class."""
    objects: int
    """Their objects."""


def mean_of_labels(asked: Sequence[Labels], number: int, labeled: Tensor) -> LabeledMean:
    """Measure how much the objects of a few frames differ in size from the labeled ones.

    The cars of one frame are not independent, so the error is that of sums over frames (cluster-robust), not that of single objects.

    Args:
        asked: Labels of each frame.
        number: Number of the class.
        labeled: (3,) float64 mean size in the labeled split.

    Returns:
        Difference and error.
    """
    sizes = []
    for labels in asked:
        own = (labels.weight > 0) & (labels.classes == number)
        if bool(own.any()):
            sizes.append(labels.boxes.data[own, 3:6].double())
    count = sum(map(len, sizes))
    error = torch.full((3,), torch.inf, dtype=torch.float64)
    if not sizes:
        return LabeledMean(difference=torch.zeros(3, dtype=torch.float64), error=error, objects=0)
    mean = torch.cat(sizes).mean(0)
    if len(sizes) > 1:
        sums = torch.stack([(each - mean).sum(0) for each in sizes])
        error = (sums.square().sum(0) * len(sizes) / (len(sizes) - 1)).sqrt() / count
    return LabeledMean(difference=mean - labeled, error=error, objects=count)


def joined_by_precision(difference: Tensor, error: Tensor, asked: LabeledMean, least_error: float) -> tuple[Tensor, Tensor]:
    """Take the mean of two independent estimates with the weights of their precisions: few labels change little, many decide.

    Args:
        difference: (3,) float64 estimate without labels, in meters. Where it is NaN or of infinite error, it has no weight.
        error: (3,) its standard error.
        asked: What the labels say.
        least_error: Error in meters that both have at least.

    Returns:
        The mean (3,) and its standard error (3,).
    """
    usable = difference.isfinite() & error.isfinite()
    precision = torch.where(usable, error.clamp_min(least_error) ** -2, torch.zeros_like(error))
    other = asked.error.clamp_min(least_error) ** -2
    joined = (torch.where(usable, difference, torch.zeros_like(difference)) * precision + asked.difference * other) / (
        precision + other
    )
    return joined, (precision + other) ** -0.5
