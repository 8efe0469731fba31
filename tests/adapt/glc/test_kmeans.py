"""k-means and the silhouette against plain loops and independent oracles."""

import numpy as np
import pytest
import torch
from scipy.cluster.vq import kmeans2

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.kmeans import KMeansConfig, _first_of_permutation, kmeans, principal_components, silhouette

BOTH = [KMeansConfig(init="sample"), KMeansConfig(init="plusplus", restarts=3, points_per_centroid=0)]


def blobs(n: int = 240, k: int = 4, d: int = 5, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = np.random.default_rng(seed)
    label = np.arange(n) % k
    return torch.from_numpy((20 * rng.normal(size=(k, d))[label] + rng.normal(size=(n, d))).astype(np.float32)), torch.from_numpy(
        label
    )


def test_the_permutation_is_that_of_faiss():
    """Against std::mt19937 written out, and a full Fisher-Yates shuffle by it."""
    state = [1234]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ (state[-1] >> 30)) + i) & 0xFFFFFFFF)
    twisted = state[:]
    for i in range(624):
        y = (twisted[i] & 0x80000000) | (twisted[(i + 1) % 624] & 0x7FFFFFFF)
        twisted[i] = twisted[(i + 397) % 624] ^ (y >> 1) ^ (0x9908B0DF if y & 1 else 0)

    def temper(y: int) -> int:
        y ^= y >> 11
        y ^= (y << 7) & 0x9D2C5680
        y ^= (y << 15) & 0xEFC60000
        return y ^ (y >> 18)

    order = list(range(50))
    for i in range(49):
        j = i + temper(twisted[i]) % (50 - i)
        order[i], order[j] = order[j], order[i]
    assert _first_of_permutation(50, 50, 1234).tolist() == order
    assert _first_of_permutation(50, 7, 1234).tolist() == order[:7]


def test_lloyd_ends_where_a_plain_loop_ends():
    points, _ = blobs(60, 3)
    found = kmeans(points, 3, KMeansConfig(), seed=7)
    centroids = points[_first_of_permutation(60, 3, 8)].numpy().astype(np.float64)
    for _ in range(100):
        label = np.array([((p - centroids) ** 2).sum(1).argmin() for p in points.numpy()])
        centroids = np.stack([points.numpy()[label == j].mean(0) for j in range(3)])
    np.testing.assert_allclose(found.centroids.numpy(), centroids, atol=1e-4)
    assert found.assignment.tolist() == label.tolist()
    assert found.inertia == pytest.approx(((points.numpy() - centroids[label]) ** 2).sum(), rel=1e-4)
    oracle, _ = kmeans2(points.numpy(), centroids, minit="matrix", iter=5)
    np.testing.assert_allclose(found.centroids.numpy(), oracle, atol=1e-4)


def test_separate_blobs_are_found_and_restarts_never_hurt():
    points, label = blobs()
    found = kmeans(points, 4, BOTH[1])
    assert len({(int(a), int(b)) for a, b in zip(label, found.assignment)}) == 4
    single = [kmeans(points, 4, KMeansConfig(points_per_centroid=0), seed=5).inertia]
    assert kmeans(points, 4, KMeansConfig(points_per_centroid=0, restarts=6), seed=5).inertia <= single[0]


@pytest.mark.parametrize("config", BOTH)
def test_the_seed_decides(config):
    points, _ = blobs(seed=3)
    a, b = kmeans(points, 6, config, seed=1), kmeans(points, 6, config, seed=1)
    assert torch.equal(a.centroids, b.centroids)
    assert not torch.equal(a.centroids, kmeans(points, 6, config, seed=2).centroids)


@pytest.mark.parametrize("config", BOTH)
def test_duplicates_one_cluster_and_as_many_clusters_as_points_are_legal(config):
    same = kmeans(torch.ones(9, 3), 4, config)
    assert same.centroids.isfinite().all()
    assert same.inertia == pytest.approx(0, abs=1e-3)
    points, _ = blobs(12)
    torch.testing.assert_close(kmeans(points, 1, config).centroids[0], points.mean(0))
    assert kmeans(points, 12, config).centroids.isfinite().all()


def test_an_empty_cluster_takes_from_the_largest():
    points = torch.tensor([[0.0, 1.0]] * 5 + [[0.1, 1.1]] * 5 + [[9.0, 9.0]])
    for seed in range(6):  # some draw duplicates as first centroids
        found = kmeans(points, 3, KMeansConfig(), seed=seed)
        assert found.centroids.isfinite().all()
        assert len(found.assignment.unique()) >= 2


@pytest.mark.parametrize("points_per_centroid", [0, 8])
def test_rows_are_clustered_as_if_the_others_were_not_there(points_per_centroid):
    points, _ = blobs()
    rows = torch.arange(200, 20, -3)
    config = KMeansConfig(points_per_centroid=points_per_centroid)
    assert torch.equal(kmeans(points, 4, config, rows=rows).centroids, kmeans(points[rows], 4, config).centroids)


@pytest.mark.parametrize("k", [0, 5])
def test_impossible_numbers_of_clusters_are_refused(k):
    with pytest.raises(InvalidInput, match="1 <= k <= N"):
        kmeans(torch.zeros(4, 2), k, KMeansConfig())
    with pytest.raises(InvalidInput, match="iterations"):
        KMeansConfig(iterations=0)


def test_silhouette_against_a_plain_loop():
    points, _ = blobs(30, 3, 2)
    label = torch.tensor([0] * 10 + [2] * 10 + [5] * 9 + [9])  # gaps in the numbering, and one sample alone
    distance = torch.cdist(points.double(), points.double())
    values = []
    for i in range(30):
        means = {int(c): [float(distance[i, j]) for j in range(30) if label[j] == c and j != i] for c in label.unique()}
        own = means.pop(int(label[i]))
        a, b = np.mean(own) if own else 0.0, min(np.mean(m) for m in means.values())
        values.append((b - a) / max(a, b) if own else 0.0)
    assert silhouette(distance, label) == pytest.approx(np.mean(values))
    assert silhouette(distance, torch.zeros(30, dtype=torch.int64)) == -1


def test_principal_components_are_those_of_the_svd():
    points, _ = blobs(50, 4, 6)
    centerd = points - points.mean(0)
    left, values, _ = torch.linalg.svd(centerd, full_matrices=False)
    torch.testing.assert_close(principal_components(points, 2).abs(), (left * values)[:, :2].abs(), atol=1e-3, rtol=1e-3)
    assert principal_components(points, 99).shape == (50, 6)
