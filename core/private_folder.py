"""A folder for caches where neither the package nor the home folder can be written, as in many containers and services.

Read next: `compiled.py`, which keeps compiled kernels there.
"""

from __future__ import annotations

import os
import stat
import tempfile
from pathlib import Path


def private_folder() -> Path | None:
    """Find a folder in the temporary folder, or in shared memory, that belongs to this user alone: what lies there is executed.

    Returns:
        The folder, made if it was missing; None where there is no such place.
    """
    try:
        places = [tempfile.gettempdir(), "/dev/shm"]
    except OSError:  # no temporary folder can be written
        places = ["/dev/shm"]
    for place in places:
        folder = Path(place) / f"upcycle3d_cache_{os.getuid()}"
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            found = folder.lstat()
            if stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077:
                tempfile.TemporaryFile(dir=folder).close()
                return folder
        except OSError:
            continue
    return None


def give_matplotlib_a_folder() -> None:
    """Name a folder for matplotlib's fonts and settings where it would find none; otherwise it warns, or refuses to be imported."""
    if "MPLCONFIGDIR" in os.environ:
        return
    base = os.environ.get("XDG_CONFIG_HOME") or os.path.join(os.path.expanduser("~"), ".config")
    usual = Path(base) / "matplotlib"
    try:
        usual.mkdir(parents=True, exist_ok=True)
        if os.access(usual, os.W_OK):
            return
    except OSError:
        pass
    folder = private_folder()
    if folder is not None:
        os.environ["MPLCONFIGDIR"] = str(folder / "matplotlib")
