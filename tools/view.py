"""``upcycle3d view``: bird's-eye-view pictures of prepared frames, their labels, and what a detector finds."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.files import write_atomically
from ..datasets.prepared import PreparedDataset
from ..perception.training.detector_files import load_detector
from ..perception.viz.bev import bev_png
from .console import print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class View:
    """Draw frames of a prepared dataset from above, as PNG. Needs no screen."""

    data: Path
    """prepared dataset"""
    out: Path
    """folder for pictures"""
    split: str | None = None
    """split to draw; every frame by default"""
    detector: Path | None = None
    """also draw what this detector finds"""
    limit: int = 8
    """number of frames at most"""
    range: tuple[float, float, float, float] = (0.0, -25.6, 51.2, 25.6)
    """x0 y0 x1 y1 in m"""
    min_score: float = 0.3
    """weaker detections are not drawn"""
    json: Path | None = None
    """also write the list of pictures for machines"""


def command(config: View) -> None:
    """Bird's-eye-view pictures of frames, labels and detections."""
    frames = PreparedDataset(config.data, config.split)
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
            (frame.id, "-" if frame.labels is None else len(frame.labels), "-" if found is None else len(found), str(path))
        )
    print_table("pictures", ("frame", "labels", "detections", "file"), written)
    write_json(config.json, [row[3] for row in written])


if __name__ == "__main__":
    sys.exit(run_command(command))
