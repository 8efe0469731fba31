"""`upcycle3d export`: the files of a checkpoint, or of any detector, for use elsewhere. Read next: `perception/training/detector_files.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from ..core.errors import InvalidInput
from ..perception.training.detector_files import DETECTOR_FILE, load_detector, save_run_detector
from .console import console, run_command


@dataclass(frozen=True, kw_only=True)
class Export:
    """Write a checkpoint as a detector file, and its vehicle half as an encoder file. `export onnx` and `export aoti` write for other runtimes."""

    detector: Path
    """Checkpoint such as RUN/checkpoints/step_00000100; a run folder or a detector file works too."""
    out: Path
    """Folder for detector.safetensors and encoder.safetensors; it must not hold a detector."""


def command(config: Export) -> None:
    """Write the detector and encoder files of a checkpoint. For other runtimes: `upcycle3d export onnx` and `upcycle3d export aoti`."""
    if (config.out / DETECTOR_FILE).exists():
        raise InvalidInput(f"{config.out} holds a {DETECTOR_FILE} already; choose another folder")
    detector = load_detector(config.detector)
    save_run_detector(config.out, detector)
    console.print(f"{detector.label} of {config.detector}, classes {', '.join(detector.class_names)}: written to {config.out}")


if __name__ == "__main__":
    sys.exit(run_command(command))
