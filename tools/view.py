"""`upcycle3d view`: pictures in BEV of prepared frames, their labels, and the objects that a detector finds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.files import write_atomically
from ..perception.training.detector_files import load_detector
from ..perception.viz.bev import bev_png
from .console import print_table, run_command, write_json
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
    written = []
    for i in range(min(len(frames), config.limit)):
        frame = frames[i]
        found = detector.detect([frame.points])[0] if detector else None
        picture = bev_png(
            frame.points,
            truth=frame.labels,
            predictions=found,
            class_names=frames.classes,
            view_range=config.range,
            title=frame.id,
            min_score=config.min_score,
        )
        path = config.out / f"{frame.id}.png"
        write_atomically(path, picture)
        written.append(
            (
                frame.id,
                "-" if frame.labels is None else len(frame.labels),
                "-" if found is None else int((found.scores >= config.min_score).sum()),
                str(path),
            )
        )
    print_table("pictures", ("frame", "labels", "detections", "file"), written)
    write_json(config.json, [row[3] for row in written])


if __name__ == "__main__":
    sys.exit(run_command(command))
