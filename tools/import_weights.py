"""`upcycle3d import openpcdet FILE PRESET`: published weights as a detector. Read next: `perception/recipes/import_openpcdet.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..core.scan_options import ScanOptions
from ..perception.models.detectors import DetectorConfig
from ..perception.recipes.import_openpcdet import ImportOutcome, import_openpcdet
from ..perception.recipes.presets import PRESETS
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The part of a preset that weights belong to."""

    detector: DetectorConfig
    """The detector as it was when the weights were trained."""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The detector to fill, and where to write it."""

    preset: Architecture
    """Detector. Override any field, as in `--preset.detector.decoder.final.score 0.2`."""
    out: Path
    """Run folder to write."""
    without_iou_head: bool = False
    """The weights are SECOND's, which has no IoU head: leave that of SECOND-IoU untrained."""
    seed: int = 0
    """Decides the weights of an IoU head that is not in the file."""
    z_shift: float | None = None
    """Meters that were added to z of the scans that the weights were trained on (0 for OpenPCDet's weights for KITTI). Later commands
    take it from the detector's file."""
    intensity_scale: float | None = None
    """Factor that was applied to the intensity of the scans that the weights were trained on. Later commands take it too."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


_PRESETS = {name: Target(preset=Architecture(detector=p.detector), out=tyro.MISSING) for name, p in PRESETS.items()}
_TargetChoice = tyro.extras.subcommand_type_from_defaults(_PRESETS, prefix_names=False)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import published weights. FILE is a .pth of OpenPCDet, a state dict alone, or its tensors as .safetensors."""

    source: tyro.conf.Positional[Literal["openpcdet"]]
    """Program whose names the weights have."""
    file: tyro.conf.Positional[Path]
    """Weights to import."""
    target: Annotated[Target, tyro.conf.arg(name="", constructor=_TargetChoice)]
    """Preset whose detector takes the weights."""


def command(config: Import) -> None:
    """Import published weights: upcycle3d import openpcdet FILE PRESET --out RUN."""
    target = config.target
    given = ScanOptions(z_shift=target.z_shift, intensity_scale=target.intensity_scale)
    outcome = import_openpcdet(
        config.file,
        target.preset.detector,
        target.out,
        without_iou_head=target.without_iou_head,
        seed=target.seed,
        rig=None if given == ScanOptions() else given.rig(),
    )
    columns = ("part", "openpcdet", "tensors", "parameters")
    parts = [(p.ours, p.theirs or "not in the file: untrained", p.tensors, p.parameters) for p in outcome.parts]
    print_table("imported detector", ("part", "of OpenPCDet", "tensors", "parameters"), parts)
    for note in notes(outcome, without_iou_head=target.without_iou_head):
        console.print(note)
    if target.without_iou_head:
        # Labels of any prepared dataset train the decoder and the head with it; the encoder stays as published.
        console.print(
            f"next: upcycle3d upcycle PRESET --method source_continued --detector {target.out} --data DIR[:SPLIT] --out RUN"
        )
    else:
        console.print(f"next: upcycle3d evaluate run --detector {target.out} --data DIR:val")
    rows = [dict(zip(columns, part, strict=True)) for part in parts]
    report = {"run": str(target.out), "file_sha256": outcome.sha256, "sparse_weights": outcome.sparse_layout, "parts": rows}
    write_json(target.json, report)


def notes(outcome: ImportOutcome, *, without_iou_head: bool) -> list[str]:
    """Say what the user must know of this import.

    Args:
        outcome: what the import gave.
        without_iou_head: the IoU head was left untrained.

    Returns:
        One sentence or paragraph per fact.
    """
    classes = ", ".join(outcome.detector.class_names)
    said = [
        f"the file names no classes, range or anchors: they are the preset's ({classes}, in this order); check that the weights were "
        "trained with them"
    ]
    if outcome.detector.trained_on is None:
        said.append(
            "the file does not say with which z shift and intensity scale it was trained: declare them with --z-shift and "
            "--intensity-scale (0 and 1 if there was none), and later commands take them from the detector"
        )
    if outcome.sparse_layout == "spconv 1":
        said.append("the sparse weights were saved by spconv 1, (z, y, x, in, out): converted to (out, z, y, x, in)")
    if without_iou_head:
        said.append(
            "warning: the IoU head is UNTRAINED, and it gives every detection its score: train this detector "
            "before its scores mean anything"
        )
    keypoints = outcome.detector.spec.keypoints
    if keypoints is not None and keypoints.source == "voxel_centers":
        said.append(
            "note: OpenPCDet trained with keypoints among the raw points; here they are centers of voxels, so AP may differ. To "
            "evaluate the same way as OpenPCDet, import with --preset.detector.encoder.keypoint-source raw_points; extract refuses "
            "such a detector"
        )
    return said


if __name__ == "__main__":
    sys.exit(run_command(command))
