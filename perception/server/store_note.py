"""What a store says of its uploads: which defences they passed, and what an audit measured of such uploads.

`upcycle3d ingest` writes it, `upcycle3d inspect` shows it. It decides nothing: the encoder fingerprint does.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from ...core.config_json import config_from_json, config_to_json
from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.strict_json import read_json

NOTE = "uploads.json"
"""The note in the folder of a store."""


@dataclass(frozen=True, kw_only=True)
class MeasuredUploads:
    """What an audit measured of uploads in one codec."""

    codec: str
    """How their features are stored."""
    text: str
    """What was measured, and how much work stands behind it."""


@dataclass(frozen=True, kw_only=True)
class StoreNote:
    """What is known of the uploads of a store."""

    defences: str
    """The defences of the encoder as `upcycle3d defend` spells them; `none` without one."""
    measured: tuple[MeasuredUploads, ...] = ()
    """What an audit measured of uploads of this encoder, codec by codec; empty where nobody measured."""
    encoder: str
    """Fingerprint, without a rig, of the encoder that this is about."""

    def about(self, codecs: Iterable[str]) -> list[str]:
        """Say what was measured of scenes in some codecs.

        Args:
            codecs: The codecs of the scenes.

        Returns:
            One sentence per codec; it says where nothing was measured.
        """
        texts = {found.codec: found.text for found in self.measured}
        others = ", ".join(texts)
        return [
            texts.get(codec, f"{codec}: not measured" + (f"; an audit measured {others} of this encoder" if others else ""))
            for codec in sorted(codecs)
        ]


def write_store_note(store: Path, note: StoreNote) -> None:
    """Write the note of a store, atomically.

    Args:
        store: Folder of the store.
        note: What is known.
    """
    write_atomically(store / NOTE, (json.dumps(config_to_json(note), indent=1) + "\n").encode())


def read_store_note(store: Path) -> StoreNote | None:
    """Read the note of a store.

    Args:
        store: Folder of the store.

    Returns:
        The note; None where there is none, as in stores of version 0.1.

    Raises:
        InvalidInput: The file is no such note.
    """
    path = store / NOTE
    if not path.exists():
        return None
    remedy = f"delete {path} and run `upcycle3d ingest` again"
    stored = read_json(path, "the note on the uploads of a store", remedy=remedy)
    try:
        return config_from_json(StoreNote, stored)
    except InvalidInput as error:
        raise InvalidInput(f"{path} is no note on the uploads of a store: {error}; {remedy}") from error
