"""Detectors as checkpoints of OpenPCDet and mmdetection3d, with the configuration that the other program loads them with.

`openpcdet_config_writing.py` and `mmdet3d_config_writing.py` make the configurations. What no setting there can say stands in
`differences`, in the head of the configuration, and on the screen.
"""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.rig import RigSpec
from ...core.text_files import read_text
from ...core.yaml_text import yaml_text
from ..models.detector import Detector
from ..models.openpcdet import SparseLayout, openpcdet_state
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.second_iou import SecondIouDetectorConfig
from .mmdet3d_config_writing import mmdet3d_settings, python_text
from .mmdet3d_weights import mmdet3d_state
from .openpcdet_config_writing import openpcdet_settings
from .plain_pickle_writing import write_torch_file

_OPENPCDET_WIDTHS = (16, 32, 64, 64, 128)
"""Channels of OpenPCDet's sparse backbone, which stand in its code."""


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """A checkpoint in the form of another program, and its configuration."""

    content: dict[str, Any]
    """What the file holds: plain data and tensors."""
    configuration: str
    """Text of the configuration: YAML for OpenPCDet, Python for mmdetection3d."""
    tensors: int
    """Number of weights and statistics in it."""
    left_out: tuple[str, ...]
    """OpenPCDet's names of the weights that have no place there."""
    differences: tuple[str, ...]
    """What no setting of the configuration can say, and where answers will differ: one sentence each."""


def openpcdet_checkpoint(detector: Detector, layout: SparseLayout = "spconv 2") -> ForeignCheckpoint:
    """Make a checkpoint that OpenPCDet loads.

    Args:
        detector: a SECOND-IoU or PV-RCNN detector. One that ranks boxes by class is SECOND: its IoU head is left out.
        layout: layout of the sparse weights. OpenPCDet turns those of spconv 1 round where it runs on spconv 2.

    Returns:
        The checkpoint; every other weight is in it, unchanged.

    Raises:
        InvalidInput: OpenPCDet has no such detector.
    """
    config, state = _plain(detector), openpcdet_state(detector)
    left_out = tuple(name for name in state if _is_second(config) and name.startswith("roi_head."))
    state = {name: value for name, value in state.items() if name not in left_out}
    if layout == "spconv 1":
        state = {name: _turned(value) for name, value in state.items()}
    differences = [*_shared_differences(detector, config)]
    widths = (config.encoder.voxels if isinstance(config, PvRcnnDetectorConfig) else config.encoder).channels
    if widths != _OPENPCDET_WIDTHS:
        differences.append(
            f"the sparse backbone has {_listed(widths)} channels here and {_listed(_OPENPCDET_WIDTHS)} in the code of OpenPCDet: change "
            "the class VoxelBackBone8x there before it loads these weights"
        )
    differences.append(
        "data: the configuration reads what `export infos openpcdet` writes, from ../data/custom; for another dataset of OpenPCDet, base "
        "DATA_CONFIG on its file (_BASE_CONFIG_), and delete DATASET and the paths"
    )
    differences.append("schedule: OPTIMIZATION is left out; copy one of OpenPCDet's before you train there")
    return ForeignCheckpoint(
        content={"model_state": state, "version": "pcdet+0.6.0"},
        configuration=_headed(yaml_text(openpcdet_settings(config, detector.spec)), differences),
        tensors=len(state) - 1,
        left_out=left_out,
        differences=tuple(differences),
    )


def mmdet3d_checkpoint(detector: Detector, classes: Sequence[str] = ()) -> ForeignCheckpoint:
    """Make a checkpoint that mmdetection3d 1.x loads, with mmcv's sparse layers or spconv 2.

    Args:
        detector: a SECOND-IoU or PV-RCNN detector. mmdetection3d has SECOND alone, so an IoU head is left out.
        classes: the classes in the order of the configuration that loads it; the detector's own order by default.

    Returns:
        The checkpoint; every other weight is in it, unchanged. It holds its configuration too, as those of mmdetection3d do.

    Raises:
        InvalidInput: mmdetection3d has no such detector, or the classes are others.
    """
    config, names = _plain(detector), tuple(classes) or detector.class_names
    state, left_out = mmdet3d_state(detector, names)
    settings = mmdet3d_settings(config, detector.spec, names)
    differences = [*_shared_differences(detector, config), *_only_in_mmdet3d(config)]
    columns = "".join(f", {feature}" for feature in detector.point_features)
    differences.append(
        f"data and schedule: base the configuration on files of yours (_base_), whose pipelines give points with x, y, z{columns} "
        "(load_dim and use_dim)"
    )
    return ForeignCheckpoint(
        content={
            "meta": {"dataset_meta": {"classes": list(names)}, "cfg": python_text(settings)},
            "state_dict": state,
        },
        configuration=_headed(python_text(settings), differences),
        tensors=len(state),
        left_out=left_out,
        differences=tuple(differences),
    )


