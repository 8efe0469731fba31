"""What a command took, changed and dropped, counted; and the one set of rules that judges these counts.

Every command that reads scans or labels adds up one `Ledger` and shows it when it ends. `judge` says what is absurd: a share that
deserves a warning names its likely cause and the option that mends it, and a total loss stops the command.

Read next: `tools/console.py`, which prints a ledger.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from .config_json import config_from_json, config_to_json
from .errors import UpcycleError
from .intensity import propose_scale

OUTSIDE_POINTS_WARNING = 0.4
"""Share of points outside the detector's range from which a warning follows. Suitable scans lose 2 to 30 % (sky, far road)."""
OUTSIDE_BOXES_WARNING = 0.2
"""Share of labeled boxes outside the detector's range from which a warning follows."""
FAILED_SCANS_WARNING = 0.1
"""Share of scans that could not be read from which a warning follows."""
FEWEST_BOXES = 4
"""Labeled boxes from which their total loss stops a command; fewer may be lost by chance."""
BEHIND_POINTS_WARNING = 0.2
"""Share of the points in range that lie behind the sensor, from which a warning follows where no labeled box lies there."""
FEWEST_BOXES_AROUND = 30
"""Labeled boxes from which it is no chance that none of them lies behind the sensor."""
EMPTY_BOXES_WARNING = 0.5
"""Share of labeled boxes without a point from which a warning follows. Full data sets have 1 to 20 %."""
CELLS_WARNING = 0.02
"""Share of occupied cells lost to the voxel limit from which a warning follows."""
CELLS_STOP = 0.10
"""Share of occupied cells lost to the voxel limit from which `extract` refuses, unless it is told to go on."""


LOWEST_TOP_INTENSITY = 0.02
"""Highest intensity of all scans below which a warning follows. Real scans reach 0.4 to 1; a factor of 1/255 too many leaves 0.004."""
Range = tuple[float, float]
"""Lowest and highest value."""


def _counts() -> Mapping[str, int]:
    return {}


