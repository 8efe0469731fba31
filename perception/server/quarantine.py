"""Moving files of uploads so that none is lost, and setting refused ones aside next to the reason.

Read next: `ingest.py`, which decides what is refused.
"""

from __future__ import annotations

import errno
import hashlib
import os
from pathlib import Path

from ...core.files import sync_folder, write_atomically
from ...core.foreign_text import shown
from ..wire.manifest import open_regular

QUARANTINE_BYTES = 1 << 30
"""Size up to which a refused file is kept in quarantine. Of a larger one, and of a sparse one, only size, hash and reason are kept."""
_HASHED_BYTES = 1 << 28  # of a file that is not kept
_COPY_BYTES = 1 << 22


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def move_durably(source: Path, target: Path) -> None:
    """Give a file another name or folder. It is complete and durable there before it vanishes from where it was.

    Args:
        source: A plain file.
        target: Where it goes, also on another file system.

    Raises:
        OSError: It cannot be moved, or the copy differs; the original is kept.
        BrokenShard: `source` is no plain file.
    """
    descriptor = open_regular(source)
    try:
        os.fsync(descriptor)  # the uploader may not have
        try:
            os.replace(source, target)
        except OSError as error:
            if error.errno != errno.EXDEV:
                raise
            write_atomically(target, iter(lambda: os.read(descriptor, _COPY_BYTES), b""))
            if _digest(source) != _digest(target):
                raise OSError(errno.EIO, f"the copy of {source} differs from it; the original was kept", str(target)) from error
            os.unlink(source)
    finally:
        os.close(descriptor)
    sync_folder(target.parent)
    sync_folder(source.parent)


def _too_large(path: Path) -> str:
    """Why a file is not kept in quarantine: huge, or sparse so that a copy would be; empty where it is kept."""
    status = path.stat()
    if status.st_size > QUARANTINE_BYTES:
        return f"it has more than {QUARANTINE_BYTES:,} bytes"
    if status.st_size > 1 << 20 and 4 * 512 * status.st_blocks < status.st_size:
        return "most of it is holes, which no upload has"
    return ""


def _describe(path: Path, why: str) -> str:
    digest, left = hashlib.sha256(), _HASHED_BYTES
    with path.open("rb") as file:
        while left and (piece := file.read(min(_COPY_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
    part = "" if left else f" of its first {_HASHED_BYTES:,} bytes"
    return f"{path.name} was removed, because {why}: {path.stat().st_size:,} bytes, SHA-256{part} {digest.hexdigest()}"


_KEPT = "Kept next to this file, unchanged: "


def kept_files(reason: Path) -> list[str]:
    """Find the files that belong to a text of quarantine.

    Args:
        reason: The `.reason.txt` file.

    Returns:
        Their names; empty where the text names none.
    """
    with reason.open(encoding="utf-8", errors="replace") as file:
        lines = [line.removeprefix(_KEPT).rstrip(".") for line in file.read(20_000).splitlines() if line.startswith(_KEPT)]
    return lines[0].split(", ") if lines else []


def set_aside(files: list[Path], folder: Path, stem: str, reason: str) -> None:
    """Set files aside under a free name, next to the reason. The reason is written first, so that no file is without one.

    Args:
        files: Files of one refused shard. Huge and sparse ones are removed, and the reason keeps their size and hash.
        folder: The quarantine.
        stem: Name of the shard.
        reason: Why it was refused.

    Raises:
        OSError: A file cannot be moved.
    """
    name, n = stem, 1
    while any((folder / f"{name}{suffix}").exists() for suffix in (".tar", ".json", ".reason.txt")):
        name, n = f"{stem}.{n}", n + 1
    removed = {path: why for path in files if (why := _too_large(path))}
    kept = ", ".join(f"{name}{path.suffix}" for path in files if path not in removed) or "nothing"
    notes = "".join(f"{_describe(path, why)}.\n" for path, why in removed.items())
    text = (
        f"Shard {stem} was refused by ingest.\n\nReason: {shown(reason, most=4000)}\n\n{_KEPT}{kept}.\n{notes}"
        "Upload it again from the vehicle. Once the cause is gone, `upcycle3d ingest … --retry-quarantine` tries what is kept again.\n"
    )
    write_atomically(folder / f"{name}.reason.txt", [text.encode("utf-8", "replace")])
    for path in files:
        if path in removed:
            path.unlink()
            sync_folder(path.parent)
        else:
            move_durably(path, folder / f"{name}{path.suffix}")
