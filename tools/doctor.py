"""`upcycle3d doctor`: what is installed here, which backends run, and how long imports take."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..ops.sparse_conv import SubmanifoldConv3d, sparse_conv_reference, submanifold_rulebook
from .console import console, print_table, run_command, write_json

CORE = ("torch", "numpy", "scipy", "numba", "safetensors", "zstandard", "pyarrow", "tyro", "rich", "tensorboard", "matplotlib")
OPTIONAL = {"spconv": "spconv"}  # package: extra that installs it

# What is timed: a statement in a fresh interpreter.
VEHICLE_SET = "import upcycle3d.perception.vehicle.extractor"
FULL_PROGRAM = (
    "import importlib; from upcycle3d.tools.main import COMMANDS; "
    "[importlib.import_module(f'upcycle3d.tools.{module}') for module, _ in COMMANDS.values()]"
)
IMPORTS = {
    "import upcycle3d": "import upcycle3d",
    "upcycle3d --help": "import sys; sys.argv = ['upcycle3d', '--version']; from upcycle3d.tools.main import main; main()",
    "torch alone": "import torch",
    "the vehicle's set": VEHICLE_SET,
    "the full program": FULL_PROGRAM,
}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print versions, devices and import times, and compare the sparse convolution with its reference."""

    repeats: int = 3
    """How often each import is timed; the shortest time is printed. 0 skips the timing."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: Doctor) -> None:
    """Say what is installed, which backends run, and how long imports take."""
    versions = {name: _version(name) for name in CORE} | {
        n: _version(n) or f"not installed (extra [{e}])" for n, e in OPTIONAL.items()
    }
    cuda = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    machine = {"python": platform.python_version(), "system": platform.platform(), "cores": os.cpu_count(), "torch threads": torch.get_num_threads(), "cuda": cuda}  # fmt: skip
    checks = {"sparse convolution, CPU": _check_sparse_conv(torch.device("cpu"))}
    if torch.cuda.is_available():
        checks["sparse convolution, CUDA"] = _check_sparse_conv(torch.device("cuda"))
    print_table("machine", ("what", "value"), list(machine.items()))
    print_table("packages", ("package", "version"), list(versions.items()))
    print_table("checks", ("what", "result"), list(checks.items()))
    times = {name: import_seconds(code, config.repeats) for name, code in IMPORTS.items()} if config.repeats else {}
    if times:
        share = times["the vehicle's set"] / times["the full program"]
        rows = [(name, f"{seconds:.2f}") for name, seconds in times.items()]
        print_table("imports in a fresh interpreter, shortest of several", ("what", "seconds"), rows)
        console.print(f"the vehicle's set takes {100 * share:.0f} % of the time of the full program")
    if versions["torch"] is None or any(versions[name] is None for name in CORE):
        console.print("a core package is missing: pip install -c constraints.txt -e .")
    write_json(config.json, {"machine": machine, "packages": versions, "checks": checks, "import_seconds": times})


def import_seconds(code: str, repeats: int) -> float:
    """Time a statement in fresh interpreters. The shortest time says most: other work on the machine only adds.

    Args:
        code: The statement.
        repeats: How often it is timed.

    Returns:
        The shortest time in seconds, without the start of the interpreter.
    """
    command = f"import time; start = time.perf_counter(); {code}; print(time.perf_counter() - start)"
    runs = (subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True) for _ in range(repeats))
    return min(float(run.stdout.split()[-1]) for run in runs)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _check_sparse_conv(device: torch.device) -> str:
    generator = torch.Generator().manual_seed(0)
    sites = torch.randperm(8 * 8 * 8, generator=generator)[:100].sort().values
    coords = torch.stack([torch.zeros_like(sites), sites // 64, sites // 8 % 8, sites % 8], 1).int().to(device)
    conv = SubmanifoldConv3d(4, 8, (3, 3, 3)).to(device)
    rulebook = submanifold_rulebook(coords, (8, 8, 8), 1, (3, 3, 3))
    features = torch.randn(100, 4, generator=generator).to(device)
    error = (conv(features, rulebook) - sparse_conv_reference(features, conv.weight, rulebook)).abs().max().item()
    return f"agrees with its reference to {error:.1e}" if error < 1e-4 else f"WRONG by {error:.1e}"


if __name__ == "__main__":
    sys.exit(run_command(command))
