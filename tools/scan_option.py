"""The options that say how files of scans are read, flat in every command: `--columns`, `--z-shift` and so on.

Read next: `core/scan_options.py`, which explains each of them.
"""

from __future__ import annotations

from typing import Annotated

import tyro

from ..core.scan_options import ScanOptions

ScanOption = Annotated[ScanOptions, tyro.conf.arg(name="")]
"""`ScanOptions` as options without a prefix."""
