"""Pseudo labels of target samples, and the check of the features and probabilities that they are made from.

Read next: `one_vs_all.py` and `lead_labels.py`, which make these labels.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import require
from ....core.tensor_value import TensorValue
from .unknown_rule import UNADAPTED_ENTROPY, is_unknown, normalized_entropy


@dataclass(frozen=True, kw_only=True, repr=False)
class PseudoLabels(TensorValue):
    """Pseudo labels of N target samples for C source classes."""

    hard: Tensor
    """(N,) int64 in 0..C. C means unknown."""

    soft: Tensor
    """(N, C) distributions: one-hot for a known sample, uniform for an unknown one."""

    weight: Tensor
    """(N,) float. Factor of each sample in the loss; GLC uses 1 for every sample."""

    margin: Tensor
    """(N,) float. Evidence for the class; a sample is known where this is at least 0."""

    nearest: Tensor
    """(N,) int64 in 0..C-1. The only class that the sample could receive."""

    prior: Tensor
    """(C,) float. The factor that suppresses a class which the target probably lacks."""

    class_number: int
    """Number of target classes K that the labels were made with."""

    @staticmethod
    def make(margin: Tensor, nearest: Tensor, prior: Tensor, class_number: int, weight: Tensor | None = None) -> PseudoLabels:
        """Make labels from margins: a sample with a margin of at least 0 receives its nearest class.

        Args:
            margin: (N,) float.
            nearest: (N,) int64 in 0..C-1.
            prior: (C,) float.
            class_number: Number of target classes K.
            weight: (N,) float, or None for 1 everywhere.

        Returns:
            The labels; `hard` and `soft` follow from `margin` and `nearest`.
        """
        known, classes = margin >= 0, prior.shape[0]
        uniform = torch.full_like(prior, 1.0 / classes)
        return PseudoLabels(
            hard=torch.where(known, nearest, classes),
            soft=torch.where(known[:, None], F.one_hot(nearest, classes).to(prior.dtype), uniform),
            weight=torch.ones_like(margin) if weight is None else weight,
            margin=margin,
            nearest=nearest,
            prior=prior,
            class_number=class_number,
        )


def unadapted_labels(probabilities: Tensor, threshold: float = UNADAPTED_ENTROPY) -> PseudoLabels:
    """Label samples without adaptation: the classifier's class, or unknown where its normalized entropy exceeds a threshold.

    Args:
        probabilities: (N, C) softmax over the source classes.
        threshold: Normalized entropy, 0 to 1. 0.55 is the paper's.

    Returns:
        One label per sample. No class is suppressed (every prior is 1), and the class number is C.
    """
    scores = normalized_entropy(probabilities)
    margin = threshold - scores
    margin = torch.where(is_unknown(scores, threshold), margin.clamp(max=-1e-12), margin.clamp(min=0))
    classes = probabilities.shape[1]
    return PseudoLabels.make(margin, probabilities.argmax(1), probabilities.new_ones(classes), classes)


def check_target(features: Tensor, probabilities: Tensor, *, at_least: int = 2) -> None:
    """Check that features and probabilities belong together and are finite.

    Args:
        features: (N, D) float.
        probabilities: (N, C) float; every row must be a distribution.
        at_least: Smallest number of samples N.

    Raises:
        InvalidInput: A shape is wrong, C is below 2, N is below `at_least`, a value is not finite, or a row does not sum to 1.
            The message names the first such row.
    """
    require(features.ndim == 2, f"target features must be (N, D), found {tuple(features.shape)}")
    require(
        probabilities.ndim == 2 and len(probabilities) == len(features),
        f"probabilities must be ({len(features)}, C) like the features, found {tuple(probabilities.shape)}",
    )
    require(
        probabilities.shape[1] >= 2,
        f"adaptation needs at least 2 source classes, found {probabilities.shape[1]}: with one class every probability is 1 and "
        "carries no information; add a background class to the classifier",
    )
    require(len(features) >= at_least, f"adaptation needs at least {at_least} target samples, found {len(features)}")
    for name, values in (("features", features), ("probabilities", probabilities)):
        if torch.isfinite(values.sum()):  # a sum is finite only if every value is: one quick pass for the usual case
            continue
        bad = (~torch.isfinite(values).all(1)).nonzero()[:, 0]
        require(len(bad) == 0, f"{name} of {len(bad)} samples are not finite, the first at row {int(bad[0]) if len(bad) else 0}")
    off = ((probabilities.sum(1) - 1).abs() > 1e-3) | (probabilities < 0).any(1)
    row = int(off.nonzero()[0, 0]) if off.any() else 0
    require(
        not off.any(),
        f"probabilities of {int(off.sum())} samples are not distributions: row {row} sums to {float(probabilities[row].sum()):.4f} "
        f"and its smallest value is {float(probabilities[row].min()):.4f}; give the softmax, not the logits",
    )
