"""What a page or a result was made with: command, version, commit and date.

No path of the machine is recorded: absolute paths in the command become relative to the working directory.

Read next: `perception/training/environment.py`, which records more of it for a run, and `perception/viz/html.py`, whose pages end with it.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_PACKAGE_ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True, kw_only=True)
class Provenance:
    """Where a page comes from."""

    command: str
    """The command line, without absolute paths."""
    version: str
    """Version of this package."""
    commit: str | None
    """Commit of this package, with "changed files" where files differ from it; None outside a git checkout."""
    date: str
    """Day and time with time zone."""

    def sentence(self) -> str:
        """Say everything in one sentence."""
        code = f"upcycle3d {self.version}" + (f", commit {self.commit}" if self.commit else "")
        return f"Made on {self.date} with {code}."


def provenance_of_process() -> Provenance:
    """Describe the command that runs now.

    Returns:
        Command, version, commit and date.
    """
    try:
        version = importlib.metadata.version("upcycle3d")
    except importlib.metadata.PackageNotFoundError:
        version = "of unknown version"
    git = git_state()
    commit = None if git is None else f"{git['commit'][:12]}{' with changed files' if git['dirty'] else ''}"
    return Provenance(
        command=shlex.join(relative_command(sys.orig_argv)),
        version=version,
        commit=commit,
        date=time.strftime("%Y-%m-%d %H:%M %z"),
    )


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


def git_state() -> dict[str, Any] | None:
    """Commit and whether files differ from it; None where this program does not run from a git checkout of its own.

    Returns:
        `commit` and `dirty`, or None.
    """

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(_PACKAGE_ROOT), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        if Path(git("rev-parse", "--show-toplevel")).resolve() != _PACKAGE_ROOT:
            return None
        return {"commit": git("rev-parse", "HEAD"), "dirty": bool(git("status", "--porcelain"))}
    except (OSError, subprocess.SubprocessError):
        return None
