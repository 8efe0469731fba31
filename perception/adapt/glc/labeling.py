"""GLC's pseudo labels: how many classes the target has, and one-vs-all global clustering with suppression of source-private classes.

GLC (Qu et al., CVPR 2023), section "adaptive one-vs-all global clustering", read beside this file:

    features F, softmax P ── ``estimate_class_number`` ── K ┐
    for every source class c                                │
        positives   the samples with the largest P[:, c], about N / K of them; their mean direction is the positive prototype
        prior       rho + (1 - rho) * mean P[positives, c]: weak for a class that the target does not have
        negatives   all other samples, in K clusters; the cluster centres' directions are the negative prototypes
    a sample goes to the class c* whose positive prototype is nearest, if  prior * cos(positive) >= max cos(negatives of c*);
    otherwise it is unknown, and its soft label is uniform, which raises the entropy of what the classifier says of it

Only class c* may take a sample, so the negatives of c are compared with the samples nearest to c and with nobody else: N x K
similarities instead of C x N x K, the same labels, and memory that does not grow with C. A class nearest to nobody is skipped.

Departures from the released code, all on purpose: a class number is an integer of at least 2 and there is always a negative (with three
source classes the released K is 0 and everything becomes known); nothing is kept between calls; t-SNE is replaced by PCA.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from ....core.structures import TensorValue
from .kmeans import KMeansConfig, kmeans, principal_components, silhouette


@dataclass(frozen=True, kw_only=True, repr=False)
class TargetLabels(TensorValue):
    """Pseudo labels of N target samples for C source classes.

    hard: (N,) int64 in 0..C, where C is "unknown". soft: (N, C), one-hot, or uniform for unknown.
    weight: (N,) float, how much a sample counts in the loss (1 everywhere in GLC).
    margin: (N,) float, evidence for the class: at least 0 where it was accepted. nearest: (N,) int64, the only class it might take.
    prior: (C,) float, the factor that suppresses source-private classes. class_number: K that was used.
    """

    hard: Tensor
    soft: Tensor
    weight: Tensor
    margin: Tensor
    nearest: Tensor
    prior: Tensor
    class_number: int

    @staticmethod
    def make(margin: Tensor, nearest: Tensor, prior: Tensor, class_number: int, weight: Tensor | None = None) -> TargetLabels:
        """Labels from the margins: a sample with at least 0 takes its nearest class."""
        known, classes = margin >= 0, prior.shape[0]
        uniform = torch.full_like(prior, 1.0 / classes)
        return TargetLabels(
            hard=torch.where(known, nearest, classes),
            soft=torch.where(known[:, None], F.one_hot(nearest, classes).to(prior.dtype), uniform),
            weight=torch.ones_like(margin) if weight is None else weight,
            margin=margin,
            nearest=nearest,
            prior=prior,
            class_number=class_number,
        )


def check_target(features: Tensor, probabilities: Tensor, *, at_least: int = 2) -> None:
    """Raise InvalidInput unless features (N, D) and probabilities (N, C) are finite, fit together and rows of the latter sum to 1."""
    require(features.ndim == 2, f"target features must be (N, D), found {tuple(features.shape)}")
    require(
        probabilities.ndim == 2 and len(probabilities) == len(features),
        f"probabilities must be ({len(features)}, C) like the features, found {tuple(probabilities.shape)}",
    )
    require(
        probabilities.shape[1] >= 2,
        f"adaptation needs at least 2 source classes, found {probabilities.shape[1]}: with one class every probability is 1 and says "
        "nothing; add a background class to the classifier",
    )
    require(len(features) >= at_least, f"adaptation needs at least {at_least} target samples, found {len(features)}")
    for name, values in (("features", features), ("probabilities", probabilities)):
        if torch.isfinite(values.sum()):  # a sum is finite only if all of it is: one quick pass for the usual case
            continue
        bad = (~torch.isfinite(values).all(1)).nonzero()[:, 0]
        require(len(bad) == 0, f"{name} of {len(bad)} samples are not finite, the first at row {int(bad[0]) if len(bad) else 0}")
    off = ((probabilities.sum(1) - 1).abs() > 1e-3) | (probabilities < 0).any(1)
    row = int(off.nonzero()[0, 0]) if off.any() else 0
    require(
        not off.any(),
        f"probabilities of {int(off.sum())} samples are no distribution: row {row} sums to {float(probabilities[row].sum()):.4f}, "
        f"smallest {float(probabilities[row].min()):.4f}; give the softmax, not the logits",
    )


# ---- how many classes the target has -------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class ClassNumberConfig:
    """How to guess the number of target classes: the k-means clustering with the best silhouette, after PCA, among candidates.

    Smoothing moves every sample to the mean of its neighbours, ``rounds`` times over one graph: it draws clusters together, which is
    what the paper has t-SNE for. On overlapping Gaussian classes it halved the mean log error (docs/adapt.md).
    """

    candidates: Literal["paper", "dense"] = "dense"  # C * (1/4, 1/2, 1, 2, 3), or all numbers from C / 2 to 3 C, thinned to 24
    neighbors: int = 10  # of the smoothing
    rounds: int = 5  # of the smoothing; 0 leaves it out
    dimensions: int = 16  # of the principal components
    max_rows: int = 2000  # a random sample of the target is enough, and the silhouette is quadratic
    kmeans: KMeansConfig = KMeansConfig(init="plusplus", restarts=3, points_per_centroid=0)

    def __post_init__(self) -> None:
        if self.neighbors < 1 or self.rounds < 0 or self.dimensions < 1 or self.max_rows < 3:
            raise InvalidInput(
                f"the class number needs neighbours >= 1, rounds >= 0, dimensions >= 1, max_rows >= 3, found {self}"
            )

    @staticmethod
    def paper() -> ClassNumberConfig:
        """The paper's candidates; the smoothing stands for its t-SNE (and chooses the same on the Gaussian sets of glc.md)."""
        return ClassNumberConfig(candidates="paper")


