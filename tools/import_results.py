"""`upcycle3d import results FILE`: results of another program as detections. Read next: `perception/interchange/result_files.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..perception.interchange.moving_data import detections_from_results
from .console import console, run_command


@dataclass(frozen=True, kw_only=True)
class ImportResults:
    """Turn a result file (.pkl) into KITTI's text files, which `evaluate kitti` scores. Nothing in the file is run."""

    file: tyro.conf.Positional[Path]
    """`result.pkl` of OpenPCDet, or the .pkl that mmdetection3d's KITTI metric wrote."""
    out: Path
    """New folder for one ID.txt per frame."""


def command(config: ImportResults) -> None:
    """Turn results of OpenPCDet or mmdetection3d into detections that `evaluate` reads."""
    frames = detections_from_results(config.file, config.out)
    console.print(f"{frames} frames written to {config.out}")
    console.print(
        f"next: upcycle3d evaluate kitti --labels KITTI/training/label_2 --detections {config.out} --ids KITTI/ImageSets/val.txt"
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
