"""Labels and a threshold for features of a target, without training.

Two answers per sample: the pseudo label of clustering, and the classifier's class unless its entropy exceeds a threshold.

Read next: `feature_report.py`, which shows the answers, and `adapt_features.py`, which does everything for a file.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.files import atomic_file
from .agreed_labels import AgreedConfig, agreed_labels
from .class_number import ClassNumber, ClassNumberConfig, target_class_number
from .feature_file import TargetFeatures, at_one_scale
from .guard import Guard, compare_certainty, guard_neighbors
from .lead_labels import LeadConfig, lead_labels
from .one_vs_all import OneVsAllConfig, one_vs_all_labels
from .pseudo_labels import PseudoLabels, unadapted_labels
from .unknown_rule import UnknownRule, is_unknown, normalized_entropy


@dataclass(frozen=True, kw_only=True)
class FeatureLabelConfig:
    """How features are labeled. `paper()` gives the settings of the GLC paper."""

    class_number: int | None = None
    """Number of target classes that the labels are made with. None: `estimate` decides."""

    estimate: ClassNumberConfig | None = None
    """How the number of target classes is estimated. None: as many as the source has."""

    labeling: AgreedConfig | OneVsAllConfig | LeadConfig = AgreedConfig()
    """Which pseudo labels are made: those on which clusters and classifier agree, GLC's or LEAD's. LEAD needs the classifier's weight."""

    fall_back: bool = True
    """Whether labels that are less certain than those of no adaptation are replaced by these."""

    unknown: UnknownRule = UnknownRule()
    """How the threshold on the entropy is chosen."""

    seed: int = 0
    """Decides the estimate; it is added to the seed of GLC's clustering."""

    @staticmethod
    def paper() -> FeatureLabelConfig:
        """Use the candidates, positives, clustering and threshold of the paper."""
        return FeatureLabelConfig(
            estimate=ClassNumberConfig.paper(),
            labeling=OneVsAllConfig.paper(),
            unknown=UnknownRule(kind="fixed"),
            fall_back=False,
        )


@dataclass(frozen=True, kw_only=True)
class FeatureLabels:
    """What was found for N samples of C source classes."""

    labels: PseudoLabels
    """Pseudo labels; those of the unadapted classifier where the guard fell back."""

    guard: Guard
    """Certainty of adaptation's labels and of no adaptation."""

    estimate: ClassNumber | None
    """How the number of target classes was estimated; None where it was not."""

    scores: Tensor
    """(N,) normalized entropy of the probabilities, 0 certain to 1 undecided."""

    threshold: float
    """Score above which `classes` is unknown."""

    classes: Tensor
    """(N,) int64, the most probable source class, or C (unknown) where the score exceeds the threshold."""


def label_features(target: TargetFeatures, config: FeatureLabelConfig = FeatureLabelConfig()) -> FeatureLabels:
    """Label features. The labels in `target` are not looked at.

    Args:
        target: Features and probabilities.
        config: Settings.

    Returns:
        Pseudo labels, scores and threshold.

    Raises:
        InvalidInput: LEAD was asked for without a weight, or the number of target classes cannot be estimated.
    """
    class_number, labeling = config.class_number, config.labeling
    if class_number is not None and not 1 <= class_number <= len(target.features):
        raise InvalidInput(
            f"the number of target classes (--class-number) must be from 1 to the number of samples, {len(target.features)}, found {class_number}"
        )
    target = replace(target, features=at_one_scale(target.features))
    source_classes = target.probabilities.shape[1]
    class_number, estimate = target_class_number(target.features, source_classes, class_number, config.estimate, seed=config.seed)
    if isinstance(labeling, AgreedConfig):
        clusters = replace(labeling.clusters, seed=labeling.clusters.seed + config.seed)
        labels = agreed_labels(target.features, target.probabilities, class_number, replace(labeling, clusters=clusters))
    elif isinstance(labeling, OneVsAllConfig):
        labeling = replace(labeling, seed=labeling.seed + config.seed)
        labels = one_vs_all_labels(target.features, target.probabilities, class_number, labeling)
    elif target.weight is None:
        raise InvalidInput("LEAD's labels need the classifier's weight (C, D), as the array `weight` of a file; none is given")
    else:
        labels = lead_labels(target.features, target.probabilities, target.weight, class_number, labeling)
    unadapted = unadapted_labels(target.probabilities)
    guard = compare_certainty(
        guard_neighbors(target.features), labels.hard, unadapted.hard, unknown=source_classes, acts=config.fall_back
    )
    scores = normalized_entropy(target.probabilities)
    threshold = config.unknown.threshold(scores)
    nearest = target.probabilities.argmax(1)
    classes = torch.where(is_unknown(scores, threshold), target.probabilities.shape[1], nearest)
    return FeatureLabels(
        labels=unadapted if guard.fell_back else labels,
        guard=guard,
        estimate=estimate,
        scores=scores,
        threshold=threshold,
        classes=classes,
    )


def write_feature_labels(path: Path, found: FeatureLabels) -> None:
    """Write the labels as an npz file, atomically.

    The arrays, all (N,): `labels` int64 (hard pseudo labels), `margin`, `nearest` int64, `weight`, `unknown_score`, `classes` int64.

    Args:
        path: The file.
        found: What `label_features` returned.
    """
    with atomic_file(path) as out:
        np.savez(
            out,
            labels=found.labels.hard.numpy(),
            margin=found.labels.margin.numpy(),
            nearest=found.labels.nearest.numpy(),
            weight=found.labels.weight.numpy(),
            unknown_score=found.scores.numpy(),
            classes=found.classes.numpy(),
        )
