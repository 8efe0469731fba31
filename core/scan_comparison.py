"""Scans compared with those of training: a scan whose road lies 1.7 m lower gives boxes that look right and are not.

Read next: `trained_on.py`, what a training knew; `perception/models/encoders/scan_survey.py`, which measures scans.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path

from .foreign_text import shown
from .rig import RigSpec
from .scan_options import ScanOptions
from .structures import PointCloud
from .trained_on import ScanMeasures, ScanStatistics, TrainedOn, summarize_scans

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


ODD_HEIGHT = 1.2
"""Meters between the road of one scan and that of most scans of a run from which the scan is odd: a vehicle with another mounting height."""
ODD_INTENSITY = 20.0
"""Factor between the mean intensity of one scan and that of most: it was divided by 255 once too often, or never."""
ODD_COUNT = 10.0
"""Factor between the points in range of one scan and those of most: it is in another unit."""
FEWEST_ODD_HEIGHTS = 2
"""Scans with another height of the road that are told: a single one may stand on a ramp."""


def odd_scans(measures: Sequence[ScanMeasures], names: Sequence[str]) -> dict[str, str]:
    """Find the few scans of a run that are unlike most of them. The medians over all scans do not show them.

    Args:
        measures: One entry per scan.
        names: Their names, in the same order; empty where nobody knows.

    Returns:
        A sentence by the name of what is odd, with the number of scans and the first names.
    """
    usual = summarize_scans(measures)
    if usual is None:
        return {}

    def far(value: float, other: float, factor: float) -> bool:
        return value > 0 and other > 0 and not other / factor <= value <= other * factor

    kinds = {
        "road": ([abs(m.ground_height - usual.ground_height) > ODD_HEIGHT for m in measures],
                 f"the road at another height than in most scans ({usual.ground_height:.2f} m)", "another mounting height (--z-shift)"),
        "mean intensity": ([far(m.intensity, usual.intensity, ODD_INTENSITY) for m in measures],
                           f"another mean intensity than most scans ({usual.intensity:.3g})", "another intensity scale (--intensity-scale)"),
        "points per scan": ([far(m.points, usual.points, ODD_COUNT) for m in measures],
                            f"ten times more or fewer points in the detector's range than most scans ({usual.points:,.0f})",
                            "another unit than meters, or another sensor"),
    }  # fmt: skip
    said = {}
    for what, (odd, found, cause) in kinds.items():
        listed = [shown(name) for name, is_odd in zip(names, odd, strict=True) if is_odd and name]
        if sum(odd) >= (FEWEST_ODD_HEIGHTS if what == "road" else 1):
            which = f" ({', '.join(listed[:3])}{' …' if len(listed) > 3 else ''})" if listed else ""
            said[what] = f"{sum(odd)} of {len(odd)} scans{which} have {found}; a likely cause is {cause}: read such scans apart"
    return said


def compare_scans(trained: ScanStatistics, found: ScanStatistics, *, rig: RigSpec | None = None) -> tuple[str, ...]:
    """Compare scans with those of training.

    Args:
        trained: Statistics of the training scans.
        found: Statistics of the scans at hand.
        rig: The rig that brought them to the shifted frame, to name the z shift that fits; None names the difference only.

    Returns:
        One sentence for each difference that is large enough to spoil detections, with the option that mends it.
    """
    return tuple(_differences(trained, found, rig).values())


def _differences(trained: ScanStatistics, found: ScanStatistics, rig: RigSpec | None) -> dict[str, str]:
    """The sentences of `compare_scans` by the name of what differs."""
    warnings: dict[str, str] = {}
    lift = found.ground_height - trained.ground_height
    if abs(lift) > GROUND_TOLERANCE:
        warnings["road"] = (
            f"the road lies at z = {found.ground_height:.2f} m in these scans and at {trained.ground_height:.2f} m in the training scans; "
            f"{_shift(lift, rig)} would bring them together (for prepared data when they are prepared)"
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


def _shift(lift: float, rig: RigSpec | None) -> str:
    if rig is None:
        return f"a z shift that is {-lift:+.2f} m different (--z-shift)"
    return f"--z-shift {rig.z_shift - lift:.2f} instead of {rig.z_shift:g}"


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

    def __init__(
        self, trained: TrainedOn | None, warn: Callable[[str], None], *, first: int = 50, rig: RigSpec | None = None
    ) -> None:
        """Begin with no scan.

        Args:
            trained: What the training knew. None, or one without statistics, compares the scans with each other only.
            warn: Called with each warning.
            first: Number of scans after which the first comparison is made.
            rig: The rig of the scans, for a warning that names the z shift that fits.
        """
        self._trained = None if trained is None else trained.scans
        self._warn, self._first, self._rig = warn, first, rig
        self._measures: list[ScanMeasures] = []
        self._names: list[str] = []
        self._warned: set[str] = set()

    def add(self, measures: ScanMeasures, name: str = "") -> None:
        """Add one scan.

        Args:
            measures: From `measure_scan` or `measures_of` (`perception/models/encoders/scan_survey.py`).
            name: Name of the scan, for a warning of a few scans among many.
        """
        self._measures.append(measures)
        self._names.append(name)
        if self._trained is not None and len(self._measures) == self._first:
            self.check(self._measures)

    def finish(self) -> None:
        """Compare all scans so far and warn of what was not yet warned of: of all of them, and of a few that are unlike the others."""
        self.check(self._measures)
        for what, text in odd_scans(self._measures, self._names).items():
            if not {what, f"odd {what}"} & self._warned:
                self._warned.add(f"odd {what}")
                self._warn(text)

    def check(self, measures: Sequence[ScanMeasures]) -> None:
        """Compare only these scans and warn of what was not yet warned of.

        Args:
            measures: Measures of the scans.
        """
        found = summarize_scans(measures)
        if self._trained is None or found is None:
            return
        for what, text in _differences(self._trained, found, self._rig).items():
            if what not in self._warned:
                self._warned.add(what)
                self._warn(text)
