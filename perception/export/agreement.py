"""How well an exported graph agrees with the detector: the one rule by which an export is written or refused."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from torch import Tensor

from ...core.errors import UpcycleError

EXPORT_TOLERANCE = 1e-4
"""Largest difference that counts as equal, as a share of the largest number of the output, or absolute where all numbers are below 1."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One output on one scan."""

    output: str
    """Graph and output."""
    largest_number: float
    """Largest absolute number that the detector computed."""
    largest_difference: float
    """Largest absolute difference; infinite where the shapes differ, or where one is not finite and the other is."""

    @classmethod
    def of(cls, output: str, found: Tensor, wanted: Tensor) -> Self:
        """Compare an output with the detector's.

        Args:
            output: Its name.
            found: What the exported graph computed.
            wanted: What the detector computed.

        Returns:
            How well they agree.
        """
        largest = float(wanted.detach().abs().max()) if wanted.numel() else 0.0
        if found.shape != wanted.shape:
            return cls(output=output, largest_number=largest, largest_difference=float("inf"))
        difference = float((found.detach().double() - wanted.detach().double()).abs().max()) if wanted.numel() else 0.0
        return cls(
            output=output, largest_number=largest, largest_difference=difference if difference == difference else float("inf")
        )

    @property
    def agrees(self) -> bool:
        """Whether the difference counts as none."""
        return math.isfinite(self.largest_difference) and self.largest_difference <= EXPORT_TOLERANCE * max(
            1.0, self.largest_number
        )


def require_agreement(agreements: Sequence[Agreement], runtime: str) -> None:
    """Refuse an export that computes something else than the detector.

    Args:
        agreements: All outputs on all scans.
        runtime: What ran the export, for the message.

    Raises:
        UpcycleError: An output differs.
    """
    wrong = [one for one in agreements if not one.agrees]
    if wrong:
        worst = max(wrong, key=lambda one: one.largest_difference / max(1.0, one.largest_number))
        raise UpcycleError(
            f"{runtime} computes something else than the detector: {worst.output} differs by {worst.largest_difference:.3g} where the largest "
            f"number is {worst.largest_number:.3g} ({len(wrong)} of {len(agreements)} outputs differ by more than {EXPORT_TOLERANCE:g}); nothing was written"
        )
