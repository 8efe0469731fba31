"""The leak share: what part of the leak of an undefended upload a defence leaves.

Roads can be predicted, so an upload of nothing already scores. The share counts from there:

    L = (F - F of nothing) / (F undefended - F of nothing)

All three F-scores are measured at matched density, in the same region, on the same frames, each by an attacker that was trained for
its own kind of upload.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import InvalidInput, require
from .mean_score import MeanScore

LEAST_LEAK = 0.02
"""F-score by which an undefended upload must lie above nothing. Shares of less are noise divided by noise."""


@dataclass(frozen=True, kw_only=True)
class LeakShare:
    """A leak share with the numbers that it was computed of."""

    value: float
    """0 where the upload gives away no more than nothing, 1 where it gives away as much as the undefended one. Below 0 and above 1 are
    possible and mean that one attacker was better than another."""
    defended: float
    """F-score on the uploads in question."""
    nothing: float
    """F-score of an attacker that sees nothing."""
    undefended: float
    """F-score on undefended uploads."""
    frames: int
    """Number of frames of each."""


def leak_share(defended: MeanScore, *, nothing: MeanScore, undefended: MeanScore) -> LeakShare:
    """Compute the leak share of a defence.

    Args:
        defended: F-score on the defended uploads, at matched density.
        nothing: F-score of an attacker that sees nothing, on the same frames.
        undefended: F-score on the undefended uploads of the same frames.

    Returns:
        The leak share.

    Raises:
        InvalidInput: The scores count no frames or different numbers of them, or the undefended upload scores less than `LEAST_LEAK` above
            nothing, so there is no leak to share.
    """
    frames = (defended.frames, nothing.frames, undefended.frames)
    require(
        frames[0] > 0 and len(set(frames)) == 1,
        f"a leak share compares scores of the same frames; the scores count {frames[0]} (defended), {frames[1]} (nothing) and "
        f"{frames[2]} (undefended) frames",
    )
    f, floor, top = (score.total / score.frames for score in (defended, nothing, undefended))
    if not top - floor >= LEAST_LEAK:
        raise InvalidInput(
            f"the undefended upload scores {top:.3f} and nothing at all scores {floor:.3f}: the attack sees no leak, so no share of it can "
            "be given; use a stronger attack or another region"
        )
    return LeakShare(value=(f - floor) / (top - floor), defended=f, nothing=floor, undefended=top, frames=frames[0])
