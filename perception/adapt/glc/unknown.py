"""When a sample counts as unknown: a score from 0 (sure) to 1 (no idea), and a threshold chosen without labels.

The paper rejects above a fixed normalised entropy of 0.55. Outside images that constant is the fragile part, so the threshold can be
read off the histogram of the unlabelled scores: Otsu (1979) and Yen et al. (1995) as in image thresholding, or two-means, the midpoint
of two clusters (SHOT, Liang et al. 2020).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ....core.errors import InvalidInput, require

Method = Literal["fixed", "otsu", "yen", "two_means"]


def normalized_entropy(probabilities: Tensor, *, epsilon: float = 1e-5) -> Tensor:
    """(N,) entropy of (N, C) distributions over ln C: 0 certain, 1 uniform. ``epsilon`` inside the logarithm as in the paper's code.

    That makes the entropy of a sure sample negative, by 1e-5; it counts as 0. Raises InvalidInput for fewer than two classes.
    """
    require(
        probabilities.ndim == 2 and probabilities.shape[1] >= 2, f"entropy needs (N, C >= 2), found {tuple(probabilities.shape)}"
    )
    entropy = -(probabilities * (probabilities + epsilon).log()).sum(1)
    return entropy.clamp_min(0) / math.log(probabilities.shape[1])


@dataclass(frozen=True, kw_only=True)
class UnknownRule:
    """A sample is unknown if its score exceeds the threshold. value: of "fixed" alone (the paper's w_0); the others read the scores."""

    method: Method = "otsu"
    value: float = 0.55

    def threshold(self, scores: Tensor) -> float:
        """From unlabelled scores (N,). Raises InvalidInput for none or non-finite ones, where the method looks at them."""
        if self.method == "fixed":
            return self.value
        values = scores.detach().double().cpu().numpy()
        if not len(values) or not np.isfinite(values).all():
            raise InvalidInput(
                f"the {self.method} threshold needs finite scores, found {len(values)} with {scores.isnan().sum()} NaN"
            )
        return {"otsu": otsu, "yen": yen, "two_means": two_means}[self.method](values)


def _histogram(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Shares and centres of 256 equal bins between the extremes."""
    counts, edges = np.histogram(scores, bins=256)
    return counts / len(scores), (edges[:-1] + edges[1:]) / 2


def otsu(scores: np.ndarray) -> float:
    """The threshold that separates (N,) scores into two groups with the largest variance between their means."""
    if scores.min() == scores.max():
        return float(scores[0])
    share, center = _histogram(scores)
    low = np.cumsum(share)[:-1]
    sums = np.cumsum(share * center)
    mean_low, mean_high = sums[:-1] / low, (sums[-1] - sums[:-1]) / (1 - low)
    between = low * (1 - low) * (mean_low - mean_high) ** 2
    # Between two groups far apart every threshold is equally good: take the middle.
    best = np.flatnonzero(between >= between.max() * (1 - 1e-12))
    return float((center[best[0]] + center[best[-1]]) / 2)


def yen(scores: np.ndarray) -> float:
    """The threshold of (N,) scores with the largest total correlation of the two groups' histograms."""
    if scores.min() == scores.max():
        return float(scores[0])
    share, center = _histogram(scores)
    low = np.cumsum(share)[:-1]
    low_squares = np.cumsum(share**2)[:-1]
    high_squares = np.cumsum(share[::-1] ** 2)[::-1][1:]
    criterion = 2 * np.log(low * (1 - low)) - np.log(low_squares * high_squares)
    return float(center[int(np.argmax(criterion))])


def two_means(scores: np.ndarray) -> float:
    """The midpoint of the centres of two clusters of (N,) scores: the best split of the sorted scores, exactly."""
    ordered = np.sort(scores)
    if ordered[0] == ordered[-1]:
        return float(ordered[0])
    n = np.arange(1, len(ordered))
    sums = np.cumsum(ordered)
    low, high = sums[:-1] / n, (sums[-1] - sums[:-1]) / (len(ordered) - n)
    best = int(np.argmax(n * (len(ordered) - n) * (low - high) ** 2))
    return float((low[best] + high[best]) / 2)


def is_unknown(scores: Tensor, threshold: float) -> Tensor:
    """(N,) bool. A score that equals the threshold is known."""
    return scores > torch.as_tensor(threshold, dtype=scores.dtype, device=scores.device)
