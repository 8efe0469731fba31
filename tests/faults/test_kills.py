"""A few seeded kills of every job; `make faults` does hundreds."""

from __future__ import annotations

import pytest

from faults.kill_cases import CASES
from faults.killing import kill_once, measure
from faults.kills_training import TRAIN, UPCYCLE

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_killed_job_goes_on_and_loses_and_doubles_nothing(case):
    undisturbed = measure(case)
    for seed in range(1 if case in (TRAIN, UPCYCLE) else 3):  # a training takes a second
        outcome = kill_once(case, undisturbed, seed)
        assert outcome.fault == "", f"seed {seed}"
