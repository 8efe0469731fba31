"""`upcycle3d bench step`: how long a supervised training step of a detector takes on this machine."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from ..core.device import find_device
from ..core.errors import InvalidInput
from ..perception.recipes.presets import PRESETS
from ..perception.recipes.speed import detectors_to_measure, machine, measure_in_turns, training_frames, training_step
from .bench_ops import print_machine
from .console import print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class BenchStep:
    """Measure encode, decode, losses, backward and optimizer on simulated frames. Several detectors take turns."""

    preset: tuple[Literal[tuple(PRESETS)], ...] = ()  # type: ignore[valid-type]
    """Presets whose detectors are measured, with random weights."""
    detector: tuple[Path, ...] = ()
    """Run folders of trained detectors to measure."""
    domain: Literal["kitti", "waymo", "lyft"] = "waymo"
    """Simulated domain of the frames. A detector whose range goes on behind the sensor gets the full turn, others a front camera's view."""
    batch: int = 2
    """Frames per step."""
    threads: int = 2
    """Threads of torch."""
    repeats: int = 15
    """Counted steps of each detector."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: BenchStep) -> None:
    """Measure a training step of one or several detectors."""
    if not (config.preset or config.detector):
        raise InvalidInput("give --preset NAME or --detector RUN, or several of them")
    torch.set_num_threads(config.threads)
    where = machine()
    calls = {
        name: training_step(network.to(find_device(config.device)), training_frames(network, config.domain, config.batch))
        for name, network in detectors_to_measure(config.detector, config.preset).items()
    }
    found = measure_in_turns(calls, config.repeats)
    print_machine(where)
    rows = [(name, f"{t.median_ms:.0f}", f"{t.median_cpu_ms:.0f}") for name, t in found.items()]
    print_table(f"milliseconds per step of {config.batch} frames", ("detector", "wall", "processor"), rows)
    write_json(config.json, {"environment": where, "steps": {name: asdict(t) for name, t in found.items()}})


if __name__ == "__main__":
    sys.exit(run_command(command))
