"""The one set of rules that judges the counts of a ledger.

A share that deserves a warning names its likely cause and the option that mends it; a total loss stops the command.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from .errors import UpcycleError
from .intensity import propose_scale
from .ledger import Ledger

OUTSIDE_POINTS_WARNING = 0.4
"""Share of points outside the detector's range from which a warning follows. Suitable scans lose 2 to 30 % (sky, far road)."""
OUTSIDE_BOXES_WARNING = 0.2
"""Share of labeled boxes outside the detector's range from which a warning follows."""
TURNED_POINTS_STOP = 0.5
"""Share of a scan's points beyond the sides of the range from which `extract` refuses scans that are read with other axes than those of
the training. With the same axes no share is safe: a full turn has more than half of its points beyond a range that looks ahead."""
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
OUTSIDE_CAMERA_WARNING = 0.97
"""Share of points that the camera does not see from which a warning follows. A camera of 80 degrees sees a sixth of a full turn."""
OFF_CENTER_WARNING = 0.1
"""Share of scans whose calibration hardly belongs to their picture from which a warning follows."""
EMPTY_SCANS_SHARE = 0.25
"""Share of labeled scans of which no box holds a point, from which whole scans are the likely cause of empty boxes."""
CELLS_WARNING = 0.02
"""Share of occupied cells lost to the voxel limit from which a warning follows."""
CELLS_STOP = 0.10
"""Share of occupied cells lost to the voxel limit from which `extract` refuses, unless it is told to go on."""


LOWEST_TOP_INTENSITY = 0.02
"""Highest intensity of all scans below which a warning follows. Real scans reach 0.4 to 1; a factor of 1/255 too many leaves 0.004."""


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
    left = ledger.points_kept
    in_view = left - ledger.points_outside_camera
    if ledger.points and not left:
        found.append(
            Finding(stops=True, text="every point is NaN, infinite or at the sensor; look at the columns (--columns, --dtype)")
        )
    elif left and not in_view:
        found.append(Finding(stops=True, text=f"no point lies in the camera's view; {_CAMERA}"))
    elif left and ledger.points_outside_camera > OUTSIDE_CAMERA_WARNING * left:
        none_left = ledger.points_outside_range == in_view
        text = f"{ledger.points_outside_camera:,} of {left:,} points lie outside the camera's view; {_CAMERA}"
        if none_left:
            text += ". None of the others lies in the detector's range"
        found.append(Finding(stops=none_left, text=text))
    elif in_view and ledger.points_outside_range == in_view:
        why = _why_outside(in_view, in_view, ledger.points_outside_height)
        found.append(Finding(stops=True, text=f"no point lies in the detector's range; {why}"))
    elif in_view and ledger.points_outside_range > OUTSIDE_POINTS_WARNING * in_view:
        share = ledger.points_outside_range / in_view
        why = _why_outside(in_view, ledger.points_outside_range, ledger.points_outside_height)
        found.append(Finding(stops=False, text=f"{share:.0%} of the points lie outside the detector's range; {why}"))
    if ledger.points_intensity_outside:
        share = ledger.points_intensity_outside / max(left, 1)
        low, high = ledger.lowest_intensity or 0.0, ledger.highest_intensity or 0.0
        text = f"{share:.1%} of the points have an intensity outside 0..1 after scaling; the files hold {low:.6g} to {high:.6g}; "
        text += propose_scale(low, high)
        found.append(Finding(stops=False, text=text))
    top = 0.0 if ledger.intensity_range is None else ledger.intensity_range[1]
    if 0 < top < LOWEST_TOP_INTENSITY:
        held = ledger.highest_intensity
        remedy = (
            "leave --intensity-scale out for numbers in 0..1, or give the factor of this sensor (1/255 where it counts to 255)"
            if held is None
            else f"the files hold numbers up to {held:.6g}: {propose_scale(0.0, held)}"
        )
        text = (
            f"the highest intensity of all scans is {top:.2g} after scaling, and sensors reach nearly 1; a likely cause is an intensity "
            f"scale for another unit; {remedy}"
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
    read = ledger.scans + ledger.scans_failed
    if ledger.scans_off_center > OFF_CENTER_WARNING * read:
        text = (
            f"in {ledger.scans_off_center} of {read} scans, the principal point of the camera (row P2) lies far from the center of "
            "the picture, so the crop to the camera's view is perhaps wrong; likely causes are calibrations or pictures (image_2) of another "
            "camera, or another size of the picture (--image-size)"
        )
        found.append(Finding(stops=False, text=text))
    boxes, empty = sum(ledger.boxes.values()), sum(ledger.boxes_empty.values())
    outside = sum(ledger.boxes_outside_range.values())
    if boxes and empty >= EMPTY_BOXES_WARNING * boxes:
        text = f"{empty} of {boxes} boxes hold no point; {_cause_of_empty_boxes(ledger)}"
        found.append(Finding(stops=empty == boxes >= FEWEST_BOXES, text=text))
    if boxes and outside > OUTSIDE_BOXES_WARNING * boxes:
        why = _why_outside(boxes, outside, ledger.boxes_outside_height)
        text = f"{outside} of {boxes} boxes lie outside the detector's range; {why}"
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


_CAMERA = "the picture's size (--image-size) or the calibration does not belong to these scans"


def _why_outside(whole: int, outside: int, height: int) -> str:
    """Where things outside the range lie, sideways or in height, and the causes of what is more."""
    beyond = outside - height
    z = "a forgotten z shift (--z-shift) or a preset for a sensor at another height"
    sides = (
        "the range of the preset ends before far objects or leaves a side out. Take a preset with a larger range (docs/presets.md), or go "
        "on if what lies outside does not matter"
    )
    if beyond == whole:
        return (
            f"all {beyond:,} lie beyond its sides (x, y): likely causes are units that are not meters, other axes (--axes), or a preset that looks "
            "another way (docs/presets.md)"
        )
    other = "Other causes are other axes (--axes) and units that are not meters"
    if height > beyond:
        also = f", {beyond} beyond its sides (x, y)" if beyond else ""
        return f"{height} lie below or above it (z){also}: the likely cause is {z}. {other}"
    also = f", {height} below or above it (z)" if height else ""
    text = f"{beyond} lie beyond its sides (x, y){also}: {sides}. {other}"
    return f"{text}; for the height, {z}" if height > OUTSIDE_BOXES_WARNING * whole else text


def warnings_of(ledger: Ledger) -> tuple[str, ...]:
    """Give the warnings of a ledger, for a report in JSON.

    Args:
        ledger: The counts of a command.

    Returns:
        What `judge` finds and does not stop.
    """
    return tuple(finding.text for finding in judge(ledger) if not finding.stops)


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


def _cause_of_empty_boxes(ledger: Ledger) -> str:
    """What may be wrong: the boxes of all scans, or whole scans."""
    labeled, wrong = ledger.scans_with_boxes, ledger.scans_with_empty_boxes
    if 0 < wrong < labeled and wrong >= EMPTY_SCANS_SHARE * labeled:
        return (
            f"these are all boxes of {wrong} scans, while those of {labeled - wrong} other scans hold points; likely causes are scans of "
            "another mounting height or in another unit among them, or labels that belong to other scans: prepare such scans apart"
        )
    return (
        "likely causes are scans or labels that are not in meters (millimeters, centimeters), angles in degrees (--yaw degrees), another "
        "order of sizes (--size-order), centers at the bottom (--origin bottom), a z shift that only the scans or only the labels got "
        "(--z-shift; in a reader of your own, the frame's rig), other axes (--axes), or a calibration of other scans"
    )
