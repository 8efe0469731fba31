"""How long a user waits for weights of OpenPCDet and mmdetection3d, and whether they are equal bit by bit after the way there and back.

    python benchmarks/speed/weights_import.py [--repeats 3] [--preset kitti_pv_rcnn_published] [--json FILE]

A detector of KITTI's size with random weights is exported to a temporary folder. Then `upcycle3d import` of that checkpoint, with its
configuration, runs as a program of its own, so the seconds hold the start of Python, torch and the command line. The aim is less than 10
seconds. The exit code is 1 where a weight differs.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from upcycle3d.perception.interchange.exporting import mmdet3d_checkpoint, openpcdet_checkpoint, write_checkpoint
from upcycle3d.perception.interchange.settings import Program
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.recipes.speed import machine
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools.console import print_table, write_json

AIM = 10.0
"""Seconds that an import may take."""
PROGRAMS: tuple[Program, ...] = ("openpcdet", "mmdet3d")
DETECTORS = ("kitti_second_iou", "kitti_pv_rcnn_published")


@dataclass(frozen=True, kw_only=True)
class Imported:
    """What the imports of one checkpoint gave."""

    preset: str
    program: Program
    bytes: int
    """Size of the checkpoint."""
    seconds: tuple[float, ...]
    """Wall seconds of each import."""
    compared: int
    """Weights and statistics that the other program has a place for."""
    differ: tuple[str, ...]
    """Our names of those that are not equal bit by bit."""


def random_detector(preset: str) -> Detector:
    """A detector whose statistics are no round numbers."""
    torch.manual_seed(0)
    detector = PRESETS[preset].detector.build()
    for name, value in detector.state_dict().items():
        if name.endswith(("running_mean", "running_var")):
            value.copy_(torch.rand(value.shape))
    return detector


def measure(detector: Detector, preset: str, program: Program, folder: Path, repeats: int) -> Imported:
    """Export a detector once and import it several times."""
    file, configuration = folder / "weights.pth", folder / ("weights.yaml" if program == "openpcdet" else "weights.py")
    made = openpcdet_checkpoint(detector) if program == "openpcdet" else mmdet3d_checkpoint(detector)
    write_checkpoint(made, file, configuration)
    seconds = []
    for repeat in range(repeats):
        run = folder / f"run{repeat}"
        words = ["import", program, str(file), preset, "--config", str(configuration), "--out", str(run)]
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "upcycle3d", *words], check=True, capture_output=True)
        seconds.append(time.perf_counter() - begin)
    found = load_detector(folder / "run0").state_dict()
    absent = ("decoder.roi_head.",) if any(name.startswith("roi_head.iou_layers.") for name in made.left_out) else ()
    expected = {name: value for name, value in detector.state_dict().items() if not name.startswith(absent)}
    return Imported(
        preset=preset,
        program=program,
        bytes=file.stat().st_size,
        seconds=tuple(seconds),
        compared=len(expected),
        differ=tuple(name for name, value in expected.items() if not torch.equal(value, found[name])),
    )


def main() -> int:
    """Measure, print and compare.

    Returns:
        1 if a weight differs.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--preset", choices=DETECTORS, help="this detector alone")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = []
    for preset in [options.preset] if options.preset else DETECTORS:
        detector = random_detector(preset)
        for program in PROGRAMS:
            with tempfile.TemporaryDirectory() as folder:
                found.append(measure(detector, preset, program, Path(folder), options.repeats))
    rows = []
    for f in found:
        median = statistics.median(f.seconds)
        times = " ".join(f"{s:.1f}" for s in f.seconds)
        equal = f"all {f.compared}" if not f.differ else f"all but {len(f.differ)} of {f.compared}"
        rows.append((f.preset, f.program, f"{f.bytes / 1e6:.0f}", f"{median:.1f}", times, "yes" if median < AIM else "no", equal))
    header = ("detector", "import", "MB", "seconds, median", "each", f"below {AIM:g}", "equal bit by bit")
    print_table("import of a checkpoint with its configuration", header, rows)
    environment = machine()
    print(environment)
    for f in found:
        for name in f.differ[:10]:
            print(f"{f.preset}, {f.program}: {name} differs")
    record = [{"preset": f.preset, "program": f.program, "seconds": f.seconds, "differ": f.differ} for f in found]
    write_json(options.json, {"imports": record, "environment": environment})
    return int(any(f.differ for f in found))


if __name__ == "__main__":
    sys.exit(main())
