"""`upcycle3d import openpcdet|mmdet3d FILE PRESET`: published weights as a detector. Read next: `perception/recipes/import_weights.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..core.scan_options import ScanOptions
from ..perception.interchange.settings import Program
from ..perception.models.detectors import DetectorConfig
from ..perception.models.second_iou import SecondIouDetectorConfig
from ..perception.recipes.import_weights import ImportOutcome, import_weights
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
    config: Path | None = None
    """The other program's configuration (.yaml of OpenPCDet, .py of mmdetection3d), read as data. It replaces the settings of the preset,
    and what has no counterpart is listed. A checkpoint of mmdetection3d holds its own."""
    without_iou_head: bool = False
    """The weights are SECOND's, which has no IoU head: leave that of SECOND-IoU untrained. A configuration says so itself."""
    seed: int = 0
    """Decides the weights of an IoU head that is not in the file."""
    z_shift: float | None = None
    """Meters that were added to z of the scans that the weights were trained on (0 for OpenPCDet's weights for KITTI). Later commands
    take it from the detector's file."""
    intensity_scale: float | None = None
    """Factor that was applied to the intensity of the scans that the weights were trained on. Later commands take it too."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


_TITLES = {"openpcdet": "OpenPCDet", "mmdet3d": "mmdetection3d"}
_PRESETS = {name: Target(preset=Architecture(detector=p.detector), out=tyro.MISSING) for name, p in PRESETS.items()}
_TargetChoice = tyro.extras.subcommand_type_from_defaults(_PRESETS, prefix_names=False)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import published weights. FILE is a .pth of the program, a state dict alone, or its tensors as .safetensors."""

    source: tyro.conf.Positional[Program]
    """Program whose names the weights have."""
    file: tyro.conf.Positional[Path]
    """Weights to import."""
    target: Annotated[Target, tyro.conf.arg(name="", constructor=_TargetChoice)]
    """Preset whose detector takes the weights."""


def command(config: Import) -> None:
    """Import published weights: upcycle3d import openpcdet|mmdet3d FILE PRESET --out RUN."""
    target = config.target
    given = ScanOptions(z_shift=target.z_shift, intensity_scale=target.intensity_scale)
    outcome = import_weights(
        config.source,
        config.file,
        target.preset.detector,
        target.out,
        config_file=target.config,
        without_iou_head=target.without_iou_head,
        seed=target.seed,
        rig=None if given == ScanOptions() else given.rig(),
    )
    columns = ("part", config.source, "tensors", "parameters")
    parts = [(p.ours, p.theirs or "not in the file: untrained", p.tensors, p.parameters) for p in outcome.parts]
    print_table("imported detector", ("part", f"of {_TITLES[config.source]}", "tensors", "parameters"), parts)
    left_over = [(entry.setting, entry.value, entry.why) for entry in outcome.left_over or ()]
    if left_over:
        print_table("settings without counterpart", ("setting", "value", "here"), left_over)
    for note in notes(outcome):
        console.print(note)
    if outcome.without_iou_head and _ranks_by_overlap(outcome):
        # Labels of any prepared dataset train the decoder and the head with it; the encoder stays as published.
        console.print(
            f"next: upcycle3d upcycle PRESET --method source_continued --detector {target.out} --data DIR[:SPLIT] --out RUN"
        )
    else:
        console.print(f"next: upcycle3d evaluate run --detector {target.out} --data DIR:val")
    rows = [dict(zip(columns, part, strict=True)) for part in parts]
    report = {"run": str(target.out), "file_sha256": outcome.sha256, "sparse_weights": outcome.sparse_layout, "parts": rows}
    if outcome.left_over is not None:
        report |= {"left_over": [dict(zip(("setting", "value", "why"), entry, strict=True)) for entry in left_over]}
    write_json(target.json, report)


def _ranks_by_overlap(outcome: ImportOutcome) -> bool:
    config = outcome.detector.config
    return not isinstance(config, SecondIouDetectorConfig) or config.decoder.ranked_by == "iou"


def notes(outcome: ImportOutcome) -> list[str]:
    """Say what the user must know of this import.

    Args:
        outcome: what the import gave.

    Returns:
        One sentence or paragraph per fact.
    """
    classes = ", ".join(outcome.detector.class_names)
    if outcome.left_over is None:
        said = [
            f"the file names no classes, range or anchors: they are the preset's ({classes}, in this order); check that the weights were "
            "trained with them, or give the configuration with --config"
        ]
    else:
        said = [f"classes, range, anchors and limits are those of the configuration; classes here: {classes}"]
    if outcome.detector.trained_on is None:
        said.append(
            "the file does not say with which z shift and intensity scale it was trained: declare them with --z-shift and "
            "--intensity-scale (0 and 1 if there was none), and later commands take them from the detector"
        )
    if outcome.sparse_layout == "spconv 1":
        said.append("the sparse weights were saved by spconv 1 or mmcv, (z, y, x, in, out): converted to (out, z, y, x, in)")
    if outcome.without_iou_head and _ranks_by_overlap(outcome):
        said.append(
            "warning: the IoU head is UNTRAINED, and it gives every detection its score: train this detector "
            "before its scores mean anything, or import with --preset.detector.decoder.ranked-by class to detect as SECOND does"
        )
    elif outcome.without_iou_head:
        said.append(
            "note: SECOND has no IoU head. Boxes are ranked by the probability of their class, as there; the IoU head of this detector is "
            "untrained and not asked. To use it, train this detector with --preset.detector.decoder.ranked-by iou"
        )
    keypoints = outcome.detector.spec.keypoints
    if keypoints is not None and keypoints.source == "voxel_centers":
        said.append(
            "note: keypoints are centers of voxels here. Published weights were trained with keypoints among the raw points, so their AP "
            "may differ. To evaluate as there, import with --preset.detector.encoder.keypoint-source raw_points; extract refuses "
            "such a detector"
        )
    return said


if __name__ == "__main__":
    sys.exit(run_command(command))
