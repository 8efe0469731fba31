"""The factor that brings a sensor's intensity to 0..1, proposed from its numbers. `rig.py` applies it.

A network trained on another unit finds nothing and gives no error, so intensity outside 0..1 is refused (`RigSpec.from_sensor`) or
counted and warned of (`judge` in `ledger_rules.py`).
"""

from __future__ import annotations

import math

TOLERANCE = 1e-3
"""How far intensity may lie outside 0..1 after scaling: a factor such as 0.0039216 gives 1.000008. Such values are clipped."""


def propose_scale(lowest: float, highest: float) -> str:
    """Propose the factor that brings intensity to 0..1.

    Args:
        lowest: Lowest intensity of the scans in the sensor's own unit.
        highest: Highest intensity.

    Returns:
        A part of a sentence: "give --intensity-scale 1/255 for a sensor that counts to 255".
    """
    highest = float(f"{highest:.6g}")  # it may come from a division
    if lowest < -TOLERANCE or not math.isfinite(highest):
        return f"no sensor gives {lowest if lowest < 0 else highest:.6g}: look at the columns (--columns) and the number type (--dtype)"
    if highest <= 1 + TOLERANCE:
        return "the numbers lie in 0..1 already: leave --intensity-scale out"
    if 2 < highest <= 100:
        return "give --intensity-scale 1/255 if the sensor counts to 255, or 1/100 if it counts in percent"
    for full in (255, 65_535):
        if full / 4 < highest <= full:
            return f"give --intensity-scale 1/{full} for a sensor that counts to {full}"
    step = 10.0 ** (math.floor(math.log10(highest)) - 1)
    limit = math.ceil(round(highest / step, 6)) * step
    return (
        f"no usual sensor counts to {highest:.6g}: take the full scale from its manual, or give --intensity-scale 1/{limit:.10g}; use one "
        "factor for all its scans"
    )
