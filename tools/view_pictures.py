"""The pictures in BEV of `upcycle3d view --out`: points or features, true boxes and detections. Read next: `perception/viz/bev.py`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import write_atomically
from ..core.foreign_text import check_name, shown
from ..perception.viewers.drawn_frame import DrawnFrame
from ..perception.viz.bev import Panel, bev_panels_png, in_view
from .console import console, print_table, print_warning

ViewRange = tuple[float, float, float, float]

_FARTHEST = 1_000.0
"""Meters from the sensor that a picture may show."""
_SHORTEST = 1.0
"""Meters of the shortest side that is drawn."""
_MOST_STRETCHED = 20
"""Longest side of a picture, in shortest sides."""


@dataclass(frozen=True, kw_only=True)
class Picture:
    """One picture and what it shows."""

    frame: str
    """Id of the frame."""
    file: str
    """Path of the picture."""
    points: int
    """Points inside the drawn part."""
    labels: int | None
    """Labeled boxes that are drawn; None for an unlabeled frame."""
    labels_outside: int
    """Labeled boxes outside the drawn part."""
    detections: int | None
    """Detections that are drawn; None without a detector."""
    below_score: int
    """Detections that are not drawn because of their score."""
    detections_outside: int
    """Detections with a sufficient score outside the drawn part."""


def check_range(part: ViewRange) -> None:
    """Refuse a part of the plane that no picture can show.

    Args:
        part: x0 y0 x1 y1 in meters.

    Raises:
        InvalidInput: It is empty, too far away, too small or too long.
    """
    x0, y0, x1, y1 = part
    text = " ".join(f"{value:g}" for value in part)
    if not (x1 > x0 and y1 > y0 and all(map(math.isfinite, part))):
        raise InvalidInput(f"--range must be x0 y0 x1 y1 with x1 > x0 and y1 > y0, found {text}")
    sides = (x1 - x0, y1 - y0)
    if min(sides) < _SHORTEST or max(map(abs, part)) > _FARTHEST or max(sides) > _MOST_STRETCHED * min(sides):
        raise InvalidInput(
            f"--range must lie within {_FARTHEST:g} m, with sides of at least {_SHORTEST:g} m of which one is at most {_MOST_STRETCHED} times the "
            f"other, found {text}: sides of {sides[0]:g} and {sides[1]:g} m"
        )


def draw_picture(frame: DrawnFrame, folder: Path, part: ViewRange, *, min_score: float, below_score: int) -> Picture:
    """Draw a frame in BEV and write the picture.

    Args:
        frame: The frame. Without points its features are drawn; teacher labels and pasted objects are not.
        folder: Folder for the picture.
        part: x0 y0 x1 y1 in meters.
        min_score: Lowest score, which the legend names.
        below_score: Detections that were left out because of their score.

    Returns:
        What was drawn.

    Raises:
        InvalidInput: The id of the frame cannot be a file name.
        OSError: The picture cannot be written.
    """
    path = folder / f"{check_name(frame.id, 'frame id')}.png"
    ground = frame.features if frame.points is None else frame.points
    panel = Panel(shown(frame.id), ground, frame.truth, frame.detections)
    write_atomically(
        path, bev_panels_png([panel], class_names=frame.class_names, view_range=part, min_score=min_score, panel_px=720)
    )
    x0, y0, x1, y1 = part

    def inside(values: Tensor, low: float, high: float) -> Tensor:
        return (values >= low) & (values <= high)

    labels = None if frame.truth is None else in_view(frame.truth.boxes, part)
    visible = None if frame.detections is None else in_view(frame.detections.boxes, part)
    xyz = None if frame.points is None else frame.points.xyz
    return Picture(
        frame=frame.id,
        file=str(path),
        points=0 if xyz is None else int((inside(xyz[:, 0], x0, x1) & inside(xyz[:, 1], y0, y1)).sum()),
        labels=None if labels is None else int(labels.sum()),
        labels_outside=0 if labels is None else int((~labels).sum()),
        detections=None if visible is None else int(visible.sum()),
        below_score=below_score,
        detections_outside=0 if visible is None else int((~visible).sum()),
    )


def report_pictures(pictures: Sequence[Picture], part: ViewRange, min_score: float, *, with_points: bool) -> None:
    """Print what the pictures show, and what lies outside of them.

    Args:
        pictures: The pictures.
        part: x0 y0 x1 y1 in meters.
        min_score: Lowest score of a detection.
        with_points: Whether the frames have points; an empty picture is then warned of.
    """

    def count(value: int | None) -> object:
        return "-" if value is None else value

    header = ("frame", "labels", "labels outside", "detections", f"score below {min_score:g}", "detections outside", "file")
    rows = [
        (p.frame, count(p.labels), p.labels_outside, count(p.detections), p.below_score, p.detections_outside, p.file)
        for p in pictures
    ]
    print_table("pictures; labels and detections are those drawn", header, rows)
    outside = sum(p.labels_outside + p.detections_outside for p in pictures)
    x0, y0, x1, y1 = part
    text = f"x {x0:g} to {x1:g} m, y {y0:g} to {y1:g} m"
    if outside:
        console.print(
            f"{outside} boxes lie outside the drawn part ({text}); --range x0 y0 x1 y1 draws another one", soft_wrap=True
        )
    empty = [p.frame for p in pictures if not p.points]
    if empty and with_points:
        print_warning(
            f"no point of {len(empty)} of {len(pictures)} frames lies in the drawn part ({text}); give --range x0 y0 x1 y1"
        )
