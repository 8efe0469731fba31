"""The result of a training: the adapted model, what it answers, and a report for each epoch.

Read next: `adapter.py`, which trains it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ....core.tensor_value import TensorValue
from .class_number import ClassNumber
from .guard import Guard
from .networks import features_and_probabilities
from .unknown_rule import is_unknown, normalized_entropy


@dataclass(frozen=True, kw_only=True, repr=False)
class AdaptedPredictions(TensorValue):
    """Answer of an adapted model for N samples and C source classes."""

    features: Tensor
    """(N, D) features of the adapted module."""

    probabilities: Tensor
    """(N, C) softmax."""

    unknown_scores: Tensor
    """(N,) normalized entropy, 0 certain to 1 undecided."""

    nearest: Tensor
    """(N,) int64, the most probable source class, whatever the score."""

    classes: Tensor
    """(N,) int64, the same, or C (unknown) where the score exceeds the threshold."""


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """Means over one epoch."""

    pseudo: float
    """Global loss before its weight."""

    local: float
    """Local loss before its weight."""

    affinity: float
    """Affinity loss before its weight; 0 where it is off."""

    unknown_share: float
    """Share of the target that the pseudo labels of this epoch called unknown, 0 to 1."""


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """Result of an adaptation. It holds no target sample."""

    feature_module: nn.Module
    """The adapted module, in evaluation mode."""

    classifier: nn.Module
    """A copy of the source's classifier, in evaluation mode."""

    threshold: float
    """Score above which a sample is unknown."""

    class_number: int
    """Number of target classes K that was used."""

    estimate: ClassNumber | None
    """How K was estimated; None where it was not."""

    guard: Guard
    """Certainty of the adapted model's answers and of no adaptation. Where it fell back, the modules are the source's."""

    history: tuple[EpochReport, ...] = field(repr=False)
    """One report per epoch."""

    def predict(self, inputs: Tensor, *, batch_size: int = 1024) -> AdaptedPredictions:
        """Classify samples of the target.

        Args:
            inputs: (N, ...) on the device of the modules.
            batch_size: Samples per call of a module.

        Returns:
            Classes, with C for unknown, and what they were decided from.
        """
        features, probabilities = features_and_probabilities(self.feature_module, self.classifier, inputs, batch_size=batch_size)
        scores = normalized_entropy(probabilities)
        nearest = probabilities.argmax(1)
        return AdaptedPredictions(
            features=features,
            probabilities=probabilities,
            unknown_scores=scores,
            nearest=nearest,
            classes=torch.where(is_unknown(scores, self.threshold), probabilities.shape[1], nearest),
        )
