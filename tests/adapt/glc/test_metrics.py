"""Open-set metrics on cases worked by hand."""

from itertools import permutations

import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.metrics import (
    accuracy,
    auroc,
    class_accuracy,
    fpr_at_tpr,
    novel_category_accuracy,
    open_set_scores,
)


def test_os_star_unk_and_h_by_hand():
    truth = np.array([0, 0, 0, 0, 1, 1, 3, 3, 3, 3])
    found = np.array([0, 0, 0, 3, 1, 0, 3, 3, 3, 1])
    result = open_set_scores(found, truth, [0, 1], 3)
    assert (result.os_star, result.unk) == ((0.75 + 0.5) / 2, 0.75)
    assert result.h == pytest.approx(2 * 0.625 * 0.75 / 1.375, rel=1e-4)
    assert class_accuracy(found, truth, [2]).tolist() == [0.0]  # absent counts as 0, as in GLC
    assert open_set_scores(found[:6], truth[:6], [0, 1], 3).h == 0  # no unknown sample
    with pytest.raises(InvalidInput, match="shared classes"):
        open_set_scores(found, truth, [], 3)


def test_accuracy_passes_over_ignored_samples():
    assert accuracy(np.array([0, 1, 1]), np.array([0, -1, 0])) == 0.5
    with pytest.raises(InvalidInput, match="no sample"):
        accuracy(np.zeros(2), np.full(2, -1))
    with pytest.raises(InvalidInput, match="one length"):
        accuracy(np.zeros(2), np.zeros(3))


def test_auroc_equals_the_mann_whitney_statistic_with_ties():
    rng = np.random.default_rng(0)
    scores, unknown = rng.integers(0, 8, 60) / 8, rng.random(60) < 0.4
    expected = mannwhitneyu(scores[unknown], scores[~unknown]).statistic / (unknown.sum() * (~unknown).sum())
    assert auroc(scores, unknown) == pytest.approx(expected)
    assert auroc(np.array([0.1, 0.9]), np.array([False, True])) == 1.0


def test_fpr95_by_hand():
    known = np.arange(1, 21) / 100  # accepting 19 of 20 takes a threshold of 0.19
    scores = np.concatenate([known, [0.05, 0.19, 0.195, 0.5]])
    unknown = np.array([False] * 20 + [True] * 4)
    assert fpr_at_tpr(scores, unknown) == 0.5
    for bad in (np.ones(24, bool), np.zeros(24, bool)):
        with pytest.raises(InvalidInput, match="known and unknown"):
            auroc(scores, bad)
    with pytest.raises(InvalidInput, match="finite"):
        fpr_at_tpr(np.where(unknown, np.nan, scores), unknown)


def test_novel_category_accuracy_is_the_best_matching():
    rng = np.random.default_rng(1)
    label = np.repeat([7, 3, 12], [30, 20, 10])
    means = {7: [9, 0, 0], 3: [0, 9, 0], 12: [0, 0, 9]}
    features = np.array([means[c] for c in label]) + rng.normal(size=(60, 3))
    assert novel_category_accuracy(features, label) == 1.0
    wrong = np.where(np.arange(60) < 6, 3, label)  # six samples of cluster 7 are called 3
    best = max(
        sum(p[a] == b for a, b in zip(label, wrong)) for p in ({7: x, 3: y, 12: z} for x, y, z in permutations([7, 3, 12]))
    )
    assert novel_category_accuracy(features, wrong) == pytest.approx(best / 60)
    with pytest.raises(InvalidInput, match="at least one"):
        novel_category_accuracy(features[:0], label[:0])
