"""The choice of scans that leave the vehicle, by a rule and by chance that nobody else knows.

Read next: `perception/wire/sampling.py` for the rule, `progress.py` for where the choice is kept.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Mapping, Sequence

from ..wire.sampling import SceneSampling


def choose_scans(
    names: Sequence[str], rule: SceneSampling, *, decided: Mapping[str, bool] | None = None, rng: random.Random | None = None
) -> dict[str, bool]:
    """Choose the scans of a drive that are uploaded.

    The first upload is drawn as well: where a drive begins is often where somebody lives. What was decided before stays, so that an
    extraction which goes on does not fill gaps, and new scans keep their distance from all that were chosen.

    Args:
        names: Names of the scans in the order of recording.
        rule: How many are left out.
        decided: What was decided about some of them before.
        rng: Where chance comes from; None takes the system's secret randomness. Tests give another.

    Returns:
        For every scan in `names`, whether it is uploaded.
    """
    chance, before = rng or secrets.SystemRandom(), decided or {}
    chosen: dict[str, bool] = {}
    following = _scans_to_next_choice(names, before)
    wanted = chance.randint(rule.gap, 2 * rule.gap)
    passed = chance.randint(0, 2 * rule.gap)  # as if the drive had begun earlier
    for name in names:
        if name in before:
            kept = before[name]
        else:
            kept = passed >= wanted and following[name] > rule.gap and chance.random() < rule.share
        chosen[name] = kept
        if kept:
            wanted, passed = chance.randint(rule.gap, 2 * rule.gap), 0
        else:
            passed += 1
    return chosen


def _scans_to_next_choice(names: Sequence[str], before: Mapping[str, bool]) -> dict[str, float]:
    """Of each scan, how many scans further the next one lies that was chosen before."""
    distance, found = float("inf"), {}
    for name in reversed(names):
        found[name] = distance
        distance = 1 if before.get(name, False) else distance + 1
    return found
