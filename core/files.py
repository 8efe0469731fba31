"""Writing files so that a reader sees the old one or the whole new one, never a part.

A file is written under a temporary name in the same folder, synced, and renamed. A killed process may leave a temporary file; its
name starts with a dot and ends in `.tmp`.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_file(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that appears complete and synced when the block ends, or not at all when it raises.

    Args:
        path: Where the file appears. Missing folders are made.

    Yields:
        The file to write to.

    Raises:
        OSError: The file cannot be written.

    Example:
        with atomic_file("runs/scores.npy") as file:
            np.save(file, scores)
    """
    with _renamed(Path(path)) as descriptor, os.fdopen(descriptor, "wb", closefd=False) as file:
        yield file


def write_atomically(path: str | Path, data: bytes | Iterable[bytes | memoryview]) -> None:
    """Write a file completely or not at all.

    Args:
        path: Where the file appears. Missing folders are made.
        data: Its content, or the pieces of it in order.

    Raises:
        OSError: The file cannot be written.
    """
    with _renamed(Path(path)) as descriptor:
        for piece in [data] if isinstance(data, bytes) else data:
            view = memoryview(piece)
            while view:
                view = view[os.write(descriptor, view) :]


def sync_folder(folder: str | Path) -> None:
    """Make the renames in a folder durable.

    Args:
        folder: The folder.

    Raises:
        OSError: It cannot be opened.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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
