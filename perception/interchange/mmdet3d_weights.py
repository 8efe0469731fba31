"""Weights of mmdetection3d's SECOND and PV-RCNN: the same numbers as OpenPCDet's, under other names and in another order of classes.

The table of names stands here once and serves both ways. OpenPCDet's names are the middle: `models/openpcdet.py` knows ours for them.
What differs besides the names:

- mmdetection3d's KITTI models count Pedestrian, Cyclist, Car, ours Car, Pedestrian, Cyclist: the channels of the anchor head change places.
- Fully connected layers of regions and keypoints are 1 x 1 convolutions there: the same numbers with more axes of length 1.
- Its sparse weights are (z, y, x, in, out), the layout of mmcv and spconv 1. With spconv 2 it turns them round when it loads them, so
  this is also what is written.

Source: mmdetection3d 1.4, `sparse_encoder.py`, `second.py`, `second_fpn.py`, `anchor3d_head.py`, `voxel_set_abstraction.py`,
`stack_point_sa_module.py`, `pv_rcnn_bbox_head.py`, `foreground_segmentation_head.py`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.tensor_file import listed
from ..models.detector import Detector
from ..models.openpcdet import SparseLayout, load_openpcdet, openpcdet_state

_FC = {"0": "0.conv", "1": "0.bn", "4": "2.conv", "5": "2.bn", "7": "3"}
"""Layers of a region's branch: there a convolution with its norm is one module, and ReLU has no place of its own."""
_MLP = {"0": "layer0.conv", "1": "layer0.bn", "3": "layer1.conv", "4": "layer1.bn"}
"""Layers of a set abstraction."""
_FUSION = {"0": "0.conv", "1": "0.bn"}
_HEAD = {"conv_cls": "conv_cls", "conv_box": "conv_reg", "conv_dir_cls": "conv_dir_cls"}
_BALLS = {
    "pfe.SA_layers": "points_encoder.voxel_sa_layers",
    "pfe.SA_rawpoints": "points_encoder.rawpoints_sa_layer",
    "roi_head.roi_grid_pool_layer": "roi_head.bbox_roi_extractor.roi_grid_pool_layer",
}
_BRANCHES = {"shared_fc_layer": "shared_fc_layer", "cls_layers": "cls_layer", "reg_layers": "reg_layer"}
_WIDTHS = {"conv_cls": None, "conv_box": 7, "conv_dir_cls": 2}
"""Values of each anchor in a layer of the anchor head; None is one for each class."""


def mmdet3d_name(name: str, *, two_stages: bool) -> str | None:
    """Translate a name of OpenPCDet.

    Args:
        name: OpenPCDet's name of a weight or a statistic.
        two_stages: whether the detector is PV-RCNN, whose anchor head is called `rpn_head`.

    Returns:
        mmdetection3d's name, or None where it has no such part.
    """
    if found := re.fullmatch(r"backbone_3d\.conv(\d)\.(.+)", name):
        return f"middle_encoder.encoder_layers.encoder_layer{found[1]}.{found[2]}"
    if name.startswith("backbone_3d."):
        return name.replace("backbone_3d", "middle_encoder", 1)
    if found := re.fullmatch(r"backbone_2d\.blocks\.(\d+)\.(\d+)\.(.+)", name):  # there the padding is no layer of its own
        return f"backbone.blocks.{found[1]}.{int(found[2]) - 1}.{found[3]}"
    if name.startswith("backbone_2d.deblocks."):
        return name.replace("backbone_2d", "neck", 1)
    if found := re.fullmatch(r"dense_head\.(\w+)\.(\w+)", name):
        return f"{'rpn_head' if two_stages else 'bbox_head'}.{_HEAD[found[1]]}.{found[2]}"
    if found := re.fullmatch(r"(.+)\.mlps\.(\d+)\.(\d+)\.(\w+)", name):
        part, number = re.fullmatch(r"(.+?)((?:\.\d+)?)", found[1]).groups()  # type: ignore[union-attr]
        return f"{_BALLS[part]}{number}.mlps.{found[2]}.{_MLP[found[3]]}.{found[4]}"
    if found := re.fullmatch(r"pfe\.vsa_point_feature_fusion\.(\d)\.(\w+)", name):
        return f"points_encoder.point_feature_fusion_layer.{_FUSION[found[1]]}.{found[2]}"
    if name.startswith("point_head.cls_layers."):
        return name.replace("point_head.cls_layers", "roi_head.semantic_head.seg_cls_layer", 1)
    if two_stages and (found := re.fullmatch(r"roi_head\.(\w+)\.(\d)\.(\w+)", name)):
        return f"roi_head.bbox_head.{_BRANCHES[found[1]]}.{_FC[found[2]]}.{found[3]}"
    return None


