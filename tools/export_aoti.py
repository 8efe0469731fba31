"""`upcycle3d export aoti`: the vehicle half of a detector as a compiled package. Read next: `perception/export/vehicle_package.py`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.scan_options import ScanOptions
from ..perception.export.vehicle_package import PACKAGE, PACKAGE_DESCRIPTION, export_vehicle_package, require_compiler
from ..perception.wire.encoder_file import load_encoder
from .console import console, print_table, run_command, write_json
from .export_scans import scans_to_compare
from .scan_option import ScanOption


@dataclass(frozen=True, kw_only=True)
class ExportAoti:
    """Compile the sparse backbone of an encoder with AOTInductor, for C++ programs with libtorch. It needs a C++ compiler and some minutes."""

    detector: Path
    """Run folder, or the encoder file alone (`encoder.safetensors`)."""
    out: Path
    """Folder for `encoder.pt2` and `encoder.json`, which explains inputs, outputs and what runs outside; it must be empty."""
    scans: tuple[Path, ...] = ()
    """Scan files (.bin, .npy, .pcd) or folders of them, on which the package is compared. By default a simulated scan."""
    read: ScanOption = ScanOptions()
    """How the scans are read."""
    device: str = "cpu"
    """`cpu` or `cuda`: where the package will run."""
    json: Path | None = None
    """Also write the differences to this file as JSON."""


def command(config: ExportAoti) -> None:
    """Compile the vehicle half of a detector as an AOTInductor package, compared with the encoder."""
    require_compiler()
    encoder = load_encoder(config.detector)
    scans = scans_to_compare(config.scans, config.read, encoder.trained_on)
    console.print("compiling; this takes a minute or more", soft_wrap=True)
    written = export_vehicle_package(encoder, scans, config.out, device=config.device)
    rows = [(one.output, f"{one.largest_number:.3g}", f"{one.largest_difference:.1e}") for one in written.agreements]
    print_table("the package and the encoder", ("output", "largest number", "largest difference"), rows)
    console.print(f"{config.out / PACKAGE}: compiled by {written.compiler}; {PACKAGE_DESCRIPTION} explains it", soft_wrap=True)
    differences = [asdict(one) for one in written.agreements]
    write_json(config.json, {"folder": str(config.out), "compiler": written.compiler, "differences": differences})


if __name__ == "__main__":
    sys.exit(run_command(command))
