"""What a target dataset's class names mean to a source model: one of its classes, something it never learned, or nothing to count."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ..structures import InvalidInput

UNKNOWN, IGNORE = "unknown", "ignore"


@dataclass(frozen=True, kw_only=True)
class ClassMap:
    """source: the model's classes in order. meaning: target name -> a source class, UNKNOWN or IGNORE.

    Raises InvalidInput for a meaning that is none of these, and for source classes that are not distinct.
    """

    source: tuple[str, ...]
    meaning: Mapping[str, str]

    def __post_init__(self) -> None:
        if not self.source or len(set(self.source)) != len(self.source) or {UNKNOWN, IGNORE} & set(self.source):
            raise InvalidInput(
                f"source classes must be distinct names other than {UNKNOWN!r} and {IGNORE!r}, found {self.source}"
            )
        wrong = {n: m for n, m in self.meaning.items() if m not in (*self.source, UNKNOWN, IGNORE)}
        if wrong:
            raise InvalidInput(
                f"these target classes map to nothing known: {wrong}; allowed are {(*self.source, UNKNOWN, IGNORE)}"
            )

    @property
    def shared(self) -> tuple[int, ...]:
        """Source classes that the target has, ascending."""
        return tuple(i for i, name in enumerate(self.source) if name in self.meaning.values())

    @property
    def source_private(self) -> tuple[int, ...]:
        """Source classes that the target lacks, ascending."""
        return tuple(i for i in range(len(self.source)) if i not in self.shared)

    def ids(self, names: Sequence[str]) -> np.ndarray:
        """(N,) int64: 0..C-1 source class, C unknown, -1 ignored. Raises InvalidInput naming every class the map misses."""
        missing = sorted(set(names) - self.meaning.keys())
        if missing:
            raise InvalidInput(
                f"the class map says nothing about {missing}; map each to one of {(*self.source, UNKNOWN, IGNORE)}"
            )
        number = {**{name: i for i, name in enumerate(self.source)}, UNKNOWN: len(self.source), IGNORE: -1}
        return np.array([number[self.meaning[name]] for name in names], dtype=np.int64)
