"""Published weights of OpenPCDet become a run folder, which every other job takes like that of a trained detector.

`models/openpcdet_file.py` reads the file, `models/openpcdet.py` copies the weights; the command is `tools/import_weights.py`.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch

from ...core.rig import RigSpec
from ...core.trained_on import TrainedOn
from ..models.detector import Detector
from ..models.detectors import DetectorConfig
from ..models.encoders.scan_survey import point_features
from ..models.openpcdet import SparseLayout, load_openpcdet, openpcdet_parts
from ..models.openpcdet_file import read_openpcdet
from ..training.detector_files import save_run_detector
from ..training.run_folder import RunFolder


@dataclass(frozen=True, kw_only=True)
class ImportRecord:
    """What decides an import: stored in its run folder and compared when the import is repeated."""

    source: str
    """Whose names the weights have: "openpcdet"."""
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
    """OpenPCDet's name of it; None if it was not in the file and is untrained."""
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


def import_openpcdet(
    file: str | Path,
    config: DetectorConfig,
    out: str | Path,
    *,
    without_iou_head: bool = False,
    seed: int = 0,
    rig: RigSpec | None = None,
) -> ImportOutcome:
    """Import published weights into a run folder. The same file again gives the same detector.

    Args:
        file: a checkpoint of OpenPCDet, a state dict alone, or its tensors as `.safetensors`.
        config: the detector that the weights were trained with; the file does not tell classes, range and anchors.
        out: run folder to write.
        without_iou_head: the weights are SECOND's, which has no IoU head; that of SECOND-IoU stays untrained.
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
        outcome = import_openpcdet("second_iou.pth", KITTI_SECOND_IOU_DETECTOR, "runs/published")
        found = outcome.detector.eval().detect(scan)
        ```
    """
    file, out = Path(file), Path(out)
    state = read_openpcdet(file)
    torch.manual_seed(seed)
    detector = config.build()
    layout = load_openpcdet(detector, state, without_iou_head=without_iou_head)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    record = ImportRecord(
        source="openpcdet", file=file.name, sha256=digest, without_iou_head=without_iou_head, seed=seed, detector=config, rig=rig
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
    parts = _parts(detector, without_iou_head=without_iou_head)
    return ImportOutcome(detector=detector, sparse_layout=layout, parts=parts, sha256=digest)


def _parts(detector: Detector, *, without_iou_head: bool) -> tuple[ImportedPart, ...]:
    """The parts of a detector, without those that its configuration leaves out."""
    found = []
    for ours, theirs in openpcdet_parts(detector).items():
        parameters = [p.numel() for n, p in detector.named_parameters() if n.startswith(f"{ours}.")]
        absent = without_iou_head and theirs == detector.decoder.openpcdet_optional
        tensors = sum(n.startswith(f"{ours}.") for n in detector.state_dict())
        found.append(ImportedPart(ours=ours, theirs=None if absent else theirs, tensors=tensors, parameters=sum(parameters)))
    return tuple(part for part in found if part.tensors)
