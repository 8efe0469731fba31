"""How well uploads were linked, each number with what guessing gives.

Read next: `attacks/linkage.py`, which makes the likeness that is scored here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...core.errors import require
from .ranking_metrics import auc, expected_absolute_tau, kendall_tau, linkage_top_1


@dataclass(frozen=True, kw_only=True)
class Rate:
    """How often an answer is right, and how often a guess would be."""

    found: float
    """Share of right answers; NaN where nothing can be asked."""

    chance: float
    """Share of right answers of a guess among the same candidates."""

    asked: int
    """Number of scenes that were asked for."""

    @property
    def times_chance(self) -> float:
        """How many times as often as by guessing."""
        return self.found / self.chance if self.chance else float("nan")


@dataclass(frozen=True, kw_only=True)
class LinkageScores:
    """What a pile of uploads gave away about order and origin."""

    neighbor: Rate
    """The most similar scene of the whole pile is the upload of the same drive before or after."""

    neighbor_in_drive: Rate
    """The same where the attacker knows which scenes are of this drive, as in a shard of one vehicle."""

    same_drive: Rate
    """The most similar scene of the pile is of the same drive."""

    drive_auc: float
    """Chance that a pair of one drive has a higher chain likeness than a pair of two drives; .5 is guessing, NaN without such pairs."""

    tau: tuple[float, ...]
    """|Kendall's tau| of the recovered order with the recording, for each drive of at least three ordered scenes, in order of name."""

    tau_chance: tuple[float, ...]
    """Mean |tau| of a random order, for each drive of `tau`."""


@dataclass(frozen=True, kw_only=True)
class PlaceScores:
    """Whether uploads could be matched with raw scans of known places."""

    top1: Rate
    """The most similar upload shows the place of the scan."""

    auc: float
    """Chance that an upload of the same place is more similar than one of another place; .5 is guessing."""


def area_under_curve(scores: Tensor, positive: Tensor) -> float:
    """Compute the chance that a positive has a higher score than a negative; equal scores count half.

    Args:
        scores: (N,) any real numbers, also infinite ones.
        positive: (N,) bool.

    Returns:
        The area, NaN where one side is empty.
    """
    if bool(positive.all()) or not bool(positive.any()):
        return float("nan")
    return auc(scores[positive], scores[~positive]).value


def score_linkage(
    score: Tensor, chains: Tensor, orders: Sequence[Tensor], drives: Sequence[str], positions: Sequence[int | None]
) -> LinkageScores:
    """Score what was concluded from a pile.

    Args:
        score: (N, N) likeness, from `pile_likeness`; the diagonal is not looked at.
        chains: (N, N) likeness of pairs of one drive, from `chain_likeness`.
        orders: For each drive that `ordered_drives` names, in that order: the place of its scenes, from `recovered_order`.
        drives: Drive of each scene.
        positions: Place of each scene in its drive; None where nobody knows it. Neighbors are the next uploaded scenes, whatever
            lay between them.

    Returns:
        The scores.

    Raises:
        InvalidInput: The numbers of scenes differ.
    """
    n = len(drives)
    require(
        score.shape == chains.shape == (n, n) and len(positions) == n,
        f"linkage of {n} scenes needs matrices ({n}, {n}) and {n} positions, found {tuple(score.shape)}, {tuple(chains.shape)} and {len(positions)}",
    )
    same = torch.tensor([[a == b for b in drives] for a in drives]).fill_diagonal_(False)
    neighbors = _neighbors(drives, positions)
    others = ~torch.eye(n, dtype=torch.bool)
    upper = torch.triu(others)
    named = ordered_drives(drives, positions)
    require(len(orders) == len(named), f"there are {len(named)} ordered drives, found {len(orders)} orders")
    tau = []
    for rows, order in zip(named.values(), orders, strict=True):
        true = [positions[i] for i in rows]
        tau.append(kendall_tau(order, [float(place) for place in true if place is not None]).absolute)
    return LinkageScores(
        neighbor=_top1(score, neighbors, others),
        neighbor_in_drive=_top1(score, neighbors, same),
        same_drive=_top1(score, same, others),
        drive_auc=area_under_curve(chains[upper], same[upper]),
        tau=tuple(tau),
        tau_chance=tuple(expected_absolute_tau(len(rows)) for rows in named.values()),
    )


def score_place(score: Tensor, same_place: Tensor) -> PlaceScores:
    """Score the search for uploads of known places.

    Args:
        score: (Q, N) likeness of scans with uploads, from `cross_likeness`.
        same_place: (Q, N) bool, which uploads show the place of which scan.

    Returns:
        The scores. Scans without an upload of their place count in the area only.
    """
    return PlaceScores(
        top1=_top1(score, same_place, torch.ones_like(same_place)), auc=area_under_curve(score.flatten(), same_place.flatten())
    )


def ordered_drives(drives: Sequence[str], positions: Sequence[int | None]) -> dict[str, list[int]]:
    """Find the drives whose order can be scored.

    Args:
        drives: Drive of each scene.
        positions: Place of each scene in its drive; None where nobody knows it.

    Returns:
        Drive to its scenes with a known place, for drives with at least three of them, in order of name.
    """
    found: dict[str, list[int]] = {}
    for index, (drive, position) in enumerate(zip(drives, positions, strict=True)):
        if position is not None:
            found.setdefault(drive, []).append(index)
    return {drive: rows for drive, rows in sorted(found.items()) if len(rows) >= 3}


def _neighbors(drives: Sequence[str], positions: Sequence[int | None]) -> Tensor:
    """(N, N) bool: the scenes uploaded next before and after in the same drive."""
    result = torch.zeros(len(drives), len(drives), dtype=torch.bool)
    by_drive: dict[str, list[tuple[int, int]]] = {}
    for index, (drive, position) in enumerate(zip(drives, positions, strict=True)):
        if position is not None:
            by_drive.setdefault(drive, []).append((position, index))
    for found in by_drive.values():
        rows = [index for _, index in sorted(found)]
        for one, other in pairwise(rows):
            result[one, other] = result[other, one] = True
    return result


def _top1(score: Tensor, right: Tensor, allowed: Tensor) -> Rate:
    """How often the best allowed candidate is right, over the rows that have a right one; ties are broken fairly."""
    if not bool((right & allowed).any()):
        return Rate(found=float("nan"), chance=float("nan"), asked=0)
    found = linkage_top_1(score, right, allowed)
    return Rate(found=found.top_1, chance=found.chance, asked=found.queries)
