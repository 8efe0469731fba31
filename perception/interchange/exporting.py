"""Detectors as checkpoints of OpenPCDet and mmdetection3d, with what the other program must set for the same answers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ...core.errors import InvalidInput
from ..models.detector import Detector
from ..models.openpcdet import SparseLayout, openpcdet_state
from ..models.pv_rcnn import PvRcnnDetectorConfig
from ..models.second_iou import SecondIouDetectorConfig
from .mmdet3d_weights import mmdet3d_state


@dataclass(frozen=True, kw_only=True)
class ForeignCheckpoint:
    """A checkpoint in the form of another program."""

    content: dict[str, Any]
    """What the file holds: plain data and tensors."""
    tensors: int
    """Number of weights and statistics in it."""
    left_out: tuple[str, ...]
    """OpenPCDet's names of the weights that have no place there."""
    to_set: tuple[str, ...]
    """What the configuration of the other program must say, and where answers will differ: one sentence each."""


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
    state = openpcdet_state(detector)
    left_out = tuple(name for name in state if _is_second(detector) and name.startswith("roi_head."))
    state = {name: value for name, value in state.items() if name not in left_out}
    if layout == "spconv 1":
        state = {name: _turned(value) for name, value in state.items()}
    return ForeignCheckpoint(
        content={"model_state": state, "version": "pcdet+0.6.0"},
        tensors=len(state) - 1,
        left_out=left_out,
        to_set=(*_shared_notes(detector, detector.class_names, "MODEL.DENSE_HEAD.DIR_OFFSET"), *_keypoint_notes(detector)),
    )


def mmdet3d_checkpoint(detector: Detector, classes: Sequence[str] = ()) -> ForeignCheckpoint:
    """Make a checkpoint that mmdetection3d 1.x loads, with mmcv's sparse layers or spconv 2.

    Args:
        detector: a SECOND-IoU or PV-RCNN detector. mmdetection3d has SECOND alone, so an IoU head is left out.
        classes: the classes in the order of the configuration that loads it; the detector's own order by default.

    Returns:
        The checkpoint; every other weight is in it, unchanged.

    Raises:
        InvalidInput: mmdetection3d has no such detector, or the classes are others.
    """
    names = tuple(classes) or detector.class_names
    state, left_out = mmdet3d_state(detector, names)
    notes = [*_shared_notes(detector, names, "dir_offset"), *_keypoint_notes(detector)]
    if left_out and not _is_second(detector):
        notes.append(
            "mmdetection3d has no IoU head: there, boxes are ranked by the probability of their class, so scores and AP differ. Export "
            "for OpenPCDet where the IoU head matters"
        )
    return ForeignCheckpoint(
        content={"meta": {"dataset_meta": {"classes": list(names)}}, "state_dict": state},
        tensors=len(state),
        left_out=left_out,
        to_set=tuple(notes),
    )


def _turned(value: Tensor) -> Tensor:
    return value.permute(1, 2, 3, 4, 0).contiguous() if value.dim() == 5 else value


def _is_second(detector: Detector) -> bool:
    config = detector.config
    return isinstance(config, SecondIouDetectorConfig) and config.decoder.ranked_by == "class"


def _shared_notes(detector: Detector, classes: Sequence[str], name: str) -> list[str]:
    config = detector.config
    if not isinstance(config, SecondIouDetectorConfig | PvRcnnDetectorConfig):
        raise InvalidInput(
            f"a {detector.label} that was changed here (defended, upcycled or narrowed) has no counterpart there; export a plain SECOND-IoU or PV-RCNN"
        )
    grid = detector.spec.grid
    anchors = "; ".join(
        f"{a.name} {' x '.join(f'{side:g}' for side in a.size)} m from z = {a.bottom_z:g} m" for a in config.decoder.anchors
    )
    return [
        f"classes in this order: {', '.join(classes)}",
        f"range {' '.join(f'{v:g}' for v in grid.range)} m, voxels of {' '.join(f'{v:g}' for v in grid.voxel_size)} m",
        f"anchors, whose heights are those of the lower face: {anchors}",
        f"{name} = {config.decoder.direction_offset!r}",
        f"points with x, y, z{''.join(f', {feature}' for feature in detector.point_features)}",
    ]


def _keypoint_notes(detector: Detector) -> list[str]:
    """Where our keypoints are not those of the publication."""
    config = detector.config
    if not isinstance(config, PvRcnnDetectorConfig):
        return []
    if config.encoder.keypoint_stride > 1:
        return [
            "keypoints lie in the middle of coarse cells here and among the raw points there, so answers differ: train there before use"
        ]
    if config.encoder.keypoint_source != "raw_points":
        return ["keypoints are centers of voxels here and raw points there, so boxes differ a little"]
    return []
