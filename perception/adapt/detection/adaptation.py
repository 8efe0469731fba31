"""GLC on a detector: its proposals on an unlabelled target get new labels and unknown scores; boxes and scores stay.

    source, once      proposals + labels ── matching ── proposal classifier                            (``proposal_classifier``)
    target, no labels proposals ── the classifier's bottleneck learns, its head is frozen ── labels     (``adapter``, ``open_set``)

Background is one of the classes throughout. Three defaults differ from ``AdaptConfig()``, all chosen on simulated Waymo -> Lyft
(docs/adapt.md): no affinity term, whose hard negatives in a batch that is half background are the sample's own class; the number of
target classes is assumed and not estimated, because background has no one cluster and too few clusters hide private classes; and the
threshold acts on the entropy among the known classes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from torch import nn

from ....core.errors import InvalidInput, require
from ....core.files import atomic_file
from ....core.tensor_file import write_tensors
from ..glc.adapter import AdaptConfig, AdaptedModel, EpochReport, GLCAdapter
from .open_set import ClassifiedProposals, JudgeConfig, frame_records, judge
from .proposal_classifier import (
    ClassifierConfig,
    ProposalClassifier,
    load_classifier,
    save_classifier,
    train_proposal_classifier,
    trainable_bottleneck,
)
from .proposal_matching import Matches
from .proposals import DetectorProposals


@dataclass(frozen=True, kw_only=True)
class DetectorAdaptConfig:
    """adapt: of the bottleneck; its ``unknown`` is not used. judge: what becomes of the adapted probabilities.

    clusters: classes assumed in the target for each class of the classifier, background included, unless ``adapt.class_number`` says
    how many; None estimates the number.
    """

    adapt: AdaptConfig = AdaptConfig(affinity_weight=0.0)
    clusters: int | None = 3
    judge: JudgeConfig = JudgeConfig()


@dataclass(frozen=True, kw_only=True)
class AdaptedProposals:
    """The target's proposals as judged after adaptation, and the adapted modules."""

    judged: ClassifiedProposals
    model: AdaptedModel


def adapt_proposals(
    classifier: ProposalClassifier,
    target: DetectorProposals,
    config: DetectorAdaptConfig = DetectorAdaptConfig(),
    *,
    after_epoch: Callable[[int, EpochReport], None] | None = None,
) -> AdaptedProposals:
    """Adapt ``classifier`` to unlabelled target proposals of the same detector. The classifier stays as it is; deterministic.

    Raises InvalidInput for proposals of another detector, missing point counts, and fewer proposals than neighbours.
    """
    inputs = classifier.inputs(target)
    settings = config.adapt
    if settings.class_number is None and config.clusters is not None:
        settings = replace(settings, class_number=max(2, config.clusters * len(classifier.classes)))
    adapter = GLCAdapter(feature_module=trainable_bottleneck(classifier), classifier=classifier.head, config=settings)
    model = adapter.fit(inputs, after_epoch=after_epoch)
    found = model.predict(inputs)
    judged = judge(found.probabilities, found.features, target, config.judge)
    return AdaptedProposals(judged=judged, model=replace(model, threshold=judged.threshold))


def cached_classifier(
    path: Path, proposals: DetectorProposals, matches: Callable[[], Matches], config: ClassifierConfig
) -> ProposalClassifier:
    """The classifier in ``path`` if it was trained so on these source proposals, else a new one, written there.

    matches: what the proposals lie on, asked for only if it must be trained. Raises InvalidInput if the file holds another.
    """
    if not path.exists():
        save_classifier(path, train_proposal_classifier(proposals, matches().ids, config))
        return load_classifier(path)
    found = load_classifier(path)
    for what, stored, wanted in (
        ("detector", found.detector, proposals.detector),
        ("source", found.source, proposals.data),
        ("options", found.config, config),
    ):
        if stored != wanted:
            raise InvalidInput(f"{path} was trained with other {what} ({stored}, wanted {wanted}); choose another folder")
    return found


def save_adapted(path: Path, adapted: AdaptedProposals, classifier: ProposalClassifier) -> None:
    """The adapted bottleneck and the head with classes and threshold, as one safetensors file. No target sample is in it."""
    meta = {
        "format": "upcycle3d adapted proposal classifier 1",
        "adapted": json.dumps(
            {
                "classes": classifier.classes,
                "detector": classifier.detector,
                "source": classifier.source,
                "threshold": adapted.judged.threshold,
                "class_number": adapted.model.class_number,
            }
        ),
    }
    both = nn.ModuleDict({"bottleneck": adapted.model.feature_module, "head": adapted.model.classifier})
    write_tensors(path, both.state_dict(), meta)


def write_detections(folder: Path, proposals: DetectorProposals, judged: ClassifiedProposals, *, z_shift: float = 0.0) -> None:
    """One file FRAME.json a frame, atomically; a frame without a proposal gets an empty list."""
    require(len(proposals) == len(judged), f"{len(proposals)} proposals and {len(judged)} judgements do not belong together")
    for index, frame_id in enumerate(proposals.frame_ids):
        records = frame_records(proposals, judged, index, z_shift=z_shift)
        with atomic_file(folder / f"{frame_id.replace('/', '_')}.json") as file:
            file.write((json.dumps(records, indent=1) + "\n").encode())
