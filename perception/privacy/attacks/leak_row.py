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
    """The upper bound: the attacker sees the raw scan at the encoder's input grid, and the upload."""

    @property
    def share(self) -> float:
        """Where the upload lies between nothing (0) and the raw scan (1); NaN where the two are the same."""
        whole = self.raw - self.nothing
        return (self.upload - self.nothing) / whole if abs(whole) > 1e-12 else float("nan")


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
