"""`upcycle3d export mmdet3d`: weights as a checkpoint of mmdetection3d, and its configuration. Read next: `perception/interchange/exporting.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..perception.interchange.exporting import mmdet3d_checkpoint, write_checkpoint
from ..perception.training.detector_files import load_detector
from .console import run_command
from .export_openpcdet import say


@dataclass(frozen=True, kw_only=True)
class ExportMmdet3d:
    """Write the weights of a detector as a checkpoint that mmdetection3d 1.x loads, and the configuration beside it. Imported again,
    weights are equal bit by bit and settings are equal."""

    detector: Path
    """Run folder, checkpoint or detector file."""
    out: Path
    """File to write, such as second.pth."""
    configuration: Path | None = None
    """Configuration to write, a .py. By default it lies beside the weights under their name. Another one that is there is not replaced."""
    classes: tuple[str, ...] = ()
    """The classes in the order of the configuration that will load it: its models for KITTI have Pedestrian Cyclist Car. By default the
    detector's own order."""


def command(config: ExportMmdet3d) -> None:
    """Write the weights of a detector as a checkpoint of mmdetection3d."""
    made = mmdet3d_checkpoint(load_detector(config.detector), config.classes)
    configuration = config.configuration or config.out.with_suffix(".py")
    write_checkpoint(made, config.out, configuration)
    say(made, config.out, configuration)


if __name__ == "__main__":
    sys.exit(run_command(command))
