"""The vehicle half of a detector in one file: what the server hands to the fleet.

The file holds the encoder's weights, its configuration, and what its training knew about its data. Its hash covers every byte of it.
A changed weight that no hash reveals (files of version 0.1 have none) still changes the encoder fingerprint, so the server refuses
what such an encoder makes. A vehicle that is told the fingerprint refuses the file itself (`check_fingerprint`).

Read next: `core/tensor_file.py`, which reads and checks the file, and `perception/vehicle/extractor.py`, which runs the encoder.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.rig import RigSpec
from ...core.tensor_file import TensorFile, TensorFileKind, load_module, write_tensors
from ...core.trained_on import TrainedOn
from ..models.encoders.encoder import Encoder
from ..models.encoders.fingerprint import encoder_fingerprint
from ..models.encoders.scan_survey import point_features
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
    encoder, file = load_module(path, _KIND, _builder, in_run=ENCODER_FILE)
    trained = TrainedOn.from_metadata(file)
    if trained is not None:
        trained.check_fits(file.path, point_range=encoder.spec.grid.range, features=point_features(encoder))
    encoder.trained_on = trained
    return encoder


def _builder(file: TensorFile) -> Callable[[], Encoder]:
    return config_from_json(_Stored, file.described("config")).encoder.build


def check_fingerprint(found: str, expected: str, rig: RigSpec, *, encoder: Encoder | None = None) -> None:
    """Refuse an encoder that is not the one that the server named. The hash in a file tells damage, not another file.

    Args:
        found: The fingerprint of the encoder with this rig.
        expected: The fingerprint that the server told, or at least its first 12 digits, in hexadecimal.
        rig: The rig, for the message.
        encoder: The encoder, to recognize its fingerprint for no rig or for the rig of its training.

    Raises:
        InvalidInput: The two differ, or `expected` is no fingerprint.
    """
    wanted = expected.strip().lower().rstrip("…")
    if not re.fullmatch(r"[0-9a-f]{12,64}", wanted):
        raise InvalidInput(
            f"an encoder fingerprint has 64 hexadecimal digits, of which at least the first 12 are needed; found {shown(expected, most=80)!r}"
        )
    if not found.startswith(wanted):
        _recognize(wanted, rig, encoder)
        raise InvalidInput(
            f"the encoder with the rig {rig} has the fingerprint {found}, and {wanted} is expected; nothing was extracted. Get the encoder "
            "file from the server again, and give the rig that the server expects (--z-shift, --intensity-scale)"
        )


def _recognize(wanted: str, rig: RigSpec, encoder: Encoder | None) -> None:
    """Raise with the cause where the expected fingerprint is of the right encoder and another rig."""
    if encoder is None:
        return
    trained = None if encoder.trained_on is None else encoder.trained_on.rig
    for other, what in ((trained, "the rig of its training"), (RigSpec(), "no rig")):
        if other is not None and encoder_fingerprint(encoder, other).startswith(wanted):
            options = f"--z-shift {other.z_shift:g} --intensity-scale {other.intensity_scale:g}"
            raise InvalidInput(
                f"{wanted} is the fingerprint of this encoder with {what} ({other}), and the rig is {rig}; nothing was extracted. Expect the "
                f"fingerprint with the rig of the fleet, which `extract` prints and `ingest` needs, or give {options} if that is the rig"
            )
