"""Unknown scores and thresholds against brute force over all divisions of the scores."""

import math

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.unknown_rule import UnknownRule, is_unknown, normalized_entropy, otsu, two_means, yen


def two_groups() -> np.ndarray:
    rng = np.random.default_rng(0)
    return np.concatenate([rng.normal(0.2, 0.05, 700), rng.normal(0.8, 0.05, 300)])


def test_entropy_runs_from_certain_to_uniform():
    scores = normalized_entropy(torch.tensor([[1.0, 0, 0], [1 / 3, 1 / 3, 1 / 3], [0.5, 0.5, 0]]))
    assert scores.tolist() == pytest.approx([0, 1, math.log(2) / math.log(3)], abs=1e-4)
    with pytest.raises(InvalidInput, match="C >= 2"):
        normalized_entropy(torch.ones(3, 1))
    assert normalized_entropy(torch.zeros(0, 3)).shape == (0,)


@pytest.mark.parametrize("rule", [otsu, yen, two_means])
def test_thresholds_fall_between_two_groups_and_bear_a_constant(rule):
    assert 0.25 < rule(two_groups()) < 0.75
    assert rule(np.full(5, 0.4)) == pytest.approx(0.4)
    assert np.isfinite(rule(np.array([0.1, 0.9])))


def test_otsu_and_two_means_and_yen_are_the_best_of_all_splits():
    scores = np.random.default_rng(1).beta(0.5, 0.9, 500)
    counts, edges = np.histogram(scores, 256)
    centers, share = (edges[1:] + edges[:-1]) / 2, counts / 500

    def between(k: int) -> float:
        low, high = share[: k + 1], share[k + 1 :]
        a, b = low.sum(), high.sum()
        return a * b * ((low * centers[: k + 1]).sum() / a - (high * centers[k + 1 :]).sum() / b) ** 2

    def correlation(k: int) -> float:
        low, high = share[: k + 1] / share[: k + 1].sum(), share[k + 1 :] / share[k + 1 :].sum()
        return -math.log((low**2).sum()) - math.log((high**2).sum())

    best = max(range(255), key=between)
    assert between(int(np.abs(centers - otsu(scores)).argmin())) == pytest.approx(between(best))
    assert yen(scores) == pytest.approx(centers[max(range(255), key=correlation)])
    ordered = np.sort(scores)
    splits = [(ordered[:i].var() * i + ordered[i:].var() * (500 - i), i) for i in range(1, 500)]
    i = min(splits)[1]
    assert two_means(scores) == pytest.approx((ordered[:i].mean() + ordered[i:].mean()) / 2)


def test_rules_apply_strictly_and_refuse_what_they_cannot_read():
    assert UnknownRule(kind="fixed", value=0.55).threshold(torch.zeros(0)) == 0.55
    assert is_unknown(torch.tensor([0.5, 0.6]), 0.5).tolist() == [False, True]
    for scores in (torch.zeros(0), torch.tensor([0.1, torch.nan])):
        with pytest.raises(InvalidInput, match="needs finite scores"):
            UnknownRule(kind="otsu").threshold(scores)
