"""Measures one scan with an encoder's grid: how many of its points lie in range, how many cells they fill, how high the road lies.

Training stores the medians of these measures beside the weights; later commands measure their own scans and compare.

Read next: `core/trained_on.py`, which summarizes and compares; `core/ledger.py`, which counts.
"""

from __future__ import annotations

import torch

from ....core.ledger import Ledger
from ....core.structures import PointCloud
from ....core.trained_on import ScanMeasures, estimate_road_height
from ....ops.voxelize import voxelize
from .encoder import Encoder


def measure_scan(points: PointCloud, encoder: Encoder) -> tuple[ScanMeasures, Ledger]:
    """Measure one scan as an encoder sees it.

    Args:
        points: The scan in the shifted frame (after the rig), on the CPU.
        encoder: The encoder whose grid counts.

    Returns:
        The measures for `summarize_scans`, and the counts of this scan: points, points outside the range, occupied cells, and
        cells over the voxel limit.
    """
    grid = encoder.spec.grid
    limit = _voxel_limit(encoder)
    inside = ((points.xyz >= points.xyz.new_tensor(grid.range[:3])) & (points.xyz < points.xyz.new_tensor(grid.range[3:]))).all(1)
    number, cells = int(inside.sum()), 0
    if number:
        found = voxelize(
            points.xyz[inside],
            point_range=grid.range,
            voxel_size=grid.voxel_size,
            max_points=1,
            max_voxels=number,
        )
        cells = len(found.coords)
    intensity = float("nan")
    if "intensity" in points.feature_names and len(points):
        intensity = float(points.features[:, points.feature_names.index("intensity")].mean())
    measures = ScanMeasures(points=number, cells=cells, ground_height=estimate_road_height(points), intensity=intensity)
    ledger = Ledger(
        scans=1,
        scans_without_points=int(number == 0),
        points=len(points),
        points_outside_range=len(points) - number,
        cells=cells,
        cells_over_limit=0 if limit is None else max(0, cells - limit),
    )
    return measures, ledger


def boxes_outside_range(boxes: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """Find boxes whose center lies outside an encoder's range.

    Args:
        boxes: (N, 7) boxes in the shifted frame.
        encoder: The encoder whose grid counts.

    Returns:
        (N,) bool.
    """
    low, high = boxes.new_tensor(encoder.spec.grid.range[:3]), boxes.new_tensor(encoder.spec.grid.range[3:])
    return ~((boxes[:, :3] >= low) & (boxes[:, :3] < high)).all(1)


def _voxel_limit(encoder: Encoder) -> int | None:
    """The largest number of voxels of a scan that the encoder reads; None for an encoder without such a limit."""
    config = getattr(encoder.config, "voxels", encoder.config)
    limit: int | None = getattr(config, "max_voxels", None)
    return limit
