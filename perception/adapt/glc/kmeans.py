"""k-means on torch tensors, principal components, and the silhouette, which measures how well a clustering separates.

Lloyd's algorithm (1982), from a random sample of the points or from k-means++ seeds (Arthur and Vassilvitskii, 2007). With
`init="sample"` the draws are those of faiss.Kmeans (documented there: MT19937, a partial Fisher-Yates shuffle), so that labels can
be compared with the published GLC code to the last sample. Lloyd's algorithm stops once no point changes its cluster, which is also
the state after the 100 rounds of faiss. The same input gives the same bits on one device.

Read next: `one_vs_all.py` and `class_number.py`, which cluster with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput
from ....core.tensor_value import TensorValue

_RESTART_STRIDE = 15486557  # a prime; how far apart faiss keeps the seeds of its restarts
_SPLIT = 1 / 1024  # an empty centroid moves next to the largest one, at this distance relative to its coordinates


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """How to cluster. The defaults are those with which GLC calls faiss.Kmeans."""

    init: Literal["sample", "plusplus"] = "sample"
    """First centroids: random points ("sample"), which is what faiss draws, or k-means++ seeds ("plusplus")."""

    iterations: int = 100
    """Most rounds of Lloyd's algorithm; it stops earlier when no point changes its cluster."""

    restarts: int = 1
    """Runs from different seeds; the one with the smallest inertia counts. More make the result depend less on the seed."""

    points_per_centroid: int = 256
    """Largest number of points per centroid; where there are more, a random sample is clustered. 0 clusters every point."""

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.restarts < 1 or self.points_per_centroid < 0:
            raise InvalidInput(
                "k-means needs iterations >= 1, restarts >= 1 and points_per_centroid >= 0, found "
                f"{self.iterations}, {self.restarts} and {self.points_per_centroid}"
            )


@dataclass(frozen=True, kw_only=True, repr=False)
class Clustering(TensorValue):
    """Result of k-means on n points, which are a sample where the configuration asks for one."""

    centroids: Tensor
    """(K, D) cluster centers."""

    assignment: Tensor
    """(n,) int64 cluster of each clustered point."""

    inertia: float
    """Sum of the squared distances of these points to their centroids."""


def kmeans(points: Tensor, k: int, config: KMeansConfig, *, rows: Tensor | None = None, seed: int = 1234) -> Clustering:
    """Divide points into `k` clusters by Euclidean distance. The seed decides the result on one device.

    Args:
        points: (N, D). Duplicates are legal: a cluster that stays empty is placed next to the largest one.
        k: Number of clusters.
        config: Settings of the clustering.
        rows: (n,) int64, the rows of `points` to cluster, or None for all. Only these are copied.
        seed: Seed of the first run; restarts use others.

    Returns:
        The clustering with the smallest inertia among the restarts.

    Raises:
        InvalidInput: `points` has another number of dimensions, or k is not in 1..n.
    """
    n = len(points) if rows is None else len(rows)
    if points.ndim != 2 or not 1 <= k <= n:
        raise InvalidInput(f"k-means needs points (N, D) with 1 <= k <= N, found {tuple(points.shape)}, {n} rows and k = {k}")
    if 0 < k * config.points_per_centroid < n:
        sample = _first_of_permutation(n, k * config.points_per_centroid, seed).to(points.device)
        rows = sample if rows is None else rows[sample]
    chosen = points if rows is None else points[rows]
    runs = (_lloyd(chosen, k, config, seed + 1 + r * _RESTART_STRIDE) for r in range(config.restarts))
    return min(runs, key=lambda run: run.inertia)


def _lloyd(points: Tensor, k: int, config: KMeansConfig, seed: int) -> Clustering:
    if config.init == "sample":
        centroids = points[_first_of_permutation(len(points), k, seed).to(points.device)]
    else:
        centroids = _plusplus(points, k, seed)
    squares = points.square().sum(1)
    distance, assignment = _nearest(points, centroids)
    for _ in range(config.iterations):
        counts = torch.bincount(assignment, minlength=k).to(points.dtype)
        centroids = _sums(points, assignment, k) / counts.clamp(min=1)[:, None]
        if not counts.all():
            centroids = _split_largest(centroids, counts)
        before = assignment
        distance, assignment = _nearest(points, centroids)
        if torch.equal(before, assignment):
            break
    return Clustering(centroids=centroids, assignment=assignment, inertia=float((distance + squares).clamp(min=0).sum()))


