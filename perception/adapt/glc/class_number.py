"""How many classes the target has, estimated from its features alone.

For each candidate number the samples are clustered with k-means; the number whose clusters lie furthest apart (the largest
silhouette) is the estimate. Read next: `one_vs_all.py`, which uses the number, and `kmeans.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput
from .kmeans import KMeansConfig, kmeans, principal_components, silhouette


@dataclass(frozen=True, kw_only=True)
class ClassNumberConfig:
    """How the number of target classes is estimated: PCA, smoothing, and k-means for each candidate.

    Smoothing replaces every sample by the mean of its neighbors. It draws the samples of a class together, which is the purpose of
    t-SNE in the paper. On overlapping Gaussian classes it halves the mean log error of the estimate (docs/adapt.md).
    """

    candidates: Literal["paper", "dense"] = "dense"
    """"paper" tries C * (1/4, 1/2, 1, 2, 3) for C source classes; "dense" tries up to 24 numbers from C / 2 to 3 C."""

    neighbors: int = 10
    """Neighbors that smoothing averages over."""

    rounds: int = 5
    """Rounds of smoothing over one graph of neighbors; 0 omits it."""

    dimensions: int = 16
    """Principal components that are kept."""

    max_rows: int = 2000
    """Samples that are clustered, drawn at random. The silhouette needs memory quadratic in this number."""

    kmeans: KMeansConfig = KMeansConfig(init="plusplus", restarts=3, points_per_centroid=0)
    """Clustering of each candidate."""

    def __post_init__(self) -> None:
        if self.neighbors < 1 or self.rounds < 0 or self.dimensions < 1 or self.max_rows < 3:
            raise InvalidInput(
                "the estimate of the class number needs neighbors >= 1, rounds >= 0, dimensions >= 1 and max_rows >= 3, found "
                f"{self.neighbors}, {self.rounds}, {self.dimensions} and {self.max_rows}"
            )

    @staticmethod
    def paper() -> ClassNumberConfig:
        """Use the candidates of the paper. Smoothing stays in the place of its t-SNE.

        On the Gaussian sets for which outputs of the released code are stored (2,000 to 20,000 samples), both choose the same number.
        """
        return ClassNumberConfig(candidates="paper")


@dataclass(frozen=True)
class ClassNumber:
    """An estimated number of classes."""

    value: int
    """The candidate with the largest silhouette."""

    candidates: tuple[int, ...]
    """Candidates that were tried, ascending. A candidate that is not below the number of samples is left out."""

    scores: tuple[float, ...]
    """Silhouette of each candidate, -1 to 1."""


def target_class_number(
    features: Tensor, source_classes: int, given: int | None, config: ClassNumberConfig | None, *, seed: int = 0
) -> tuple[int, ClassNumber | None]:
    """Decide the number of target classes: the given one, an estimate, or as many as the source has.

    Training begins with labels of as many classes as the source has, and goes on with those that they use; see `occupied_classes`.

    Args:
        features: (N, D) target features of any length.
        source_classes: Number of source classes C.
        given: The number, if it is known.
        config: How the number is estimated, or None to take C.
        seed: Decides the estimate.

    Returns:
        The number, and how it was estimated or None.

    Raises:
        InvalidInput: An estimate is asked for and no candidate is below the number of samples.
    """
    if given is not None or config is None:
        return (source_classes if given is None else given), None
    estimate = estimate_class_number(features, class_number_candidates(source_classes, config.candidates), config, seed=seed)
    return estimate.value, estimate


def occupied_classes(nearest: Tensor, classes: int) -> int:
    """Count the source classes that labels use: a class counts less where it has fewer samples than the others.

    Args:
        nearest: (N,) int64 in 0..C-1, at least one.
        classes: Number of source classes C.

    Returns:
        The exponential of the entropy of the classes' shares, rounded: 2..C, and C where all have the same share.
    """
    share = torch.bincount(nearest, minlength=classes).double() / len(nearest)
    return max(2, round(float(torch.special.entr(share).sum().exp())))


def class_number_candidates(classes: int, kind: Literal["paper", "dense"]) -> tuple[int, ...]:
    """List the numbers of target classes to try.

    Args:
        classes: Number of source classes C.
        kind: "paper" or "dense"; see `ClassNumberConfig.candidates`.

    Returns:
        Ascending numbers, none below 2.
    """
    if kind == "paper":
        return tuple(sorted({max(2, int(classes * factor)) for factor in (0.25, 0.5, 1, 2, 3)}))
    # A target with less than half of the source's classes would make the source of little use, and silhouettes favor few clusters.
    lowest = max(2, -(-classes // 2))
    return tuple(sorted({round(x) for x in np.geomspace(lowest, max(4, 3 * classes), 24).tolist()}))


def estimate_class_number(
    features: Tensor, candidates: Sequence[int], config: ClassNumberConfig, *, seed: int = 0
) -> ClassNumber:
    """Estimate the number of target classes.

    Args:
        features: (N, D) target features of any length.
        candidates: Numbers of classes to try.
        config: Settings of the estimate.
        seed: Decides the drawn samples and the clustering.

    Returns:
        The candidate whose clusters lie furthest apart. The smallest wins a tie.

    Raises:
        InvalidInput: No candidate is at least 2 and below N.
    """
    rows = np.sort(np.random.default_rng(seed).permutation(len(features))[: config.max_rows])
    points = principal_components(F.normalize(features[torch.from_numpy(rows).to(features.device)]), config.dimensions)
    usable = sorted(k for k in set(candidates) if 2 <= k < len(points))
    if not usable:
        raise InvalidInput(
            f"none of the class numbers {sorted(set(candidates))} is at least 2 and below the {len(points)} samples"
        )
    if config.rounds:
        count = min(config.neighbors + 1, max(1, len(points) // 4))  # each sample is its own first neighbor
        nearest = torch.cdist(points, points).topk(count, largest=False).indices
        for _ in range(config.rounds):
            points = points[nearest].mean(1)
    distances = torch.cdist(points, points)
    clusterings = (kmeans(points, k, config.kmeans, seed=seed) for k in usable)
    scores = [silhouette(distances, clustering.assignment) for clustering in clusterings]
    return ClassNumber(usable[int(np.argmax(scores))], tuple(usable), tuple(scores))
