"""One measure of an attack, beside what the same attacker reaches with less and with more; and scores that several attacks share."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LeakRow:
    """One measure, taken four times with the same learner, the same frames and the same seed."""

    nothing: float
    """The no-information baseline: the attacker knows the place that is asked about and how the data usually are, and has no upload."""

    coordinates: float
    """The attacker sees which cells and keypoints were uploaded, without their features."""

    upload: float
    """The attacker sees the upload."""

    raw: float
    """The upper bound: the attacker sees the raw scan at the encoder's input grid."""

    @property
    def share(self) -> float:
        """Where the upload lies between nothing (0) and the raw scan (1); NaN where the two are the same."""
        whole = self.raw - self.nothing
        return (self.upload - self.nothing) / whole if abs(whole) > 1e-12 else float("nan")


def ranking_auc(positive: Tensor, negative: Tensor) -> float:
    """Compute the chance that a positive sample has a higher score than a negative one; equal scores count half.

    Args:
        positive: (P,) scores of the samples that should score high.
        negative: (N,) scores of the others.

    Returns:
        Area under the ROC curve; 0.5 is chance. NaN where one of the two is empty.
    """
    if not len(positive) or not len(negative):
        return float("nan")
    ordered = negative.double().sort().values
    below = torch.searchsorted(ordered, positive.double())
    equal = torch.searchsorted(ordered, positive.double(), right=True) - below
    return float((below + 0.5 * equal).double().mean() / len(negative))


def auc_error(auc: float, positive: int, negative: int) -> float:
    """Estimate the standard error of an area under the ROC curve (Hanley and McNeil, 1982).

    Args:
        auc: The area.
        positive: Number of positive samples.
        negative: Number of negative samples.

    Returns:
        One standard error.
    """
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (positive - 1) * (first - auc**2) + (negative - 1) * (second - auc**2)
    return float((max(spread, 0.0) / (positive * negative)) ** 0.5)


def explained_share(truth: Tensor, answer: Tensor) -> float:
    """Compute R2, the share of the variance that an answer explains.

    Args:
        truth: (N,) true values.
        answer: (N,) answers.

    Returns:
        1 for perfect answers, 0 for the mean of the true values, negative for worse.
    """
    rest = (truth.double() - answer.double()).square().sum()
    return float(1 - rest / (truth.double() - truth.double().mean()).square().sum().clamp_min(1e-12))


def balanced_accuracy(truth: Tensor, answer: Tensor, classes: int) -> float:
    """Average the share of right answers over the classes that occur.

    Args:
        truth: (N,) true classes.
        answer: (N,) answers.
        classes: Number of classes.

    Returns:
        1 for perfect answers, one over the number of classes for a guess. NaN where there is no sample.
    """
    shares = [(answer[truth == c] == c).double().mean() for c in range(classes) if bool((truth == c).any())]
    return float(torch.stack(shares).mean()) if shares else float("nan")
