"""Scores a detector on a split together with what must be known to trust the score: the one way of the command and of Python.

Read next: `perception/evaluation/score.py`, which scores; `scan_survey.py`, which compares the split with the data of the training.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from ...core.ledger import Ledger
from ...datasets.prepared import PreparedDataset
from ..evaluation.score import EvaluationReport, Protocol, score_detector
from ..models.detector import Detector
from .scan_survey import data_warnings, survey_split
from .training_frames import shared_frames_note


def score_split(
    detector: Detector,
    frames: PreparedDataset,
    protocol: Protocol | None = None,
    *,
    overlaps: Mapping[str, float] | None = None,
    source: Path | str | None = None,
) -> EvaluationReport:
    """Score a detector, and compare the split with the data that it was trained on.

    Args:
        detector: The detector, on its device.
        frames: The labeled split.
        protocol: See `score_detector`.
        overlaps: See `score_detector`.
        source: The run folder or file of the detector, to look for frames that it was trained on; None looks for none.

    Returns:
        The report of `score_detector`, whose account also has the counts of the scans, and says what differs from the training.

    Raises:
        InvalidInput: See `score_detector` and `data_warnings`.
    """
    scans, unlike = Ledger(), tuple[str, ...]()
    if isinstance(detector, Detector):
        survey = survey_split(frames, detector.encoder)
        unlike = data_warnings(detector, frames, survey.statistics)
        scans = replace(survey.ledger.without_labels(), scans=0)
    report = score_detector(detector, frames, protocol, overlaps=overlaps)
    if report.account is None:
        raise AssertionError("score_detector gives an account")
    seen = None if source is None else shared_frames_note(source, frames)
    return replace(report, account=report.account.told(ledger=scans, warnings=unlike, notes=[] if seen is None else [seen]))
