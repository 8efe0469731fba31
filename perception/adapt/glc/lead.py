"""LEAD's labeller (Qu et al., CVPR 2024): unknown samples have a large part outside the space that the classifier looks at.

No k-means: features are split along the singular vectors of the classifier's weight, the known space (C directions) and the rest.

    score      length of the part of the normalised feature outside the known space
    boundary   per sample and class: the mean score of the class's positives, raised towards the unknown samples' mean score by how
               well the sample fits the class (its prototype and the classifier's weight)
    label      the class that fits best; unknown if the score reaches the boundary; samples near the boundary weigh less

The released code means to give confident samples weight 1 and does not (chained indexing); here the weight is the formula's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from .labeling import OneVsAllConfig, TargetLabels, check_target, most_confident, positive_counts

_STEEPNESS = 1e-4  # of the weight around the boundary


@dataclass(frozen=True, kw_only=True)
class LeadConfig:
    """counts: how many positives a class has, by the options of the one-vs-all labeller."""

    counts: OneVsAllConfig = OneVsAllConfig(positives="uniform")
    em_steps: int = 100  # of the two-component Gaussian mixture on the scores, at most

    def __post_init__(self) -> None:
        if self.em_steps < 1:
            raise InvalidInput(f"the mixture needs at least one step, found em_steps = {self.em_steps}")


def lead_labels(features: Tensor, probabilities: Tensor, weight: Tensor, class_number: int, config: LeadConfig) -> TargetLabels:
    """Pseudo labels of target features (N, D), their softmax (N, C), from the classifier's weight (C, D) with C < D.

    Raises InvalidInput for what ``check_target`` refuses, and unless C < D: without it there is no unknown space.
    """
    check_target(features, probabilities)
    classes, dimensions = weight.shape[0], features.shape[1]
    require(
        weight.shape == (probabilities.shape[1], dimensions) and classes < dimensions,
        f"LEAD needs a weight (C, D) with C < D for features {tuple(features.shape)} and probabilities {tuple(probabilities.shape)}, "
        f"found {tuple(weight.shape)}",
    )
    features, weight = F.normalize(features), weight.detach()
    left, _, _ = torch.linalg.svd(weight.T, full_matrices=False)  # (D, C), a basis of the known space
    score = (features - (features @ left) @ left.T).norm(dim=1)

    counts = positive_counts(probabilities, class_number, config.counts)
    positives = [most_confident(probabilities, c)[:count] for c, count in enumerate(counts)]
    prototypes = F.normalize(torch.stack([features[rows].mean(0) for rows in positives]))
    own = torch.stack([score[rows].mean() for rows in positives])  # (C,)
    confidence = torch.stack([probabilities[rows, c].mean() for c, rows in enumerate(positives)])

    fit_target = 1 - torch.exp(-F.relu(features @ prototypes.T))
    fit_source = torch.exp(F.relu(features @ F.normalize(weight).T) - 1)
    common, nearest = (fit_target * fit_source).sqrt().max(1)
    unknown_mean = larger_mixture_mean(score, steps=config.em_steps)
    boundary = own[nearest] + common * (unknown_mean - own[nearest]).clamp(min=0)
    margin = torch.where(score >= boundary, torch.minimum(boundary - score, score.new_tensor(-1e-12)), boundary - score)
    sureness = 1 - (1 + (score - boundary).square() / _STEEPNESS) ** (-(1 + _STEEPNESS) / 2)
    return TargetLabels.make(margin, nearest, confidence, class_number, weight=sureness)


def larger_mixture_mean(scores: Tensor, *, steps: int) -> float:
    """The larger mean of a mixture of two Gaussians fitted to (N,) scores by expectation-maximisation, from the two halves."""
    values = scores.double()
    ordered = values.sort().values
    half = max(1, len(ordered) // 2)
    mean = torch.stack([ordered[:half].mean(), ordered[half:].mean() if half < len(ordered) else ordered[-1]])
    variance = values.var(unbiased=False).clamp(min=1e-12).repeat(2)
    share = torch.full_like(mean, 0.5)
    for _ in range(steps):
        logs = share.log() - 0.5 * variance.log() - 0.5 * (values[:, None] - mean).square() / variance
        duty = logs.softmax(1)
        total = duty.sum(0).clamp(min=1e-9)
        new = (duty * values[:, None]).sum(0) / total
        variance = ((duty * (values[:, None] - new).square()).sum(0) / total).clamp(min=1e-12)
        share = total / len(values)
        moved = float((new - mean).abs().max())
        mean = new
        if moved < 1e-9:
            break
    return float(mean.max())
