"""What a training knew about its data, kept beside the weights: rig, point features, and simple statistics of the scans.

A detector file and an encoder file carry one `TrainedOn`. Later commands take the rig from it, and compare the scans they read
with those of training: a scan whose road lies 1.7 m lower gives boxes that look right and are not.

Read next: `perception/training/detector_files.py`, which writes it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from .config_json import config_from_json, config_to_json
from .errors import InvalidInput, require, require_counts, require_numbers
from .foreign_text import is_one_name, shown
from .rig import RigSpec
from .scan_options import Axis, NumberType, ScanOptions
from .structures import PointCloud
from .tensor_file import TensorFile

_KEY = "trained_on"
_MOST_NAMES = 1000

GROUND_TOLERANCE = 0.5
"""Meters by which the ground height may differ from that of training before a warning follows. Scans of one sensor differ by up to
0.45 m from the median of a data set and medians of splits by 0.1 m; sensors of several data sets, with their own shifts, by 0.35 m
(docs/decisions.md)."""
COUNT_FACTOR = 2.5
"""Factor by which points or occupied cells per scan may differ from those of training before a warning follows. Scans of one sensor
differ by up to 1.7; a full turn has 3.2 times the points of what the camera sees of it."""
ROAD_TOLERANCE = 0.7
"""Meters by which the road of the training data may lie higher or lower than a preset expects it before a warning follows. Medians of real
data, with the shifts that the documentation names, differ by up to 0.43 m."""
HEADROOM = 2.0
"""Meters above the road that a detector's range must hold, else cars are cut off."""
BEHIND_SHARE = 0.1
"""Share of a scan's points behind the sensor (x < 0) from which it is no camera's view. What a camera ahead sees has none there."""
INTENSITY_FACTOR = 4.0
"""Factor by which the mean intensity may differ from that of training before a warning follows. Sensors of several data sets differ by
up to 3.8."""


@dataclass(frozen=True, kw_only=True)
class ScanStatistics:
    """Simple statistics of scans in the shifted frame: medians over scans, so that one odd scan changes nothing."""

    scans: int
    """Number of scans that were looked at."""
    points: float
    """Points per scan in the detector's range."""
    cells: float
    """Occupied cells of the detector's grid per scan, those over the voxel limit included."""
    ground_height: float
    """Height of the road in meters: the 10th percentile of z of the points within 5 to 30 m of the sensor. NaN without such points."""
    intensity: float
    """Mean intensity. NaN for scans without intensity."""


