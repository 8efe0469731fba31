"""From the probabilities of a proposal to what it is called: a known class, or unknown; and how that is written.

A proposal classifier also knows background. The unknown score leaves it out: it is the normalised entropy among the known classes
alone, "if this is an object, do we know which?". Entropy over all classes would call a blurred car unknown (car or background?) and
let the background class swallow the unknown (a truck that is 90 % background is a sure answer). Background stays a probability
beside the label, so that whoever reads the detections can leave it out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ..structures import Boxes3D, Predictions, Value, require
from .adapter import extract
from .proposal_classifier import ProposalClassifier
from .proposals import DetectorProposals
from .unknown import UnknownRule, is_unknown, normalised_entropy

ScoreKind = Literal["objects", "all"]
UNKNOWN_NAME = "unknown"


@dataclass(frozen=True, kw_only=True, repr=False)
class JudgedProposals(Value):
    """What is known about N proposals. probabilities: (N, C + 1), background last. features: (N, D) of the bottleneck.

    unknown_scores: (N,) 0 sure .. 1 no idea. nearest: (N,) int64, the most probable known class. unknown: (N,) bool, score above the
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
    """(N,) from probabilities (N, C + 1), background last: entropy among the C known classes ("objects"), or among all ("all").

    With one known class "objects" has nothing to compare, so at least two are required (InvalidInput).
    """
    require(
        probabilities.ndim == 2 and probabilities.shape[1] >= 3,
        f"unknown scores of proposals need two known classes and background, found {tuple(probabilities.shape)}; with one known class "
        'only kind "all" would say anything, and that is how sure the detector is of an object',
    )
    if kind == "all":
        return normalised_entropy(probabilities)
    known = probabilities[:, :-1].clamp_min(1e-8)  # a sure background leaves nothing to divide by
    return normalised_entropy(known / known.sum(1, keepdim=True))


def judge(
    probabilities: Tensor, features: Tensor, classes: tuple[str, ...], *, kind: ScoreKind, rule: UnknownRule
) -> JudgedProposals:
    """Labels by the score and a threshold read off the unlabelled scores of all proposals. classes: the C known names."""
    require(
        probabilities.shape == (len(features), len(classes) + 1),
        f"probabilities must be ({len(features)}, {len(classes) + 1}), background last, found {tuple(probabilities.shape)}",
    )
    scores = unknown_scores(probabilities, kind)
    threshold = rule.threshold(scores)
    return JudgedProposals(
        probabilities=probabilities,
        features=features,
        unknown_scores=scores,
        nearest=probabilities[:, :-1].argmax(1),
        unknown=is_unknown(scores, threshold),
        threshold=threshold,
        classes=classes,
    )


def judge_by_source(
    classifier: ProposalClassifier, proposals: DetectorProposals, *, kind: ScoreKind, rule: UnknownRule
) -> JudgedProposals:
    """The baseline: the source's classifier as it is, with a threshold on its entropy."""
    features, probabilities = extract(classifier.bottleneck, classifier.head, classifier.inputs(proposals))
    return judge(probabilities, features, classifier.classes[:-1], kind=kind, rule=rule)


def known_detections(proposals: DetectorProposals, judged: JudgedProposals | None, frame: int) -> Predictions:
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
    proposals: DetectorProposals, judged: JudgedProposals, frame: int, *, z_shift: float = 0.0
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
