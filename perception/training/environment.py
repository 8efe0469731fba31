"""What a result was made with: versions, machine, git state, seed and command, as plain JSON.

No path of the machine is recorded: absolute paths in the command become relative to the working directory.

Read next: `run_folder.py`, which records one entry for the start and for every resume of a run.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Sequence

import torch

from ...core.config_json import Json
from ...core.provenance import git_state
from ...core.provenance import relative_command as relative_command

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
        "git": git_state(),
    }


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
