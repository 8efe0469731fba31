"""The measurement of an adaptation against the target's labels: the adapted classifier, the baselines, and the detector itself.

Everything is decided before this; labels only measure. Read next: `proposal_metrics.py`, the single metrics.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ....datasets.prepared import PreparedDataset
from ...evaluation.score import Scores
from ...models.detector import Detector
from .adaptation import AdaptedProposals
from .class_map import ClassMap
from .open_set import OpenSetConfig, baselines, classify_without_adaptation
from .proposal_classifier import ProposalClassifier
from .proposal_matching import match_proposals
from .proposal_metrics import ProposalReport, known_ap, proposal_report, scored_limits
from .proposals import DetectorProposals

ADAPTED = "adapted"
"""Name of the adapted classifier among the reports."""


@dataclass(frozen=True, kw_only=True)
class AdaptationMeasurement:
    """What was measured on a labeled target."""

    reports: Mapping[str, ProposalReport]
    """Reports by name: those of `baselines`, then `ADAPTED`."""

    detector_ap: Scores
    """AP in percent of the known classes with the detector's own classes; see `known_ap`."""

    @property
    def adapted(self) -> ProposalReport:
        """The report after adaptation."""
        return self.reports[ADAPTED]


def measure_adaptation(
    detector: Detector,
    classifier: ProposalClassifier,
    target: DetectorProposals,
    adapted: AdaptedProposals,
    frames: PreparedDataset,
    class_map: ClassMap,
    open_set: OpenSetConfig,
) -> AdaptationMeasurement:
    """Measure an adaptation and its baselines.

    Args:
        detector: The detector; objects outside of what it can see are not scored.
        classifier: The source's classifier, before adaptation.
        target: The target's proposals.
        adapted: The adaptation.
        frames: The labeled frames of the target, in the order of the proposals' frames.
        class_map: What the target's classes mean to the detector.
        open_set: The settings that `adapted` was classified with.

    Returns:
        All reports.

    Raises:
        InvalidInput: A frame has no labels, the map lacks a class, or no proposal lies on an object.
    """
    labels = [frames.labels(i) for i in range(len(frames))]
    matches = match_proposals(target, labels, frames.classes, class_map)
    ways = {name: classify_without_adaptation(classifier, target, way) for name, way in baselines(open_set).items()}
    ways[ADAPTED] = adapted.classified
    limits = scored_limits(detector)
    reports = {
        name: proposal_report(target, classified, matches, labels, class_map, limits=limits) for name, classified in ways.items()
    }
    return AdaptationMeasurement(
        reports=reports, detector_ap=known_ap(target, None, labels, frames.classes, class_map, limits=limits)
    )
