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


class Readout:
    """A linear map from patches to sizes."""

    def __init__(self, weight: Tensor, middle: Tensor, mean: Tensor) -> None:
        self.weight, self.middle, self.mean = weight, middle, mean

    def __call__(self, patches: Tensor) -> Tensor:
        return (patches - self.middle) @ self.weight + self.mean


def ridge_regression(x: Tensor, y: Tensor, strength: float) -> Readout:
    """Fit y to x by ridge regression, with every column of x scaled to unit variance and an intercept that is not shrunk.

    Args:
        x: (N, P) float64.
        y: (N, M) float64.
        strength: Ridge in units of the mean squared length of a centered row.

    Returns:
        The fit as a function of (K, P).
    """
    middle, mean = x.mean(0), y.mean(0)
    spread = x.std(0, correction=0)
    scale = torch.where(spread > 1e-6 * spread.max(), 1 / spread, torch.zeros_like(spread))  # a column that only rounding changes
    rows = (x - middle) * scale
    if len(rows) <= rows.shape[1]:  # the smaller of the two equal systems
        gram = rows @ rows.T
        gram.diagonal().add_(strength * float(gram.diagonal().mean()) + 1e-12)
        weight = rows.T @ torch.linalg.solve(gram, y - mean)
    else:
        gram = rows.T @ rows
        gram.diagonal().add_(strength * float(rows.square().sum(1).mean()) + 1e-12)
        weight = torch.linalg.solve(gram, rows.T @ (y - mean))
    return Readout(weight * scale[:, None], middle, mean)


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


def indirect_difference(
    known: KnownReadings, frame: Tensor, fleet: Tensor, scene: Tensor, *, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Find by how much the known objects would have to be longer, wider and higher for their mean reading to be that of the fleet.

    Args:
        known: Readings of labeled objects.
        frame: (N,) number of their frame.
        fleet: (F, M, 3) readings of the fleet's objects by F instruments, each of which read its part of the labeled objects.
        scene: (M,) number of their scene.
        seed: Decides the bootstrap.

    Returns:
        Difference (3,) in meters, its standard error (3,), and by how much the mean reading of each side moves per meter (3,). The difference
        is NaN where the readings do not follow the sizes.
    """
    found, follows = _solve(known, fleet.mean((0, 1)))
    rng = np.random.default_rng([seed, 7])
    again = []
    for _ in range(_BOOTSTRAPS):
        one, other = _resampled(frame, rng), _resampled(scene, rng)
        instruments = torch.from_numpy(rng.integers(0, len(fleet), len(fleet)))
        again.append(_solve(known.of(one), fleet[instruments][:, other].mean((0, 1)))[0])
    return found, torch.stack(again).std(0), follows


def _solve(known: KnownReadings, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """The difference at which the mean reading of the original objects is the wanted one (3,), and how the reading moves with each side."""
    terms = torch.cat([torch.ones_like(known.sizes[:, :1]), known.sizes], 1)
    fit = torch.linalg.lstsq(terms, known.readings).solution  # (4, 3): the mean reading of a size
    follows = fit[1:].T
    if float(torch.linalg.matrix_norm(follows, -2)) < 1e-6:  # some difference of sizes leaves the readings as they are
        return torch.full((3,), torch.nan, dtype=wanted.dtype), follows.diagonal()
    now = fit[0] + follows @ known.original.mean(0)
    return torch.linalg.solve(follows, wanted - now), follows.diagonal()


def _resampled(group: Tensor, rng: np.random.Generator) -> Tensor:
    """Rows of a bootstrap sample that draws whole frames or scenes."""
    groups, place = group.unique(return_inverse=True)
    order = place.argsort(stable=True)
    ends = torch.bincount(place, minlength=len(groups)).cumsum(0)
    starts = torch.cat([ends.new_zeros(1), ends[:-1]])
    drawn = torch.from_numpy(rng.integers(0, len(groups), len(groups)))
    return torch.cat([order[starts[i] : ends[i]] for i in drawn.tolist()])
