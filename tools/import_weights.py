"""``upcycle3d import openpcdet FILE PRESET``: published weights as a detector of this program.

A checkpoint of OpenPCDet is a pickle. Only its tensors and plain values are read (``weights_only``), so a file from elsewhere runs no
code here; one that needs more is refused, with the way to convert it where it was made.
"""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.tensor_file import read_tensors
from ..perception.models.detector import Detector
from ..perception.models.detectors import DetectorConfig
from ..perception.models.openpcdet import load_openpcdet, openpcdet_parts
from ..perception.recipes.presets import PRESETS
from ..perception.training.detector_files import save_run_detector
from ..perception.training.run_folder import RunFolder
from .console import console, print_table, run_command, write_json

LARGEST_FILE = 2 * 1024**3
"""bytes; PV-RCNN with its optimiser state has 0.16e9"""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The part of a preset that weights belong to."""

    detector: DetectorConfig
    """must be as the weights were trained"""


@dataclass(frozen=True, kw_only=True)
class Target:
    """The detector to build, and where to write it."""

    preset: Architecture
    """detector; override any field, as in --preset.detector.decoder.final.score 0.2"""
    out: Path
    """run folder to write"""
    without_iou_head: bool = False
    """the weights are SECOND's, which has no IoU head: leave that of SECOND-IoU untrained"""
    seed: int = 0
    """initial weights of an IoU head that is not in the file"""
    json: Path | None = None
    """also write the result for machines"""


_PRESETS = {name: Target(preset=Architecture(detector=p.detector), out=tyro.MISSING) for name, p in PRESETS.items()}
_TargetChoice = tyro.extras.subcommand_type_from_defaults(_PRESETS, prefix_names=False)


@dataclass(frozen=True, kw_only=True)
class Import:
    """Import published weights. FILE: a .pth of OpenPCDet, a state dict alone, or its tensors as .safetensors."""

    source: tyro.conf.Positional[Literal["openpcdet"]]
    """whose names the weights have"""
    file: tyro.conf.Positional[Path]
    """weights to import"""
    target: Annotated[Target, tyro.conf.arg(name="", constructor=_TargetChoice)]


@dataclass(frozen=True, kw_only=True)
class Origin:
    """What the run folder keeps of an import."""

    source: str
    file: str
    sha256: str
    without_iou_head: bool
    seed: int
    detector: DetectorConfig


def command(config: Import) -> None:
    """Import published weights: upcycle3d import openpcdet FILE PRESET --out RUN."""
    target = config.target
    architecture = target.preset.detector
    state = read_state(config.file)
    torch.manual_seed(target.seed)
    detector = architecture.build()
    layout = load_openpcdet(detector, state, without_iou_head=target.without_iou_head)
    with config.file.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    origin = Origin(
        source=config.source,
        file=config.file.name,
        sha256=digest,
        without_iou_head=target.without_iou_head,
        seed=target.seed,
        detector=architecture,
    )
    with RunFolder.create(target.out, origin, seed=target.seed, resume=True):  # the same file again gives the same detector
        save_run_detector(target.out, detector)
    parts = part_sizes(detector, without_iou_head=target.without_iou_head)
    print_table("imported detector", ("part", "of OpenPCDet", "tensors", "parameters"), parts)
    for note in notes(layout, detector, without_iou_head=target.without_iou_head):
        console.print(note)
    if target.without_iou_head:
        # Labels of any prepared dataset train the decoder, the head with it; the encoder stays as published.
        console.print(
            f"next: upcycle3d upcycle PRESET --method source_continued --detector {target.out} --data DIR[:SPLIT] --out RUN"
        )
    else:
        console.print(f"next: upcycle3d evaluate run --detector {target.out} --data PREPARED --split val")
    names = ("part", "openpcdet", "tensors", "parameters")
    rows = [dict(zip(names, part, strict=True)) for part in parts]
    write_json(target.json, {"run": str(target.out), "file_sha256": digest, "sparse_weights": layout, "parts": rows})