@dataclass(frozen=True, kw_only=True)
class TrainedOn:
    """What a training knew about its data."""

    rig: RigSpec
    """Rig of the training data: the default of every later command."""
    feature_names: tuple[str, ...]
    """Point features of the training scans, after x, y, z."""
    classes: tuple[str, ...]
    """Class names of the detector, in the order of the class numbers."""
    point_range: tuple[float, float, float, float, float, float]
    """Range of the detector's grid: x, y, z where it starts, then where it ends, in meters."""
    scans: ScanStatistics | None = None
    """Statistics of the training scans; None where nobody measured them, as in imported weights."""
    camera_view: bool = False
    """Whether the training scans held only what a camera sees."""
    axes: tuple[Axis, Axis, Axis] | None = None
    """Axes with which the scan files of the training were read (`--axes`). None where nobody knows."""
    columns: tuple[str, ...] | None = None
    """Columns with which they were read; empty for the usual ones. None where nobody knows."""
    dtype: NumberType | None = None
    """Type of the numbers in their `.bin` files. None where nobody knows."""
    reader_scale: float = 1.0
    """Factor by which the reader of the training data multiplied the intensity of the files, before the rig: 1/255 for nuScenes and Lyft.
    Scan files of the same sensor need it as their intensity scale."""

    def __post_init__(self) -> None:
        for what, names in (("feature_names", self.feature_names), ("classes", self.classes)):
            require(
                len(names) <= _MOST_NAMES and len(set(names)) == len(names) and all(map(is_one_name, names)),
                f"TrainedOn.{what} must be at most {_MOST_NAMES} different printable names, found {len(names)}: "
                f"{', '.join(shown(repr(name), most=60) for name in names[:5])}",
            )
        require(
            all(map(math.isfinite, self.point_range)) and all(a < b for a, b in zip(self.point_range[:3], self.point_range[3:])),
            f"TrainedOn.point_range must be finite and end after it starts, found {self.point_range}",
        )
        if self.scans is None:
            return
        require_counts("ScanStatistics", least=0, most=2**53, scans=self.scans.scans)
        for what, value, least in (
            ("points", self.scans.points, 0.0),
            ("cells", self.scans.cells, 0.0),
            ("ground_height", self.scans.ground_height, -1e6),
            ("intensity", self.scans.intensity, -1e9),
        ):
            if not math.isnan(value):  # nobody knows
                require_numbers("ScanStatistics", least=least, most=1e6 if what == "ground_height" else 1e9, **{what: value})

    def check_fits(
        self,
        where: str | Path,
        *,
        point_range: Sequence[float],
        features: Sequence[str],
        classes: Sequence[str] | None = None,
    ) -> None:
        """Refuse what cannot belong to the network in the same file.

        Args:
            where: The file, for the message.
            point_range: Range of the network's grid.
            features: Point features that it reads.
            classes: Classes that it tells apart; None for an encoder alone.

        Raises:
            InvalidInput: They differ, or the training lacked a feature that the network reads.
        """
        wrong = ""
        if classes is not None and tuple(classes) != self.classes:
            wrong = f"its classes are {_few(self.classes)}, and the network has {_few(classes)}"
        elif tuple(point_range) != self.point_range:
            wrong = f"its range is {self.point_range}, and the network's is {tuple(point_range)}"
        elif missing := [name for name in features if name not in self.feature_names]:
            wrong = f"it had the point features {_few(self.feature_names)}, and the network reads {_few(missing)} too"
        require(
            not wrong,
            f"what {where} says about its training belongs to another network: {wrong}; the file was edited or put together. Take the file "
            "that `train` wrote",
        )

    def to_json(self) -> dict[str, Any]:
        """Return everything as plain values for a file."""
        return config_to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> TrainedOn:
        """Make one of the values of `to_json`.

        Args:
            data: Names and values.

        Returns:
            The same as was written.

        Raises:
            InvalidInput: A name is unknown, or a value has another type.
        """
        return config_from_json(TrainedOn, data)

    def as_metadata(self) -> dict[str, str]:
        """Return the entry of a tensor file's metadata that `from_metadata` reads."""
        return {_KEY: json.dumps(self.to_json(), sort_keys=True)}

    @staticmethod
    def from_metadata(file: TensorFile) -> TrainedOn | None:
        """Read what a tensor file says about the training of its weights.

        Args:
            file: The file.

        Returns:
            What the training knew; None where the file says nothing, as those of earlier versions.

        Raises:
            InvalidInput: The entry cannot be used.
        """
        if _KEY not in file.meta:
            return None
        described = file.described(_KEY)
        try:
            return TrainedOn.from_json(described)
        except InvalidInput as error:
            raise InvalidInput(f"what {file.path} says about its training cannot be used: {error}") from error


def _few(names: Sequence[str]) -> str:
    return ", ".join(shown(name, most=60) for name in names[:8]) or "none"


@dataclass(frozen=True, kw_only=True)
class ScanMeasures:
    """The measures of one scan that `ScanStatistics` summarizes."""

    points: int
    """Points in the detector's range."""
    cells: int
    """Occupied cells."""
    ground_height: float
    """Height of the road in meters, or NaN."""
    intensity: float
    """Mean intensity, or NaN."""


def estimate_road_height(points: PointCloud) -> float:
    """Estimate the height of the road in one scan.

    Args:
        points: A scan, z up.

    Returns:
        The 10th percentile of z of the points within 5 to 30 m of the sensor, in meters; NaN with fewer than 50 such points.
    """
    distance = torch.linalg.vector_norm(points.xyz[:, :2], dim=1)
    near = points.xyz[(distance > 5) & (distance < 30), 2]
    return float(np.percentile(near.numpy(), 10)) if len(near) >= 50 else float("nan")


def summarize_scans(measures: Sequence[ScanMeasures]) -> ScanStatistics | None:
    """Summarize the measures of scans.

    Args:
        measures: One entry per scan.

    Returns:
        Medians, NaN left out; None without a scan.
    """
    if not measures:
        return None

    def median(values: Sequence[float]) -> float:
        known = [v for v in values if v == v]
        return float(np.median(known)) if known else float("nan")

    return ScanStatistics(
        scans=len(measures),
        points=median([m.points for m in measures]),
        cells=median([m.cells for m in measures]),
        ground_height=median([m.ground_height for m in measures]),
        intensity=median([m.intensity for m in measures]),
    )


