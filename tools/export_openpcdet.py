"""`upcycle3d export openpcdet`: weights as a checkpoint of OpenPCDet, and its configuration. Read next: `perception/interchange/exporting.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..perception.interchange.exporting import ForeignCheckpoint, openpcdet_checkpoint, write_checkpoint
from ..perception.models.openpcdet import SparseLayout
from ..perception.training.detector_files import load_detector
from .console import console, run_command


@dataclass(frozen=True, kw_only=True)
class ExportOpenPCDet:
    """Write the weights of a detector as a checkpoint that OpenPCDet loads, and the configuration beside it. Imported again, weights are
    equal bit by bit and settings are equal."""

    detector: Path
    """Run folder, checkpoint or detector file."""
    out: Path
    """File to write, such as second_iou.pth."""
    configuration: Path | None = None
    """Configuration to write, a .yaml. By default it lies beside the weights under their name. Another one that is there is not replaced."""
    layout: SparseLayout = "spconv 2"
    """Layout of the sparse weights."""


def command(config: ExportOpenPCDet) -> None:
    """Write the weights of a detector as a checkpoint of OpenPCDet."""
    made = openpcdet_checkpoint(load_detector(config.detector), config.layout)
    configuration = config.configuration or config.out.with_suffix(".yaml")
    write_checkpoint(made, config.out, configuration)
    say(made, config.out, configuration)


def say(made: ForeignCheckpoint, out: Path, configuration: Path) -> None:
    """Print what was written and what no setting of the other program can say.

    Args:
        made: the checkpoint.
        out: its file.
        configuration: file of its configuration.
    """
    console.print(f"{made.tensors} tensors written to {out}, and their configuration to {configuration}")
    if made.left_out:
        console.print(f"left out, because it has no place there: {len(made.left_out)} tensors of the IoU head (roi_head.*)")
    console.print("what no setting there can say:")
    for sentence in made.differences:
        console.print(f"  {sentence}")


if __name__ == "__main__":
    sys.exit(run_command(command))