def part_sizes(detector: Detector, *, without_iou_head: bool) -> list[tuple[str, str, int, int]]:
    """Of every part: our name, OpenPCDet's, its tensors (parameters and statistics) and its number of parameters."""
    sizes = []
    for ours, theirs in openpcdet_parts(detector).items():
        state = [n for n in detector.state_dict() if n.startswith(f"{ours}.")]
        parameters = sum(p.numel() for n, p in detector.named_parameters() if n.startswith(f"{ours}."))
        absent = without_iou_head and theirs == detector.decoder.openpcdet_optional
        sizes.append((ours, "not in the file: untrained" if absent else theirs, len(state), parameters))
    return [row for row in sizes if row[2]]


def notes(layout: str, detector: Detector, *, without_iou_head: bool) -> list[str]:
    """What the user must know of this import."""
    classes = ", ".join(detector.class_names)
    said = [
        f"the file names no classes, range or anchors: they are the preset's ({classes}, in this order); make sure they were trained"
    ]
    if layout == "spconv 1":
        said.append("the sparse weights were saved by spconv 1, (z, y, x, in, out): converted to (out, z, y, x, in)")
    if without_iou_head:
        said.append(
            "warning: the IoU head is UNTRAINED, and it gives every detection its score: train this detector "
            "before its scores mean anything"
        )
    keypoints = detector.spec.keypoints
    if keypoints is not None and keypoints.source == "voxel_centers":
        said.append(
            "note: OpenPCDet trained with keypoints among the raw points; here they are centres of voxels, so AP may differ. To evaluate "
            "as the reference does, import with --preset.detector.encoder.keypoint-source raw_points; extract refuses such a detector"
        )
    return said


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by name: a .safetensors, or a .pth that holds ``model_state`` or is a state dict itself.

    Raises InvalidInput for a file that is too large, damaged, or needs pickle, and CorruptFile for damaged safetensors.
    """
    if not path.is_file():
        raise InvalidInput(f"there is no file {path}; give a checkpoint of OpenPCDet (.pth) or its tensors (.safetensors)")
    if (size := _declared_size(path)) > LARGEST_FILE:
        raise InvalidInput(
            f"{path} holds {size:,} bytes, more than the {LARGEST_FILE:,} that are read; save its model_state alone, without optimiser"
        )
    if path.suffix == ".safetensors":
        return dict(read_tensors(path).tensors)
    content = _load_plain(path)
    state = content.get("model_state", content) if isinstance(content, Mapping) else content
    if not isinstance(state, Mapping) or not state or not all(isinstance(n, str) for n in state):
        raise InvalidInput(f"{path} holds no named weights but a {type(state).__name__}; give a checkpoint with model_state")
    others = [name for name, value in state.items() if not isinstance(value, Tensor)]
    if others:
        raise InvalidInput(f"{path} has no model_state and is no state dict: {', '.join(others[:8])} are no tensors")
    return dict(state)


def _declared_size(path: Path) -> int:
    """Bytes of the file or, of a zip, of what it unpacks to, if that is more."""
    size = path.stat().st_size
    if size > LARGEST_FILE or not zipfile.is_zipfile(path):
        return size
    try:
        with zipfile.ZipFile(path) as archive:
            return max(size, sum(member.file_size for member in archive.infolist()))
    except zipfile.BadZipFile as error:
        raise InvalidInput(f"{path} is damaged ({error}); get it again") from error


def _load_plain(path: Path) -> Any:
    file = path.open("rb")  # outside: a file that may not be read is not a damaged one
    try:
        with file:
            return torch.load(file, map_location="cpu", weights_only=True)
    except MemoryError:
        raise
    except Exception as error:  # damaged bytes make the reader raise nearly anything
        first = str(error).strip().split("\n")[0]
        raise InvalidInput(
            f"{path} is damaged, or holds more than tensors and plain values ({type(error).__name__}: {first}). Nothing else is read, "
            "because a pickle may run any code. If you trust the file, run this in the environment that saved it (from torch 2.6 on "
            "with weights_only=False) and import the result:\n"
            "  import torch\n"
            f"  state = torch.load({str(path)!r}, map_location='cpu')['model_state']\n"
            "  torch.save({'model_state': {n: t.detach().clone() for n, t in state.items()}}, 'plain.pth')"
        ) from error


if __name__ == "__main__":
    sys.exit(run_command(command))
