"""Weights of OpenPCDet: the parts of its detectors are our parts under other names; below a part every name is the same.

Published SECOND, SECOND-IoU and PV-RCNN weights load completely or not at all, and ours can be given back under OpenPCDet's names.
Batch norm's ``num_batches_tracked`` is part of both. OpenPCDet's ``global_step`` counts its training steps: it is not read, and 0 when
given back. Source: OpenPCDet ``detector3d_template.py``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from .decoders.pv_rcnn import PvRcnnDecoder
from .detector import Detector

_SECOND_IOU_PARTS = {
    "encoder.sparse_backbone": "backbone_3d",
    "decoder.bev_backbone": "backbone_2d",
    "decoder.anchor_head": "dense_head",
    "decoder.roi_head": "roi_head",
}
_PV_RCNN_PARTS = {
    "encoder.second.sparse_backbone": "backbone_3d",
    "encoder.stage_abstractions": "pfe.SA_layers",
    "encoder.raw_abstraction": "pfe.SA_rawpoints",
    "decoder.fusion": "pfe.vsa_point_feature_fusion",
    "decoder.keypoint_head": "point_head",
    "decoder.bev_backbone": "backbone_2d",
    "decoder.anchor_head": "dense_head",
    "decoder.roi_head": "roi_head",
}
_STEP = "global_step"
_HEAD = "roi_head."
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)

SparseLayout = Literal["spconv 2", "spconv 1"]


def openpcdet_parts(detector: Detector) -> Mapping[str, str]:
    """The parts of a detector, ours -> OpenPCDet's. Every weight lies in exactly one of them."""
    return _PV_RCNN_PARTS if isinstance(detector.decoder, PvRcnnDecoder) else _SECOND_IOU_PARTS


def openpcdet_state(detector: Detector) -> dict[str, Tensor]:
    """A copy of the weights as OpenPCDet's ``model_state``: its names, complete, sparse weights as spconv 2 has them."""
    return {_STEP: torch.zeros(1, dtype=torch.int64)} | {n: t.cpu().clone() for n, t in _by_their_name(detector).items()}


def load_openpcdet(detector: Detector, state: Mapping[str, Tensor], *, without_iou_head: bool = False) -> SparseLayout:
    """Copy an OpenPCDet state dict into a detector, completely.

    without_iou_head: the weights are SECOND's, which has no IoU head; that of the detector stays as it is, untrained.
    Returns how the sparse weights were laid out: (out, z, y, x, in) of spconv 2, which is ours, or (z, y, x, in, out) of spconv 1,
    which are permuted.

    Raises InvalidInput with every missing, left-over and misfit name; the detector is then untouched.
    """
    wanted = _by_their_name(detector)
    given = {name: value for name, value in state.items() if name != _STEP}
    _check_iou_head(detector, wanted, given, without_iou_head)
    if without_iou_head:
        wanted = {name: target for name, target in wanted.items() if not name.startswith(_HEAD)}
    layout = _sparse_layout(wanted, given)
    if layout == "spconv 1":
        given = {n: t.permute(4, 0, 1, 2, 3) if t.dim() == 5 else t for n, t in given.items()}

    faults = [f"missing {name} {tuple(t.shape)}" for name, t in wanted.items() if name not in given]
    faults += [f"left over {name} {tuple(t.shape)}" for name, t in given.items() if name not in wanted]
    faults += [f"{name}: {fault}" for name, t in wanted.items() if name in given and (fault := _misfit(t, given[name]))]
    if faults:
        lines = "\n  ".join([f"the OpenPCDet weights do not fit this detector ({len(faults)} names):", *faults])
        raise InvalidInput(f"{lines}\n{_advice(detector, wanted, given)}")
    with torch.no_grad():
        for name, target in wanted.items():
            target.copy_(given[name])
    return layout


def _by_their_name(detector: Detector) -> dict[str, Tensor]:
    """The weights of the detector themselves (not copies) by OpenPCDet's names."""
    theirs = openpcdet_parts(detector)
    named = {}
    for name, value in detector.state_dict().items():
        part = next(ours for ours in theirs if name.startswith(f"{ours}."))
        named[theirs[part] + name[len(part) :]] = value
    return named


def _check_iou_head(
    detector: Detector, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], without_iou_head: bool
) -> None:
    there = any(name.startswith(_HEAD) for name in given)
    if isinstance(detector.decoder, PvRcnnDecoder):
        if without_iou_head:
            raise InvalidInput("PV-RCNN has no IoU head to leave out; import without --without-iou-head")
    elif without_iou_head and there:
        raise InvalidInput("these weights have an IoU head (roi_head.*); import them without --without-iou-head")
    elif not without_iou_head and given.keys() == {name for name in wanted if not name.startswith(_HEAD)}:
        raise InvalidInput(
            "these weights have no IoU head (roi_head.*): they are SECOND's, this detector is SECOND-IoU. With --without-iou-head "
            "everything else is imported; the IoU head, which gives every detection its score, is then untrained and must be trained"
        )


def _sparse_layout(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> SparseLayout:
    """The layout of the file's 5-d weights, by shape. One file has one layout, so a weight that fits both ways (as many channels as
    kernel cells) follows the others; the last layer, with its kernel of 3 x 1 x 1, never does.
    """
    sparse = {n: (t.shape, given[n].shape) for n, t in wanted.items() if n in given and t.dim() == given[n].dim() == 5}
    fits_2 = {n for n, (shape, found) in sparse.items() if found == shape}
    fits_1 = {n for n, (shape, found) in sparse.items() if (found[4], *found[:4]) == shape}
    return "spconv 1" if fits_1 - fits_2 and not fits_2 - fits_1 else "spconv 2"


def _misfit(target: Tensor, value: Tensor) -> str:
    """What keeps ``value`` from being copied into ``target``; empty if nothing does."""
    if value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return f"expected plain numbers, found a tensor of {value.layout} {value.dtype} on {value.device}"
    if value.shape != target.shape:
        return f"expected {tuple(target.shape)}, found {tuple(value.shape)}"
    if value.dtype not in _NUMBERS or value.is_floating_point() != target.is_floating_point():
        return f"expected {target.dtype}, found {value.dtype}"
    return "" if torch.isfinite(value).all() else "holds numbers that are not finite"


def _advice(detector: Detector, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> str:
    """What to change, where the shapes tell."""
    advice = []
    if isinstance(detector.decoder, PvRcnnDecoder) != any(name.startswith("pfe.") for name in given):
        ours, theirs = ("PV-RCNN", "no") if isinstance(detector.decoder, PvRcnnDecoder) else ("SECOND-IoU", "a")
        advice.append(
            f"this detector is {ours}, the weights have {theirs} keypoint part (pfe.*): choose a preset of the other kind"
        )
    box, columns = "dense_head.conv_box.bias", "backbone_3d.conv_input.0.weight"
    if box in given and given[box].shape != wanted[box].shape:
        names = ", ".join(detector.class_names)
        advice.append(
            f"the weights have anchors of {given[box].numel() / 14:g} classes, this detector of {len(detector.class_names)} "
            f"({names}): choose a preset with the classes of the weights, in their order"
        )
    if columns in given and given[columns].dim() == 5 and given[columns].shape[-1] != wanted[columns].shape[-1]:
        advice.append(
            f"the weights read {given[columns].shape[-1]} values a point, this detector {wanted[columns].shape[-1]} (x, y, z and its "
            "point features): set point-features as in training"
        )
    return "; ".join(advice) or "build the detector with the configuration that the weights were trained with"
