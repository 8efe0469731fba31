"""A trained detector in one file: safetensors, with its configuration in the metadata, so that it loads anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.tensor_file import TensorFileKind, fill_module, read_tensors, write_tensors
from ..models.detector import Detector
from ..models.detectors import DetectorConfig
from ..wire.encoder_file import ENCODER_FILE, save_encoder

DETECTOR_FILE = "detector.safetensors"
TEACHER_FILE = "teacher.safetensors"
_KIND = TensorFileKind(
    name="detector of this program",
    format="upcycle3d detector 2",
    advice=f"give a run folder of `train` or `upcycle`, or a {DETECTOR_FILE}",
)


@dataclass(frozen=True)
class _Stored:
    """What the metadata holds: the configuration with its kind."""

    detector: DetectorConfig


def save_detector(path: str | Path, detector: Detector, config: DetectorConfig) -> None:
    """Write weights and configuration to one file, atomically.

    Args:
        path: The file to write.
        detector: The detector to store.
        config: The configuration it was built with.
    """
    write_tensors(path, detector.state_dict(), {"config": json.dumps(config_to_json(_Stored(config)))}, _KIND)


def load_detector(path: str | Path) -> tuple[Detector, DetectorConfig]:
    """Load a detector from its file or from the run folder that holds it.

    Args:
        path: A run folder of `train` or `upcycle`, or a detector file.

    Returns:
        The detector in evaluation mode, on the CPU, and its configuration.

    Raises:
        InvalidInput: The file is missing or of another kind, or its weights do not fit its configuration.
        CorruptFile: The file is damaged.
    """
    path = Path(path)
    file = read_tensors(path / DETECTOR_FILE if path.is_dir() else path, _KIND)
    described = file.described("config")
    try:
        config = config_from_json(_Stored, described).detector
    except InvalidInput as error:
        raise InvalidInput(f"the configuration in {file.path} cannot be used: {error}") from error
    detector = config.build()
    fill_module(detector, file.tensors, file.path)
    return detector.eval(), config


def save_run_detector(folder: Path, detector: Detector, config: DetectorConfig) -> None:
    """The detector, and its vehicle half alone: the file that goes to the fleet."""
    save_detector(folder / DETECTOR_FILE, detector, config)
    save_encoder(folder / ENCODER_FILE, detector.encoder)
