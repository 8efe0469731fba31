"""`upcycle3d predict`: boxes for a scan or a folder of scans."""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from ..core.device import find_device
from ..core.errors import InvalidInput
from ..core.files import write_atomically
from ..core.point_files import read_points, scan_files
from ..core.rig import RigSpec
from ..core.structures import Predictions
from ..datasets.kitti import read_calibration, shift_calibration
from ..datasets.kitti_text import predictions_to_kitti, write_objects
from ..perception.training.detector_files import load_detector
from .console import console, print_table, progress_bar, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class Predict:
    """Detect objects in scans. Boxes are written in the sensor frame, one file per scan."""

    detector: Path
    """Run folder, `detector.safetensors` or `teacher.safetensors`."""
    scans: tuple[Path, ...]
    """Scan files (.bin, .npy, .pcd) or folders of them."""
    out: Path
    """Folder for the detections."""
    format: Literal["json", "kitti"] = "json"
    """`json`: boxes in the sensor frame. `kitti`: text in the camera frame, which needs `--calib`."""
    calib: Path | None = None
    """Folder of KITTI calibration files, for `--format kitti`."""
    columns: tuple[str, ...] = ()
    """Names of the values in one row, in file order; `_` skips one. By default x y z intensity."""
    drop_non_finite: bool = False
    """Leave out points with NaN or inf. Without this option such a scan is refused."""
    rig: RigSpec = field(default_factory=RigSpec)
    """Mounting height and intensity scale of these scans."""
    min_score: float = 0.1
    """Detections with a lower score are left out."""
    device: str = "cpu"
    """`cpu`, `cuda` or `cuda:N`."""
    json: Path | None = None
    """Also write the number of boxes per scan to this file as JSON."""


def command(config: Predict) -> None:
    """Find objects in a scan or in a folder of scans."""
    if config.format == "kitti" and config.calib is None:
        raise InvalidInput("KITTI's text format is in the camera frame, so it needs --calib; or use --format json")
    target = find_device(config.device)
    detector = load_detector(config.detector).to(target)
    scans = scan_files(config.scans)
    counts: dict[str, int] = {}
    with progress_bar("predict", len(scans)) as advance:
        for done, path in enumerate(scans, start=1):
            points = read_points(
                path, columns=config.columns or None, intensity_scale=None, drop_non_finite=config.drop_non_finite
            )
            found = detector.detect([config.rig.from_sensor(points)])[0].to("cpu")
            found = found.select(found.scores >= config.min_score)
            counts[path.name] = len(found)
            if config.format == "kitti":
                assert config.calib is not None
                calibration = shift_calibration(read_calibration(config.calib / f"{path.stem}.txt"), config.rig.z_shift)
                write_objects(config.out / f"{path.stem}.txt", predictions_to_kitti(found, detector.class_names, calibration))
            else:
                record = boxes_json(replace(found, boxes=config.rig.to_sensor(found.boxes)), detector.class_names)
                write_atomically(config.out / f"{path.stem}.json", (json.dumps(record, indent=1) + "\n").encode())
            advance(done, len(scans))
    print_table("detections", ("scans", "boxes", "folder"), [(len(scans), sum(counts.values()), str(config.out))])
    console.print(f"scores of at least {config.min_score:g}; format {config.format}")
    write_json(config.json, counts)


def boxes_json(found: Predictions, class_names: tuple[str, ...]) -> list[dict[str, object]]:
    """Detections as JSON values.

    Args:
        found: Detections of one scan.
        class_names: Names of the class numbers.

    Returns:
        One record per box: class, score, x y z of the center, dx dy dz, yaw; meters and radians, in the frame of the boxes.
    """
    names = ("x", "y", "z", "dx", "dy", "dz", "yaw")
    return [
        {"class": class_names[c], "score": round(s, 4)} | {n: round(v, 3) for n, v in zip(names, box, strict=True)}
        for box, c, s in zip(found.boxes.data.tolist(), found.classes.tolist(), found.scores.tolist(), strict=True)
    ]


if __name__ == "__main__":
    sys.exit(run_command(command))
