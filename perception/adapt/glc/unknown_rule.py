"""When a sample is unknown: a score from 0 (certain) to 1 (undecided), and a threshold that is chosen without labels.

The paper rejects samples with a normalized entropy above 0.55. Outside images this constant does not carry over, so the threshold
can be read off the histogram of the unlabeled scores: Otsu (1979) and Yen et al. (1995) as in image thresholding, or two-means, the
midpoint of two clusters (SHOT, Liang et al. 2020).

Read next: `adapter.py`, which applies the rule to the adapted model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ....core.errors import InvalidInput, require, require_numbers

UNADAPTED_ENTROPY = 0.55  # the paper's threshold on the normalized entropy, for a source model without adaptation
ThresholdKind = Literal["fixed", "otsu", "yen", "two_means"]


def normalized_entropy(probabilities: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """Entropy of distributions divided by the largest possible one, ln C.

    Args:
        probabilities: (N, C) distributions, C >= 2.
        epsilon: Constant inside the logarithm, as in the released code. It makes the entropy of a certain sample negative, by
            1e-5; this counts as 0.

    Returns:
        (N,) from 0, certain, to 1, uniform.

    Raises:
        InvalidInput: There are fewer than two classes.
    """
    require(
        probabilities.ndim == 2 and probabilities.shape[1] >= 2, f"entropy needs (N, C >= 2), found {tuple(probabilities.shape)}"
    )
    entropy = -(probabilities * (probabilities + epsilon).log()).sum(1)
    return entropy.clamp_min(0) / math.log(probabilities.shape[1])


@dataclass(frozen=True, kw_only=True)
class UnknownRule:
    """How the threshold is chosen above which a score means unknown.

    Raises:
        InvalidInput: The value lies outside 0 to 1.
    """

    kind: ThresholdKind = "otsu"
    """"fixed" uses `value`; "otsu", "yen" and "two_means" read the threshold off the unlabeled scores.

    These three always reject a part of the samples. Use "fixed" where the target may have no unknown class.
    """

    value: float = 0.55
    """Threshold of "fixed", 0 to 1. 0.55 is the paper's. Lower it to reject more samples."""

    def __post_init__(self) -> None:
        require_numbers("UnknownRule", least=0, most=1, value=self.value)

    def threshold(self, scores: Tensor) -> float:
        """Choose the threshold.

        Args:
            scores: (N,) unknown scores of unlabeled samples; "fixed" does not look at them.

        Returns:
            The threshold. A sample is unknown if its score is larger.

        Raises:
            InvalidInput: The rule needs scores and there are none, or one is not finite.
        """
        if self.kind == "fixed":
            return self.value
        values = scores.detach().double().cpu().numpy()
        if not len(values) or not np.isfinite(values).all():
            raise InvalidInput(
                f"the {self.kind} threshold needs finite scores, found {len(values)} scores, {int(scores.isnan().sum())} of them NaN"
            )
        return {"otsu": otsu, "yen": yen, "two_means": two_means}[self.kind](values)


def is_unknown(scores: Tensor, threshold: float) -> Tensor:
    """Compare scores with a threshold.

    Args:
        scores: (N,) unknown scores.
        threshold: A score that equals it is known.

    Returns:
        (N,) bool.
    """
    return scores > torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)


# ---- rules on the histogram of the scores


def _histogram(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares and centers of 256 equal bins between the extremes."""
    counts, edges = np.histogram(scores, bins=256)
    return counts / len(scores), (edges[:-1] + edges[1:]) / 2


def otsu(scores: np.ndarray) -> float:
    """Find the threshold that divides scores in two groups with the largest variance between their means (Otsu, 1979).

    Args:
        scores: (N,) finite.

    Returns:
        The threshold. Where several are equally good, their middle.
    """
    if scores.min() == scores.max():
        return float(scores[0])
    share, center = _histogram(scores)
    low = np.cumsum(share)[:-1]
    sums = np.cumsum(share * center)
    mean_low, mean_high = sums[:-1] / low, (sums[-1] - sums[:-1]) / (1 - low)
    between = low * (1 - low) * (mean_low - mean_high) ** 2
    # Between two groups that lie far apart every threshold is equally good: take the middle.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float((center[best[0]] + center[best[-1]]) / 2)


def yen(scores: np.ndarray) -> float:
    """Find the threshold with the largest total correlation of the two groups' histograms (Yen et al., 1995).

    Args:
        scores: (N,) finite.

    Returns:
        The threshold.
    """
    if scores.min() == scores.max():
        return float(scores[0])
    share, center = _histogram(scores)
    low = np.cumsum(share)[:-1]
    low_squares = np.cumsum(share**2)[:-1]
    high_squares = np.cumsum(share[::-1] ** 2)[::-1][1:]
    criterion = 2 * np.log(low * (1 - low)) - np.log(low_squares * high_squares)
    return float(center[int(np.argmax(criterion))])


def two_means(scores: np.ndarray) -> float:
    """Find the midpoint of the centers of two clusters; the best division of the sorted scores, exactly (SHOT, 2020).

    Args:
        scores: (N,) finite.

    Returns:
        The threshold.
    """
    ordered = np.sort(scores)
    if ordered[0] == ordered[-1]:
        return float(ordered[0])
    n = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    low, high = sums[:-1] / n, (sums[-1] - sums[:-1]) / (len(ordered) - n)
    best = int(np.argmax(n * (len(ordered) - n) * (low - high) ** 2))
    return float((low[best] + high[best]) / 2)
