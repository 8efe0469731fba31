"""Clusters of image and text features for multistage contrastive learning (the first half of CLIP-MoE, Zhang et al., 2024).

In each stage the features of the current model are clustered, 3 image clusters by 3 text clusters, and the labels accumulate:

    label = 3 * text + image,    accumulated_0 = label_0,    accumulated_j = 9 * accumulated_{j-1} + label_j

Samples with one accumulated label were alike for every model so far. Batches of them force the next model to tell them apart.
Accumulated clusters become small; here a small one is merged into its parent (`merge_small`), so that no sample is lost.

Read next: `cluster_batches.py`, which draws batches from the clusters.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from ...adapt.glc.kmeans import KMeansConfig, kmeans

_LARGEST = 2**63 - 1


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """How the features of one stage are clustered. The numbers of clusters are those of CLIP-MoE."""

    image_clusters: int = 3
    """Number of clusters of the image features."""

    text_clusters: int = 3
    """Number of clusters of the text features."""

    seeds: int = 5
    """Runs of k-means from different first centroids; the one with the smallest inertia counts. More depend less on the seed."""

    iterations: int = 100
    """Most rounds of one run; it stops earlier when no sample changes its cluster."""

    def __post_init__(self) -> None:
        require(
            min(self.image_clusters, self.text_clusters, self.seeds, self.iterations) >= 1,
            f"image_clusters, text_clusters, seeds and iterations must be 1 or more, found {self.image_clusters}, "
            f"{self.text_clusters}, {self.seeds} and {self.iterations}",
        )

    @property
    def labels(self) -> int:
        """Number of labels of one stage."""
        return self.image_clusters * self.text_clusters


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureClusters:
    """Clusters of L2-normalized features."""

    centroids: Tensor
    """(K, D) means of the normalized features of each cluster."""

    assignment: Tensor
    """(N,) int64 cluster of each sample."""

    inertia: float
    """Sum of the squared distances of the normalized features to their centroids, added up in float64."""


def cluster_features(features: Tensor, clusters: int, config: ClusterConfig, *, seed: int = 0) -> FeatureClusters:
    """Cluster features by direction: k-means of the L2-normalized features, the best of several seeds.

    Args:
        features: (N, D) features of all samples.
        clusters: Number of clusters, from 1 to N.
        config: Seeds and iterations.
        seed: Decides the result on one device.

    Returns:
        The clusters of the run with the smallest inertia.

    Raises:
        InvalidInput: There are fewer samples than clusters, or a feature is NaN or infinite.
    """
    if features.ndim != 2 or not 1 <= clusters <= len(features):
        raise InvalidInput(f"{clusters} clusters need features (N, D) with at least {clusters} rows, found {shape_of(features)}")
    finite = features.isfinite().all(1)
    if not finite.all():
        raise InvalidInput(
            f"features of {int((~finite).sum())} of {len(features)} samples are NaN or infinite, first that of sample "
            f"{int((~finite).nonzero()[0, 0])}; the model that computed them is damaged or its input is"
        )
    points = F.normalize(features.detach().float(), dim=1)
    settings = KMeansConfig(init="plusplus", iterations=config.iterations, points_per_centroid=0)
    runs: list[FeatureClusters] = []
    for run in range(config.seeds):
        found = kmeans(points, clusters, settings, seed=seed * 1_000_003 + run)
        inertia = _inertia(points, found.centroids, found.assignment)
        runs.append(FeatureClusters(centroids=found.centroids, assignment=found.assignment, inertia=inertia))
    return min(runs, key=lambda run: run.inertia)


def _inertia(points: Tensor, centroids: Tensor, assignment: Tensor) -> float:
    """In float64 and from differences: the usual expansion of the square loses the digits in which good runs differ."""
    total = 0.0
    for rows in torch.arange(len(points), device=points.device).split(65_536):
        total += float((points[rows].double() - centroids[assignment[rows]].double()).square().sum())
    return total


def stage_labels(image: Tensor, text: Tensor, config: ClusterConfig, *, seed: int = 0) -> Tensor:
    """Label every sample by its image cluster and its text cluster.

    Args:
        image: (N, D) image features of all samples, from the model of this stage.
        text: (N, E) text features of the same samples.
        config: Numbers of clusters, seeds and iterations.
        seed: Decides the result on one device.

    Returns:
        (N,) int64 label: image_clusters * text cluster + image cluster.

    Raises:
        InvalidInput: The numbers of samples differ, or as for `cluster_features`.
    """
    require(len(image) == len(text), f"every image needs one text, found {shape_of(image)} and {shape_of(text)}")
    of_image = cluster_features(image, config.image_clusters, config, seed=seed).assignment
    of_text = cluster_features(text, config.text_clusters, config, seed=seed).assignment
    return config.image_clusters * of_text + of_image


@dataclass(frozen=True, kw_only=True, eq=False)
class AccumulatedLabels:
    """The labels of several stages joined into one number per sample: its digits are the labels of the stages."""

    code: Tensor
    """(N,) int64 accumulated label."""

    stages: int
    """Number of stages that are joined."""

    base: int
    """Number of labels of one stage, 9 in CLIP-MoE."""

    def __post_init__(self) -> None:
        if self.code.ndim != 1 or self.code.dtype != torch.int64:
            raise InvalidInput(f"labels must be (N,) int64, found {shape_of(self.code)}")
        require(self.stages >= 1 and self.base >= 1, f"stages and base must be 1 or more, found {self.stages} and {self.base}")
        highest = self.base**self.stages
        require(highest <= _LARGEST, f"labels of {self.stages} stages with base {self.base} do not fit into 64 bits")
        if len(self.code) and not 0 <= int(self.code.min()) <= int(self.code.max()) < highest:
            raise InvalidInput(
                f"labels of {self.stages} stages with base {self.base} must be in 0..{highest - 1}, found "
                f"{int(self.code.min())}..{int(self.code.max())}"
            )

    @classmethod
    def first(cls, label: Tensor, base: int = 9) -> AccumulatedLabels:
        """Begin with the labels of the first stage.

        Args:
            label: (N,) int64 labels.
            base: Number of labels of one stage.

        Returns:
            Accumulated labels of one stage.

        Raises:
            InvalidInput: A label is not in 0..base - 1.
        """
        return cls(code=label, stages=1, base=base)

    def then(self, label: Tensor) -> AccumulatedLabels:
        """Add the labels of the next stage. They refine: every new cluster lies in one old cluster.

        Args:
            label: (N,) int64 labels of the same samples in the same order.

        Returns:
            Accumulated labels of one stage more.

        Raises:
            InvalidInput: The number of samples differs, or a label is not in 0..base - 1.
        """
        AccumulatedLabels.first(label, self.base)
        require(len(label) == len(self.code), f"found {len(label)} new labels for {len(self.code)} samples; labels belong to all")
        return AccumulatedLabels(code=self.base * self.code + label, stages=self.stages + 1, base=self.base)

    def clusters(self) -> int:
        """Count the clusters that have a sample.

        Returns:
            Their number.
        """
        return len(self.code.unique())


@dataclass(frozen=True, kw_only=True, eq=False)
class MergedClusters:
    """Clusters from which batches are drawn; every sample is in one of them."""

    group: Tensor
    """(N,) int64 cluster of each sample, from 0 to the number of clusters - 1."""

    level: Tensor
    """(G,) int64 number of stages whose labels all members of the cluster share; 0 where they share none."""

    code: Tensor
    """(G,) int64 accumulated label that they share, of that many stages."""

    moved: int
    """Number of samples in clusters that were merged, whose `level` is below the number of stages."""

    def sizes(self) -> Tensor:
        """Count the samples of each cluster.

        Returns:
            (G,) int64; they add up to the number of samples.
        """
        return torch.bincount(self.group, minlength=len(self.level))


def merge_small(labels: AccumulatedLabels, smallest: int) -> MergedClusters:
    """Merge clusters that are too small for a batch into their parents, from the deepest stage upwards.

    The small clusters of one parent are put together. If that is still too small, the smallest of the parent's large clusters
    joins them, so that all still share the parent's label. Only where a parent has no large cluster do its samples move on to its
    own parent. So no sample is lost, and no cluster is too small unless all samples together are.

    Args:
        labels: Accumulated labels.
        smallest: Number of samples that a cluster needs, such as the batch size.

    Returns:
        The clusters, in the order of their labels.

    Raises:
        InvalidInput: `smallest` is below 1.
    """
    require(smallest >= 1, f"the smallest cluster must have at least 1 sample, found {smallest}")
    codes, place, counts = labels.code.unique(return_inverse=True, return_counts=True)
    size = counts.tolist()
    done: dict[tuple[int, int], list[int]] = {}  # by (level, code): places in `codes` whose samples form one cluster
    small: dict[int, list[int]] = {}  # by code at the current level
    for i, code in enumerate(codes.tolist()):
        if size[i] >= smallest:
            done[labels.stages, code] = [i]
        else:
            small[code] = [i]
    for level in range(labels.stages - 1, -1, -1):
        small = _merge_level(small, done, size, level, labels.stages, labels.base, smallest)
    if small:  # all samples together are too few
        done[0, 0] = small[0]
    return _numbered(done, place, size, labels.stages)


def _merge_level(
    small: dict[int, list[int]],
    done: dict[tuple[int, int], list[int]],
    size: list[int],
    level: int,
    stages: int,
    base: int,
    smallest: int,
) -> dict[int, list[int]]:
    """Merge the small nodes one level below `level` into their parents; `done` changes in place, the small parents come back."""
    pools: dict[int, list[int]] = defaultdict(list)
    for code, members in small.items():
        pools[code // base].extend(members)
    large: dict[int, list[tuple[int, tuple[int, int]]]] = defaultdict(list)
    for key, members in done.items():
        large[key[1] // base ** (key[0] - level)].append((sum(size[i] for i in members), key))
    left: dict[int, list[int]] = {}
    for parent, members in pools.items():
        if sum(size[i] for i in members) < smallest:
            if not large[parent]:
                left[parent] = members
                continue
            members = members + done.pop(min(large[parent])[1])
        done[level, parent] = members
    return left


def _numbered(done: dict[tuple[int, int], list[int]], place: Tensor, size: list[int], stages: int) -> MergedClusters:
    group_of_code = torch.zeros(max(len(size), 1), dtype=torch.int64)
    order = sorted(done, key=lambda key: min(done[key]))
    for number, key in enumerate(order):
        group_of_code[done[key]] = number
    return MergedClusters(
        group=group_of_code.to(place.device)[place],
        level=torch.tensor([level for level, _ in order], dtype=torch.int64),
        code=torch.tensor([code for _, code in order], dtype=torch.int64),
        moved=sum(size[i] for key in order if key[0] < stages for i in done[key]),
    )
