"""`upcycle3d export openpcdet`: weights as a checkpoint of OpenPCDet. Read next: `perception/interchange/exporting.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..perception.interchange.exporting import ForeignCheckpoint, openpcdet_checkpoint
from ..perception.interchange.plain_pickle_writing import write_torch_file
from ..perception.models.openpcdet import SparseLayout
from ..perception.training.detector_files import load_detector
from .console import console, run_command


@dataclass(frozen=True, kw_only=True)
class ExportOpenPCDet:
    """Write the weights of a detector as a checkpoint that OpenPCDet loads. Imported again, they are equal bit by bit."""

    detector: Path
    """Run folder, checkpoint or detector file."""
    out: Path
    """File to write, such as second_iou.pth."""
    layout: SparseLayout = "spconv 2"
    """Layout of the sparse weights."""


def command(config: ExportOpenPCDet) -> None:
    """Write the weights of a detector as a checkpoint of OpenPCDet."""
    made = openpcdet_checkpoint(load_detector(config.detector), config.layout)
    write_torch_file(config.out, made.content)
    say(made, config.out, "OpenPCDet")


def say(made: ForeignCheckpoint, out: Path, program: str) -> None:
    """Print what was written and what the other program must be told.

    Args:
        made: the checkpoint.
        out: its file.
        program: name of the other program.
    """
    console.print(f"{made.tensors} tensors written to {out}; the configuration of {program} must say:")
    for sentence in made.to_set:
        console.print(f"  {sentence}")
    if made.left_out:
        console.print(f"left out, because it has no place there: {len(made.left_out)} tensors of the IoU head (roi_head.*)")


if __name__ == "__main__":
    sys.exit(run_command(command))
