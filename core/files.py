"""Writing files so that a reader sees the old one or the whole new one, never a part.

Temporary name in the same folder, fsync, rename. A killed process may leave a temporary file; its name starts with a dot and ends
in ``.tmp``.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: Path) -> Iterator[BinaryIO]:
    """A binary file that appears at ``path`` complete and synced when the block ends, or not at all when it raises."""
    with _renamed(path) as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
        yield file


def write_atomically(path: Path, data: bytes | Iterable[bytes]) -> None:
    """``data``, or all its pieces, under ``path``, or nothing. Raises ``OSError``."""
    with _renamed(path) as descriptor:
        for piece in [data] if isinstance(data, bytes) else data:
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]


@contextmanager
def _renamed(path: Path) -> Iterator[int]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o644)
    try:
        try:
            yield descriptor
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Make renames in ``folder`` durable."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
