"""The look of a method in charts: one color and one kind of dashes per method, in every chart of every page.

Read next: `perception/viz/charts.py`, which draws with these numbers.
"""

from __future__ import annotations

from .upcycling_experiment import COMPARED_METHODS

_FIRST = ("source_only", "upcycling", "oracle_full", "pseudo_label", "source_continued", "oracle_frozen")
"""The methods that stand together most often: each has a color of its own, without dashes."""

METHOD_STYLES = {name: number for number, name in enumerate(dict.fromkeys((*_FIRST, *COMPARED_METHODS)))}
"""Number of a method's look, by name."""


def style_of(name: str) -> int:
    """Look up the look of a method.

    Args:
        name: Name of the method, or "source training" for the training of the source model.

    Returns:
        Number of color and dashes.
    """
    return METHOD_STYLES.get("source_only" if name == "source training" else name, len(METHOD_STYLES))
