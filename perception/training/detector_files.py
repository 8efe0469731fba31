"""A trained detector in one file: safetensors, with its configuration in the metadata, so that it loads anywhere."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ..models.detector import Detector
from ..models.detectors import DetectorConfig, build_detector
from ..wire.encoder_file import save_encoder
from .checkpoint import fill_module, read_weights, save_weights

DETECTOR_FILE = "detector.safetensors"
TEACHER_FILE = "teacher.safetensors"
ENCODER_FILE = "encoder.safetensors"
_FORMAT = "upcycle3d detector 2"


@dataclass(frozen=True)
class _Stored:
    """What the metadata holds: the configuration with its kind."""

    detector: DetectorConfig


def save_detector(path: Path, detector: Detector, config: DetectorConfig) -> None:
    """Write weights and configuration, atomically."""
    save_weights(path, detector, {"format": _FORMAT, "config": json.dumps(config_to_json(_Stored(config)))})


def load_detector(path: Path) -> tuple[Detector, DetectorConfig]:
    """A detector in evaluation mode with its configuration, from a file or from a run folder that holds one.

    Raises InvalidInput for another kind of file and CorruptCheckpoint for a damaged one.
    """
    path = path / DETECTOR_FILE if path.is_dir() else path
    if not path.is_file():
        raise InvalidInput(f"no detector at {path}; give a run folder of `train` or `upcycle`, or a {DETECTOR_FILE}")
    tensors, meta = read_weights(path)
    if meta.get("format") != _FORMAT or "config" not in meta:
        raise InvalidInput(f"{path} is no detector of this program: expected format {_FORMAT!r}, found {meta.get('format')!r}")
    config = config_from_json(_Stored, json.loads(meta["config"])).detector
    detector = build_detector(config)
    fill_module(detector, tensors, str(path))
    return detector.eval(), config


def save_run_detector(folder: Path, detector: Detector, config: DetectorConfig) -> None:
    """The detector, and its vehicle half alone: the file that goes to the fleet."""
    save_detector(folder / DETECTOR_FILE, detector, config)
    save_encoder(folder / ENCODER_FILE, detector.encoder)
