"""Turns the mean reading of a poor instrument back into a mean size, by what it reads on objects of known sizes.

The instrument follows the truth weakly and mixes the sides; that does not matter as long as the same instrument reads both the known and the
unknown objects. Read next: `size_estimate.py`, which reads patches of a detector's map.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BOOTSTRAPS = 200
_SOLUTIONS = 3


class Readout:
    """A linear map from patches to sizes."""

    def __init__(self, weight: Tensor, middle: Tensor, mean: Tensor) -> None:
        self.weight, self.middle, self.mean = weight, middle, mean

    def __call__(self, patches: Tensor) -> Tensor:
        return (patches - self.middle) @ self.weight + self.mean


def ridge_regression(x: Tensor, y: Tensor, strength: float) -> Readout:
    """Fit y to x by ridge regression, with an intercept that is not shrunk.

    Columns are not brought to one variance: one that hardly ever differs from zero would then decide the readings of the few rows where it
    does.

    Args:
        x: (N, P) float64.
        y: (N, M) float64.
        strength: Ridge in units of the mean squared length of a centered row.

    Returns:
        The fit as a function of (K, P).
    """
    middle, mean = x.mean(0), y.mean(0)
    rows = x - middle
    if len(rows) <= rows.shape[1]:  # the smaller of the two equal systems
        gram = rows @ rows.T
        gram.diagonal().add_(strength * float(gram.diagonal().mean()) + 1e-12)
        weight = rows.T @ torch.linalg.solve(gram, y - mean)
    else:
        gram = rows.T @ rows
        gram.diagonal().add_(strength * float(rows.square().sum(1).mean()) + 1e-12)
        weight = torch.linalg.solve(gram, rows.T @ (y - mean))
    return Readout(weight, middle, mean)


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownReadings:
    """What an instrument read on N objects of known sizes."""

    readings: Tensor
    """(N, 3) float64 readings of length, width and height."""
    sizes: Tensor
    """(N, 3) float64 true sizes."""
    original: Tensor
    """(N, 3) float64 true sizes before they were changed at random."""

    def of(self, rows: Tensor) -> KnownReadings:
        """Select objects.

        Args:
            rows: (M,) int64 rows.

        Returns:
            The readings of these objects.
        """
        return KnownReadings(readings=self.readings[rows], sizes=self.sizes[rows], original=self.original[rows])


@dataclass(frozen=True, kw_only=True, eq=False)
class IndirectDifference:
    """By how much the objects behind some readings differ in size from the known ones."""

    difference: Tensor
    """(3,) float64 length, width and height in meters."""
    error: Tensor
    """(3,) its standard error."""
    follows: Tensor
    """(3,) by how much the mean reading of each side moves per meter."""
    distance: float
    """How many standard errors the mean readings of both lie apart, for the three sides together: the evidence for any difference."""


def indirect_difference(
    known: KnownReadings, frame: Tensor, fleet: Tensor, scene: Tensor, *, least_error: float, seed: int
) -> IndirectDifference:
    """Find by how much the known objects would have to be longer, wider and higher for their mean reading to be that of the fleet.

    The random changes of the known objects say what differences are to be expected (the prior of a linear Gaussian model): a side that the
    instrument hardly follows takes what its common part with the other sides says, and no difference where these say nothing.

    Args:
        known: Readings of labeled objects.
        frame: (N,) number of their frame.
        fleet: (F, M, 3) readings of the fleet's objects by F instruments, each of which read its part of the labeled objects.
        scene: (M,) number of their scene.
        least_error: Meters by which the sensor and the place may make objects look larger or smaller, which no bootstrap shows. Readings that
            differ by no more are no evidence.
        seed: Decides the bootstrap.

    Returns:
        The difference.
    """
    gap, follows = _gap(known, fleet.mean((0, 1)))
    rng = np.random.default_rng([seed, 7])
    gaps, slopes = [], []
    for _ in range(_BOOTSTRAPS):
        one, other = _resampled(frame, rng), _resampled(scene, rng)
        instruments = torch.from_numpy(rng.integers(0, len(fleet), len(fleet)))
        again, slope = _gap(known.of(one), fleet[instruments][:, other].mean((0, 1)))
        gaps.append(again)
        slopes.append(slope)
    expected = torch.cov((known.sizes - known.original).T, correction=0)
    difference = torch.zeros_like(gap)
    elsewhere = least_error**2 * follows @ follows.T + 1e-12 * torch.eye(3, dtype=gap.dtype)
    for _ in range(_SOLUTIONS):  # how far the slopes can be trusted matters the more, the larger the difference is
        noise = torch.cov((torch.stack(gaps) - torch.stack(slopes) @ difference).T) + elsewhere
        gain = torch.linalg.solve(follows @ expected @ follows.T + noise, follows @ expected).T
        difference = gain @ gap
    left = expected - gain @ follows @ expected
    return IndirectDifference(
        difference=difference,
        error=left.diagonal().clamp_min(0).sqrt(),
        follows=follows.diagonal(),
        distance=float(gap @ torch.linalg.solve(noise, gap)) ** 0.5,
    )


def _gap(known: KnownReadings, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """(3,) the wanted mean reading minus that of the original objects, and (3, 3) by how much each reading moves with each side."""
    terms = torch.cat([torch.ones_like(known.sizes[:, :1]), known.sizes], 1)
    fit = torch.linalg.lstsq(terms, known.readings).solution  # (4, 3): the mean reading of a size
    follows = fit[1:].T
    return wanted - (fit[0] + follows @ known.original.mean(0)), follows


def _resampled(group: Tensor, rng: np.random.Generator) -> Tensor:
    """Rows of a bootstrap sample that draws whole frames or scenes."""
    groups, place = group.unique(return_inverse=True)
    order = place.argsort(stable=True)
    ends = torch.bincount(place, minlength=len(groups)).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    drawn = torch.from_numpy(rng.integers(0, len(groups), len(groups)))
    return torch.cat([order[starts[i] : ends[i]] for i in drawn.tolist()])
