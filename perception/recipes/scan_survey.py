"""A look at a split of a prepared dataset with a detector's grid: statistics for the weights' file, and coverage for the reader.

Read next: `perception/models/encoders/scan_survey.py`, which measures one scan; `jobs.py`, which calls this before a training.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast, get_args

from ...core.errors import InvalidInput
from ...core.frame import count_ignored
from ...core.ledger import Ledger
from ...core.rig import intensity_range
from ...core.scan_comparison import compare_road, compare_scans, rig_differences
from ...core.scan_options import Axis, NumberType
from ...core.trained_on import ScanMeasures, ScanStatistics, TrainedOn, summarize_scans
from ...datasets.data_split import DataSplit
from ...datasets.nuscenes import INTENSITY_SCALE
from ...datasets.prepared import PreparedDataset
from ..models.detector import Detector
from ..models.detectors import DetectorConfig
from ..models.encoders.encoder import Encoder
from ..models.encoders.scan_survey import boxes_outside_range, measure_scan, outside_height, point_features, points_behind

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
        ledger = ledger + counts + Ledger(intensity_range=intensity_range(frame.points))
        if frame.labels is not None:
            ignored, types = count_ignored(frame.labels, frames.classes, frame.reading)
            labels = frame.labels.select(~ignored)
            outside = boxes_outside_range(labels.boxes.data, encoder)
            empty = labels.num_points == 0
            behind = labels.boxes.data[:, 0] < 0
            ledger = ledger + Ledger(
                boxes=_by_class(labels.classes.tolist(), frames.classes),
                boxes_empty=_by_class(labels.classes[empty].tolist(), frames.classes),
                boxes_outside_range=_by_class(labels.classes[outside].tolist(), frames.classes),
                boxes_outside_height=int(outside_height(labels.boxes.data, encoder).sum()),
                types_ignored=types,
                points_behind=points_behind(frame.points, encoder),
                boxes_behind=int((behind & ~outside).sum()),
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
    scans, options = survey.statistics, dict(frames.origin.options)
    if scans is not None and "intensity" not in point_features(detector.encoder):
        scans = replace(scans, intensity=float("nan"))  # nobody needs to compare what is not read
    return TrainedOn(
        rig=frames.rig,
        feature_names=frames.feature_names,
        classes=detector.class_names,
        point_range=detector.spec.grid.range,
        scans=scans,
        reader_scale=INTENSITY_SCALE if frames.origin.layout in ("nuscenes", "lyft") else 1.0,
        camera_view=("crop_to_camera", "True") in frames.origin.options,
        axes=_axes_of(frames),
        columns=tuple(options["columns"].split()) if "columns" in options else None,
        dtype=cast(NumberType, options["dtype"]) if options.get("dtype") in get_args(NumberType) else None,
    )


def _axes_of(frames: PreparedDataset) -> tuple[Axis, Axis, Axis] | None:
    """Axes with which the scan files behind a prepared dataset were read; None where nobody knows."""
    if frames.origin.layout == "nuscenes":  # its reader turns the files, in which y points forward
        return ("y", "-x", "z")
    words = dict(frames.origin.options).get("axes", "").split()
    if len(words) != 3 or not set(words) <= set(get_args(Axis)):
        return None
    return cast(tuple[Axis, Axis, Axis], tuple(words))


def check_labels(split: DataSplit, frames: PreparedDataset) -> None:
    """Refuse a split with frames that nobody labeled, before anything is written.

    Args:
        split: The split, as the user named it.
        frames: Its frames.

    Raises:
        InvalidInput: A frame has no labels; the message says which splits have some.
    """
    missing = [name for i, name in enumerate(frames.ids) if frames.labels(i) is None]
    if not missing:
        return
    labeled = [name for name in frames.splits if PreparedDataset(frames.root, name).labels(0) is not None and name != split.name]
    what = f"the split {split.name}" if split.name is not None else "the dataset"
    some = "has no labels" if len(missing) == len(frames) else f"has {len(missing)} frames without labels, {missing[0]} is one"
    other = f"splits with labels are: {', '.join(labeled)}" if labeled else "no split of it has labels"
    raise InvalidInput(f"{what} of {frames.root} {some}, so nothing can be learned from it; {other}")


def expected_road(config: DetectorConfig) -> float:
    """Say at which height a detector expects the road: objects stand on it.

    Args:
        config: Configuration of the detector.

    Returns:
        The lowest bottom of its anchors in meters. OpenPCDet's anchors of pedestrians and cyclists stand higher than those of cars.
    """
    return min(anchor.bottom_z for anchor in config.decoder.anchors)


def road_warning(
    detector: Detector, frames: PreparedDataset, statistics: ScanStatistics | None, *, own_anchors: bool = False
) -> tuple[str, ...]:
    """Compare the height of the road in a split with what a detector is made for.

    Args:
        detector: The detector.
        frames: The split.
        statistics: Of the split's scans, from `survey_split`.
        own_anchors: Whether the anchors were made of this split's labels: then only the range can be wrong.

    Returns:
        A sentence, or nothing where the road lies right.
    """
    expected = None
    if isinstance(detector.config, DetectorConfig) and not own_anchors:
        expected = expected_road(detector.config)
    z_range = detector.spec.grid.range
    return compare_road(statistics, expected=expected, rig=frames.rig, z_range=(z_range[2], z_range[5]))


def data_warnings(detector: Detector, frames: PreparedDataset, statistics: ScanStatistics | None) -> tuple[str, ...]:
    """Compare a split with the data that a detector was trained on.

    Args:
        detector: The detector.
        frames: The split that it is scored on, or trained on further.
        statistics: Of the split's scans, from `survey_split`; None compares rig and point features only.

    Returns:
        One sentence for each difference; nothing where the detector's file does not say what it was trained on.

    Raises:
        InvalidInput: The split lacks point features that the detector reads.
    """
    read = point_features(detector.encoder)
    missing = [name for name in read if name not in frames.feature_names]
    if missing:
        raise InvalidInput(
            f"the detector reads the point features {', '.join(read)}, and {frames.root} has {', '.join(frames.feature_names) or 'none'}: "
            f"{', '.join(missing)} missing; prepare the data with these columns, or use a detector without them"
        )
    trained = detector.trained_on
    if trained is None:
        return road_warning(detector, frames, statistics)
    said = list(rig_differences(frames.rig, trained, f"the rig of {frames.root}"))
    if read and set(frames.feature_names) != set(trained.feature_names):
        said.append(
            f"{frames.root} has the point features {', '.join(frames.feature_names)}, and the training data had "
            f"{', '.join(trained.feature_names)}; the detector reads {', '.join(read)}"
        )
    if trained.scans is not None and statistics is not None:
        said += compare_scans(trained.scans, statistics, rig=frames.rig)
    elif trained.scans is None:
        said += road_warning(detector, frames, statistics)
    return tuple(said)


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
