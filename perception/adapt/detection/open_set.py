"""Open-set decision on proposals: from probabilities to a known class, or unknown.

    unknown score   entropy of the classifier among the known classes  x  (1 - detector's score) ** score_exponent
    class           the largest of  log P[c] + class_bonus * [c is the detector's class]

The entropy leaves background out: "if this is an object, do we know which?". Over all classes a blurred car (car or background?) would
be unknown, and a truck that is 90 % background a certain answer. Background stays a probability next to the class, so that a reader of
the detections can leave it out. The detector has a say in both because it has seen what the classifier has not: a box that it is
certain of is seldom unknown, and its own class is seldom wrong where it is certain (docs/adapt.md, "Where the defaults come from").

Read next: `adaptation.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from ....core.structures import Predictions
from ....core.tensor_value import TensorValue
from ..glc.networks import features_and_probabilities
from ..glc.unknown_rule import UnknownRule, is_unknown, normalized_entropy
from .proposal_classifier import ProposalClassifier
from .proposals import DetectorProposals

EntropyOver = Literal["known", "all", "none"]


@dataclass(frozen=True, kw_only=True)
class OpenSetConfig:
    """How a proposal gets its class and its unknown score."""

    entropy_over: EntropyOver = "known"
    """Entropy among the known classes ("known"), among all with background ("all"), or 1 for every proposal ("none")."""

    score_exponent: float = 2.0
    """Exponent of 1 - the detector's score, which multiplies the entropy. 0 leaves the detector's score out."""

    class_bonus: float = 2.0
    """Bonus on the log probability of the detector's own class; 2.0 multiplies its odds by e² (about 7). 0 leaves it out."""

    unknown: UnknownRule = UnknownRule()
    """How the threshold of the unknown score is chosen."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.score_exponent) and self.score_exponent >= 0 and math.isfinite(self.class_bonus)):
            raise InvalidInput(
                "an open-set decision needs a finite score_exponent of at least 0 and a finite class_bonus, found "
                f"{self.score_exponent:g} and {self.class_bonus:g}"
            )
        if self.entropy_over == "none" and self.score_exponent == 0:
            raise InvalidInput(
                'without an entropy (entropy_over="none") and without the detector (score_exponent=0) there is no unknown score'
            )

    @staticmethod
    def classifier_alone(entropy_over: EntropyOver, unknown: UnknownRule) -> OpenSetConfig:
        """Decide by the classifier alone, like GLC.

        Args:
            entropy_over: See the field.
            unknown: See the field.

        Returns:
            The configuration without the detector's score and class.
        """
        return OpenSetConfig(entropy_over=entropy_over, score_exponent=0.0, class_bonus=0.0, unknown=unknown)


@dataclass(frozen=True, kw_only=True, repr=False)
class ClassifiedProposals(TensorValue):
    """Open-set decision on N proposals of C known classes."""

    probabilities: Tensor
    """(N, C + 1) softmax of the classifier, background last."""

    features: Tensor
    """(N, D) features of the bottleneck."""

    unknown_scores: Tensor
    """(N,) from 0, certain, to 1, undecided."""

    nearest: Tensor
    """(N,) int64 in 0..C-1, the most probable known class, whatever the score."""

    unknown: Tensor
    """(N,) bool, whether the score exceeds the threshold."""

    threshold: float
    """The threshold of the unknown score."""

    classes: tuple[str, ...]
    """Names of the C known classes."""

    def __len__(self) -> int:
        return len(self.nearest)

    @property
    def ids(self) -> Tensor:
        """(N,) int64: 0..C-1 a known class, C unknown."""
        return torch.where(self.unknown, len(self.classes), self.nearest)


def unknown_scores(probabilities: Tensor, entropy_over: EntropyOver = "known") -> Tensor:
    """Compute the classifier's part of the unknown score.

    Args:
        probabilities: (N, C + 1), background last, C >= 2: one known class leaves nothing to compare.
        entropy_over: Entropy among the C known classes, among all, or ones.

    Returns:
        (N,) from 0 to 1.

    Raises:
        InvalidInput: There are fewer than two known classes.
    """
    require(
        probabilities.ndim == 2 and probabilities.shape[1] >= 3,
        f"unknown scores of proposals need two known classes and background, found {tuple(probabilities.shape)}. With one known class "
        "only the entropy with background carries information, and that is how certain the detector is of an object",
    )
    if entropy_over == "none":
        return probabilities.new_ones(len(probabilities))
    if entropy_over == "all":
        return normalized_entropy(probabilities)
    known = probabilities[:, :-1].clamp_min(1e-8)  # a certain background leaves nothing to divide by
    return normalized_entropy(known / known.sum(1, keepdim=True))


def classify_open_set(
    probabilities: Tensor, features: Tensor, proposals: DetectorProposals, config: OpenSetConfig = OpenSetConfig()
) -> ClassifiedProposals:
    """Decide for each proposal on a known class or unknown. The threshold is read off the unlabeled scores of all proposals.

    Args:
        probabilities: (N, C + 1), background last. The C known classes are the detector's.
        features: (N, D) features of the bottleneck.
        proposals: N proposals.
        config: Settings.

    Returns:
        The decisions.

    Raises:
        InvalidInput: The three do not fit together, or there are fewer than two known classes.
    """
    classes = proposals.class_names
    require(
        probabilities.shape == (len(features), len(classes) + 1) and len(features) == len(proposals),
        f"probabilities must be ({len(proposals)}, {len(classes) + 1}), background last, and features ({len(proposals)}, D); found "
        f"{tuple(probabilities.shape)} and {tuple(features.shape)}",
    )
    scores = unknown_scores(probabilities, config.entropy_over) * (1 - proposals.scores) ** config.score_exponent
    own = F.one_hot(proposals.classes, len(classes))
    threshold = config.unknown.threshold(scores)
    return ClassifiedProposals(
        probabilities=probabilities,
        features=features,
        unknown_scores=scores,
        nearest=(probabilities[:, :-1].clamp_min(1e-8).log() + config.class_bonus * own).argmax(1),
        unknown=is_unknown(scores, threshold),
        threshold=threshold,
        classes=classes,
    )


def classify_without_adaptation(
    classifier: ProposalClassifier, proposals: DetectorProposals, config: OpenSetConfig
) -> ClassifiedProposals:
    """Decide with the source's classifier as it is: the baseline.

    Args:
        classifier: The source's classifier.
        proposals: N proposals of the same detector.
        config: Settings.

    Returns:
        The decisions.

    Raises:
        InvalidInput: The proposals are of another detector, or lack point counts that the classifier needs.
    """
    features, probabilities = features_and_probabilities(classifier.bottleneck, classifier.head, classifier.inputs(proposals))
    return classify_open_set(probabilities, features, proposals, config)


def baselines(config: OpenSetConfig) -> dict[str, OpenSetConfig]:
    """List what an adapted classifier is compared with: settings for the source's classifier.

    Args:
        config: The settings of the adapted classifier.

    Returns:
        Settings by name. The first is GLC's decision; the second leaves background out; the third lets its threshold follow the
        scores; the fourth asks the detector alone; the last differs from the adapted one only in the adaptation. The names are keys
        of result files.
    """
    fixed = UnknownRule(kind="fixed", value=0.55)
    return {
        "source, entropy > 0.55": OpenSetConfig.classifier_alone("all", fixed),
        "source, entropy among known > 0.55": OpenSetConfig.classifier_alone("known", fixed),
        "source, entropy among known, automatic": OpenSetConfig.classifier_alone("known", config.unknown),
        "detector's score alone": replace(config, entropy_over="none", score_exponent=max(1.0, config.score_exponent)),
        "source, judged as adapted": config,
    }


def known_detections(proposals: DetectorProposals, classified: ClassifiedProposals | None, frame: int) -> Predictions:
    """Give the detections of the known classes in one frame, best first.

    Args:
        proposals: All proposals.
        classified: Decisions on them, or None for the detector's own classes.
        frame: Position of the frame in `proposals.frame_ids`.

    Returns:
        Without `classified` all proposals, with it those that are not unknown, with their new classes.
    """
    found = proposals.of_frame(frame)
    if classified is None:
        return found
    rows = proposals.frame == frame
    return Predictions(
        boxes=found.boxes,
        classes=classified.nearest[rows],
        scores=found.scores,
        class_scores=found.class_scores,
        iou_scores=found.iou_scores,
    ).select(~classified.unknown[rows])
