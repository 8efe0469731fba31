"""Published weights of OpenPCDet and mmdetection3d become a run folder, which every other job takes like that of a trained detector.

`models/openpcdet_file.py` reads the file, `models/openpcdet.py` and `interchange/mmdet3d_weights.py` copy the weights, and
`interchange/openpcdet_config.py` and `mmdet3d_config.py` read configurations. The command is `tools/import_weights.py`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.errors import InvalidInput
from ...core.rig import RigSpec
from ...core.trained_on import TrainedOn
from ..interchange.config_files import python_config, read_python_config
from ..interchange.mmdet3d_config import mmdet3d_classes, read_mmdet3d_config
from ..interchange.mmdet3d_weights import load_mmdet3d, mmdet3d_names
from ..interchange.openpcdet_config import read_openpcdet_config
from ..interchange.settings import LeftOver, Program, ReadConfig
from ..models.detector import Detector
from ..models.detectors import DetectorConfig
from ..models.encoders.scan_survey import point_features
from ..models.openpcdet import SparseLayout, load_openpcdet, openpcdet_parts, openpcdet_state
from ..models.openpcdet_file import Checkpoint, read_foreign_checkpoint
from ..training.detector_files import save_run_detector
from ..training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class ImportRecord:
    """What decides an import: stored in its run folder and compared when the import is repeated."""

    source: str
    """Whose names the weights have: "openpcdet" or "mmdet3d"."""
    file: str
    """Name of the file, without its folder."""
    sha256: str
    """SHA-256 of the file."""
    without_iou_head: bool
    """Whether the IoU head was left untrained."""
    seed: int
    """Seed of an untrained IoU head."""
    detector: DetectorConfig
    """The detector that was filled."""
    rig: RigSpec | None = None
    """Rig of the training data, as far as the user declared it."""


@dataclass(frozen=True, kw_only=True)
class ImportedPart:
    """One part of an imported detector."""

    ours: str
    """Name of the part in our detector."""
    theirs: str | None
    """The other program's name of it; None if it was not in the file and is untrained."""
    tensors: int
    """Number of its parameters and statistics."""
    parameters: int
    """Number of its values that are learned."""


@dataclass(frozen=True, kw_only=True)
class ImportOutcome:
    """What an import gave."""

    detector: Detector
    """The detector with the imported weights, on the CPU."""
    sparse_layout: SparseLayout
    """How the sparse weights of the file were laid out."""
    parts: tuple[ImportedPart, ...]
    """The parts that this detector has, the encoder's first."""
    sha256: str
    """SHA-256 of the file."""
    without_iou_head: bool
    """Whether the IoU head was left untrained."""
    left_over: tuple[LeftOver, ...] | None
    """Settings of the configuration that have no counterpart; None where no configuration was read."""


def import_weights(
    source: Program,
    file: str | Path,
    preset: DetectorConfig,
    out: str | Path,
    *,
    config_file: str | Path | None = None,
    without_iou_head: bool = False,
    seed: int = 0,
    rig: RigSpec | None = None,
) -> ImportOutcome:
    """Import published weights into a run folder. The same file again gives the same detector.

    Args:
        source: whose weights they are.
        file: a checkpoint, a state dict alone, or its tensors as `.safetensors`.
        preset: the detector that the weights were trained with. What a configuration says replaces its settings.
        out: run folder to write.
        config_file: the other program's configuration. mmdetection3d stores it in its checkpoints, OpenPCDet does not.
        without_iou_head: the weights are SECOND's, which has no IoU head; that of SECOND-IoU stays untrained. A configuration knows.
        seed: seed of an untrained IoU head.
        rig: what was done to the scans that the weights were trained on. Later commands take it from the detector's file. None where
            nobody knows.

    Returns:
        The detector, and what was imported.

    Raises:
        InvalidInput: The file cannot be read, its weights do not fit the detector, or `out` holds another run. Nothing is
            written then.

    Example:
        ```python
        outcome = import_weights("openpcdet", "second_iou.pth", KITTI_SECOND_IOU_DETECTOR, "runs/published")
        found = outcome.detector.eval().detect(scan)
        ```
    """
    file, out = Path(file), Path(out)
    checkpoint = read_foreign_checkpoint(file)
    read, classes = _configuration(source, checkpoint, preset, config_file, file)
    config = preset if read is None else read.detector
    without_iou_head = without_iou_head or (read is not None and read.without_iou_head)
    torch.manual_seed(seed)
    detector = config.build()
    if source == "mmdet3d":
        layout, _ = load_mmdet3d(detector, checkpoint.state, classes)
    else:
        layout = load_openpcdet(detector, checkpoint.state, without_iou_head=without_iou_head)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    record = ImportRecord(
        source=source, file=file.name, sha256=digest, without_iou_head=without_iou_head, seed=seed, detector=config, rig=rig
    )
    if rig is not None:
        detector.trained_on = TrainedOn(
            rig=rig,
            feature_names=point_features(detector.encoder),
            classes=detector.class_names,
            point_range=detector.spec.grid.range,
        )
    with RunFolder.create(out, record, seed=seed, resume=True):
        save_run_detector(out, detector)
    return ImportOutcome(
        detector=detector,
        sparse_layout=layout,
        parts=_parts(source, detector, without_iou_head=without_iou_head),
        sha256=digest,
        without_iou_head=without_iou_head,
        left_over=None if read is None else read.left_over,
    )


