"""The guard: where adaptation's own labels are less certain than no adaptation, it says so, and the source model decides.

No target label takes part. Certainty is the one of `neighborhood.py`, for both on the features of the source model. Where adaptation calls
nothing unknown, as it should in a target without private classes, only the agreement in the classes is compared.

Read next: `feature_labels.py` and `adapter.py`, which ask the guard.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .neighborhood import certainty, neighbor_agreement, neighbors_of

_NEIGHBORS, _MOST_ROWS = 10, 4000


@dataclass(frozen=True, kw_only=True)
class Guard:
    """Certainty of adaptation's labels and of those of the unadapted source model, and what was made of it."""

    adapted: float
    """Certainty of adaptation's labels; about 0 for random labels."""

    unadapted: float
    """Certainty of the source model's labels, with the paper's threshold on the entropy."""

    acts: bool
    """Whether the source model decides where adaptation is less certain. Without it the guard only reports."""

    @property
    def doubts(self) -> bool:
        """Whether adaptation is less certain than no adaptation."""
        return self.adapted < self.unadapted

    @property
    def fell_back(self) -> bool:
        """Whether the answers are those of the unadapted source model."""
        return self.acts and self.doubts

    def sentence(self) -> str:
        """Say in plain words what the guard found."""
        numbers = f"the certainty of its labels is {self.adapted:.3f}, and {self.unadapted:.3f} without it"
        if not self.doubts:
            return f"Adaptation is at least as certain as no adaptation: {numbers}."
        if self.acts:
            return f"Adaptation is less certain than no adaptation ({numbers}); the labels are those of the unadapted model."
        return f"Adaptation is less certain than no adaptation ({numbers}), and its labels were kept because the guard is off."


def guard_neighbors(source_features: Tensor) -> Tensor:
    """Find the neighbors with which certainties are compared.

    Args:
        source_features: (N, D) features of the source model, before adaptation.

    Returns:
        (N, 10) int64 rows, fewer columns for fewer samples.
    """
    return neighbors_of(source_features, _NEIGHBORS, most_rows=_MOST_ROWS)


def compare_certainty(neighbors: Tensor, adapted: Tensor, unadapted: Tensor, *, unknown: int, acts: bool) -> Guard:
    """Compare the labels of adaptation with those of the unadapted source model.

    Args:
        neighbors: (N, k) int64; see `guard_neighbors`.
        adapted: (N,) int64 labels of adaptation.
        unadapted: (N,) int64 labels of the source model.
        unknown: The label that means unknown, C.
        acts: Whether the source model decides where adaptation is less certain.

    Returns:
        The guard's report.
    """
    if not (adapted == unknown).any():
        return Guard(
            adapted=neighbor_agreement(adapted, neighbors), unadapted=neighbor_agreement(unadapted, neighbors), acts=acts
        )
    found = [certainty(labels, unknown, neighbors) for labels in (adapted, unadapted)]
    return Guard(adapted=found[0], unadapted=found[1], acts=acts)
