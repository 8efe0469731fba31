"""Which encoder made a feature: one SHA-256 over everything that shapes the numbers at the cut.

Features of two encoders do not mix: a decoder trained on one reads noise in the other. The fingerprint covers weights,
batch-norm statistics, the cut, the voxeliser's settings and order, the point features, and what the rig does to a scan
before the encoder sees it (z shift, intensity scale). The codec is not part of it; it is recorded apart.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...structures import InvalidInput, PointCloud

_FINGERPRINT_VERSION = 2


@dataclass(frozen=True, kw_only=True)
class RigSpec:
    """How one kind of vehicle's scans become the encoder's scans.

    z_shift: metres added to z so that the ground lies near 0 (the sensor's mounting height).
    intensity_scale: factor that brings the sensor's intensity to 0..1 (1/255 for bytes).
    """

    z_shift: float = 0.0
    intensity_scale: float = 1.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.z_shift) and math.isfinite(self.intensity_scale) and self.intensity_scale > 0):
            raise InvalidInput(f"a rig needs a finite z_shift and a positive intensity_scale, found {self}")

    def apply(self, points: PointCloud) -> PointCloud:
        """``points`` with z shifted and intensity scaled; the argument is left alone.

        Raises ``InvalidInput`` if the scaled intensity leaves 0..1: a wrong scale gives features that look right and are not.
        """
        xyz = points.xyz + points.xyz.new_tensor([0.0, 0.0, self.z_shift])
        if "intensity" not in points.feature_names:
            return replace(points, xyz=xyz)
        column = points.feature_names.index("intensity")
        features = points.features.clone()
        features[:, column] *= self.intensity_scale
        if len(points):
            low, high = features[:, column].min().item(), features[:, column].max().item()
            if low < -1e-3 or high > 1 + 1e-3:
                raise InvalidInput(
                    f"intensity must lie in 0..1 after scaling by {self.intensity_scale:g}, found {low:g} to {high:g}; "
                    "set RigSpec.intensity_scale for this sensor (1/255 for bytes)"
                )
        return replace(points, xyz=xyz, features=features)

    def undo(self, points: PointCloud) -> PointCloud:
        """The scan that ``apply`` made ``points`` of."""
        scale = points.features.new_tensor([self.intensity_scale if n == "intensity" else 1.0 for n in points.feature_names])
        return replace(points, xyz=points.xyz - points.xyz.new_tensor([0.0, 0.0, self.z_shift]), features=points.features / scale)

    @classmethod
    def of(cls, notes: Mapping[str, str | float | bool]) -> RigSpec:
        """The rig that a prepared dataset's notes tell of."""
        return cls(z_shift=float(notes.get("z_shift", 0.0)), intensity_scale=float(notes.get("intensity_scale", 1.0)))


def _plain(value: Any, where: str) -> Any:
    """``value`` for canonical JSON: equal Python values (0 and 0.0, tuple and list) give equal text."""
    if isinstance(value, dict):
        return {str(key): _plain(v, f"{where}.{key}") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else float(value)
    raise InvalidInput(f"the encoder's {where} is a {type(value).__name__}; a fingerprint covers finite plain values only")


def _little_endian_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        flat = flat.view(-1, tensor.element_size()).flip(1).reshape(-1)
    return flat.numpy().tobytes()


def encoder_fingerprint(encoder: nn.Module, rig: RigSpec) -> str:
    """SHA-256 (64 hexadecimal digits) of ``encoder`` behind ``rig``.

    encoder: has ``spec`` and ``config``, dataclasses of plain values. Hashed are the class name, both dataclasses, the rig,
    and every parameter and buffer (name, dtype, shape, little-endian bytes, sorted by name). ``num_batches_tracked`` counts
    training steps and changes no feature, so it is left out. Device and train/eval mode do not matter.
    """
    for name in ("spec", "config"):
        value = getattr(encoder, name, None)
        if not is_dataclass(value) or isinstance(value, type):
            raise InvalidInput(
                f"{type(encoder).__name__}.{name} must be a dataclass of plain values, found {type(value).__name__}"
            )
    tensors = dict(encoder.named_parameters(remove_duplicate=False)) | dict(encoder.named_buffers(remove_duplicate=False))
    kept = sorted((n, t) for n, t in tensors.items() if n.rpartition(".")[2] != "num_batches_tracked")
    header = {
        "fingerprint_version": _FINGERPRINT_VERSION,
        "encoder": type(encoder).__name__,
        "spec": _plain(asdict(encoder.spec), "spec"),  # type: ignore[call-overload]
        "config": _plain(asdict(encoder.config), "config"),  # type: ignore[call-overload]
        "rig": _plain(asdict(rig), "rig"),
        "tensors": [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in kept],
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for _, tensor in kept:
        digest.update(_little_endian_bytes(tensor))
    return digest.hexdigest()
