"""How many points of a scan an attack gives back exactly, and how many a guess would hit that uses only what the upload says openly.

A *claim* is a point that an attack says it knows. It is right where a true point lies within a centimeter, and a true point is recovered
where it is the nearest one to a right claim, so that ten claims around one point recover one point.

The guess claims the positions that stand in the upload anyway: centers of voxels or keypoints. Some of them lie within a centimeter of
a true point by accident. `chance` is the number of right claims that this share would give among as many claims.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from scipy.spatial import cKDTree
from torch import Tensor

from ...core.errors import require
from .true_scan import finite_points

EXACT = 0.01
"""Meters within which a point counts as given back."""


@dataclass(frozen=True, kw_only=True)
class ExactPointScore:
    """Exact points of some scans. Two scores add up."""

    scans: int = 0
    """Number of scans."""
    true_points: int = 0
    """Points of the scans that could be recovered."""
    claims: int = 0
    """Points that the attack says it knows."""
    right: int = 0
    """Claims that have a true point within the limit."""
    recovered: int = 0
    """Different true points that right claims give back."""
    guesses: int = 0
    """Positions that stand in the uploads anyway."""
    right_guesses: int = 0
    """Those of them that have a true point within the limit."""
    sources: int = 0
    """Keypoints, or groups of cells, that might give a point away; 0 where the attack looks at all there are."""
    tried: int = 0
    """Those of them that the attack looked at. The others may give away more points."""

    def __add__(self, other: ExactPointScore) -> ExactPointScore:
        return ExactPointScore(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(ExactPointScore)})

    @property
    def recovered_per_scan(self) -> float:
        """Exact points recovered per scan; 0 where there is no scan."""
        return self.recovered / self.scans if self.scans else 0.0

    @property
    def chance_per_scan(self) -> float:
        """Claims per scan that would be right if they were as good as the guesses; 0 where there is no scan or no guess."""
        return self.claims * self.right_guesses / (self.guesses * self.scans) if self.scans and self.guesses else 0.0

    @property
    def share_right(self) -> float | None:
        """Share of the claims that are right; None without a claim."""
        return self.right / self.claims if self.claims else None

    @property
    def share_recovered(self) -> float | None:
        """Share of the true points that are recovered; None without a true point."""
        return self.recovered / self.true_points if self.true_points else None


def score_exact_points(claims: Tensor, truth: Tensor, guesses: Tensor, *, within: float = EXACT) -> ExactPointScore:
    """Count the exact points that an attack gives back of one scan.

    Args:
        claims: (K, 3) points in meters that the attack says it knows.
        truth: (N, 3) the points to recover: the scan, or a part of it, such as the points that lie alone in a ball.
        guesses: (G, 3) positions that stand in the upload: its keypoints, or centers of voxels.
        within: Meters within which a point counts as given back.

    Returns:
        The counts of one scan.

    Raises:
        InvalidInput: A point is not finite, or the limit is not positive.
    """
    require(within > 0, f"the limit must be positive, found {within} m")
    tree = cKDTree(finite_points(truth, "the true scan"))
    near = tree.query(finite_points(claims, "the claims"))[0:2] if len(claims) and tree.n else ([], [])
    hits = [int(i) for d, i in zip(*near) if d <= within]
    lucky = tree.query(finite_points(guesses, "the guesses"))[0] if len(guesses) and tree.n else []
    return ExactPointScore(
        scans=1,
        true_points=len(truth),
        claims=len(claims),
        right=len(hits),
        recovered=len(set(hits)),
        guesses=len(guesses),
        right_guesses=sum(bool(d <= within) for d in lucky),
    )
