"""Which encoder made a feature: one SHA-256 over everything that shapes the numbers at the cut.

Features of two encoders do not mix: a decoder trained on one reads noise in the other. The fingerprint covers weights,
batch-norm statistics, the cut, the settings of voxelization, the point features and their order, defences, and the kind of rig
that a scan passes before the encoder sees it (z shift, intensity scale). The rig is rounded (`RigSpec.rounded`): a mounting height to
the millimeter would name a vehicle, and whoever has the encoder file could find it by trying heights. The codec is not part of it;
it is recorded separately. Manifests and stores carry the fingerprint: see `wire/manifest.py` and `server/ingest.py`.
"""

from __future__ import annotations

import hashlib
import json
import math
import sys
from dataclasses import asdict, fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ....core.errors import InvalidInput
from ....core.rig import RigSpec
from .encoder import Encoder

_FINGERPRINT_VERSION = 2


def _plain(value: Any, where: str) -> Any:
    """`value` for canonical JSON: equal Python values (0 and 0.0, tuple and list) give equal text."""
    if isinstance(value, dict):
        return {str(key): _plain(v, f"{where}.{key}") for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v, f"{where}[{i}]") for i, v in enumerate(value)]
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, float) and math.isfinite(value):
        return int(value) if value.is_integer() else float(value)
    raise InvalidInput(f"the encoder's {where} is a {type(value).__name__}; a fingerprint covers finite plain values only")


def _values(config: Any) -> Any:
    """`asdict`, without the fields that were added later and have their defaults."""
    if isinstance(config, list | tuple):
        return [_values(value) for value in config]
    if isinstance(config, dict):
        return {key: _values(value) for key, value in config.items()}
    if not is_dataclass(config) or isinstance(config, type):
        return config
    kept = (f for f in fields(config) if not (f.metadata.get("added_later") and getattr(config, f.name) == f.default))
    return {f.name: _values(getattr(config, f.name)) for f in kept}


def _little_endian_bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    if sys.byteorder == "big":
        flat = flat.view(-1, tensor.element_size()).flip(1).reshape(-1)
    return flat.numpy().tobytes()


def encoder_fingerprint(encoder: Encoder, rig: RigSpec) -> str:
    """Compute the fingerprint of an encoder that reads scans after a rig.

    It hashes the class name of the encoder, its `spec` and `config`, the rig, and every parameter and buffer (name, dtype, shape,
    little-endian bytes, sorted by name). A field of `config` that was added later (`ADDED_LATER`) counts only where it is not at its
    default, so that encoders of before keep their fingerprint. `num_batches_tracked` counts training steps and changes no feature, so
    it is left out. Device and training or evaluation mode do not matter.

    Args:
        encoder: an encoder whose `spec` and `config` are dataclasses of plain values.
        rig: mounting height and intensity scale of the vehicles that run it. It is rounded with the rig of the encoder's training as the
            nominal one (`trained_on`). An encoder without such notes, as files of version 0.1 hold, has no nominal rig, and its
            fingerprint covers the rig as it is.

    Returns:
        SHA-256 as 64 hexadecimal digits.

    Raises:
        InvalidInput: `spec` or `config` is missing or holds more than finite plain values.
    """
    for name in ("spec", "config"):
        value = getattr(encoder, name, None)
        if not is_dataclass(value) or isinstance(value, type):
            raise InvalidInput(
                f"{type(encoder).__name__}.{name} must be a dataclass of plain values, found {type(value).__name__}"
            )
    tensors = dict(encoder.named_parameters(remove_duplicate=False)) | dict(encoder.named_buffers(remove_duplicate=False))
    kept = sorted((n, t) for n, t in tensors.items() if n.rpartition(".")[2] != "num_batches_tracked")
    trained_on = getattr(encoder, "trained_on", None)
    kind = rig if trained_on is None else rig.rounded(trained_on.rig)
    header = {
        "fingerprint_version": _FINGERPRINT_VERSION,
        "encoder": type(encoder).__name__,
        "spec": _plain(asdict(encoder.spec), "spec"),  # type: ignore[call-overload]
        "config": _plain(_values(encoder.config), "config"),
        "rig": _plain(asdict(kind), "rig"),
        "tensors": [[n, str(t.dtype).removeprefix("torch."), list(t.shape)] for n, t in kept],
    }
    text = json.dumps(header, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()
    digest = hashlib.sha256(len(text).to_bytes(8, "little") + text)
    for _, tensor in kept:
        digest.update(_little_endian_bytes(tensor))
    return digest.hexdigest()
