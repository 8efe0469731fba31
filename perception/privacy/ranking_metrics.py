"""How well an attacker orders and finds: order of recording, linked scenes, members of a training set. Each score has its chance level.

Ties are broken by chance on purpose: an attack that gives every candidate the same score reaches exactly the chance level, whatever
order the candidates come in.

Read next: `linkage_metrics.py`, which scores a pile of uploads with them, and `exact_points.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.stats import kendalltau, rankdata
from torch import Tensor

from ...core.errors import require

CHANCE_AUC = 0.5
"""AUC of scores that say nothing."""
FALSE_POSITIVES = 0.01
"""Share of non-members that `MembershipScore.found_at_1_percent` accepts as false alarms."""


@dataclass(frozen=True, kw_only=True)
class AucScore:
    """Area under the ROC curve: how often a positive has a larger score than a negative, ties counted half. Chance is 0.5."""

    value: float
    """Between 0 and 1."""
    positives: int
    """Number of positives."""
    negatives: int
    """Number of negatives."""

    @property
    def chance_deviation(self) -> float:
        """Standard deviation of the value for scores that say nothing; two of them around 0.5 are no finding."""
        return math.sqrt((self.positives + self.negatives + 1) / (12 * self.positives * self.negatives))


def auc(positives: ArrayLike | Tensor, negatives: ArrayLike | Tensor) -> AucScore:
    """Compute the area under the ROC curve.

    Args:
        positives: (P,) scores of what the attacker should rank high, such as pairs of scenes of one drive.
        negatives: (N,) scores of the others.

    Returns:
        The area.

    Raises:
        InvalidInput: One side is empty, or a score is NaN.
    """
    high, low = _numbers(positives), _numbers(negatives)
    require(len(high) > 0 and len(low) > 0, f"an AUC needs both sides, found {len(high)} positives and {len(low)} negatives")
    ranks = rankdata(np.concatenate([high, low]))[: len(high)].sum()
    value = (ranks - len(high) * (len(high) + 1) / 2) / (len(high) * len(low))
    return AucScore(value=float(value), positives=len(high), negatives=len(low))


@dataclass(frozen=True, kw_only=True)
class OrderScore:
    """How much of the order of recording an attacker recovers."""

    tau: float
    """Kendall's tau between -1 and 1 (tau-b, which allows ties): 1 is the order of recording, -1 the same order backwards."""
    scenes: int
    """Number of scenes that were ordered."""

    @property
    def absolute(self) -> float:
        """|tau|: similar neighbors give the order, but not its direction. This is the number to report."""
        return abs(self.tau)

    @property
    def chance(self) -> float:
        """The |tau| that is expected of a random order."""
        return expected_absolute_tau(self.scenes)


def kendall_tau(recovered: ArrayLike | Tensor, recorded: ArrayLike | Tensor) -> OrderScore:
    """Compare a recovered order with the order of recording.

    Args:
        recovered: (N,) the place, or the time, that the attacker gives to each scene.
        recorded: (N,) when each scene was recorded.

    Returns:
        Kendall's tau. It is 0 where the attacker gives all scenes one place.

    Raises:
        InvalidInput: There are fewer than two scenes, the lengths differ, a number is NaN, or all scenes were recorded at once.
    """
    a, b = _numbers(recovered), _numbers(recorded)
    require(len(a) == len(b) > 1, f"an order needs at least two scenes on both sides, found {len(a)} and {len(b)}")
    require(bool((b != b[0]).any()), "all scenes have the same time of recording, so they have no order")
    tau = float(kendalltau(a, b).statistic)
    return OrderScore(tau=0.0 if math.isnan(tau) else tau, scenes=len(a))


def expected_absolute_tau(scenes: int) -> float:
    """Compute the mean |tau| over all orders of scenes without ties.

    Args:
        scenes: Number of scenes, at least two.

    Returns:
        The mean: exact for at most 60 scenes, of the normal approximation for more.
    """
    if scenes > 60:
        return math.sqrt(2 / math.pi * 2 * (2 * scenes + 5) / (9 * scenes * (scenes - 1)))
    share = np.ones(1)  # of the orders with 0, 1, 2, ... exchanged pairs
    for count in range(2, scenes + 1):
        share = np.convolve(share, np.full(count, 1 / count))
    pairs = scenes * (scenes - 1) / 2
    return float((share * np.abs(1 - 2 * np.arange(len(share)) / pairs)).sum())


