"""Writing files so that a reader sees the old one or the whole new one, never a part.

A file is written under a temporary name in the same folder, synced, and renamed. A killed process may leave a temporary file; its
name starts with a dot and ends in `.tmp`. Whoever holds the folder's lock (`locked_folder`) removes it with `remove_litter`.
"""

from __future__ import annotations

import fcntl
import lzma
import os
import re
import secrets
import shutil
import stat
import struct
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tokenize import TokenError
from typing import BinaryIO

from .errors import InvalidInput, UpcycleError
from .foreign_text import shown

LOCK = ".lock"
"""Name of the file that `locked_folder` locks."""
NPY_FAULTS = (
    ValueError, OSError, TypeError, SyntaxError, EOFError, KeyError, OverflowError, MemoryError, RecursionError, TokenError,
)  # fmt: skip
"""What numpy raises for a damaged `.npy` header, whose text it evaluates."""
ZIP_FAULTS = (
    zipfile.BadZipFile, zlib.error, lzma.LZMAError, struct.error, ValueError, OverflowError, EOFError, NotImplementedError,
    RuntimeError, OSError,
)  # fmt: skip
"""What zipfile raises for a damaged archive."""
_LOCK_SECONDS = 0.5
_LITTER = re.compile(r"\.([0-9a-f]{16}|objects\.[0-9]+)\.tmp")  # of `atomic_file`; and of the GT database of an earlier version


def check_input_file(path: str | Path, what: str, *, most: int | None = None) -> None:
    """Refuse, before it is opened, what a reader would wait for or read without end: a pipe, a socket, a device, a file that is too large.

    What does not exist or is a folder passes: the reader says so in its own words.

    Args:
        path: The file.
        what: What it is, for the message: "label file".
        most: Bytes of the largest file that is read; None for no limit.

    Raises:
        InvalidInput: It is no regular file, or it is larger.
    """
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return
    if not stat.S_ISREG(found.st_mode) and not stat.S_ISDIR(found.st_mode):
        raise InvalidInput(
            f"the {what} {shown(path)} is not a regular file but a pipe, a socket or a device; write it to a file first, and give that"
        )
    if most is not None and stat.S_ISREG(found.st_mode) and found.st_size > most:
        raise InvalidInput(f"the {what} {shown(path)} has {found.st_size:,} bytes, more than the {most:,} that are read")


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


def remove_litter(folder: str | Path, *names: str) -> int:
    """Delete the temporary files that killed processes left in a folder. Only who holds the folder's lock may do it.

    Args:
        folder: The folder; it may be missing. Folders inside it are left alone.
        *names: Temporary files and folders of other names to delete as well.

    Returns:
        How many were deleted.

    Raises:
        OSError: One cannot be deleted.

    Example:
        >>> from upcycle3d.core.files import remove_litter
        >>> remove_litter("no_such_folder")
        0
    """
    folder = Path(folder)
    found = [path for path in (folder.iterdir() if folder.is_dir() else ()) if _LITTER.fullmatch(path.name) or path.name in names]
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    return len(found)


@contextmanager
def locked_folder(folder: str | Path, busy: str, *, wait: bool = False, name: str = LOCK) -> Iterator[int]:
    """Hold a folder for this process; the kernel releases it however the process ends.

    Args:
        folder: The folder. It is made if it is missing.
        busy: What to say when another process holds it.
        wait: Whether to wait for the other process instead.
        name: Name of the lock file, where not the whole folder is held but one file in it.

    Yields:
        The descriptor of the lock. A forked worker closes it, so that it does not outlive its parent.

    Raises:
        UpcycleError: Another process holds the folder.
        OSError: The folder cannot be written.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = os.open(folder / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o644)
    try:
        if wait:
            fcntl.flock(lock, fcntl.LOCK_EX)
        elif not _locked_soon(lock):
            raise UpcycleError(busy)
        yield lock
    finally:
        os.close(lock)


def _locked_soon(lock: int) -> bool:
    """Take a lock within half a second: a worker whose parent was just killed may hold it for a moment."""
    end = time.monotonic() + _LOCK_SECONDS
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > end:
                return False
            time.sleep(0.05)
        else:
            return True


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
