"""Clusters of features: the labels of the stages refine each other, and merging small clusters loses no sample."""

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.upcycling.clusters import (
    AccumulatedLabels,
    ClusterConfig,
    cluster_features,
    merge_small,
    stage_labels,
)

GENERATOR = 11


def rays(labels: list[int], dims: int, seed: int = 0) -> Tensor:
    """Features near one axis per label, with lengths from 1 to 100: only their directions tell the labels apart."""
    generator = torch.Generator().manual_seed(seed)
    noise = 0.05 * torch.randn(len(labels), dims, generator=generator)
    return (torch.eye(dims)[labels] + noise) * (1 + 99 * torch.rand(len(labels), 1, generator=generator))


def test_labels_are_three_times_text_plus_image():
    """Well separated directions: the label of a sample is a function of its pair of classes, in the order of the formula."""
    images, texts = [i % 3 for i in range(36)], [i // 3 % 3 for i in range(36)]
    config = ClusterConfig(seeds=3)
    label = stage_labels(rays(images, 4), rays(texts, 5), config)
    of_image, of_text = label % 3, label // 3
    assert len(label.unique()) == 9
    assert len({(a, int(b)) for a, b in zip(images, of_image)}) == 3
    assert len({(a, int(b)) for a, b in zip(texts, of_text)}) == 3


def test_the_best_of_several_seeds_is_kept_by_its_float64_inertia():
    """The inertia is the sum of squared distances, and more seeds never make it larger; the seed decides the result."""
    points = torch.randn(60, 6, generator=torch.Generator().manual_seed(GENERATOR))
    one = [cluster_features(points, 5, ClusterConfig(seeds=n), seed=4) for n in (1, 4, 8)]
    assert one[0].inertia >= one[1].inertia >= one[2].inertia
    units = F.normalize(points, dim=1).double()
    expected = sum(float((u - one[2].centroids[a].double()).square().sum()) for u, a in zip(units, one[2].assignment))
    assert one[2].inertia == pytest.approx(expected, rel=1e-12)
    again = cluster_features(points, 5, ClusterConfig(seeds=8), seed=4)
    assert torch.equal(again.assignment, one[2].assignment)
    assert torch.equal(cluster_features(points * 7.0, 5, ClusterConfig(seeds=8), seed=4).assignment, again.assignment)


def test_accumulated_labels_follow_the_formula_and_refine():
    """Every accumulated cluster lies in one cluster of the stage before, and the formula is 9 * before + label."""
    generator = torch.Generator().manual_seed(GENERATOR)
    labels = [torch.randint(9, (300,), generator=generator) for _ in range(3)]
    stages = [AccumulatedLabels.first(labels[0])]
    for label in labels[1:]:
        stages.append(stages[-1].then(label))
    for i in range(300):
        assert int(stages[2].code[i]) == 81 * int(labels[0][i]) + 9 * int(labels[1][i]) + int(labels[2][i])
    for before, after in pairwise(stages):
        parents: dict[int, set[int]] = {}
        for a, b in zip(after.code.tolist(), before.code.tolist()):
            parents.setdefault(a, set()).add(b)
        assert all(len(own) == 1 for own in parents.values())
    assert [s.clusters() for s in stages] == [len(set(s.code.tolist())) for s in stages]


def check_merged(labels: AccumulatedLabels, smallest: int) -> None:
    """What `merge_small` promises, read sample by sample."""
    merged = merge_small(labels, smallest)
    sizes = merged.sizes().tolist()
    assert sum(sizes) == len(labels.code) == len(merged.group)
    if len(labels.code) >= smallest:
        assert min(sizes) >= smallest
    for group, (level, code) in enumerate(zip(merged.level.tolist(), merged.code.tolist())):
        own = labels.code[merged.group == group]
        assert len(own) > 0
        assert set((own // labels.base ** (labels.stages - level)).tolist()) == {code}
        if level == labels.stages:  # an untouched cluster is whole
            assert sizes[group] == int((labels.code == code).sum())
    untouched = merged.level[merged.group] == labels.stages
    assert merged.moved == int((~untouched).sum())


@pytest.mark.parametrize("smallest", [1, 2, 5, 20, 60, 500])
def test_merging_keeps_every_sample_and_makes_no_cluster_too_small(smallest):
    generator = torch.Generator().manual_seed(GENERATOR)
    skew = torch.tensor([0.4, 0.2, 0.1, 0.1, 0.05, 0.05, 0.04, 0.03, 0.03])
    labels = AccumulatedLabels.first(torch.multinomial(skew, 400, True, generator=generator))
    for _ in range(2):
        check_merged(labels, smallest)
        labels = labels.then(torch.multinomial(skew, 400, True, generator=generator))
    check_merged(labels, smallest)


def codes(**counts: int) -> AccumulatedLabels:
    """Labels of two stages: `ab=3` are three samples with label a in the first stage and b in the second."""
    listed = [9 * int(name[1]) + int(name[2]) for name, count in counts.items() for _ in range(count)]
    return AccumulatedLabels(code=torch.tensor(listed), stages=2, base=9)


def found(labels: AccumulatedLabels, smallest: int) -> list[tuple[int, int, int]]:
    merged = merge_small(labels, smallest)
    return list(zip(merged.level.tolist(), merged.code.tolist(), merged.sizes().tolist()))


def test_small_siblings_join_then_the_smallest_large_sibling_then_the_parent():
    """The three cases in numbers: (level, shared label, size) of each cluster."""
    assert found(codes(c00=5, c01=2, c02=2), 4) == [(2, 0, 5), (1, 0, 4)]
    assert found(codes(c00=6, c01=5, c02=2), 4) == [(2, 0, 6), (1, 0, 7)]
    assert found(codes(c00=6, c10=2, c11=1, c20=2), 4) == [(2, 0, 6), (0, 0, 5)]
    assert found(codes(c00=6, c10=2, c20=5), 4) == [(2, 0, 6), (0, 0, 7)]
    assert found(codes(c00=1, c10=1), 4) == [(0, 0, 2)]
    assert found(codes(c00=5, c01=4), 4) == [(2, 0, 5), (2, 1, 4)]


def test_no_samples_are_legal_and_impossible_input_is_refused():
    empty = merge_small(AccumulatedLabels.first(torch.zeros(0, dtype=torch.int64)), 4)
    assert (len(empty.group), len(empty.level), empty.moved) == (0, 0, 0)
    features = torch.randn(5, 3)
    with pytest.raises(InvalidInput, match="at least 6 rows"):
        cluster_features(features, 6, ClusterConfig())
    features[2, 1] = torch.nan
    with pytest.raises(InvalidInput, match="first that of sample 2"):
        cluster_features(features, 2, ClusterConfig())
    with pytest.raises(InvalidInput, match="every image needs one text"):
        stage_labels(torch.randn(5, 3), torch.randn(4, 3), ClusterConfig())
    with pytest.raises(InvalidInput, match=r"0\.\.8"):
        AccumulatedLabels.first(torch.tensor([9]))
    first = AccumulatedLabels.first(torch.tensor([1, 2]))
    with pytest.raises(InvalidInput, match="1 new labels for 2 samples"):
        first.then(torch.tensor([1]))
    with pytest.raises(InvalidInput, match="64 bits"):
        AccumulatedLabels(code=torch.tensor([1]), stages=20, base=9)
    with pytest.raises(InvalidInput, match="seeds"):
        ClusterConfig(seeds=0)