def _configuration(
    source: Program, checkpoint: Checkpoint, preset: DetectorConfig, config_file: str | Path | None, file: Path
) -> tuple[ReadConfig | None, tuple[str, ...]]:
    """What the other program's configuration says, and the classes in the order of the weights."""
    if source == "openpcdet":
        return (None if config_file is None else read_openpcdet_config(config_file, preset)), ()
    version = str(checkpoint.meta.get("mmdet3d_version", "1"))
    if version.startswith("0."):
        raise InvalidInput(
            f"{file} was trained with mmdetection3d {version[:20]}, whose boxes have another order of sizes and turn the other way round; weights "
            "of version 1.0 and later can be imported"
        )
    values, where = _mmdet3d_settings(checkpoint.meta, config_file, file)
    classes = mmdet3d_classes(values, checkpoint.meta)
    if not classes:
        raise InvalidInput(
            f"neither {file} nor {where} names the classes; add class_names = [...] to the configuration, in the order of the weights"
        )
    return read_mmdet3d_config(values, where, classes, preset), classes


def _mmdet3d_settings(meta: Mapping[str, Any], config_file: str | Path | None, file: Path) -> tuple[dict[str, Any], str]:
    if config_file is not None:
        return read_python_config(config_file), str(config_file)
    text = next((meta[name] for name in ("cfg", "config") if isinstance(meta.get(name), str)), None)
    if text is None:
        raise InvalidInput(
            f"{file} does not hold its configuration, which decides classes, anchors and directions; give it with --config FILE.py"
        )
    where = f"the configuration in {file.name}"
    return python_config(text, where), where


def _parts(source: Program, detector: Detector, *, without_iou_head: bool) -> tuple[ImportedPart, ...]:
    """The parts of a detector, without those that its configuration leaves out."""
    found = []
    names = mmdet3d_names(detector) if source == "mmdet3d" else {name: name for name in openpcdet_state(detector)}
    for ours, theirs in openpcdet_parts(detector).items():
        parameters = [p.numel() for n, p in detector.named_parameters() if n.startswith(f"{ours}.")]
        absent = without_iou_head and theirs == detector.decoder.openpcdet_optional
        tensors = sum(n.startswith(f"{ours}.") for n in detector.state_dict())
        called = (
            theirs if source == "openpcdet" else _first_names(name for n, name in names.items() if n.startswith(f"{theirs}."))
        )
        found.append(ImportedPart(ours=ours, theirs=None if absent else called, tensors=tensors, parameters=sum(parameters)))
    return tuple(part for part in found if part.tensors)


def _first_names(names: Any) -> str:
    """The modules that weights lie in, such as `backbone, neck`."""
    deep = {"points_encoder": 2, "roi_head": 2}
    return ", ".join(dict.fromkeys(".".join(parts[: deep.get(parts[0], 1)]) for parts in (name.split(".") for name in names)))
