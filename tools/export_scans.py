"""The scans on which an exported graph is compared with the detector: the user's own, or one simulated turn of a LiDAR.

Read next: `export_onnx.py` and `export_aoti.py`, which use them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..core.point_files import find_scans, read_scan
from ..core.rig import RigSpec
from ..core.scan_comparison import rig_of_scans
from ..core.scan_options import ScanOptions
from ..core.structures import PointCloud
from ..core.trained_on import TrainedOn
from .console import console, print_table, print_warning


def scans_to_compare(paths: Sequence[Path], read: ScanOptions, trained: TrainedOn | None) -> list[PointCloud]:
    """Read the scans, or simulate one where none is given, and say which.

    Args:
        paths: Scan files and folders.
        read: How they are read.
        trained: What the training of the detector knew about its scans.

    Returns:
        Scans in the shifted frame.

    Raises:
        InvalidInput: A scan cannot be read.
    """
    if not paths:
        from ..datasets.simulation.places import KITTI
        from ..datasets.simulation.simulate import simulate_frame

        console.print("compared on one simulated scan (KITTI's sensor); --scans compares on your own", soft_wrap=True)
        frame = simulate_frame(KITTI, seed=0, index=0, view="full").frame
        return [RigSpec(z_shift=KITTI.sensor.height).from_sensor(frame.points)]
    files, skipped = find_scans(paths)
    rig, said = rig_of_scans(read, trained, files)
    for text in said:
        print_warning(text)
    scans, ledger = [], skipped
    for path in files:
        points, counted = read_scan(path, read)
        scans.append(rig.from_sensor(points))
        ledger = ledger + counted
    print_table("scans to compare on", ("", "number", "share"), ledger.rows())
    return scans
