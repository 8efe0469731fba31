"""`upcycle3d bench extract`: what an extraction costs a vehicle, in milliseconds and bytes per scan."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch

from ..core.device import find_device
from ..core.errors import InvalidInput
from ..core.point_files import find_scans, read_points
from ..core.rig import RigSpec
from ..perception.recipes.presets import PRESETS
from ..perception.recipes.speed import detectors_to_measure, extraction_speed, machine, rig_for, simulated_scans
from ..perception.wire.codec import CODECS
from .bench_ops import print_machine
from .console import print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class BenchExtract:
    """Smash scans with both codecs and compare the scenes with the raw scans. Nothing is written but the result."""

    preset: tuple[Literal[tuple(PRESETS)], ...] = ()  # type: ignore[valid-type]
    """Presets whose encoders are measured. Their weights are random, so sizes differ from trained ones."""
    detector: tuple[Path, ...] = ()
    """Run folders of trained detectors to measure."""
    domain: Literal["kitti", "waymo", "lyft"] = "kitti"
    """Simulated domain of the scans."""
    view: Literal["camera", "full"] = "camera"
    """A front camera's view, or the full turn of the sensor."""
    frames: int = 5
    """Number of simulated scans."""
    scans: tuple[Path, ...] = ()
    """Scan files or folders to use instead of simulated scans."""
    rig: RigSpec = RigSpec()
    """Rig of the vehicle that made `--scans`. Simulated scans take the mounting height of their domain."""
    threads: int = 2
    """Threads of torch."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the result to this file as JSON."""


def command(config: BenchExtract) -> None:
    """Measure an extraction with one or several detectors, in milliseconds and bytes per scan."""
    if not (config.preset or config.detector):
        raise InvalidInput("give --preset NAME or --detector RUN, or several of them")
    torch.set_num_threads(config.threads)
    where = machine()
    given = [read_points(path, intensity_scale=None) for path in find_scans(config.scans)[0]] if config.scans else []
    scans = given or simulated_scans(config.domain, config.frames, view=config.view)
    found = {
        (name, codec): extraction_speed(
            network.to(find_device(config.device)),
            scans,
            config.rig if given else rig_for(network, config.domain),
            codec,
        )
        for name, network in detectors_to_measure(config.detector, config.preset).items()
        for codec in CODECS
    }
    print_machine(where)
    rows = [
        (
            *key,
            *(f"{v:.1f}" for v in (s.voxelize_ms, s.backbone_ms, s.codec_ms)),
            *(f"{v:.0f}" for v in (s.cells, s.keypoints, s.bytes_per_scene / 1000)),
            f"{s.bytes_per_scene / s.raw_bytes_per_scan:.2f}",
        )
        for key, s in found.items()
    ]
    raw = next(iter(found.values())).raw_bytes_per_scan / 1000
    header = ("detector", "codec", "voxelize ms", "backbone ms", "codec ms", "cells", "keypoints", "kB", "of the raw scan")
    print_table(f"median milliseconds and mean kB per scan, {len(scans)} scans; a raw scan has {raw:.0f} kB", header, rows)
    write_json(config.json, {"environment": where, "extraction": {"/".join(key): asdict(s) for key, s in found.items()}})


if __name__ == "__main__":
    sys.exit(run_command(command))