def write_checkpoint(made: ForeignCheckpoint, out: Path, configuration: Path) -> None:
    """Write a checkpoint and its configuration.

    Args:
        made: both.
        out: file of the weights; one of an earlier export is replaced.
        configuration: file of the configuration.

    Raises:
        InvalidInput: Another configuration is there. Nothing is written then.
    """
    if configuration.resolve() == out.resolve():
        raise InvalidInput(f"weights and configuration would be one file, {out}; give the weights a name that ends in .pth")
    if configuration.exists() and read_text(configuration, "configuration") != made.configuration:
        raise InvalidInput(
            f"{configuration} is there and holds another configuration; move it away, or give another name with --configuration"
        )
    write_torch_file(out, made.content)
    write_atomically(configuration, made.configuration.encode())


def _headed(text: str, differences: Sequence[str]) -> str:
    """A configuration under a comment that says what it cannot say."""
    head = [
        "Written by `upcycle3d export` for the weights beside it. What no setting below can say:",
        *(f"- {d}" for d in differences),
    ]
    lines = [line for part in head for line in textwrap.wrap(part, 118, subsequent_indent="  ")]
    return "".join(f"# {line}\n" for line in lines) + text


def _turned(value: Tensor) -> Tensor:
    return value.permute(1, 2, 3, 4, 0).contiguous() if value.dim() == 5 else value


def _plain(detector: Detector) -> SecondIouDetectorConfig | PvRcnnDetectorConfig:
    if not isinstance(detector.config, SecondIouDetectorConfig | PvRcnnDetectorConfig):
        raise InvalidInput(
            f"a {detector.label} that was changed here (defended, upcycled or narrowed) has no counterpart there; export a plain SECOND-IoU or PV-RCNN"
        )
    return detector.config


def _is_second(config: SecondIouDetectorConfig | PvRcnnDetectorConfig) -> bool:
    return isinstance(config, SecondIouDetectorConfig) and config.decoder.ranked_by == "class"


def _listed(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _shared_differences(detector: Detector, config: SecondIouDetectorConfig | PvRcnnDetectorConfig) -> list[str]:
    """What neither program has a setting for."""
    found = []
    rig = detector.trained_on.rig if detector.trained_on is not None else None
    if rig is None:
        found.append(
            "nobody knows whether z was shifted and the intensity scaled in training; if so, do the same to the scans there"
        )
    elif rig != RigSpec():
        found.append(
            f"the detector was trained on scans whose z was raised by {rig.z_shift:g} m and whose intensity was multiplied by "
            f"{rig.intensity_scale:g}; do the same to the scans and the boxes there, because both programs take scans as they are"
        )
    if isinstance(config, PvRcnnDetectorConfig) and config.encoder.keypoint_stride > 1:
        found.append(
            f"keypoints lie in the middle of cells of {config.encoder.keypoint_stride} voxels here and in the middle of single voxels there, "
            "so answers differ: train there before use"
        )
    proposals, final = config.decoder.test_proposals, config.decoder.final
    if _is_second(config) and (proposals.pre, proposals.iou, proposals.post) != (final.pre, final.iou, final.post):
        found.append(
            f"boxes are suppressed twice here, first from {proposals.pre} to {proposals.post} at an overlap of {proposals.iou:g}; there "
            "they are suppressed once, as the second time here"
        )
    return found


def _only_in_mmdet3d(config: SecondIouDetectorConfig | PvRcnnDetectorConfig) -> list[str]:
    """What OpenPCDet has a setting for and mmdetection3d has none."""
    if isinstance(config, SecondIouDetectorConfig):
        found = ["suppression: each class by itself there, all classes together here"]
        if config.decoder.ranked_by == "iou":
            found.append(
                "mmdetection3d has no IoU head: there, boxes are ranked by the probability of their class, so scores and AP differ. "
                "Export for OpenPCDet where the IoU head matters"
            )
        return found
    final, used = config.decoder.final, [balls is not None for balls in config.encoder.stages]
    found = [f"its final suppression has no limits of boxes; here {final.pre} enter and {final.post} stay at most"]
    if used != sorted(used, reverse=True):
        stages = " and ".join(f"conv{k}" for k, is_used in enumerate(used, 1) if is_used)
        found.append(
            f"keypoints gather from {stages} alone here, and mmdetection3d takes its sparse stages from the first one on: change "
            "VoxelSetAbstraction.forward there to take these stages"
        )
    return found