@dataclass(frozen=True)
class ClassNumber:
    """The estimate, and each candidate with its silhouette. The candidates that the data are too few for are left out."""

    value: int
    candidates: tuple[int, ...]
    scores: tuple[float, ...]


def class_number_candidates(classes: int, kind: Literal["paper", "dense"]) -> tuple[int, ...]:
    """Ascending numbers of classes to try for a source of ``classes``; never below 2."""
    if kind == "paper":
        return tuple(sorted({max(2, int(classes * factor)) for factor in (0.25, 0.5, 1, 2, 3)}))
    lowest = max(
        2, -(-classes // 2)
    )  # below half of its classes the source would be of little use, and silhouettes like few clusters
    return tuple(sorted({round(x) for x in np.geomspace(lowest, max(4, 3 * classes), 24).tolist()}))


def estimate_class_number(
    features: Tensor, candidates: Sequence[int], config: ClassNumberConfig, *, seed: int = 0
) -> ClassNumber:
    """The candidate whose clusters of the target features (N, D) lie furthest apart; the smallest wins a tie.

    Raises InvalidInput if no candidate is at least 2 and below N.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(features))[: config.max_rows])
    points = principal_components(F.normalize(features[torch.from_numpy(rows).to(features.device)]), config.dimensions)
    usable = sorted(k for k in set(candidates) if 2 <= k < len(points))
    if not usable:
        raise InvalidInput(
            f"none of the class numbers {sorted(set(candidates))} is at least 2 and below the {len(points)} samples"
        )
    if config.rounds:
        count = min(config.neighbors + 1, max(1, len(points) // 4))  # each sample is its own first neighbour
        nearest = torch.cdist(points, points).topk(count, largest=False).indices
        for _ in range(config.rounds):
            points = points[nearest].mean(1)
    distances = torch.cdist(points, points)
    clusterings = (kmeans(points, k, config.kmeans, seed=seed) for k in usable)
    scores = [silhouette(distances, clustering.assignment) for clustering in clusterings]
    return ClassNumber(usable[int(np.argmax(scores))], tuple(usable), tuple(scores))


# ---- one-vs-all global clustering ----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class OneVsAllConfig:
    """Options of the labelling. The defaults of ``paper()`` are the paper's; our own were chosen on Gaussian sets."""

    rho: float = 0.75  # floor of the prior of a class without confident samples
    positives: Literal["uniform", "expected"] = "expected"  # N / K for every class, or as many as the classifier expects
    shrink: float = 0.8  # "expected" takes this part of sum_n P[n, c]
    # Clusters of the negatives, in K; the median margin of these clusterings decides.
    negatives: tuple[float, ...] = (1.0, 1.5, 2.0)
    kmeans: KMeansConfig = KMeansConfig()
    seed: int = 1234

    def __post_init__(self) -> None:
        odd = len(self.negatives) % 2 == 1 and min(self.negatives) > 0
        if not 0 <= self.rho <= 1 or not 0 < self.shrink <= 1 or not odd:
            raise InvalidInput(
                f"one-vs-all labelling needs 0 <= rho <= 1, 0 < shrink <= 1 and an odd number of positive factors, found {self}"
            )

    @staticmethod
    def paper() -> OneVsAllConfig:
        """What the released code does."""
        return OneVsAllConfig(positives="uniform", negatives=(1.0,))


def positive_counts(probabilities: Tensor, class_number: int, config: OneVsAllConfig) -> list[int]:
    """How many samples speak for each class: at least 1, and at most all but one, so that there is a negative.

    "uniform" presumes balanced classes: N / K. "expected": ``shrink`` of what the probabilities sum to, at most half the samples.
    """
    n, classes = probabilities.shape
    if config.positives == "uniform":
        return [min(max(1, n // class_number), n - 1)] * classes
    expected = config.shrink * probabilities.sum(0, dtype=torch.float64)
    return [min(max(1, int(count)), max(1, n // 2)) for count in expected.tolist()]


def most_confident(probabilities: Tensor, c: int) -> Tensor:
    """(N,) all rows, those with the largest probability of class ``c`` first; equal ones in their order."""
    return probabilities[:, c].sort(descending=True, stable=True).indices


def one_vs_all_labels(features: Tensor, probabilities: Tensor, class_number: int, config: OneVsAllConfig) -> TargetLabels:
    """Pseudo labels of target features (N, D), of any length, and their softmax (N, C) over the source classes.

    class_number: K, guessed or known. Raises InvalidInput for what ``check_target`` refuses, and for K < 2.
    """
    check_target(features, probabilities)
    require(class_number >= 2, f"the target must be given at least 2 classes, found class_number = {class_number}")
    features = F.normalize(features)
    classes = probabilities.shape[1]
    counts = positive_counts(probabilities, class_number, config)

    positives = [most_confident(probabilities, c)[:count].clone() for c, count in enumerate(counts)]
    confidence = torch.stack([probabilities[rows, c].mean() for c, rows in enumerate(positives)])
    prior = config.rho + (1 - config.rho) * confidence
    prototypes = F.normalize(torch.stack([features[rows].mean(0) for rows in positives]))
    similarity, nearest = (features @ prototypes.T).max(1)

    margin = torch.empty_like(similarity)
    for c in range(classes):
        mine = (nearest == c).nonzero()[:, 0]
        if len(mine) == 0:
            continue
        negatives, own, rivals = most_confident(probabilities, c)[counts[c] :], features[mine], []
        for vote, factor in enumerate(config.negatives):
            k = min(max(1, round(factor * class_number)), len(negatives))
            clusters = kmeans(features, k, config.kmeans, rows=negatives, seed=config.seed + vote)
            rivals.append((own @ F.normalize(clusters.centroids).T).amax(1))
        margin[mine] = prior[c] * similarity[mine] - torch.stack(rivals).median(0).values
    return TargetLabels.make(margin, nearest, prior, class_number)
