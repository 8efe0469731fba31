"""``upcycle3d doctor``: what is installed here, and which backend each operator uses."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from ..ops.sparse_conv import SubmanifoldConv3d, sparse_conv_reference, submanifold_rulebook
from .console import console, print_table, run_command, write_json

CORE = ("torch", "numpy", "scipy", "numba", "safetensors", "zstandard", "pyarrow", "tyro", "rich", "tensorboard", "matplotlib")
OPTIONAL = {"spconv": "spconv", "rerun-sdk": "viz", "open3d-cpu": "viz", "mmengine": "mmdet3d", "ray": "ray"}


@dataclass(frozen=True, kw_only=True)
class Doctor:
    """Print versions, devices and backends, and run the sparse convolution against its reference."""

    json: Path | None = None
    """also write the result for machines"""


def command(config: Doctor) -> None:
    """What is installed here and which backends run."""
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
    if versions["torch"] is None or any(versions[name] is None for name in CORE):
        console.print("a core package is missing: pip install -c constraints.txt -e .")
    write_json(config.json, {"machine": machine, "packages": versions, "checks": checks})


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
