"""`upcycle3d export onnx`: the server half of a detector as ONNX graphs. Read next: `perception/export/onnx_folder.py`."""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from ..core.scan_options import ScanOptions
from ..perception.export.onnx_folder import ONNX_DESCRIPTION, export_onnx, require_onnx
from ..perception.training.detector_files import load_detector
from .console import console, print_table, run_command, write_json
from .export_scans import scans_to_compare
from .scan_option import ScanOption


@dataclass(frozen=True, kw_only=True)
class ExportOnnx:
    """Write the decoder of a detector as ONNX graphs. Each is run in onnxruntime and compared with the detector before anything is written."""

    detector: Path
    """Run folder, detector file or checkpoint."""
    out: Path
    """Folder for the graphs and `onnx.json`, which explains their inputs, outputs and order; it must be empty."""
    scans: tuple[Path, ...] = ()
    """Scan files (.bin, .npy, .pcd) or folders of them, whose features the graphs are compared on. By default a simulated scan."""
    read: ScanOption = ScanOptions()
    """How the scans are read."""
    json: Path | None = None
    """Also write the differences to this file as JSON."""


def command(config: ExportOnnx) -> None:
    """Write the decoder of a detector as ONNX graphs, compared with the detector in onnxruntime."""
    require_onnx()
    detector = load_detector(config.detector)
    written = export_onnx(detector, scans_to_compare(config.scans, config.read, detector.trained_on), config.out)
    rows = [(one.output, f"{one.largest_number:.3g}", f"{one.largest_difference:.1e}") for one in written.agreements]
    print_table("onnxruntime and the detector", ("output", "largest number", "largest difference"), rows)
    files = ", ".join(path.name for path in sorted(config.out.glob("*.onnx")))
    console.print(f"{config.out}: {files}; {ONNX_DESCRIPTION} explains them", soft_wrap=True)
    write_json(config.json, {"folder": str(config.out), "differences": [asdict(one) for one in written.agreements]})


if __name__ == "__main__":
    sys.exit(run_command(command))
