"""GLC on a detector's proposals: the classifier of proposals learns from an unlabeled target.

    source, once      proposals + labels ── matching ── proposal classifier                    (`classifier_training.py`)
    target, no labels proposals ── the classifier's bottleneck learns, its head is frozen ── open-set decision

Background is one of the classes throughout. These defaults differ from `AdaptConfig()`, and were chosen on simulated Waymo -> Lyft
(docs/adapt.md): there is no affinity term, whose hard negatives in a batch that is half background are samples of the same class; the
number of target classes is assumed and not estimated, because background has not one cluster and too few clusters hide private classes;
the threshold acts on the entropy among the known classes; an epoch sees every proposal, labels are those of clusters alone, and
no guard compares them with the source, because everything was measured that way.

Read next: `measure.py`, which measures where there are labels, and `adapt_detector.py`, the whole way from a detector to detections.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ....core.tensor_file import TensorFileKind, write_tensors
from ..glc.adapted_model import AdaptedModel, EpochReport
from ..glc.adapter import AdaptConfig, GLCAdapter
from ..glc.class_number import ClassNumberConfig
from ..glc.one_vs_all import OneVsAllConfig
from ..glc.unknown_rule import UnknownRule
from .open_set import ClassifiedProposals, OpenSetConfig, classify_open_set
from .proposal_classifier import ProposalClassifier
from .proposals import DetectorProposals

_KIND = TensorFileKind(
    name="adapted proposal classifier",
    format="upcycle3d adapted proposal classifier 2",
    advice="give the adapted.safetensors that an adaptation wrote",
)


@dataclass(frozen=True, kw_only=True)
class DetectorAdaptConfig:
    """How the classifier of proposals adapts, and how proposals are classified afterwards."""

    glc: AdaptConfig = AdaptConfig(
        affinity_weight=0.0,
        steps_per_epoch=None,
        labeling=OneVsAllConfig(),
        estimate=ClassNumberConfig(),
        unknown=UnknownRule(kind="fixed"),
        fall_back=False,
    )
    """Training of the bottleneck. Its `unknown` is not used."""

    target_classes_per_class: int | None = 3
    """Target classes that are assumed for each class of the classifier, background included. None: the number is estimated.

    `glc.class_number` overrules it.
    """

    open_set: OpenSetConfig = OpenSetConfig()
    """Open-set decision on the adapted probabilities."""


@dataclass(frozen=True, kw_only=True)
class AdaptedProposals:
    """Result of an adaptation."""

    classified: ClassifiedProposals
    """Open-set decision on the target's proposals after adaptation."""

    model: AdaptedModel
    """The adapted bottleneck and the head."""


def adapt_proposals(
    classifier: ProposalClassifier,
    target: DetectorProposals,
    config: DetectorAdaptConfig = DetectorAdaptConfig(),
    *,
    after_epoch: Callable[[int, EpochReport], None] | None = None,
) -> AdaptedProposals:
    """Adapt a classifier to unlabeled target proposals of the same detector. The classifier itself does not change.

    Args:
        classifier: The source's classifier of proposals.
        target: The target's proposals.
        config: Settings; the seed decides the result.
        after_epoch: Called after each epoch with its number, from 0, and its report.

    Returns:
        New classes and the adapted model.

    Raises:
        InvalidInput: The proposals are of another detector, lack point counts, or are not more than the neighbors.
    """
    inputs = classifier.inputs(target)
    settings = config.glc
    if settings.class_number is None and config.target_classes_per_class is not None:
        settings = replace(settings, class_number=max(2, config.target_classes_per_class * len(classifier.classes)))
    bottleneck = copy.deepcopy(classifier.bottleneck).requires_grad_(True)
    adapter = GLCAdapter(feature_module=bottleneck, classifier=classifier.head, config=settings)
    model = adapter.fit(inputs, after_epoch=after_epoch)
    found = model.predict(inputs)
    classified = classify_open_set(found.probabilities, found.features, target, config.open_set)
    return AdaptedProposals(classified=classified, model=replace(model, threshold=classified.threshold))


def save_adapted(path: str | Path, adapted: AdaptedProposals, classifier: ProposalClassifier) -> None:
    """Write the adapted bottleneck and the head with classes and threshold as one safetensors file. It holds no target sample.

    Args:
        path: The file.
        adapted: The adaptation.
        classifier: The source's classifier that was adapted.
    """
    plain = {
        "classes": classifier.classes,
        "detector": classifier.detector,
        "source": classifier.source,
        "threshold": adapted.classified.threshold,
        "class_number": adapted.model.class_number,
    }
    both = nn.ModuleDict({"bottleneck": adapted.model.feature_module, "head": adapted.model.classifier})
    write_tensors(path, both.state_dict(), {"adapted": json.dumps(plain)}, _KIND)
