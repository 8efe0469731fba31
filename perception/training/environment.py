"""What a result was made with: versions, machine, git state, seed and command, as plain JSON.

No path of the machine is recorded: absolute paths in the command become relative to the working directory.

Read next: `run_folder.py`, which records one entry for the start and for every resume of a run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from ...core.config_json import Json

_PACKAGE_ROOT = Path(__file__).resolve().parents[2]
_PACKAGES = ("upcycle3d", "torch", "numpy", "numba", "safetensors")


def describe_environment(*, command: Sequence[str], seed: int) -> dict[str, Json]:
    """Describe what this process runs with.

    Args:
        command: The command line, usually `sys.orig_argv`. Absolute paths in it are recorded relative to the working directory.
        seed: Seed of the run.

    Returns:
        time, command, seed, python, packages, platform, cpus, torch_threads, cuda, and git (None outside a git checkout).
    """
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": relative_command(command),
        "seed": seed,
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in _PACKAGES},
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "git": _git_state(),
    }


def relative_command(command: Sequence[str]) -> list[str]:
    """Rewrite a command line without absolute paths; in the same working directory it does the same.

    Args:
        command: The words of the command line.

    Returns:
        The words with paths relative to the working directory. The Python interpreter becomes "python", and a program that the
        shell finds under its name alone becomes that name: `/opt/venv/bin/python /opt/venv/bin/upcycle3d` is "upcycle3d".
    """
    words = [_relative_word(word) for word in command]
    if command and os.path.isabs(command[0]) and os.path.realpath(command[0]) == os.path.realpath(sys.executable):
        words[0] = "python"
    for place, word in enumerate(command[:2]):
        name = os.path.basename(word)
        if os.path.isabs(word) and shutil.which(name) == word:
            # A script on the PATH names its interpreter itself.
            return [name, *words[place + 1 :]]
    return words


def _relative_word(word: str) -> str:
    option, sign, value = word.partition("=")
    if word.startswith("-") and sign and os.path.isabs(value):
        return f"{option}={os.path.relpath(value)}"
    return os.path.relpath(word) if os.path.isabs(word) else word


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _git_state() -> dict[str, Json] | None:
    """Commit and whether files differ from it; None where this program does not run from a git checkout of its own."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _PACKAGE_ROOT:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
