"""The size of a camera picture from the first bytes of its file, without a picture library: PNG and JPEG.

Read next: `kitti.py`, which crops scans to the view of the camera.
"""

from __future__ import annotations

import struct
from pathlib import Path

from ..core.errors import InvalidInput
from ..core.files import check_input_file
from ..core.foreign_text import shown

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".PNG", ".JPG", ".JPEG")
"""Suffixes of the pictures whose size is read."""
LARGEST_SIDE = 65_536
"""Pixels of the largest side that is believed."""
_FRAMES = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # JPEG's markers "start of frame", without tables
_ALONE = frozenset((0x01, *range(0xD0, 0xD9)))  # markers without a length


def find_picture(folder: Path, name: str) -> Path | None:
    """Find the picture of a frame.

    Args:
        folder: Folder of the pictures.
        name: Name of the frame.

    Returns:
        The first file `NAME.png`, `.jpg` or `.jpeg`, in small or capital letters; None where there is none.
    """
    return next((path for suffix in PICTURE_SUFFIXES if (path := folder / f"{name}{suffix}").is_file()), None)


def read_picture_size(path: Path | str) -> tuple[int, int]:
    """Read the size of a PNG or JPEG picture, whatever its suffix says.

    Args:
        path: The picture.

    Returns:
        Width and height in pixels.

    Raises:
        InvalidInput: The file is neither, is cut off, or states a size outside 1 to 65,536 pixels.
    """
    check_input_file(path, "picture")
    with open(path, "rb") as file:
        head = file.read(24)
        if head[:8] == b"\x89PNG\r\n\x1a\n":
            size = struct.unpack(">II", head[16:24]) if len(head) == 24 and head[12:16] == b"IHDR" else None
        elif head[:2] == b"\xff\xd8":
            file.seek(2)
            size = _jpeg_size(file.read(1 << 20))
        else:
            raise InvalidInput(
                f"{shown(path)} is not a PNG or JPEG picture, so the size of the camera's view is not known; replace it, or give the size "
                "(--image-size WIDTH HEIGHT)"
            )
    if size is None or not all(0 < side <= LARGEST_SIDE for side in size):
        found = "it is cut off" if size is None else f"it says {size[0]} x {size[1]} pixels"
        raise InvalidInput(
            f"the size of the picture {shown(path)} cannot be read: {found}; replace it, or give the size (--image-size WIDTH HEIGHT)"
        )
    return size[0], size[1]


def _jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Width and height of the first frame header. A segment is FF, marker, length (with its own two bytes), content."""
    at = 0
    while at + 9 <= len(data):
        if data[at] != 0xFF:
            return None
        marker = data[at + 1]
        if marker == 0xFF:  # fill byte
            at += 1
        elif marker in _ALONE:
            at += 2
        elif marker in _FRAMES:
            height, width = struct.unpack(">HH", data[at + 5 : at + 9])
            return width, height
        elif marker in (0xD9, 0xDA):  # the end, or the pixels, before any frame header
            return None
        else:
            (length,) = struct.unpack(">H", data[at + 2 : at + 4])
            if length < 2:
                return None
            at += 2 + length
    return None