def compare_scans(trained: ScanStatistics, found: ScanStatistics) -> tuple[str, ...]:
    """Compare scans with those of training.

    Args:
        trained: Statistics of the training scans.
        found: Statistics of the scans at hand.

    Returns:
        One sentence for each difference that is large enough to spoil detections, with the option that mends it.
    """
    return tuple(_differences(trained, found).values())


def _differences(trained: ScanStatistics, found: ScanStatistics) -> dict[str, str]:
    """The sentences of `compare_scans` by the name of what differs."""
    warnings: dict[str, str] = {}
    lift = found.ground_height - trained.ground_height
    if abs(lift) > GROUND_TOLERANCE:
        warnings["road"] = (
            f"the road lies at z = {found.ground_height:.2f} m in these scans and at {trained.ground_height:.2f} m in the training scans; "
            f"a z shift that is {-lift:+.2f} m different would bring them together (--z-shift, for prepared data when they are prepared)"
        )
    crop = "another sensor, range or crop (--calib)"
    for what, now, then, factor, hint, form in (
        ("points per scan", found.points, trained.points, COUNT_FACTOR, crop, ",.0f"),
        ("occupied cells per scan", found.cells, trained.cells, COUNT_FACTOR, crop, ",.0f"),
        (
            "mean intensity",
            found.intensity,
            trained.intensity,
            INTENSITY_FACTOR,
            "another intensity scale (--intensity-scale)",
            ".3g",
        ),
    ):
        if now == now and then == then and then > 0 and not then / factor <= now <= then * factor:
            warnings[what] = (
                f"{what}: {format(now, form)} in these scans, {format(then, form)} in the training scans; a likely cause is {hint}"
            )
    if "points per scan" in warnings:
        warnings.pop("occupied cells per scan", None)  # the same cause once
    return warnings


def compare_road(
    found: ScanStatistics | None, *, expected: float | None, rig: RigSpec, z_range: tuple[float, float]
) -> tuple[str, ...]:
    """Compare the height of the road in the training scans with what a detector is made for.

    Args:
        found: Statistics of the training scans; None compares nothing.
        expected: Height of the road that the anchors fit, in meters; None compares with the range only.
        rig: The rig that the scans were prepared with.
        z_range: Where the detector's range begins and ends in z, in meters.

    Returns:
        A sentence with both heights and the z shift that would fit; nothing where the road lies right, or was not found.
    """
    if found is None or math.isnan(found.ground_height):
        return ()
    road, (low, high) = found.ground_height, z_range
    if expected is not None and abs(expected - road) > ROAD_TOLERANCE:
        shift = rig.z_shift + expected - road
        option = "without --z-shift" if abs(shift) < 0.2 else f"with --z-shift {shift:.2f}"
        return (
            f"the road lies at z = {road:.2f} m in these scans, and this detector expects it at z = {expected:.2f} m (the bottom of its "
            f"anchors); prepare the data again {option} (now {rig.z_shift:g}), or take a "
            "preset for this height (docs/presets.md)",
        )
    if road < low or road + HEADROOM > high:
        return (
            f"the road lies at z = {road:.2f} m in these scans, and the detector's range goes from z = {low:g} to {high:g} m, so objects are "
            "cut off; prepare the data again with another --z-shift, or take a preset for this height (docs/presets.md)",
        )
    return ()


def reaches_behind(points: PointCloud) -> bool:
    """Say whether a scan shows what lies behind the sensor, which no camera that looks ahead sees.

    Args:
        points: A scan, x forward.

    Returns:
        Whether more than `BEHIND_SHARE` of its points have x < 0.
    """
    return len(points) > 0 and int((points.xyz[:, 0] < 0).sum()) > BEHIND_SHARE * len(points)


