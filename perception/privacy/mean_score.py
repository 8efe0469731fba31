"""A mean over frames that can be added up, and that knows how many frames it counts.

Not every frame has every score: a scan without a pedestrian says nothing about pedestrians. A score that is missing is not counted;
it never becomes a zero or a NaN.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...core.errors import require


@dataclass(frozen=True, kw_only=True)
class MeanScore:
    """The mean of a score over the frames that have it."""

    total: float = 0.0
    """Sum of the scores."""

    frames: int = 0
    """Number of frames that have the score."""

    def __post_init__(self) -> None:
        require(
            self.frames >= 0 and math.isfinite(self.total) and (self.frames > 0 or self.total == 0),
            f"MeanScore needs a finite sum, and 0 where it counts no frame; found {self.total} over {self.frames} frames",
        )

    @staticmethod
    def of(value: float | None) -> MeanScore:
        """Count one frame.

        Args:
            value: The frame's score; None where the frame has none.

        Returns:
            The mean over this frame, or over no frame.
        """
        return MeanScore() if value is None else MeanScore(total=float(value), frames=1)

    def __add__(self, other: MeanScore) -> MeanScore:
        return MeanScore(total=self.total + other.total, frames=self.frames + other.frames)

    @property
    def mean(self) -> float | None:
        """The mean, None where no frame has the score."""
        return self.total / self.frames if self.frames else None

    def __str__(self) -> str:
        return "-" if self.mean is None else f"{self.mean:.3f}"