@dataclass(frozen=True, kw_only=True)
class RetrievalScore:
    """How often the best candidate of a query is a right one."""

    top_1: float
    """Share of the queries whose best candidate is right. Of several best ones each counts equally."""
    chance: float
    """The same for a candidate that is drawn at random: the mean share of right candidates."""
    queries: int
    """Queries that have a right candidate. Only they count."""
    without_answer: int
    """Queries without a right candidate."""

    @property
    def times_chance(self) -> float:
        """`top_1` divided by `chance`: 1 means that nothing was found."""
        return self.top_1 / self.chance


def linkage_top_1(likeness: Tensor, right: Tensor, candidates: Tensor | None = None) -> RetrievalScore:
    """Score a search for linked scenes.

    Args:
        likeness: (Q, C) how sure the attacker is that query and candidate belong together.
        right: (Q, C) bool, which do.
        candidates: (Q, C) bool, which candidates a query may choose. None: all of them. Scenes that are compared with one
            another leave out themselves.

    Returns:
        The share of right answers and its chance level.

    Raises:
        InvalidInput: The shapes differ, a likeness is NaN, or no query has a right candidate.
    """
    allowed = torch.ones_like(right) if candidates is None else candidates
    require(
        likeness.ndim == 2 and likeness.shape == right.shape == allowed.shape,
        f"likeness, right and candidates need one shape (Q, C), found {tuple(likeness.shape)}, {tuple(right.shape)} and "
        f"{tuple(allowed.shape)}",
    )
    require(not bool(likeness[allowed].isnan().any()), "a likeness is NaN, so the candidates have no order")
    right = right & allowed
    answerable = right.any(1)
    require(bool(answerable.any()), "no query has a right candidate, so nothing can be found")
    likeness, right, allowed = likeness[answerable].double(), right[answerable], allowed[answerable]
    likeness = likeness.masked_fill(~allowed, -math.inf)
    best = (likeness == likeness.amax(1, keepdim=True)) & allowed
    return RetrievalScore(
        top_1=float(((best & right).sum(1) / best.sum(1)).mean()),
        chance=float((right.sum(1) / allowed.sum(1)).mean()),
        queries=len(right),
        without_answer=int((~answerable).sum()),
    )


@dataclass(frozen=True, kw_only=True)
class MembershipScore:
    """How well an attacker tells the frames of the training set from others."""

    auc: AucScore
    """AUC with the members as positives."""
    found_at_1_percent: float | None
    """Share of the members that are found when one non-member in a hundred is called a member; chance is 0.01. None with fewer than 100
    non-members, where one in a hundred is less than one frame."""
    found_at_5_percent: float | None = None
    """The same where one non-member in twenty is called a member; chance is 0.05. None with fewer than 20 non-members."""


def membership_score(members: ArrayLike | Tensor, outsiders: ArrayLike | Tensor) -> MembershipScore:
    """Score an attack on membership.

    Args:
        members: (M,) how sure the attacker is of frames that the detector was trained on.
        outsiders: (N,) the same of frames of the same kind that it was not trained on.

    Returns:
        The AUC, and the share of members that are found with few false alarms.

    Raises:
        InvalidInput: One side is empty, or a score is NaN.
    """
    area, inside, outside = auc(members, outsiders), _numbers(members), _numbers(outsiders)
    found = [
        float((inside > np.sort(outside)[-int(len(outside) * share) - 1]).mean()) if len(outside) * share >= 1 else None
        for share in (FALSE_POSITIVES, 5 * FALSE_POSITIVES)
    ]
    return MembershipScore(auc=area, found_at_1_percent=found[0], found_at_5_percent=found[1])


def _numbers(values: ArrayLike | Tensor) -> NDArray[np.float64]:
    array = values.detach().cpu().double().numpy() if isinstance(values, Tensor) else np.asarray(values, dtype=np.float64)
    require(
        array.ndim == 1 and not bool(np.isnan(array).any()), f"scores must be one row of numbers without NaN, found {array.shape}"
    )
    return array
