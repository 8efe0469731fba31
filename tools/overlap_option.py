"""The option that gives classes a minimum overlap of one's own: `--overlap CLASS VALUE …`, once or several times.

Read next: `perception/evaluation/kitti.py`, which uses it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Annotated

import tyro

from ..core.errors import InvalidInput
from ..core.foreign_text import shown

OverlapOption = tyro.conf.UseAppendAction[tuple[Annotated[tuple[str, ...], tyro.conf.arg(metavar="CLASS VALUE …")], ...]]
"""Words of the option, one tuple per occurrence."""


def parse_overlaps(groups: tuple[tuple[str, ...], ...]) -> Mapping[str, float]:
    """Read the words of `--overlap`.

    Args:
        groups: The words, one tuple per occurrence of the option.

    Returns:
        Minimum overlap by class.

    Raises:
        InvalidInput: The words are not pairs of a class and a number between 0 and 1, or a class stands twice.
    """
    found: dict[str, float] = {}
    for words in groups:
        if not words or len(words) % 2:
            raise InvalidInput(
                f"--overlap takes pairs of a class and a number, such as --overlap Van 0.7 Truck 0.5; found {shown(' '.join(words)) or 'nothing'}"
            )
        for name, text in zip(words[::2], words[1::2]):
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not 0 < value < 1:
                raise InvalidInput(f"--overlap {shown(name)} {shown(text)}: the minimum overlap must be a number between 0 and 1")
            if name.casefold() in {known.casefold() for known in found}:
                raise InvalidInput(f"--overlap names {shown(name)} twice; give each class one value")
            found[name] = value
    return found
