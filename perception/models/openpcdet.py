"""Weights of OpenPCDet: the parts of its detectors are our parts under other names; below a part every name is the same.

Published SECOND, SECOND-IoU and PV-RCNN weights load completely or not at all, and ours can be given back under OpenPCDet's names.
Which part has which name stands beside each encoder and decoder (`openpcdet_parts`), so nothing here knows a detector by name.
Batch norm's `num_batches_tracked` is part of both. OpenPCDet's `global_step` counts its training steps: it is not read, and 0 when
given back. Source: OpenPCDet `detector3d_template.py`. The command that uses this is `tools/import_weights.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.tensor_file import listed
from .detector import Detector

_STEP = "global_step"
_KEYPOINTS = "pfe."
_NUMBERS = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)

SparseLayout = Literal["spconv 2", "spconv 1"]
"""Order of the axes of a sparse convolution's weight: (out, z, y, x, in) in spconv 2, (z, y, x, in, out) in spconv 1."""


def openpcdet_parts(detector: Detector) -> Mapping[str, str]:
    """Find the parts that a detector shares with OpenPCDet.

    Args:
        detector: any detector.

    Returns:
        OpenPCDet's name of every part by ours, such as `decoder.anchor_head` -> `dense_head`. Every weight lies in exactly one.

    Raises:
        InvalidInput: OpenPCDet has no such detector.
    """
    halves = {"encoder": detector.encoder.openpcdet_parts, "decoder": detector.decoder.openpcdet_parts}
    for half, parts in halves.items():
        if not parts:
            raise InvalidInput(
                f"the {half} of this {detector.label} has no counterpart in OpenPCDet, so it cannot exchange weights with it"
            )
    return {f"{half}.{ours}": theirs for half, parts in halves.items() for ours, theirs in parts.items()}


def openpcdet_state(detector: Detector) -> dict[str, Tensor]:
    """Copy the weights of a detector under OpenPCDet's names.

    Args:
        detector: a detector that OpenPCDet has too.

    Returns:
        A complete `model_state` on the CPU; sparse weights are laid out as in spconv 2.

    Raises:
        InvalidInput: OpenPCDet has no such detector.
    """
    return {_STEP: torch.zeros(1, dtype=torch.int64)} | {n: t.cpu().clone() for n, t in _by_their_name(detector).items()}


def load_openpcdet(detector: Detector, state: Mapping[str, Tensor], *, without_iou_head: bool = False) -> SparseLayout:
    """Copy an OpenPCDet state dict into a detector, completely.

    Args:
        detector: the detector to fill. It is untouched if anything does not fit.
        state: the weights by OpenPCDet's names.
        without_iou_head: the weights are SECOND's, which has no IoU head; that of SECOND-IoU stays as it is, untrained.

    Returns:
        How the sparse weights were laid out. Those of spconv 1 are permuted to the layout of spconv 2, which is ours.

    Raises:
        InvalidInput: Weights do not fit; the message counts missing, left-over and misfit names and lists the first of each.
    """
    wanted = _by_their_name(detector)
    given = {name: value for name, value in state.items() if name != _STEP}
    optional = _optional_names(detector, wanted)
    _check_optional_part(detector, wanted, given, optional, without_iou_head)
    if without_iou_head:
        wanted = {name: target for name, target in wanted.items() if name not in optional}
    layout = _sparse_layout(wanted, given)
    if layout == "spconv 1":
        given = {n: t.permute(4, 0, 1, 2, 3) if t.dim() == 5 else t for n, t in given.items()}

    missing = [f"missing {name} {tuple(t.shape)}" for name, t in wanted.items() if name not in given]
    left_over = [f"left over {name} {tuple(t.shape)}" for name, t in given.items() if name not in wanted]
    misfit = [f"{name}: {fault}" for name, t in wanted.items() if name in given and (fault := _misfit(t, given[name]))]
    if faults := len(missing) + len(left_over) + len(misfit):
        listing = [line for part in (missing, left_over, misfit) for line in listed(part)]
        lines = "\n  ".join([f"the OpenPCDet weights do not fit this {detector.label} ({faults} names):", *listing])
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
        part = next((ours for ours in theirs if name.startswith(f"{ours}.")), None)
        if part is None:
            raise InvalidInput(f"OpenPCDet has no name for the weight {name} of this {detector.label}")
        named[theirs[part] + name[len(part) :]] = value
    return named


