"""`upcycle3d bench ops`: how fast the CPU operators are on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from ..perception.recipes.operator_speed import operator_calls
from ..perception.recipes.speed import machine, measure_in_turns
from .console import print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class BenchOps:
    """Measure the operators on made-up scenes of real size. On a busy machine, read the processor time."""

    threads: int = 1
    """Threads of torch."""
    repeats: int = 20
    """Counted calls of each operator."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: BenchOps) -> None:
    """Measure voxelization, rotated IoU and NMS, and PV-RCNN's point operators."""
    torch.set_num_threads(config.threads)
    where = machine()
    found = {
        name: measure_in_turns({name: call}, config.repeats)[name]  # each alone: an operator may keep memory between calls
        for name, call in operator_calls().items()
    }
    print_machine(where)
    rows = [(name, f"{t.median_ms:.2f}", f"{t.median_cpu_ms:.2f}") for name, t in found.items()]
    print_table(f"milliseconds, median of {config.repeats}", ("operator", "wall", "processor"), rows)
    write_json(config.json, {"environment": where, "operators": {name: asdict(t) for name, t in found.items()}})


def print_machine(where: dict[str, object]) -> None:
    """Print what speed depends on.

    Args:
        where: What `machine` found.
    """
    shown = {k: v for k, v in where.items() if k in ("cpu", "cpus", "load", "torch_threads", "python", "cuda")}
    print_table("machine", ("what", "value"), [(k, str(v)) for k, v in shown.items()])


if __name__ == "__main__":
    sys.exit(run_command(command))
