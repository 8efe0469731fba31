"""GLC's pseudo labels: one-vs-all global clustering with suppression of source-private classes.

GLC (Qu et al., CVPR 2023), section "adaptive one-vs-all global clustering". In short:

    features F, softmax P ── `estimate_class_number` ── K ┐
    for every source class c                              │
        positives   the samples with the largest P[:, c], about N / K of them; their mean direction is the positive prototype
        prior       rho + (1 - rho) * mean P[positives, c]: small for a class that the target does not have
        negatives   all other samples, in K clusters; the directions of the cluster centers are the negative prototypes
    a sample belongs to the class c* whose positive prototype is nearest, if  prior * cos(positive) >= max cos(negatives of c*);
    otherwise it is unknown, and its soft label is uniform, which raises the entropy of the classifier's answer

Only class c* can take a sample, so the negatives of c are compared with the samples nearest to c and with no others: N x K
similarities instead of C x N x K. The labels are the same, and memory does not grow with C. A class that no sample is nearest to
is skipped.

Departures from the released code, all on purpose: a class number is an integer of at least 2 and there is always a negative (with
three source classes the released code can compute K = 0, and then every sample is known); nothing is kept between calls; t-SNE is
replaced by PCA.

Read next: `class_number.py` for K, and `adapter.py`, which trains with these labels.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from .kmeans import KMeansConfig, kmeans
from .pseudo_labels import PseudoLabels, check_target


@dataclass(frozen=True, kw_only=True)
class OneVsAllConfig:
    """Settings of GLC's labels. `paper()` gives the paper's; the default labels use them through `AgreedConfig`."""

    rho: float = 0.75
    """Smallest prior, 0 to 1: the factor on a class without confident samples. Lower it to suppress such classes more."""

    positives: Literal["uniform", "expected"] = "expected"
    """How many samples speak for a class: "uniform" takes N / K for each (the paper), "expected" follows the classifier.

    Use "uniform" only where the classes are about equally frequent.
    """

    shrink: float = 0.8
    """With "expected": the share of the expected number of samples, sum_n P[n, c], that is taken."""

    negatives: tuple[float, ...] = (1.0, 1.5, 2.0)
    """Numbers of negative clusters in units of K, an odd number of them. The median margin of these clusterings decides."""

    kmeans: KMeansConfig = KMeansConfig()
    """Clustering of the negatives."""

    stable: bool = True
    """Whether samples with equal probabilities keep their order, so that the labels are the same on every processor.

    The released code sorts without this promise, and its order of equal samples decides which rows k-means draws.
    """

    seed: int = 1234
    """Seed of the first clustering; the next ones add 1 each. 1234 is the seed of faiss, which the released code uses."""

    def __post_init__(self) -> None:
        odd = len(self.negatives) % 2 == 1 and min(self.negatives) > 0
        if not 0 <= self.rho <= 1 or not 0 < self.shrink <= 1 or not odd:
            raise InvalidInput(
                "one-vs-all labels need 0 <= rho <= 1, 0 < shrink <= 1 and an odd number of positive factors in negatives, found "
                f"{self.rho:g}, {self.shrink:g} and {self.negatives}"
            )

    @staticmethod
    def paper() -> OneVsAllConfig:
        """Use the settings of the released code: N / K positives for each class, one clustering in K clusters, torch's default sort."""
        return OneVsAllConfig(positives="uniform", negatives=(1.0,), stable=False)


def positive_counts(probabilities: Tensor, class_number: int, config: OneVsAllConfig) -> list[int]:
    """Decide how many samples speak for each class.

    Args:
        probabilities: (N, C) softmax.
        class_number: Number of target classes K.
        config: `positives` and `shrink` are used.

    Returns:
        C numbers, each at least 1 and below N so that a negative remains. "uniform" gives N / K; "expected" gives `shrink` times
        the sum of the probabilities, at most N / 2.
    """
    n, classes = probabilities.shape
    if config.positives == "uniform":
        return [min(max(1, n // class_number), n - 1)] * classes
    expected = config.shrink * probabilities.sum(0, dtype=torch.float64)
    return [min(max(1, int(count)), max(1, n // 2)) for count in expected.tolist()]


def most_confident(probabilities: Tensor, c: int, *, stable: bool = True) -> Tensor:
    """Sort samples by their probability of one class.

    Args:
        probabilities: (N, C).
        c: The class.
        stable: Whether equal samples keep their order. Without it they get the order of torch's default sort.

    Returns:
        (N,) int64 rows, the largest probability first.
    """
    return probabilities[:, c].sort(descending=True, stable=stable).indices


def class_similarities(
    features: Tensor, probabilities: Tensor, counts: list[int], *, stable: bool = True
) -> tuple[Tensor, Tensor]:
    """Compare samples with the mean direction of those that speak for each class.

    Args:
        features: (N, D) of length 1.
        probabilities: (N, C).
        counts: How many samples speak for each of the C classes; see `positive_counts`.
        stable: See `most_confident`.

    Returns:
        (N, C) cosines, and (C,) the mean probability of each class among the samples that speak for it.
    """
    orders = (most_confident(probabilities, c, stable=stable) for c in range(probabilities.shape[1]))
    positives = [order[:count].clone() for order, count in zip(orders, counts)]
    confidence = torch.stack([probabilities[rows, c].mean() for c, rows in enumerate(positives)])
    prototypes = F.normalize(torch.stack([features[rows].mean(0) for rows in positives]))
    return features @ prototypes.T, confidence


def one_vs_all_labels(features: Tensor, probabilities: Tensor, class_number: int, config: OneVsAllConfig) -> PseudoLabels:
    """Make GLC's pseudo labels.

    Args:
        features: (N, D) target features of any length.
        probabilities: (N, C) softmax over the source classes.
        class_number: Number of target classes K, estimated or known.
        config: Settings of the labels.

    Returns:
        One label per sample.

    Raises:
        InvalidInput: `check_target` refuses the input, or K is below 2.

    Example:
        estimate = estimate_class_number(features, class_number_candidates(10, "dense"), ClassNumberConfig())
        labels = one_vs_all_labels(features, probabilities, estimate.value, OneVsAllConfig())
        unknown = labels.hard == probabilities.shape[1]
    """
    check_target(features, probabilities)
    require(class_number >= 2, f"the target must have at least 2 classes, found class_number = {class_number}")
    features = F.normalize(features)
    classes = probabilities.shape[1]
    counts = positive_counts(probabilities, class_number, config)
    similarities, confidence = class_similarities(features, probabilities, counts, stable=config.stable)
    prior = config.rho + (1 - config.rho) * confidence
    similarity, nearest = similarities.max(1)

    margin = torch.empty_like(similarity)
    for c in range(classes):
        mine = (nearest == c).nonzero()[:, 0]
        if len(mine) == 0:
            continue
        negatives, own, rivals = most_confident(probabilities, c, stable=config.stable)[counts[c] :], features[mine], []
        for vote, factor in enumerate(config.negatives):
            k = min(max(1, round(factor * class_number)), len(negatives))
            clusters = kmeans(features, k, config.kmeans, rows=negatives, seed=config.seed + vote)
            rivals.append((own @ F.normalize(clusters.centroids).T).amax(1))
        margin[mine] = prior[c] * similarity[mine] - torch.stack(rivals).median(0).values
    return PseudoLabels.make(margin, nearest, prior, class_number)
