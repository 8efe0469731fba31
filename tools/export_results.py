"""`upcycle3d export results PROGRAM`: detections as a result file of another program. Read next: `perception/interchange/result_files.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..perception.interchange.moving_data import results_from_detections
from ..perception.interchange.settings import Program
from .console import console, run_command


@dataclass(frozen=True, kw_only=True)
class ExportResults:
    """Write detections in KITTI's text as a result file (.pkl) of another program."""

    program: tyro.conf.Positional[Program]
    """Whose form."""
    detections: Path
    """Folder of ID.txt, one per frame, as `predict --format kitti` writes them."""
    out: Path
    """File to write, such as result.pkl."""


def command(config: ExportResults) -> None:
    """Write detections as a result file of OpenPCDet or mmdetection3d."""
    frames = results_from_detections(config.program, config.detections, config.out)
    console.print(f"{frames} frames written to {config.out}")


if __name__ == "__main__":
    sys.exit(run_command(command))
