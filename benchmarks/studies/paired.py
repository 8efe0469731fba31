"""Not a script: what the studies say of differences that are paired over seeds."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

QUANTILES = {2: 12.71, 3: 4.30, 4: 3.18, 5: 2.78, 6: 2.57, 7: 2.45, 8: 2.36, 9: 2.31, 10: 2.26}


def half_width(values: Sequence[float]) -> float:
    """Half of the 95 % interval of a mean by Student's t; infinite for one value."""
    if len(values) < 2:
        return float("inf")
    return QUANTILES.get(len(values), 2.0) * statistics.stdev(values) / len(values) ** 0.5
