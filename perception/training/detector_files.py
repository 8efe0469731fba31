"""A trained detector in one file: its weights and its configuration, so that it loads anywhere.

Read next: `core/tensor_file.py`, which reads and checks the file, and `models/detectors.py`, the table of configurations.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.tensor_file import TensorFile, TensorFileKind, build_module, load_module, write_tensors
from ...core.trained_on import TrainedOn
from ..models.detector import Detector
from ..models.detectors import DetectorConfig
from ..wire.encoder_file import ENCODER_FILE, save_encoder
from .checkpoint import INDEX, read_checkpoint
from .run_folder import why_unfinished

DETECTOR_FILE = "detector.safetensors"
TEACHER_FILE = "teacher.safetensors"
DETECTOR_KIND = TensorFileKind(
    name="detector of this program",
    format="upcycle3d detector 3",
    earlier=("upcycle3d detector 2",),
    advice=f"give a run folder of `train` or `upcycle`, or a {DETECTOR_FILE}",
)


@dataclass(frozen=True)
class _Stored:
    """What the metadata holds: the configuration with its kind."""

    detector: DetectorConfig


def save_detector(path: str | Path, detector: Detector) -> None:
    """Write the weights and the configuration of a detector to one file, atomically.

    Args:
        path: The file to write.
        detector: A detector that `config.build()` made.

    Raises:
        InvalidInput: The detector has no configuration, or one that is not in the table, so no program could load the file.
    """
    config = detector.config
    if config is None:
        raise InvalidInput(
            f"this {detector.label} has no configuration to write into its file; make detectors with config.build()"
        )
    if not isinstance(config, DetectorConfig):
        raise InvalidInput(
            f"a {detector.label} cannot be loaded from a file: its configuration, a {type(config).__name__}, is not in "
            "perception/models/detectors.py; add it there"
        )
    meta = {"config": json.dumps(config_to_json(_Stored(config)))}
    if detector.trained_on is not None:
        meta |= detector.trained_on.as_metadata()
    write_tensors(path, detector.state_dict(), meta, DETECTOR_KIND)


def load_detector(path: str | Path) -> Detector:
    """Load a detector from its file, from the run folder that holds it, or from a checkpoint of a run.

    Args:
        path: A run folder of `train` or `upcycle`, a detector file, or a checkpoint such as `RUN/checkpoints/step_00000100`.

    Returns:
        The detector in evaluation mode, on the CPU, with its configuration as `config`.

    Raises:
        InvalidInput: The file is missing or of another kind, the run is not finished (the message says how to go on), or the weights
            do not fit their configuration or hold NaN.
        CorruptFile: The file is damaged.

    Example:
        ```python
        detector = load_detector("runs/source")
        found = detector.detect(scan)
        ```
    """
    if isinstance(path, str | Path):
        folder = Path(path)
        if (folder / INDEX).is_file():
            return _load_checkpoint(folder)
        if folder.is_dir() and not (folder / DETECTOR_FILE).exists() and (unfinished := why_unfinished(folder)):
            raise InvalidInput(f"{folder} holds no {DETECTOR_FILE}: {unfinished}")
    detector, file = load_module(path, DETECTOR_KIND, _builder, in_run=DETECTOR_FILE)
    return _with_training(detector, TrainedOn.from_metadata(file), file.path)


def _builder(file: TensorFile) -> Callable[[], Detector]:
    return config_from_json(_Stored, file.described("config")).detector.build


def _load_checkpoint(path: Path) -> Detector:
    """The student of a checkpoint, with the configuration and the description of the training that its run recorded."""
    step, meta, modules = read_checkpoint(path)
    try:
        config = config_from_json(_Stored, {"detector": meta["config"]["preset"]["detector"]}).detector
        weights = modules["student"]
    except (KeyError, TypeError) as error:
        raise InvalidInput(
            f"{path} (step {step}) is no checkpoint of `train` or `upcycle`: it does not say which detector it belongs to"
        ) from error
    except InvalidInput as error:
        raise InvalidInput(f"the configuration in {path / INDEX} cannot be used: {error}") from error
    detector = build_module(config.build, weights, path).eval()
    described = meta["config"].get("trained_on")
    return _with_training(detector, None if described is None else TrainedOn.from_json(described), path)


def _with_training(detector: Detector, trained: TrainedOn | None, path: Path) -> Detector:
    if trained is not None:
        spec, names = detector.spec, detector.class_names
        trained.check_fits(path, point_range=spec.grid.range, features=detector.point_features, classes=names)
    detector.trained_on = trained
    return detector


def save_run_detector(folder: str | Path, detector: Detector) -> None:
    """Write the two files of a finished run: the detector, and its vehicle half alone, which goes to the fleet.

    Args:
        folder: The run folder.
        detector: A detector that `config.build()` made.

    Raises:
        InvalidInput: The configuration of the detector or of its encoder is not in the tables.
    """
    save_detector(Path(folder) / DETECTOR_FILE, detector)
    save_encoder(Path(folder) / ENCODER_FILE, detector.encoder)
