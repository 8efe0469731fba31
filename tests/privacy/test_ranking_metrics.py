"""Orders, linkage and membership against definitions that are counted out, and their chance levels against random draws."""

import itertools
import math

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.privacy.exact_points import ExactPointScore, score_exact_points
from upcycle3d.perception.privacy.ranking_metrics import (
    auc,
    expected_absolute_tau,
    kendall_tau,
    linkage_top_1,
    membership_score,
)


def others(scenes: int) -> torch.Tensor:
    return ~torch.eye(scenes, dtype=torch.bool)


def same_group(groups: list[str]) -> torch.Tensor:
    return torch.tensor([[a == b for b in groups] for a in groups]) & others(len(groups))


@pytest.mark.parametrize("seed", range(5))
def test_auc_is_the_share_of_pairs_in_the_right_order(seed: int):
    rng = np.random.default_rng(seed)
    high, low = rng.integers(0, 6, 17) + 1, rng.integers(0, 6, 23)  # many ties
    pairs = [1.0 if a > b else 0.5 if a == b else 0.0 for a in high for b in low]
    assert auc(high, low).value == pytest.approx(np.mean(pairs))
    assert auc(torch.from_numpy(high), low.tolist()).value == pytest.approx(np.mean(pairs))


def test_auc_of_chance_spreads_as_it_says():
    rng = np.random.default_rng(0)
    drawn = [auc(rng.random(12), rng.random(20)) for _ in range(2000)]
    values = [d.value for d in drawn]
    assert np.mean(values) == pytest.approx(0.5, abs=0.01)
    assert np.std(values) == pytest.approx(drawn[0].chance_deviation, rel=0.05)
    assert auc([1.0] * 3, [1.0] * 4).value == 0.5
    with pytest.raises(InvalidInput, match="both sides"):
        auc([], [1.0])
    with pytest.raises(InvalidInput, match="NaN"):
        auc([math.nan], [1.0])


def test_tau_counts_exchanged_pairs():
    recorded = np.arange(7)
    recovered = np.array([0, 2, 1, 3, 4, 6, 5])  # 2 of 21 pairs are exchanged
    score = kendall_tau(recovered, recorded)
    assert score.tau == pytest.approx(1 - 2 * 2 / 21)
    assert kendall_tau(-recovered, recorded).absolute == pytest.approx(score.absolute)
    assert kendall_tau(np.zeros(7), recorded).tau == 0
    with pytest.raises(InvalidInput, match="at least two"):
        kendall_tau([1.0], [1.0])
    with pytest.raises(InvalidInput, match="no order"):
        kendall_tau([1.0, 2.0], [1.0, 1.0])


@pytest.mark.parametrize("scenes", [2, 3, 5, 6])
def test_the_expected_tau_of_a_random_order_is_the_mean_over_all_orders(scenes: int):
    every = [kendall_tau(order, np.arange(scenes)).absolute for order in itertools.permutations(range(scenes))]
    assert expected_absolute_tau(scenes) == pytest.approx(np.mean(every))


def test_the_expected_tau_is_continuous_where_it_becomes_an_approximation():
    assert expected_absolute_tau(61) == pytest.approx(expected_absolute_tau(60) * math.sqrt(60 / 61), rel=0.02)


def test_top_1_counts_right_best_candidates():
    likeness = torch.tensor([[9.0, 2.0, 1.0, 0.0], [5.0, 9.0, 7.0, 0.0], [0.0, 3.0, 9.0, 1.0], [1.0, 2.0, 3.0, 9.0]])
    right = same_group(["a", "a", "b", "c"])
    score = linkage_top_1(likeness, right, others(4))
    # The scene itself is no candidate. Query 0 finds 1 (right), query 1 finds 2 (wrong), queries 2 and 3 have no partner.
    assert (score.top_1, score.queries, score.without_answer) == (0.5, 2, 2)
    assert score.chance == pytest.approx(1 / 3)
    assert score.times_chance == pytest.approx(1.5)


def test_an_attack_that_says_nothing_reaches_exactly_the_chance_level():
    drives = ["a"] * 5 + ["b"] * 3 + ["c"]
    score = linkage_top_1(torch.zeros(9, 9), same_group(drives), others(9))
    assert score.top_1 == pytest.approx(score.chance)
    rng = torch.Generator().manual_seed(0)
    drawn = [linkage_top_1(torch.rand(9, 9, generator=rng), same_group(drives), others(9)).top_1 for _ in range(2000)]
    assert np.mean(drawn) == pytest.approx(score.chance, abs=0.01)
    with pytest.raises(InvalidInput, match="no query has a right candidate"):
        linkage_top_1(torch.zeros(2, 2), same_group(["a", "b"]), others(2))
    with pytest.raises(InvalidInput, match="one shape"):
        linkage_top_1(torch.zeros(2, 3), same_group(["a", "b"]))


def test_membership_with_few_false_alarms():
    members = np.concatenate([np.full(30, 2.0), np.full(70, 0.0)])
    outside = np.concatenate([np.full(1, 3.0), np.full(99, 1.0)])
    score = membership_score(members, outside)
    assert score.found_at_1_percent == 0.3  # the one false alarm is the non-member above all members
    assert score.auc.value == pytest.approx(0.3 * 0.99)
    assert score.found_at_5_percent == 0.3
    assert membership_score(members, outside[:19]).found_at_5_percent is None
    assert membership_score(members, outside[:99]).found_at_1_percent is None
    assert membership_score([1.0] * 10, [1.0] * 100).found_at_1_percent == 0


def test_exact_points_are_counted_once_and_compared_with_a_guess():
    truth = torch.tensor([[0.0, 0, 0], [1, 0, 0], [2, 0, 0], [3, 0, 0]])
    claims = torch.tensor([[0.009, 0, 0], [-0.009, 0, 0], [1.011, 0, 0], [2, 0.005, 0.005]])
    guesses = torch.tensor([[3.005, 0, 0], [5, 0, 0], [6, 0, 0], [7, 0, 0]])
    score = score_exact_points(claims, truth, guesses)
    assert (score.claims, score.right, score.recovered, score.true_points) == (4, 3, 2, 4)
    assert (score.share_right, score.share_recovered, score.chance_per_scan) == (0.75, 0.5, 1.0)
    nothing = score_exact_points(torch.zeros(0, 3), truth, guesses)
    both = score + nothing
    assert (both.scans, both.recovered_per_scan, both.guesses) == (2, 1.0, 8)
    assert (nothing.share_right, nothing.chance_per_scan) == (None, 0)
    empty = score_exact_points(claims, torch.zeros(0, 3), guesses)
    assert (empty.right, empty.recovered, empty.share_recovered) == (0, 0, None)
    assert ExactPointScore().recovered_per_scan == 0


def test_the_chance_level_is_what_the_same_number_of_guesses_hits():
    """Centers of 0.1 m voxels lie within 1 cm of a uniform point for 4/3 pi of a millionth of a cubic meter per liter."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.rand(20_000, 3, generator=generator) * 2
    cells = torch.cartesian_prod(*[torch.arange(20)] * 3)
    guesses = (cells + 0.5) * 0.1
    score = score_exact_points(guesses, truth, guesses)
    assert score.chance_per_scan == score.right
    expected = 8000 * (1 - math.exp(-2.5 * 4 / 3 * math.pi * 0.001))
    assert score.right == pytest.approx(expected, rel=0.25)