def _optional_names(detector: Detector, wanted: Mapping[str, Tensor]) -> set[str]:
    """Names of the weights that published weights may lack; none for most detectors."""
    part = detector.decoder.openpcdet_optional
    return set() if part is None else {name for name in wanted if name.startswith(f"{part}.")}


def _check_optional_part(
    detector: Detector, wanted: Mapping[str, Tensor], given: Mapping[str, Tensor], optional: set[str], left_out: bool
) -> None:
    if left_out and not optional:
        raise InvalidInput(f"{detector.label} has no IoU head to leave out; import without --without-iou-head")
    part = detector.decoder.openpcdet_optional
    if left_out and any(name.startswith(f"{part}.") for name in given):
        raise InvalidInput(f"these weights have an IoU head ({part}.*); import them without --without-iou-head")
    if not left_out and optional and given.keys() == wanted.keys() - optional:
        raise InvalidInput(
            f"these weights have no IoU head ({part}.*): they are SECOND's, and this detector is {detector.label}. With "
            "--without-iou-head everything else is imported; the IoU head, which gives every detection its score, is then "
            "untrained and must be trained"
        )


def _sparse_layout(wanted: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> SparseLayout:
    """Tell the layout of the file's 5-d weights by their shapes.

    One file has one layout, so a weight that fits both ways (as many channels as kernel cells) follows the others; the last
    layer, with its kernel of 3 x 1 x 1, never fits both ways.
    """
    sparse = {n: (t.shape, given[n].shape) for n, t in wanted.items() if n in given and t.dim() == given[n].dim() == 5}
    fits_2 = {n for n, (shape, found) in sparse.items() if found == shape}
    fits_1 = {n for n, (shape, found) in sparse.items() if (found[4], *found[:4]) == shape}
    return "spconv 1" if fits_1 - fits_2 and not fits_2 - fits_1 else "spconv 2"


def _misfit(target: Tensor, value: Tensor) -> str:
    """What keeps `value` from being copied into `target`; empty if nothing does."""
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
    ours, theirs = (any(name.startswith(_KEYPOINTS) for name in names) for names in (wanted, given))
    if ours != theirs:
        advice.append(
            f"this detector is {detector.label}, the weights have {'a' if theirs else 'no'} keypoint part ({_KEYPOINTS}*): choose a "
            "preset of the detector that was trained"
        )
    balls = "pfe.SA_rawpoints"
    ours, theirs = (any(name.startswith(balls) for name in names) for names in (wanted, given))
    if theirs and not ours:
        advice.append(
            "the weights gather from raw points, this detector does not, because single points can be computed from such uploads: choose "
            "a preset of PV-RCNN as published, such as kitti_pv_rcnn_published"
        )
    box, columns = "dense_head.conv_box.bias", "backbone_3d.conv_input.0.weight"
    if box in given and box in wanted and given[box].shape != wanted[box].shape:
        names = ", ".join(detector.class_names)
        advice.append(
            f"the weights have anchors of {given[box].numel() / 14:g} classes, this detector of {len(detector.class_names)} "
            f"({names}): choose a preset with the classes of the weights, in their order"
        )
    layer, wanted_layer = given.get(columns), wanted.get(columns)
    if layer is not None and wanted_layer is not None and layer.dim() == 5 and layer.shape[-1] != wanted_layer.shape[-1]:
        advice.append(
            f"the weights read {layer.shape[-1]} values per point, this detector {wanted_layer.shape[-1]} (x, y, z and its "
            "point features): set point-features as in training"
        )
    return "; ".join(advice) or "build the detector with the configuration that the weights were trained with"