def _nearest(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Squared distance (N,) to the nearest centroid minus the square of the point itself, and its index; the first wins a tie."""
    return torch.addmm(centroids.square().sum(1), points, centroids.T, alpha=-2).min(1)


def _sums(points: Tensor, assignment: Tensor, k: int) -> Tensor:
    """(k, D) sum of each cluster's points. On a GPU through a matrix product: scattered additions have no fixed order there."""
    if points.is_cuda:
        return F.one_hot(assignment, k).to(points.dtype).T @ points
    return points.new_zeros(k, points.shape[1]).index_add_(0, assignment, points)


def _split_largest(centroids: Tensor, counts: Tensor) -> Tensor:
    """Move each empty centroid next to the one that has most points by now, and push the two apart."""
    centroids, counts = centroids.clone(), counts.clone()
    sign = torch.ones(centroids.shape[1], device=centroids.device, dtype=centroids.dtype)
    sign[1::2] = -1
    for empty in (counts == 0).nonzero()[:, 0].tolist():
        largest = int(counts.argmax())
        centroids[empty] = centroids[largest] * (1 + sign * _SPLIT)
        centroids[largest] = centroids[largest] * (1 - sign * _SPLIT)
        counts[empty] = counts[largest] / 2
        counts[largest] = counts[largest] / 2
    return centroids


def _plusplus(points: Tensor, k: int, seed: int) -> Tensor:
    """k-means++ seeds: each is drawn with a probability proportional to the squared distance from the seeds so far."""
    draws = np.random.default_rng(seed).random(k).tolist()
    chosen = [int(draws[0] * len(points))]
    distance = torch.full((len(points),), torch.inf, device=points.device, dtype=points.dtype)
    for draw in draws[1:]:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
        cumulative = distance.double().cumsum(0)
        chosen.append(min(int(torch.searchsorted(cumulative, draw * cumulative[-1])), len(points) - 1))
    return points[chosen]


def _first_of_permutation(n: int, count: int, seed: int) -> Tensor:
    """The first `count` entries of faiss's random permutation of 0..n-1 (rand_perm: MT19937, modulo, swaps)."""
    generator = np.random.RandomState(seed & 0xFFFFFFFF)  # seeds MT19937 the way std::mt19937 does
    draws = generator.randint(0, 2**32, size=count, dtype=np.uint32).tolist()
    order = list(range(n))
    for i, draw in enumerate(draws):
        j = i + draw % (n - i)
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order[:count])


def principal_components(points: Tensor, dimensions: int) -> Tensor:
    """Project points on the directions of largest variance.

    Args:
        points: (N, D).
        dimensions: Number of directions.

    Returns:
        (N, min(dimensions, D)) coordinates, the direction of largest variance first.
    """
    centered = points - points.mean(0)
    _, vectors = torch.linalg.eigh(centered.T @ centered)
    return centered @ vectors.flip(1)[:, :dimensions]


def silhouette(distances: Tensor, assignment: Tensor) -> float:
    """Compute the mean silhouette of a clustering (Rousseeuw, 1987). A point alone in its cluster scores 0.

    Args:
        distances: (N, N) distances between the points.
        assignment: (N,) int64 cluster of each point.

    Returns:
        From -1, wrong, to 1, well separated. A single cluster separates nothing and gets -1.
    """
    _, compact = assignment.unique(return_inverse=True)
    k = int(compact.max()) + 1 if len(compact) else 0
    if k < 2:
        return -1.0
    members = F.one_hot(compact, k).to(distances.dtype)
    counts = members.sum(0)
    sums = distances @ members  # (N, K): to all points of each cluster
    own = compact[:, None]
    size = counts[compact]
    inside = sums.gather(1, own)[:, 0] / (size - 1).clamp(min=1)
    outside = (sums / counts).scatter(1, own, torch.inf).amin(1)
    score = (outside - inside) / torch.maximum(outside, inside).clamp(min=torch.finfo(distances.dtype).tiny)
    return float(torch.where(size > 1, score, 0.0).mean())
