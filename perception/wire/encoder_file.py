"""The vehicle half of a detector in one file: what the server hands to the fleet.

The file holds the encoder's weights and its configuration, nothing else. A changed weight that the hash of the file does not
reveal (files of version 0.1 have no hash) still changes the encoder fingerprint, so the server refuses what such an encoder
makes.

Read next: `core/tensor_file.py`, which reads and checks the file, and `perception/vehicle/extractor.py`, which runs the encoder.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.tensor_file import TensorFileKind, build_module, read_tensors, write_tensors
from ...core.trained_on import TrainedOn
from ..models.encoders.encoder import Encoder
from ..models.encoders.table import EncoderConfig

ENCODER_FILE = "encoder.safetensors"
_KIND = TensorFileKind(
    name="vehicle encoder",
    format="upcycle3d encoder 3",
    earlier=("upcycle3d encoder 2",),
    earlier_hashed=False,
    advice="give the encoder.safetensors of a run folder; a whole detector is read by load_detector, and has an `encoder`",
    max_bytes=1 << 30,
)


@dataclass(frozen=True)
class _Stored:
    """What the metadata holds: the configuration with its kind."""

    encoder: EncoderConfig


def save_encoder(path: str | Path, encoder: Encoder) -> None:
    """Write the weights and the configuration of an encoder to one file, atomically.

    Args:
        path: The file to write.
        encoder: An encoder whose configuration is in `models/encoders/table.py`.

    Raises:
        InvalidInput: The encoder's configuration is not in the table, so no vehicle could load the file.
    """
    config = encoder.config
    if not isinstance(config, EncoderConfig):
        raise InvalidInput(
            f"a vehicle cannot load a {type(encoder).__name__} from a file: its configuration, a {type(config).__name__}, is not in "
            "perception/models/encoders/table.py; add it there"
        )
    meta = {"config": json.dumps(config_to_json(_Stored(config)))}
    if encoder.trained_on is not None:
        meta |= encoder.trained_on.as_metadata()
    write_tensors(path, encoder.state_dict(), meta, _KIND)


def load_encoder(path: str | Path) -> Encoder:
    """Load the encoder that a vehicle runs.

    Args:
        path: The encoder file, or the run folder that holds it.

    Returns:
        The encoder in evaluation mode, on the CPU.

    Raises:
        InvalidInput: The file is missing, damaged, incomplete or of another kind, or holds NaN; nothing is loaded then.

    Example:
        ```python
        encoder = load_encoder("runs/source")
        extractor = Extractor(encoder, RigSpec(z_shift=1.73), "fp16")
        ```
    """
    if not isinstance(path, str | Path):
        raise InvalidInput(
            f"an encoder is loaded from a run folder or an encoder file, found {type(path).__name__}; give its path"
        )
    path = Path(path)
    file = read_tensors(path / ENCODER_FILE if path.is_dir() else path, _KIND)
    described = file.described("config")
    try:
        config = config_from_json(_Stored, described).encoder
    except InvalidInput as error:
        raise InvalidInput(f"the configuration in {file.path} cannot be used: {error}; {_KIND.advice}") from error
    encoder: Encoder = build_module(config.build, file.tensors, file.path)
    encoder.trained_on = TrainedOn.from_metadata(file)
    return encoder.eval()
