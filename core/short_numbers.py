"""Numbers in the few letters that a table has room for: seconds, and scores that may be far too large."""

from __future__ import annotations

import math


def seconds_text(seconds: float | None) -> str:
    """Write seconds so that short times keep a digit that says something.

    Args:
        seconds: The seconds; None where nobody measured them.

    Returns:
        One decimal below 10, and whole seconds above; "?" for None.

    Example:
        >>> seconds_text(0.349), seconds_text(1234.5)
        ('0.3', '1234')
    """
    if seconds is None:
        return "?"
    return f"{seconds:.1f}" if seconds < 9.95 else f"{seconds:.0f}"


def score_text(score: float | None) -> str:
    """Write a score such as a perplexity, which has no upper end.

    Args:
        score: The score; None where there is none.

    Returns:
        Three decimals up to 10,000, and the short form with an exponent above; "-" for None.

    Example:
        >>> score_text(12.3456), score_text(912345678.0)
        ('12.346', '9.1e+08')
    """
    if score is None:
        return "-"
    return f"{score:.1e}" if math.isfinite(score) and abs(score) > 1e4 else f"{score:.3f}"


def duration_text(seconds: float) -> str:
    """Say how long something takes, in its two largest units.

    Args:
        seconds: The duration; at least 0.

    Returns:
        Words such as `40 s` or `3 min 20 s`.

    Example:
        >>> duration_text(7265)
        '2 h 01 min'
    """
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"
