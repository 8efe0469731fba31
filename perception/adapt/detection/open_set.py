"""From the probabilities of a proposal to what it is called: a known class, or unknown; and how that is written.

    unknown score   entropy of the classifier among the known classes  x  (1 - detector's score) ** confidence
    class           the largest of  log P[c] + class_trust * [c is the detector's class]

The entropy leaves background out: "if this is an object, do we know which?". Over all classes a blurred car (car or background?) would
be unknown, and a truck that is 90 % background a sure answer. Background stays a probability beside the label, so that whoever reads
the detections can leave it out. The detector has its own say in both, because it has seen what the classifier has not: a box that it is
sure of is seldom unknown, and its own class is seldom wrong where it is sure (docs/adapt.md, "Where the defaults come from").
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from ....core.structures import Boxes3D, Predictions, TensorValue
from ..glc.adapter import extract
from ..glc.unknown import UnknownRule, is_unknown, normalized_entropy
from .proposal_classifier import ProposalClassifier
from .proposals import DetectorProposals

ScoreKind = Literal["objects", "all", "none"]
UNKNOWN_NAME = "unknown"


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """How a proposal gets its label. score: entropy among the known classes, among all with background, or none (1 for every proposal).

    confidence: exponent of 1 - the detector's score, which multiplies the entropy; 0 leaves the detector out. class_trust: nats added to
    the log probability of the detector's own class, 2 counts it about seven times. unknown: rule of the threshold.
    """

    score: ScoreKind = "objects"
    confidence: float = 2.0
    class_trust: float = 2.0
    unknown: UnknownRule = UnknownRule()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.confidence) and self.confidence >= 0 and math.isfinite(self.class_trust)):
            raise InvalidInput(f"judging needs a finite confidence of at least 0 and a finite class_trust, found {self}")
        if self.score == "none" and self.confidence == 0:
            raise InvalidInput(
                'without an entropy (score="none") and without the detector (confidence=0) there is no unknown score'
            )

    @staticmethod
    def entropy(score: ScoreKind, unknown: UnknownRule) -> JudgeConfig:
        """The classifier alone, as GLC judges."""
        return JudgeConfig(score=score, confidence=0.0, class_trust=0.0, unknown=unknown)


@dataclass(frozen=True, kw_only=True, repr=False)
class ClassifiedProposals(TensorValue):
    """What is known about N proposals. probabilities: (N, C + 1), background last. features: (N, D) of the bottleneck.

    unknown_scores: (N,) 0 sure .. 1 no idea. nearest: (N,) int64, the known class it would be. unknown: (N,) bool, score above the
    threshold. classes: the C known names.
    """

    probabilities: Tensor
    features: Tensor
    unknown_scores: Tensor
    nearest: Tensor
    unknown: Tensor
    threshold: float
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.nearest)

    @property
    def ids(self) -> Tensor:
        """(N,) int64: 0..C-1 a known class, C unknown."""
        return torch.where(self.unknown, len(self.classes), self.nearest)


def unknown_scores(probabilities: Tensor, kind: ScoreKind = "objects") -> Tensor:
    """(N,) from probabilities (N, C + 1), background last: entropy among the C known classes ("objects"), or among all ("all"); or ones.

    With one known class "objects" has nothing to compare, so at least two are required (InvalidInput).
    """
    require(
        probabilities.ndim == 2 and probabilities.shape[1] >= 3,
        f"unknown scores of proposals need two known classes and background, found {tuple(probabilities.shape)}; with one known class "
        'only kind "all" would say anything, and that is how sure the detector is of an object',
    )
    if kind == "none":
        return probabilities.new_ones(len(probabilities))
    if kind == "all":
        return normalized_entropy(probabilities)
    known = probabilities[:, :-1].clamp_min(1e-8)  # a sure background leaves nothing to divide by
    return normalized_entropy(known / known.sum(1, keepdim=True))


def judge(
    probabilities: Tensor, features: Tensor, proposals: DetectorProposals, config: JudgeConfig = JudgeConfig()
) -> ClassifiedProposals:
    """Labels of N proposals; the threshold is read off the unlabelled scores of all of them. The C known classes are the detector's.

    probabilities: (N, C + 1), background last. features: (N, D) of the bottleneck. Raises InvalidInput where these do not fit together.
    """
    classes = proposals.class_names
    require(
        probabilities.shape == (len(features), len(classes) + 1) and len(features) == len(proposals),
        f"probabilities must be ({len(proposals)}, {len(classes) + 1}), background last, and features ({len(proposals)}, D); found "
        f"{tuple(probabilities.shape)} and {tuple(features.shape)}",
    )
    scores = unknown_scores(probabilities, config.score) * (1 - proposals.scores) ** config.confidence
    own = F.one_hot(proposals.classes, len(classes))
    threshold = config.unknown.threshold(scores)
    return ClassifiedProposals(
        probabilities=probabilities,
        features=features,
        unknown_scores=scores,
        nearest=(probabilities[:, :-1].clamp_min(1e-8).log() + config.class_trust * own).argmax(1),
        unknown=is_unknown(scores, threshold),
        threshold=threshold,
        classes=classes,
    )


def judge_by_source(classifier: ProposalClassifier, proposals: DetectorProposals, config: JudgeConfig) -> ClassifiedProposals:
    """The baseline: the source's classifier as it is."""
    features, probabilities = extract(classifier.bottleneck, classifier.head, classifier.inputs(proposals))
    return judge(probabilities, features, proposals, config)


