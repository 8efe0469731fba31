"""`upcycle3d export infos PROGRAM`: a prepared dataset as an info file. Read next: `perception/interchange/moving_data.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..perception.interchange.moving_data import infos_from_data
from ..perception.interchange.settings import Program
from .console import run_command, write_json
from .data_option import DataOption
from .import_infos import counts, say_moved


@dataclass(frozen=True, kw_only=True)
class ExportInfos:
    """Write a split as an info file (.pkl) of another program, with its scans beside it. Our own files are never pickles."""

    program: tyro.conf.Positional[Program]
    """Whose form."""
    data: DataOption
    """Split of a prepared dataset."""
    out: Path
    """New folder."""
    json: Path | None = None
    """Also write the counts to this file as JSON."""


def command(config: ExportInfos) -> None:
    """Write a prepared dataset as an info file of OpenPCDet or mmdetection3d."""
    split = config.data.name or "all"
    moved = infos_from_data(config.program, config.data.open(), split, config.out)
    say_moved(moved)
    write_json(config.json, counts(moved))


if __name__ == "__main__":
    sys.exit(run_command(command))
