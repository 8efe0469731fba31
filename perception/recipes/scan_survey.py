"""A look at a split of a prepared dataset with a detector's grid: statistics for the weights' file, and coverage for the reader.

Read next: `perception/models/encoders/scan_survey.py`, which measures one scan; `jobs.py`, which calls this before a training.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.ledger import Ledger
from ...core.trained_on import ScanMeasures, ScanStatistics, TrainedOn, summarize_scans
from ...datasets.prepared import PreparedDataset
from ..models.detector import Detector
from ..models.encoders.encoder import Encoder
from ..models.encoders.scan_survey import boxes_outside_range, measure_scan

SURVEY_FRAMES = 200
"""Frames of a split that are measured. More would change the medians by less than any tolerance."""


@dataclass(frozen=True, kw_only=True)
class Survey:
    """What a look at a split gave."""

    statistics: ScanStatistics | None
    """Medians over the frames; None for a split without frames."""
    ledger: Ledger
    """Counts of the frames that were looked at: points and boxes in range, occupied cells."""


def survey_split(frames: PreparedDataset, encoder: Encoder, *, most: int = SURVEY_FRAMES) -> Survey:
    """Measure frames spread evenly over a split. The same split gives the same numbers.

    Args:
        frames: The split.
        encoder: The encoder whose grid counts.
        most: Largest number of frames that are read.

    Returns:
        Statistics and counts.
    """
    measures: list[ScanMeasures] = []
    ledger = Ledger(boxes=dict.fromkeys(frames.classes, 0))
    for index in spread_evenly(len(frames), most):
        frame = frames[index]
        found, counts = measure_scan(frame.points, encoder)
        measures.append(found)
        ledger = ledger + counts
        if frame.labels is not None:
            outside = boxes_outside_range(frame.labels.boxes.data, encoder)
            empty = frame.labels.num_points == 0
            ledger = ledger + Ledger(
                boxes=_by_class(frame.labels.classes.tolist(), frames.classes),
                boxes_empty=_by_class(frame.labels.classes[empty].tolist(), frames.classes),
                boxes_outside_range=_by_class(frame.labels.classes[outside].tolist(), frames.classes),
            )
    return Survey(statistics=summarize_scans(measures), ledger=ledger)


def describe_training(detector: Detector, frames: PreparedDataset, survey: Survey) -> TrainedOn:
    """Say what a detector is trained on.

    Args:
        detector: The detector.
        frames: The labeled split.
        survey: What `survey_split` gave for them.

    Returns:
        What its file will hold.
    """
    return TrainedOn(
        rig=frames.rig,
        feature_names=frames.feature_names,
        classes=detector.class_names,
        point_range=detector.spec.grid.range,
        scans=survey.statistics,
        camera_view=("crop_to_camera", "True") in frames.origin.options,
    )


def spread_evenly(number: int, most: int) -> range | list[int]:
    """Choose indices spread evenly over a sequence.

    Args:
        number: Length of the sequence.
        most: Largest number of indices.

    Returns:
        The indices in order; all of them where there are not more than `most`.
    """
    return range(number) if number <= most else [i * number // most for i in range(most)]


def _by_class(classes: list[int], names: tuple[str, ...]) -> dict[str, int]:
    return {name: n for i, name in enumerate(names) if (n := classes.count(i))}