def rig_of_scans(options: ScanOptions, trained: TrainedOn | None, files: Sequence[Path] = ()) -> tuple[RigSpec, tuple[str, ...]]:
    """Choose the rig for scans that a detector or an encoder reads: that of its training, as far as no option says otherwise.

    Args:
        options: How the scans are read.
        trained: What the training of the detector or encoder knew; None where its file does not say.
        files: The scan files. Columns and number type are compared only for files whose header does not name them.

    Returns:
        The rig, and sentences to warn with, once per command: the rig or the way of reading differs from that of training, or nobody
        knows the rig.
    """
    rig = options.rig(None if trained is None else trained.rig)
    if trained is not None:
        return rig, (*_reading_differences(options, trained, files), *rig_differences(rig, trained, "the rig given"))
    if options.z_shift is None or options.intensity_scale is None:
        text = f"the detector's file does not say with which rig it was trained; {rig} is used (--z-shift, --intensity-scale)"
        return rig, (text,)
    return rig, ()


def _reading_differences(options: ScanOptions, trained: TrainedOn, files: Sequence[Path]) -> tuple[str, ...]:
    """A sentence for each option of reading that training had otherwise, with the option that reads like it."""
    kinds = {path.suffix for path in files}
    said = []
    if trained.axes is not None and trained.axes != options.axes:
        said.append(
            f"these scans are read with --axes {' '.join(options.axes)}, and the training scans were read with --axes "
            f"{' '.join(trained.axes)}; where both come from the same kind of file, boxes and features are turned: give --axes "
            f"{' '.join(trained.axes)}"
        )
    usual = ("x", "y", "z", "intensity")
    now, then = options.columns or usual, trained.columns or usual
    if trained.columns is not None and kinds & {".bin", ".npy"} and now != then:
        said.append(
            f"these scans are read with --columns {' '.join(now)}, and the training scans were read with --columns {' '.join(then)}; give "
            "the same columns where both come from the same kind of file"
        )
    if trained.dtype is not None and ".bin" in kinds and trained.dtype != options.dtype:
        said.append(
            f"these scans are read with --dtype {options.dtype}, and the training scans were read with --dtype {trained.dtype}"
        )
    return tuple(said)


def rig_differences(rig: RigSpec, trained: TrainedOn, whose: str) -> tuple[str, ...]:
    """Compare a rig with that of training.

    Args:
        rig: The rig at hand.
        trained: What the training knew.
        whose: Subject of the sentence: "the rig given".

    Returns:
        A sentence with both values where they differ; else nothing. The scale that the reader of the training data applied is none.
    """
    read_as_in_training = math.isclose(rig.intensity_scale, trained.rig.intensity_scale * trained.reader_scale, rel_tol=1e-4)
    if rig.z_shift == trained.rig.z_shift and (rig.intensity_scale == trained.rig.intensity_scale or read_as_in_training):
        return ()
    return (
        f"{whose} is {rig}; the training had {trained.rig}. This is right only for scans of a sensor that is mounted or scaled otherwise",
    )


class ScanWatch:
    """Compares the scans that a command reads with those of training, after the first scans and at the end, and warns of each thing once.

    Example:
        watch = ScanWatch(detector.trained_on, print_warning)
        for scan in scans:
            watch.add(measures_of(scan, voxels.counts[0]))
        watch.finish()
    """

    def __init__(self, trained: TrainedOn | None, warn: Callable[[str], None], *, first: int = 50) -> None:
        """Begin with no scan.

        Args:
            trained: What the training knew. None, or one without statistics, never warns.
            warn: Called with each warning.
            first: Number of scans after which the first comparison is made.
        """
        self._trained = None if trained is None else trained.scans
        self._warn, self._first = warn, first
        self._measures: list[ScanMeasures] = []
        self._warned: set[str] = set()

    def add(self, measures: ScanMeasures) -> None:
        """Add one scan.

        Args:
            measures: From `measure_scan` or `measures_of` (`perception/models/encoders/scan_survey.py`).
        """
        if self._trained is not None:
            self._measures.append(measures)
            if len(self._measures) == self._first:
                self.finish()

    def finish(self) -> None:
        """Compare all scans so far and warn of what was not yet warned of."""
        self.check(self._measures)

    def check(self, measures: Sequence[ScanMeasures]) -> None:
        """Compare only these scans and warn of what was not yet warned of.

        Args:
            measures: Measures of the scans.
        """
        found = summarize_scans(measures)
        if self._trained is None or found is None:
            return
        for what, text in _differences(self._trained, found).items():
            if what not in self._warned:
                self._warned.add(what)
                self._warn(text)
