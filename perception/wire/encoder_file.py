"""The vehicle half in one file: what the server hands to the fleet. Safetensors with the encoder's configuration, nothing else.

The vehicle side must not load training code, so the few lines of checking stand here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ..models.encoders.pv_rcnn import PvRcnnEncoder, PvRcnnEncoderConfig
from ..models.encoders.second import SecondEncoder, SecondEncoderConfig

_FORMAT = "upcycle3d encoder 2"


@dataclass(frozen=True)
class _Stored:
    """What the metadata holds: the configuration with its kind."""

    encoder: SecondEncoderConfig | PvRcnnEncoderConfig


def save_encoder(path: Path, encoder: nn.Module) -> None:
    """Write the encoder's weights and configuration, atomically."""
    if not isinstance(encoder, SecondEncoder | PvRcnnEncoder):
        raise InvalidInput(f"a vehicle file holds a SecondEncoder or a PvRcnnEncoder, found {type(encoder).__name__}")
    meta = {"format": _FORMAT, "config": json.dumps(config_to_json(_Stored(encoder.config)))}
    tensors = {name: t.detach().cpu().contiguous() for name, t in encoder.state_dict().items()}
    write_atomically(path, save(tensors, metadata=meta))


def load_encoder(path: Path) -> SecondEncoder | PvRcnnEncoder:
    """An encoder in evaluation mode. Raises InvalidInput for a missing, damaged or foreign file.

    A flipped bit in the weights changes the fingerprint, so the server refuses what such an encoder makes.
    """
    try:
        with safe_open(path, framework="pt") as file:
            meta = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise InvalidInput(
            f"cannot read the encoder {path}: {error}; get the file again from where the server exported it"
        ) from error
    if meta.get("format") != _FORMAT:
        raise InvalidInput(f"{path} is no vehicle encoder: expected format {_FORMAT!r}, found {meta.get('format')!r}")
    config = config_from_json(_Stored, json.loads(meta["config"])).encoder
    encoder = PvRcnnEncoder(config) if isinstance(config, PvRcnnEncoderConfig) else SecondEncoder(config)
    encoder.load_state_dict(tensors)
    return encoder.eval()