def _widest(one: Range | None, other: Range | None) -> Range | None:
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Counts of one command, or of one scan; `+` adds them up. A field that a command does not count stays 0 or empty."""

    scans: int = 0
    """Scans that were read and used."""
    scans_failed: int = 0
    """Scans that could not be read or used; the command lists them with the reasons."""
    scans_without_points: int = 0
    """Scans of which no point was left after cropping, or none lay in the detector's range."""
    files_skipped: Mapping[str, int] = field(default_factory=_counts)
    """Files that were not read, by kind: "hidden file", "not a scan"."""
    points: int = 0
    """Points in the files."""
    points_non_finite: int = 0
    """Points left out because a value was NaN or infinite."""
    points_zero: int = 0
    """Points left out because they lie exactly at the sensor: missing returns of an organized cloud."""
    points_outside_camera: int = 0
    """Points left out because the camera does not see them."""
    points_outside_range: int = 0
    """Points outside the detector's range, among those that were not left out before."""
    points_intensity_clipped: int = 0
    """Points whose intensity lay outside 0..1 by a rounding error after scaling, and was clipped."""
    points_intensity_outside: int = 0
    """Points whose intensity lies outside 0..1 after scaling."""
    lowest_intensity: float = field(default=0.0, metadata={"joined_by": min})
    """Lowest intensity in the files where it is below 0, else 0."""
    highest_intensity: float = field(default=0.0, metadata={"joined_by": max})
    """Highest intensity in the files, in the sensor's own unit. Sums of ledgers hold the largest."""
    intensity_range: Range | None = field(default=None, metadata={"joined_by": _widest})
    """Lowest and highest intensity after scaling. None where nobody measured it, or where scans have no intensity."""
    cells: int = 0
    """Occupied cells of the detector's grid, those over the limit included."""
    cells_over_limit: int = 0
    """Occupied cells dropped because a scan had more of them than the voxel limit."""
    boxes: Mapping[str, int] = field(default_factory=_counts)
    """Labeled boxes that were kept, by class. A class without any stands here with 0."""
    boxes_empty: Mapping[str, int] = field(default_factory=_counts)
    """Kept boxes without a point in them, by class."""
    boxes_outside_range: Mapping[str, int] = field(default_factory=_counts)
    """Kept boxes whose center lies outside the detector's range, by class."""
    points_behind: int = 0
    """Points in the detector's range behind the sensor (x < 0), in scans with labels."""
    boxes_behind: int = 0
    """Kept boxes in the detector's range whose center lies behind the sensor (x < 0)."""
    types_dropped: Mapping[str, int] = field(default_factory=_counts)
    """Labeled objects that were dropped because their type is not asked for, by type."""

    def __add__(self, other: Ledger) -> Ledger:
        both = {f: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Ledger(**{f.name: f.metadata.get("joined_by", _added)(*values) for f, values in both.items()})

    @staticmethod
    def total(parts: Iterable[Ledger]) -> Ledger:
        """Add up ledgers.

        Args:
            parts: Any number of ledgers.

        Returns:
            Their sum; all zero without a part.
        """
        result = Ledger()
        for part in parts:
            result = result + part
        return result

    def to_json(self) -> dict[str, Any]:
        """Return all counts as plain values for a JSON file."""
        return config_to_json(self)

    @staticmethod
    def from_json(data: Mapping[str, Any]) -> Ledger:
        """Make a ledger of the values of `to_json`.

        Args:
            data: Names and counts.

        Returns:
            The ledger.

        Raises:
            InvalidInput: A name is unknown or a value is no count.
        """
        return config_from_json(Ledger, data)

    def rows(self) -> tuple[tuple[str, str, str], ...]:
        """Give the counts that are not zero as rows of a table: what, how many, share."""
        left = self.points - self.points_non_finite - self.points_zero
        in_view = left - self.points_outside_camera
        kept = sum(self.boxes.values())
        table = [
            ("scans", self.scans, 0),
            ("scans that failed", self.scans_failed, self.scans + self.scans_failed),
            ("scans without a point", self.scans_without_points, self.scans),
            *((f"files skipped: {kind}", n, 0) for kind, n in self.files_skipped.items()),
            ("points", self.points, 0),
            ("points that are not finite, dropped", self.points_non_finite, self.points),
            ("points at the sensor (no return), dropped", self.points_zero, self.points),
            ("points outside the camera's view, dropped", self.points_outside_camera, left),
            ("points outside the range", self.points_outside_range, in_view),
            ("points with an intensity of 1 and a rounding error, clipped", self.points_intensity_clipped, self.points),
            ("points with an intensity outside 0..1", self.points_intensity_outside, self.points),
            ("occupied cells", self.cells, 0),
            ("cells over the voxel limit, dropped", self.cells_over_limit, self.cells),
            *((f"boxes: {name}", n, 0) for name, n in self.boxes.items()),
            *((f"boxes without a point: {name}", n, self.boxes.get(name, 0)) for name, n in self.boxes_empty.items()),
            *((f"boxes outside the range: {name}", n, self.boxes.get(name, 0)) for name, n in self.boxes_outside_range.items()),
            *((f"objects of type {name}, dropped", n, n + kept) for name, n in sorted(self.types_dropped.items())),
        ]
        wanted = [row for row in table if row[1] or row[0].startswith("boxes: ")]
        counts = tuple((what, f"{n:,}", f"{n / whole:.1%}" if whole else "") for what, n, whole in wanted)
        if self.intensity_range is None:
            return counts
        low, high = self.intensity_range
        return (*counts, ("intensity after scaling, lowest and highest", f"{low:.3g} to {high:.3g}", ""))


@dataclass(frozen=True, kw_only=True)
class Finding:
    """What a rule says about a ledger."""

    stops: bool
    """Whether the command must end with this error; otherwise it is a warning."""
    text: str
    """What was found, its likely cause, and what to do."""


def judge(ledger: Ledger, *, refuse_lost_cells: bool = False) -> tuple[Finding, ...]:
    """Judge counts by the rules of this module.

    Args:
        ledger: The counts of a command.
        refuse_lost_cells: Whether losing more than `CELLS_STOP` of the cells stops, as in `extract`.

    Returns:
        What is absurd, the worst first. Empty where everything is usual.
    """
    found: list[Finding] = []
    left = ledger.points - ledger.points_non_finite - ledger.points_zero
    in_view = left - ledger.points_outside_camera
    shift = "likely causes are a preset for another sensor, a forgotten z shift (--z-shift), other axes (--axes), or units that are not meters"
    if ledger.points and not left:
        found.append(
            Finding(stops=True, text="every point is NaN, infinite or at the sensor; look at the columns (--columns, --dtype)")
        )
    elif left and not in_view:
        found.append(
            Finding(
                stops=True,
                text="no point lies in the camera's view; the picture's size (--image-size) or the calibration does not belong to "
                "these scans",
            )
        )
    elif in_view and ledger.points_outside_range == in_view:
        found.append(Finding(stops=True, text=f"no point lies in the detector's range; {shift}"))
    elif in_view and ledger.points_outside_range > OUTSIDE_POINTS_WARNING * in_view:
        share = ledger.points_outside_range / in_view
        found.append(Finding(stops=False, text=f"{share:.0%} of the points lie outside the detector's range; {shift}"))
    if ledger.points_intensity_outside:
        share = ledger.points_intensity_outside / max(left, 1)
        low, high = ledger.lowest_intensity, ledger.highest_intensity
        text = f"{share:.1%} of the points have an intensity outside 0..1 after scaling; the files hold {low:.6g} to {high:.6g}; "
        text += propose_scale(low, high)
        found.append(Finding(stops=False, text=text))
    top = 0.0 if ledger.intensity_range is None else ledger.intensity_range[1]
    if 0 < top < LOWEST_TOP_INTENSITY:
        text = (
            f"the highest intensity of all scans is {top:.2g} after scaling, and sensors reach nearly 1; a likely cause is an intensity "
            "scale for another unit: leave --intensity-scale out for numbers in 0..1, or give the factor of this sensor (1/255 where it "
            "counts to 255)"
        )
        found.append(Finding(stops=False, text=text))
    if ledger.cells_over_limit > CELLS_WARNING * ledger.cells:
        share = ledger.cells_over_limit / ledger.cells
        found.append(
            Finding(
                stops=refuse_lost_cells and share > CELLS_STOP,
                text=f"{share:.0%} of the occupied cells were dropped because scans have more than the voxel limit; take a preset "
                "for full turns (full_turn_small, docs/presets.md), crop to the camera's view (--calib), or raise max_voxels of the detector "
                "and train it again",
            )
        )
    if ledger.scans_failed > FAILED_SCANS_WARNING * (ledger.scans + ledger.scans_failed):
        found.append(
            Finding(
                stops=False,
                text=f"{ledger.scans_failed} of {ledger.scans + ledger.scans_failed} scans were left out because of errors; that "
                "usually has one cause: see the reasons",
            )
        )
    boxes, empty = sum(ledger.boxes.values()), sum(ledger.boxes_empty.values())
    outside = sum(ledger.boxes_outside_range.values())
    if boxes and empty > EMPTY_BOXES_WARNING * boxes:
        text = (
            f"{empty} of {boxes} boxes hold no point; likely causes are angles in degrees (--yaw degrees), another order of sizes "
            "(--size-order), centers at the bottom (--origin bottom), other axes (--axes), or a calibration of other scans"
        )
        found.append(Finding(stops=empty == boxes >= FEWEST_BOXES, text=text))
    if boxes and outside > OUTSIDE_BOXES_WARNING * boxes:
        text = f"{outside} of {boxes} boxes lie outside the detector's range; {shift}"
        found.append(Finding(stops=outside == boxes, text=text))
    in_range = in_view - ledger.points_outside_range
    if (
        boxes - outside >= FEWEST_BOXES_AROUND
        and not ledger.boxes_behind
        and ledger.points_behind > BEHIND_POINTS_WARNING * in_range
    ):
        share = ledger.points_behind / in_range
        text = (
            f"{share:.0%} of the points in range lie behind the sensor, and none of the {boxes - outside} boxes does; where objects are "
            "labeled in the camera's view only, as in KITTI, a detector learns that nothing is behind it: crop the scans to the camera's "
            "view and take a preset for it"
        )
        found.append(Finding(stops=False, text=text))
    return tuple(sorted(found, key=lambda finding: not finding.stops))


def stop_if_absurd(findings: Iterable[Finding]) -> None:
    """Raise the first finding that stops.

    Args:
        findings: From `judge`.

    Raises:
        UpcycleError: A finding stops the command.
    """
    for finding in findings:
        if finding.stops:
            raise UpcycleError(finding.text)


def _added(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return {name: one.get(name, 0) + other.get(name, 0) for name in [*one, *(n for n in other if n not in one)]}
    return one + other
