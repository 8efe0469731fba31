"""k-means on torch tensors, and the silhouette that tells how well a clustering separates.

Lloyd's algorithm (1982), from a random sample of the points or from k-means++ seeds (Arthur and Vassilvitskii, 2007). With
``init="sample"`` the draws are those of faiss.Kmeans (documented there; MT19937, a partial Fisher-Yates shuffle), so that labels can
be compared with published GLC code to the last sample; Lloyd stops once nothing moves, which is where faiss's 100 rounds also stand.
The same input gives the same bits on one device.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput
from ....core.structures import TensorValue

_RESTART_STRIDE = 15486557  # a prime; how far apart faiss keeps the seeds of its restarts
_SPLIT = 1 / 1024  # an empty centroid moves beside the largest one, this far apart, relative to its coordinates


@dataclass(frozen=True, kw_only=True)
class KMeansConfig:
    """How to cluster. The defaults are those of faiss.Kmeans as GLC calls it."""

    init: Literal["sample", "plusplus"] = "sample"  # first centroids: random points, or k-means++
    iterations: int = 100  # at most; stops when no point changes its cluster
    restarts: int = 1  # runs from other seeds; the one with the least inertia counts
    points_per_centroid: int = 256  # cluster a random sample of at most this many points per centroid; 0: every point

    def __post_init__(self) -> None:
        if self.iterations < 1 or self.restarts < 1 or self.points_per_centroid < 0:
            raise InvalidInput(f"k-means needs iterations >= 1, restarts >= 1 and points_per_centroid >= 0, found {self}")


@dataclass(frozen=True, kw_only=True, repr=False)
class Clustering(TensorValue):
    """centroids: (K, D). assignment: (n,) int64, of the points clustered (a sample, where the config asks for one).

    inertia: sum of squared distances of those points to their centroids.
    """

    centroids: Tensor
    assignment: Tensor
    inertia: float


def kmeans(points: Tensor, k: int, config: KMeansConfig, *, rows: Tensor | None = None, seed: int = 1234) -> Clustering:
    """``k`` clusters of ``points`` (N, D), or of their ``rows`` (n,), Euclidean. Deterministic by ``seed`` on one device.

    Only the rows that are clustered are copied. Raises InvalidInput unless 1 <= k <= n. Duplicates are legal: clusters left empty
    stay beside the largest one.
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
    """Squared distance (N,) to the nearest centroid, less the point's own square, and its index; the first wins a tie."""
    return torch.addmm(centroids.square().sum(1), points, centroids.T, alpha=-2).min(1)


def _sums(points: Tensor, assignment: Tensor, k: int) -> Tensor:
    """(k, D) sum of each cluster's points. On a GPU through a matrix product: scattered additions have no fixed order there."""
    if points.is_cuda:
        return F.one_hot(assignment, k).to(points.dtype).T @ points
    return points.new_zeros(k, points.shape[1]).index_add_(0, assignment, points)


def _split_largest(centroids: Tensor, counts: Tensor) -> Tensor:
    """Each empty centroid beside the one that has most points by now, pushed apart from it."""
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
    """k-means++ seeds: each next one drawn with probability proportional to the squared distance from those there are."""
    draws = np.random.default_rng(seed).random(k).tolist()
    chosen = [int(draws[0] * len(points))]
    distance = torch.full((len(points),), torch.inf, device=points.device, dtype=points.dtype)
    for draw in draws[1:]:
        distance = torch.minimum(distance, (points - points[chosen[-1]]).square().sum(1))
        cumulative = distance.double().cumsum(0)
        chosen.append(min(int(torch.searchsorted(cumulative, draw * cumulative[-1])), len(points) - 1))
    return points[chosen]


def _first_of_permutation(n: int, count: int, seed: int) -> Tensor:
    """The first ``count`` entries of faiss's random permutation of 0..n-1 (rand_perm: MT19937, modulo, swaps)."""
    generator = np.random.RandomState(seed & 0xFFFFFFFF)  # seeds MT19937 the way std::mt19937 does
    draws = generator.randint(0, 2**32, size=count, dtype=np.uint32).tolist()
    order = list(range(n))
    for i, draw in enumerate(draws):
        j = i + draw % (n - i)
        order[i], order[j] = order[j], order[i]
    return torch.tensor(order[:count])


def principal_components(points: Tensor, dimensions: int) -> Tensor:
    """(N, min(dimensions, D)): coordinates along the directions of largest variance, the largest first."""
    centerd = points - points.mean(0)
    _, vectors = torch.linalg.eigh(centerd.T @ centerd)
    return centerd @ vectors.flip(1)[:, :dimensions]


def silhouette(distances: Tensor, assignment: Tensor) -> float:
    """Mean silhouette (Rousseeuw, 1987) of a clustering: -1 wrong .. 1 well apart. A point alone in its cluster scores 0.

    distances: (N, N) between the points. assignment: (N,) int64 cluster of each; one cluster for all separates nothing and gets -1.
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