def mmdet3d_names(detector: Detector) -> dict[str, str]:
    """List the names of all weights of a detector.

    Args:
        detector: a SECOND-IoU or PV-RCNN detector.

    Returns:
        mmdetection3d's name by OpenPCDet's, of every weight that mmdetection3d has a place for.

    Raises:
        InvalidInput: OpenPCDet has no such detector, and so mmdetection3d has none either.
    """
    state = openpcdet_state(detector)
    two_stages = any(name.startswith("pfe.") for name in state)
    found = {name: mmdet3d_name(name, two_stages=two_stages) for name in state if name != "global_step"}
    return {name: theirs for name, theirs in found.items() if theirs is not None}


def mmdet3d_state(detector: Detector, classes: Sequence[str] = ()) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Copy the weights of a detector under mmdetection3d's names.

    Args:
        detector: a SECOND-IoU or PV-RCNN detector.
        classes: the classes in the order of the configuration that will load them; the detector's own order by default.

    Returns:
        A complete `state_dict` on the CPU, and OpenPCDet's names of what mmdetection3d has no place for: the IoU head of SECOND-IoU.

    Raises:
        InvalidInput: mmdetection3d has no such detector, or `classes` are not the detector's.
    """
    names, state = mmdet3d_names(detector), openpcdet_state(detector)
    order = _positions(detector.class_names, tuple(classes) or detector.class_names)
    given = {}
    for name, theirs in names.items():
        value = _with_classes(state[name], name, order)
        if value.dim() == 5:
            value = value.permute(1, 2, 3, 4, 0)
        elif _is_convolution_there(name, value):
            value = value.reshape(*value.shape[:2], 1, 1)
        given[theirs] = value.contiguous()
    return given, tuple(name for name in state if name not in names and name != "global_step")


def load_mmdet3d(detector: Detector, state: Mapping[str, Tensor], classes: Sequence[str]) -> tuple[SparseLayout, tuple[str, ...]]:
    """Copy a state dict of mmdetection3d into a detector, completely.

    Args:
        detector: the detector to fill. It is untouched if anything does not fit.
        state: the weights by mmdetection3d's names, with sparse weights as in mmcv, spconv 1 or spconv 2.
        classes: the classes in the order in which the weights count them.

    Returns:
        How the sparse weights were laid out, and OpenPCDet's names of the part that the file lacks and that stays untrained (the IoU head).

    Raises:
        InvalidInput: Weights are missing, left over or have another shape, or the classes are not the detector's.
    """
    names = mmdet3d_names(detector)
    missing = [theirs for theirs in names.values() if theirs not in state]
    left_over = [name for name in state if name not in set(names.values())]
    if missing or left_over:
        lines = [f"missing {name}" for name in listed(missing)] + [f"left over {name}" for name in listed(left_over)]
        text = "\n  ".join([f"the weights do not fit this {detector.label} ({len(missing) + len(left_over)} names):", *lines])
        raise InvalidInput(f"{text}\nchoose a preset of the detector that was trained: SECOND or PV-RCNN of mmdetection3d 1.x")
    order = _positions(classes, detector.class_names)
    ours = openpcdet_state(detector)
    given = {}
    for name, theirs in names.items():
        value, shape = state[theirs], ours[name].shape
        if value.dim() == 4 and _is_convolution_there(name, ours[name]):
            value = value.reshape(value.shape[: len(shape)]) if value.shape[2:] == (1, 1) else value
        given[name] = _with_classes(value, name, order) if value.shape[:1] == shape[:1] else value
    absent = tuple(name for name in ours if name not in names and name != "global_step")
    return load_openpcdet(detector, given, without_iou_head=bool(absent)), absent


def _is_convolution_there(name: str, ours: Tensor) -> bool:
    """Whether a weight of fewer axes is that of a 1 x 1 convolution in mmdetection3d."""
    return (
        name.endswith(".weight")
        and (name.startswith("roi_head.") or ".vsa_point_feature_fusion." in name)
        and ours.dim() in (2, 3)
    )


def _positions(have: Sequence[str], want: Sequence[str]) -> list[int]:
    """Where each wanted class stands among those that are there. Case does not matter."""
    there = [name.lower() for name in have]
    if sorted(there) != sorted(name.lower() for name in want):
        raise InvalidInput(
            f"the classes {', '.join(have)} and {', '.join(want)} are not the same; choose a preset with the classes of the weights "
            "(their order does not matter), or name its classes"
        )
    return [there.index(name.lower()) for name in want]


def _with_classes(value: Tensor, name: str, order: Sequence[int]) -> Tensor:
    """A layer of the anchor head for classes in another order; other layers as they are. Every number stays what it is."""
    layer = name.split(".")[1]
    if not name.startswith("dense_head.") or layer not in _WIDTHS:
        return value
    classes, index = len(order), torch.as_tensor(order)
    width = _WIDTHS[layer] or classes
    if value.shape[0] != classes * 2 * width:
        return value  # `load_openpcdet` names the fault
    blocks = value.reshape(classes, 2, width, *value.shape[1:])[index]
    if _WIDTHS[layer] is None:
        blocks = blocks[:, :, index]
    return blocks.reshape(value.shape)
