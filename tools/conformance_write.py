"""`upcycle3d conformance write`: scans and what an exporter must make of them. Read next: `perception/conformance/golden.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

from ..core.rig import RigSpec
from ..perception.conformance.golden import CASES_FILE, write_conformance
from ..perception.wire.encoder_file import load_encoder
from .console import console, print_table, run_command


@dataclass(frozen=True, kw_only=True)
class ConformanceWrite:
    """Write golden scans and scenes of an encoder, with which any other implementation of the exporter can be checked."""

    folder: tyro.conf.Positional[Path]
    """Folder to write; it must be empty."""
    detector: Path
    """Run folder of the detector, or its encoder file alone. An encoder with defences is refused."""
    scans: tuple[Path, ...] = ()
    """Further scans, `.bin` files of x, y, z, intensity. The folder holds copies of them: give none that must stay private."""
    codec: Literal["fp16", "int8"] = "fp16"
    """How exporters must store features."""
    z_shift: float | None = None
    """Mounting height in meters. By default that of the training data."""
    intensity_scale: float | None = None
    """Factor that brings intensity to 0..1. By default that of the training data."""


def command(config: ConformanceWrite) -> None:
    """Write golden scans and scenes of an encoder: upcycle3d conformance write FOLDER --detector RUN."""
    encoder = load_encoder(config.detector)
    trained = RigSpec() if encoder.trained_on is None else encoder.trained_on.rig
    rig = RigSpec(
        z_shift=trained.z_shift if config.z_shift is None else config.z_shift,
        intensity_scale=trained.intensity_scale if config.intensity_scale is None else config.intensity_scale,
    )
    written = write_conformance(encoder, rig, config.codec, config.folder, scans=config.scans)
    rows = [(case.name, "a scene" if case.scene else "no scene", case.rule) for case in written.spec.cases]
    print_table("cases", ("case", "gives", "rule"), rows)
    console.print(
        f"{config.folder}: {len(rows)} cases; {CASES_FILE} says what every scene must name; check an exporter with",
        soft_wrap=True,
    )
    console.print(
        f"  upcycle3d conformance check {config.folder} -- YOUR_EXPORTER --encoder {{encoder}} --scan {{scan}} --out {{out}}",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(run_command(command))
