"""Folders that appear complete or not at all, so that nobody takes a part of a result for the whole.

Read next: `files.py`, which does the same for single files.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import InvalidInput


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Fill a folder that appears complete when the block ends, or not at all when it raises.

    Args:
        folder: The folder; it must not exist, or be empty.

    Yields:
        Where to write until then.

    Raises:
        InvalidInput: The folder holds something.
        OSError: The folder cannot be written.
    """
    require_empty(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as temporary:
        work = Path(temporary) / "model"
        work.mkdir()
        yield work
        if folder.exists():
            folder.rmdir()
        work.rename(folder)


def require_empty(folder: Path) -> None:
    """Refuse a folder that holds something: it could be somebody's model, or the result of other options.

    Args:
        folder: The folder that a model shall be written to.

    Raises:
        InvalidInput: It exists and is not an empty folder.
    """
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InvalidInput(f"{folder} is there already and is not empty; move it away or delete it, or choose another place")
