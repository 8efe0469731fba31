"""What a command took, changed and dropped, counted. Every command that reads scans or labels adds up one `Ledger` and shows it.

Read next: `ledger_rules.py`, which judges the counts, and `tools/console.py`, which prints them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .config_json import config_from_json, config_to_json

Range = tuple[float, float]
"""Lowest and highest value."""


def _counts() -> Mapping[str, int]:
    return {}


def _widest(one: Range | None, other: Range | None) -> Range | None:
    if one is None or other is None:
        return one or other
    return min(one[0], other[0]), max(one[1], other[1])


def _least(one: float | None, other: float | None) -> float | None:
    return min((value for value in (one, other) if value is not None), default=None)


def _largest(one: float | None, other: float | None) -> float | None:
    return max((value for value in (one, other) if value is not None), default=None)


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Counts of one command, or of one scan; `+` adds them up. A field that a command does not count stays 0 or empty."""

    scans: int = 0
    """Scans that were read and used."""
    scans_failed: int = 0
    """Scans that could not be read or used; the command lists them with the reasons."""
    scans_left_out: int = 0
    """Scans that a rule kept on the vehicle (`extract --sample`)."""
    scans_without_points: int = 0
    """Scans of which no point was left after cropping, or none lay in the detector's range."""
    scans_off_center: int = 0
    """Scans whose camera has its principal point far from the center of the picture: calibration and picture hardly belong together."""
    files_skipped: Mapping[str, int] = field(default_factory=_counts)
    """Files that were not read, by kind: "hidden file", "not a scan"."""
    points: int = 0
    """Points in the files."""
    points_non_finite: int = 0
    """Points left out because a value was NaN or infinite."""
    points_zero: int = 0
    """Points left out because they lie exactly at the sensor: missing returns of an organized cloud."""
    points_no_label_zone: int = 0
    """Points left out because they lie in zones where nobody labeled (Waymo)."""
    points_outside_camera: int = 0
    """Points left out because the camera does not see them."""
    points_outside_range: int = 0
    """Points outside the detector's range, among those that were not left out before."""
    points_outside_height: int = 0
    """Points of `points_outside_range` that lie within its sides (x, y), and so below or above it (z)."""
    points_intensity_clipped: int = 0
    """Points whose intensity lay outside 0..1 by a rounding error after scaling, and was clipped."""
    points_intensity_outside: int = 0
    """Points whose intensity lies outside 0..1 after scaling."""
    lowest_intensity: float | None = field(default=None, metadata={"joined_by": _least})
    """Lowest intensity in the files, in the sensor's own unit; None where nobody measured it. Sums of ledgers hold the lowest."""
    highest_intensity: float | None = field(default=None, metadata={"joined_by": _largest})
    """Highest intensity in the files, in the sensor's own unit; None where nobody measured it. Sums of ledgers hold the largest."""
    intensity_range: Range | None = field(default=None, metadata={"joined_by": _widest})
    """Lowest and highest intensity after scaling. None where nobody measured it, or where scans have no intensity."""
    cells: int = 0
    """Occupied cells of the detector's grid, those over the limit included."""
    cells_over_limit: int = 0
    """Occupied cells dropped because a scan had more of them than the voxel limit."""
    boxes: Mapping[str, int] = field(default_factory=_counts)
    """Labeled boxes that were kept, by class, without those of `types_ignored`. A class without any stands here with 0."""
    boxes_empty: Mapping[str, int] = field(default_factory=_counts)
    """Kept boxes without a point in them, by class."""
    boxes_outside_range: Mapping[str, int] = field(default_factory=_counts)
    """Kept boxes whose center lies outside the detector's range, by class."""
    boxes_outside_height: int = 0
    """Boxes of `boxes_outside_range` whose center lies within its sides (x, y), and so below or above it (z)."""
    boxes_leaning: int = 0
    """Labeled boxes that lean by more than 5 degrees in the files, of any type. Those that are kept stand upright, with the same center,
    sizes and heading."""
    scans_with_boxes: int = 0
    """Scans with a labeled box, counted by `prepare`."""
    scans_with_empty_boxes: int = 0
    """Those among them of which no box holds a point, counted by `prepare`."""
    points_behind: int = 0
    """Points in the detector's range behind the sensor (x < 0), in scans with labels."""
    boxes_behind: int = 0
    """Kept boxes in the detector's range whose center lies behind the sensor (x < 0)."""
    types_dropped: Mapping[str, int] = field(default_factory=_counts)
    """Labeled objects that were dropped because their type is not asked for, by type."""
    types_ignored: Mapping[str, int] = field(default_factory=_counts)
    """Labeled objects that were kept with weight 0, by type: to find one is neither right nor wrong, as for KITTI's vans and cars."""

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

    def without_labels(self) -> Ledger:
        """Leave out boxes and types, for labels that are counted elsewhere or not used. What lies behind the sensor stays."""
        return replace(
            self,
            boxes={},
            boxes_empty={},
            boxes_outside_range={},
            boxes_outside_height=0,
            boxes_leaning=0,
            scans_with_boxes=0,
            scans_with_empty_boxes=0,
            types_ignored={},
            types_dropped={},
        )

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

    @property
    def points_kept(self) -> int:
        """Points that are neither NaN, nor missing returns, nor in zones where nobody labeled."""
        return self.points - self.points_non_finite - self.points_zero - self.points_no_label_zone

    def rows(self) -> tuple[tuple[str, str, str], ...]:
        """Give the counts that are not zero as rows of a table: what, how many, and the share with its whole."""
        left = self.points_kept
        in_view = left - self.points_outside_camera
        objects = sum(sum(n.values()) for n in (self.boxes, self.types_ignored, self.types_dropped))

        def points(whole: int) -> str:
            return "of the points" if whole == self.points else "of the points left"

        table: list[tuple[str, int, int, str]] = [
            ("scans", self.scans, 0, ""),
            ("scans that failed", self.scans_failed, self.scans + self.scans_failed, "of the scans"),
            (
                "scans kept on the vehicle by the sampling rule",
                self.scans_left_out,
                self.scans + self.scans_failed + self.scans_left_out,
                "of the scans",
            ),
            ("scans without a point", self.scans_without_points, self.scans, "of the scans"),
            (
                "scans whose calibration hardly belongs to their picture",
                self.scans_off_center,
                self.scans + self.scans_failed,
                "of the scans",
            ),
            *((f"files skipped: {kind}", n, 0, "") for kind, n in self.files_skipped.items()),
            ("points", self.points, 0, ""),
            ("points that are not finite, dropped", self.points_non_finite, self.points, "of the points"),
            ("points at the sensor (no return), dropped", self.points_zero, self.points, "of the points"),
            ("points in zones where nobody labeled, dropped", self.points_no_label_zone, self.points, "of the points"),
            ("points outside the camera's view, dropped", self.points_outside_camera, left, points(left)),
            ("points outside the range", self.points_outside_range, in_view, points(in_view)),
            ("points below or above the range", self.points_outside_height, in_view, points(in_view)),
            (
                "points with an intensity of 1 and a rounding error, clipped",
                self.points_intensity_clipped,
                self.points,
                "of the points",
            ),
            ("points with an intensity outside 0..1", self.points_intensity_outside, self.points, "of the points"),
            ("occupied cells", self.cells, 0, ""),
            ("cells over the voxel limit, dropped", self.cells_over_limit, self.cells, "of the cells"),
            *((f"boxes: {name}", n, 0, "") for name, n in self.boxes.items()),
            *((f"boxes without a point: {name}", n, *self._boxes_of(name)) for name, n in self.boxes_empty.items()),
            *((f"boxes outside the range: {name}", n, *self._boxes_of(name)) for name, n in self.boxes_outside_range.items()),
            ("boxes that lean in the files, set upright", self.boxes_leaning, objects, "of all objects"),
            ("boxes below or above the range", self.boxes_outside_height, sum(self.boxes.values()), "of the boxes"),
            *(
                (f"objects of type {name}, kept with weight 0", n, objects, "of all objects")
                for name, n in sorted(self.types_ignored.items())
            ),
            *(
                (f"objects of type {name}, dropped", n, objects, "of all objects")
                for name, n in sorted(self.types_dropped.items())
            ),
        ]
        wanted = [row for row in table if row[1] or row[0].startswith("boxes: ")]
        rows = [(what, f"{n:,}", f"{n / whole:.1%} {of}" if whole else "") for what, n, whole, of in wanted]
        scaled = self.intensity_range
        if self.highest_intensity is not None and (scaled is None or scaled[1] != self.highest_intensity):
            low = 0.0 if self.lowest_intensity is None else self.lowest_intensity
            rows.append(("intensity in the files, lowest and highest", f"{low:.4g} to {self.highest_intensity:.6g}", ""))
        if scaled is not None:
            rows.append(("intensity after scaling, lowest and highest", f"{scaled[0]:.3g} to {scaled[1]:.3g}", ""))
        return tuple(rows)

    def _boxes_of(self, name: str) -> tuple[int, str]:
        return self.boxes.get(name, 0), f"of the {name} boxes"


def _added(one: Any, other: Any) -> Any:
    if isinstance(one, Mapping):
        return {name: one.get(name, 0) + other.get(name, 0) for name in [*one, *(n for n in other if n not in one)]}
    return one + other
