"""`upcycle3d view`: pictures in BEV of prepared frames, their labels, and the objects that a detector finds."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ..core.errors import InvalidInput
from ..core.files import write_atomically
from ..core.foreign_text import check_name, shown
from ..core.frame import Frame
from ..core.ledger import Ledger
from ..core.ledger_rules import warnings_of
from ..core.structures import Predictions
from ..perception.models.detector import Detector
from ..perception.recipes.scan_survey import data_warnings, survey_split
from ..perception.training.detector_files import load_detector
from ..perception.viz.bev import bev_png, in_view, renumbered
from .console import console, print_table, print_warning, run_command, settle, write_json
from .data_option import DataOption

_FARTHEST = 1_000.0
"""Meters from the sensor that a picture may show."""
_SHORTEST = 1.0
"""Meters of the shortest side that is drawn."""
_MOST_STRETCHED = 20
"""Longest side of a picture, in shortest sides."""


@dataclass(frozen=True, kw_only=True)
class DrawFrames:
    """Draw frames of a prepared dataset in BEV, as PNG files. This needs no screen."""

    data: DataOption
    """Prepared dataset, `DIR[:SPLIT]`; all frames where no split is named."""
    out: Path
    """Folder for the pictures."""
    detector: Path | None = None
    """Run folder or detector file. Its detections are drawn too."""
    limit: int = 8
    """Highest number of frames to draw."""
    range: tuple[float, float, float, float] = (0.0, -25.6, 51.2, 25.6)
    """Part to draw: x0 y0 x1 y1 in meters."""
    min_score: float = 0.3
    """Detections with a lower score are left out."""
    json: Path | None = None
    """Also write the list of pictures to this file as JSON."""


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


def command(config: DrawFrames) -> None:
    """Draw frames, labels and detections in BEV."""
    x0, y0, x1, y1 = config.range
    part = " ".join(f"{value:g}" for value in config.range)
    if not (x1 > x0 and y1 > y0 and all(map(math.isfinite, config.range))):
        raise InvalidInput(f"--range must be x0 y0 x1 y1 with x1 > x0 and y1 > y0, found {part}")
    sides = (x1 - x0, y1 - y0)
    if min(sides) < _SHORTEST or max(map(abs, config.range)) > _FARTHEST or max(sides) > _MOST_STRETCHED * min(sides):
        raise InvalidInput(
            f"--range must lie within {_FARTHEST:g} m, with sides of at least {_SHORTEST:g} m of which one is at most {_MOST_STRETCHED} times the "
            f"other, found {part}: sides of {sides[0]:g} and {sides[1]:g} m"
        )
    if config.limit < 1 or not 0 <= config.min_score <= 1:
        raise InvalidInput(
            f"--limit must be at least 1 and --min-score between 0 and 1, found {config.limit} and {config.min_score}"
        )
    frames = config.data.open()
    number = min(len(frames), config.limit)
    for frame_id in frames.ids[:number]:
        check_name(frame_id, "frame id")
    detector = load_detector(config.detector) if config.detector else None
    ledger, unlike = Ledger(), tuple[str, ...]()
    if isinstance(detector, Detector):
        survey = survey_split(frames, detector.encoder, most=number)
        ledger, unlike = survey.ledger, data_warnings(detector, frames, survey.statistics)
    else:
        ledger = Ledger(scans=number)
    pictures = []
    for i in range(number):
        frame = frames[i]
        found, names = None, frames.classes
        if detector is not None:
            found, names = renumbered(detector.detect([frame.points])[0], detector.class_names, frames.classes)
        pictures.append(_draw(frame, found, names, config))
    _report(pictures, config)
    for text in unlike:
        print_warning(text)
    write_json(
        config.json,
        {"pictures": [vars(p) for p in pictures], "ledger": ledger.to_json(), "warnings": [*unlike, *warnings_of(ledger)]},
    )
    settle(ledger, "what was read")


def _draw(frame: Frame, found: Predictions | None, names: tuple[str, ...], config: DrawFrames) -> Picture:
    picture = bev_png(
        frame.points,
        truth=frame.labels,
        predictions=found,
        class_names=names,
        view_range=config.range,
        title=shown(frame.id),
        min_score=config.min_score,
    )
    x0, y0, x1, y1 = config.range

    def inside(values: Tensor, low: float, high: float) -> Tensor:
        return (values >= low) & (values <= high)

    path = config.out / f"{check_name(frame.id, 'frame id')}.png"
    write_atomically(path, picture)
    labels = None if frame.labels is None else in_view(frame.labels.boxes, config.range)
    good = None if found is None else found.scores >= config.min_score
    visible = None if found is None else in_view(found.boxes, config.range)
    return Picture(
        frame=frame.id,
        file=str(path),
        points=int((inside(frame.points.xyz[:, 0], x0, x1) & inside(frame.points.xyz[:, 1], y0, y1)).sum()),
        labels=None if labels is None else int(labels.sum()),
        labels_outside=0 if labels is None else int((~labels).sum()),
        detections=None if good is None or visible is None else int((good & visible).sum()),
        below_score=0 if good is None else int((~good).sum()),
        detections_outside=0 if good is None or visible is None else int((good & ~visible).sum()),
    )


def _report(pictures: list[Picture], config: DrawFrames) -> None:
    def count(value: int | None) -> object:
        return "-" if value is None else value

    header = (
        "frame",
        "labels",
        "labels outside",
        "detections",
        f"score below {config.min_score:g}",
        "detections outside",
        "file",
    )
    rows = [
        (p.frame, count(p.labels), p.labels_outside, count(p.detections), p.below_score, p.detections_outside, p.file)
        for p in pictures
    ]
    print_table("pictures; labels and detections are those drawn", header, rows)
    outside = sum(p.labels_outside + p.detections_outside for p in pictures)
    x0, y0, x1, y1 = config.range
    part = f"x {x0:g} to {x1:g} m, y {y0:g} to {y1:g} m"
    if outside:
        console.print(
            f"{outside} boxes lie outside the drawn part ({part}); --range x0 y0 x1 y1 draws another one", soft_wrap=True
        )
    empty = [p.frame for p in pictures if not p.points]
    if empty:
        print_warning(
            f"no point of {len(empty)} of {len(pictures)} frames lies in the drawn part ({part}); give --range x0 y0 x1 y1"
        )


if __name__ == "__main__":
    sys.exit(run_command(command))
