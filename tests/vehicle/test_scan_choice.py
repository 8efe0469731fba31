"""Thinning in time: gaps are kept, chance decides within them, and nothing that was decided changes."""

import itertools
import random
from collections import Counter

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.vehicle.scan_choice import choose_scans
from upcycle3d.perception.wire.sampling import EVERY_SCAN, FLEET_SAMPLING, SceneSampling

NAMES = [f"{i:05d}" for i in range(3000)]


def kept(chosen: dict[str, bool]) -> list[int]:
    return [int(name) for name, keep in chosen.items() if keep]


def test_gaps_are_at_least_the_rule_and_drawn_up_to_twice_as_many():
    places = kept(choose_scans(NAMES, SceneSampling(gap=10), rng=random.Random(1)))
    gaps = Counter(b - a - 1 for a, b in itertools.pairwise(places))
    assert set(gaps) == set(range(10, 21))
    assert max(gaps.values()) < 4 * min(gaps.values())  # 3000 / 16 = 188 gaps over 11 numbers


def test_the_first_upload_of_a_drive_is_drawn_too():
    first = [kept(choose_scans(NAMES[:40], SceneSampling(gap=10), rng=random.Random(seed)))[0] for seed in range(300)]
    assert min(first) == 0
    assert max(first) >= 15
    assert Counter(first)[0] < 200


def test_the_share_is_what_the_rule_says():
    places = kept(choose_scans(NAMES, SceneSampling(share=0.25), rng=random.Random(1)))
    assert len(places) == pytest.approx(750, abs=5 * (3000 * 0.25 * 0.75) ** 0.5)


def test_two_vehicles_choose_differently_and_secretly():
    assert choose_scans(NAMES, SceneSampling(gap=3)) != choose_scans(NAMES, SceneSampling(gap=3))


def test_every_scan_is_the_default_and_the_fleet_has_a_rule():
    assert all(choose_scans(NAMES, EVERY_SCAN).values())
    assert EVERY_SCAN.every_scan
    assert not FLEET_SAMPLING.every_scan


@pytest.mark.parametrize("seed", range(5))
def test_decisions_stay_and_new_scans_keep_their_distance_from_them(seed: int):
    rule, rng = SceneSampling(gap=5), random.Random(seed)
    known = [name for i, name in enumerate(NAMES[:400]) if 100 <= i < 200 or i >= 300]
    before = choose_scans(known, rule, rng=rng)
    after = choose_scans(NAMES[:400], rule, decided=before, rng=rng)
    assert {name: after[name] for name in known} == before
    new = {i for i in kept(after) if f"{i:05d}" not in before}
    assert new
    assert all(abs(i - j) > 5 for i in new for j in kept(after) if i != j)


@pytest.mark.parametrize(
    ("field", "value"), [("gap", -1), ("gap", 1.5), ("gap", True), ("share", 0.0), ("share", 1.5), ("share", 1)]
)
def test_impossible_rules_are_refused(field: str, value: object):
    with pytest.raises(InvalidInput, match=field):
        SceneSampling(**{field: value})
