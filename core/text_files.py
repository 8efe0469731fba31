"""Reading text files of users: UTF-8 with or without a byte order mark, and a sentence for everything else.

Read next: `foreign_text.py`, which makes what is inside safe to show.
"""

from __future__ import annotations

import codecs
from pathlib import Path

from .errors import InvalidInput
from .files import check_input_file
from .foreign_text import shown

MOST_TEXT_BYTES = 16 << 20
"""Bytes of the largest text file that is read. Lists of frames are far smaller."""
MOST_LINES = 400_000
"""Lines of the longest text file that is read."""


def read_text(path: Path | str, what: str) -> str:
    """Read a text file of a user: UTF-8, with or without a byte order mark, with line ends of any system.

    Args:
        path: The file.
        what: What it is, for the message: "label file".

    Returns:
        The text, without the byte order mark.

    Raises:
        InvalidInput: The file cannot be read, is a pipe or a device, has more than 16 MiB or 400,000 lines, or is not UTF-8 text; the message says what it looks like.
    """
    check_input_file(path, what, most=MOST_TEXT_BYTES)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise InvalidInput(
            f"cannot read the {what} {shown(path)}: {error.strerror or error}; check the folder and the name"
        ) from error
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) or b"\0" in data[:1000]:
        looks = "UTF-16" if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "no text"
        raise InvalidInput(f"the {what} {shown(path)} is {looks}; save it as text in UTF-8")
    if (lines := data.count(b"\n")) > MOST_LINES:
        raise InvalidInput(f"the {what} {shown(path)} has {lines:,} lines, more than the {MOST_LINES:,} that are read; divide it")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise InvalidInput(
            f"the {what} {shown(path)}, line {line}: byte 0x{data[error.start]:02x} is not UTF-8, perhaps a letter in Latin-1; "
            "save the file as text in UTF-8"
        ) from error