def baselines(config: JudgeConfig) -> dict[str, JudgeConfig]:
    """What an adapted classifier is compared with, by name: ways to judge with the source's classifier.

    The first is GLC's; the third lets its threshold follow the scores; the fourth asks the detector alone; the last differs from the
    adapted one in nothing but the adaptation.
    """
    fixed = UnknownRule(method="fixed", value=0.55)
    return {
        "source, entropy > 0.55": JudgeConfig.entropy("all", fixed),
        "source, entropy among known > 0.55": JudgeConfig.entropy("objects", fixed),
        "source, entropy among known, automatic": JudgeConfig.entropy("objects", config.unknown),
        "detector's score alone": replace(config, score="none", confidence=max(1.0, config.confidence)),
        "source, judged as adapted": config,
    }


def known_detections(proposals: DetectorProposals, judged: ClassifiedProposals | None, frame: int) -> Predictions:
    """Detections of the known classes in one frame, best first: without ``judged`` the detector's own, with it those not unknown."""
    found = proposals.of_frame(frame)
    if judged is None:
        return found
    rows = proposals.frame == frame
    return Predictions(
        boxes=found.boxes,
        classes=judged.nearest[rows],
        scores=found.scores,
        class_scores=found.class_scores,
        iou_scores=found.iou_scores,
    ).select(~judged.unknown[rows])


def frame_records(
    proposals: DetectorProposals, judged: ClassifiedProposals, frame: int, *, z_shift: float = 0.0
) -> list[dict[str, object]]:
    """One record per proposal of a frame, as ``predict`` writes them, with the new label, the probabilities and the unknown score.

    class is "unknown" where ``unknown``; nearest is the most probable known class in any case. Boxes and scores are the detector's.
    z_shift: m, what preparation added to z; taken back.
    """
    rows = (proposals.frame == frame).nonzero()[:, 0].tolist()
    boxes = Boxes3D(data=proposals.boxes - proposals.boxes.new_tensor([0, 0, z_shift, 0, 0, 0, 0])).data.tolist()
    names = (*judged.classes, "background")
    records: list[dict[str, object]] = []
    for row in rows:
        nearest, unknown = judged.classes[int(judged.nearest[row])], bool(judged.unknown[row])
        record: dict[str, object] = {
            "class": UNKNOWN_NAME if unknown else nearest,
            "score": round(float(proposals.scores[row]), 4),
        }
        record |= {n: round(v, 3) for n, v in zip(("x", "y", "z", "dx", "dy", "dz", "yaw"), boxes[row], strict=True)}
        record |= {"unknown": unknown, "unknown_score": round(float(judged.unknown_scores[row]), 4), "nearest": nearest}
        record["probabilities"] = {n: round(p, 4) for n, p in zip(names, judged.probabilities[row].tolist(), strict=True)}
        record["detector_class"] = proposals.class_names[int(proposals.classes[row])]
        records.append(record)
    return records
