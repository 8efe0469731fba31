"""`upcycle3d view`: pictures in BEV of prepared frames, their labels, and the objects that a detector finds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.files import write_atomically
from ..perception.recipes.scan_survey import data_warnings, survey_split
from ..perception.training.detector_files import load_detector
from ..perception.viz.bev import bev_png, in_view, renumbered
from .console import print_table, print_warning, run_command, write_json
from .data_option import DataOption


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


def command(config: DrawFrames) -> None:
    """Draw frames, labels and detections in BEV."""
    frames = config.data.open()
    detector = load_detector(config.detector) if config.detector else None
    if detector is not None:
        for text in data_warnings(detector, frames, survey_split(frames, detector.encoder, most=config.limit).statistics):
            print_warning(text)
    written = []
    for i in range(min(len(frames), config.limit)):
        frame = frames[i]
        found, names = None, frames.classes
        if detector is not None:
            found, names = renumbered(detector.detect([frame.points])[0], detector.class_names, frames.classes)
        picture = bev_png(
            frame.points,
            truth=frame.labels,
            predictions=found,
            class_names=names,
            view_range=config.range,
            title=frame.id,
            min_score=config.min_score,
        )
        drawn = None if found is None else found.select(found.scores >= config.min_score)
        path = config.out / f"{frame.id}.png"
        write_atomically(path, picture)
        written.append(
            (
                frame.id,
                "-" if frame.labels is None else int(in_view(frame.labels.boxes, config.range).sum()),
                "-" if drawn is None else int(in_view(drawn.boxes, config.range).sum()),
                str(path),
            )
        )
    print_table("pictures", ("frame", "labels drawn", "detections drawn", "file"), written)
    write_json(config.json, [row[3] for row in written])


if __name__ == "__main__":
    sys.exit(run_command(command))
