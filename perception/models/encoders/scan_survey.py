"""Measures one scan with an encoder's grid: how many of its points lie in range, how many cells they fill, how high the road lies.

Training stores the medians of these measures beside the weights; later commands measure their own scans and compare.

Read next: `core/trained_on.py`, which summarizes; `core/ledger.py`, which counts.
"""

from __future__ import annotations

import torch

from ....core.features import VoxelCounts
from ....core.ledger import Ledger
from ....core.structures import PointCloud
from ....core.trained_on import ScanMeasures, estimate_road_height
from ....ops.voxelize import voxelize
from .encoder import Encoder


def measure_scan(points: PointCloud, encoder: Encoder, reading: Ledger | None = None) -> tuple[ScanMeasures, Ledger]:
    """Measure one scan as an encoder sees it.

    Args:
        points: The scan in the shifted frame (after the rig), on the CPU.
        encoder: The encoder whose grid counts.
        reading: What the scan's reader counted (`Frame.reading`), to be part of the counts.

    Returns:
        The measures for `summarize_scans`, and the counts of this scan: points, points outside the range, occupied cells, and
        cells over the voxel limit.
    """
    grid, limit = encoder.spec.grid, _voxel_limit(encoder)
    found = voxelize(
        points.xyz,
        point_range=grid.range,
        voxel_size=grid.voxel_size,
        max_points=1,
        max_voxels=max(1, len(points)) if limit is None else limit,
    )
    outside = Ledger(points_outside_height=points_outside_height(points, encoder))
    return measures_of(points, found.counts), found.counts.ledger(reading) + outside


def measures_of(points: PointCloud, counts: VoxelCounts) -> ScanMeasures:
    """Measure a scan that an encoder has sorted into voxels already, without doing it again.

    Args:
        points: The scan in the shifted frame (after the rig), on the CPU.
        counts: The entry of this scan in `SparseVoxels.counts`.

    Returns:
        The same measures as `measure_scan`.
    """
    intensity = float("nan")
    if "intensity" in points.feature_names and len(points):
        intensity = float(points.features[:, points.feature_names.index("intensity")].mean())
    return ScanMeasures(
        points=counts.points - counts.points_outside,
        cells=counts.cells,
        ground_height=estimate_road_height(points),
        intensity=intensity,
    )


def points_behind(points: PointCloud, encoder: Encoder) -> int:
    """Count the points in an encoder's range that lie behind the sensor.

    Args:
        points: The scan in the shifted frame.
        encoder: The encoder whose grid counts.

    Returns:
        Number of points in range with x < 0.
    """
    return int(((points.xyz[:, 0] < 0) & ~boxes_outside_range(points.xyz, encoder)).sum())


def points_outside_height(points: PointCloud, encoder: Encoder) -> int:
    """Count the points that lie within the sides of an encoder's range, and below or above it.

    Args:
        points: The scan in the shifted frame.
        encoder: The encoder whose grid counts.

    Returns:
        Number of points outside the range because of z alone.
    """
    return int(outside_height(points.xyz, encoder).sum())


def outside_height(boxes: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """Find boxes whose center lies within the sides of an encoder's range, and below or above it.

    Args:
        boxes: (N, 7) boxes in the shifted frame, or (N, 3) points.
        encoder: The encoder whose grid counts.

    Returns:
        (N,) bool.
    """
    within = _within_axes(boxes, encoder)
    return within[:, 0] & within[:, 1] & ~within[:, 2]


def boxes_outside_range(boxes: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """Find boxes whose center lies outside an encoder's range.

    Args:
        boxes: (N, 7) boxes in the shifted frame, or (N, 3) points.
        encoder: The encoder whose grid counts.

    Returns:
        (N,) bool.
    """
    return ~_within_axes(boxes, encoder).all(1)


def _within_axes(boxes: torch.Tensor, encoder: Encoder) -> torch.Tensor:
    """(N, 3) bool: whether x, y and z each lie in the range of the encoder's grid."""
    low, high = boxes.new_tensor(encoder.spec.grid.range[:3]), boxes.new_tensor(encoder.spec.grid.range[3:])
    return (boxes[:, :3] >= low) & (boxes[:, :3] < high)


def point_features(encoder: Encoder) -> tuple[str, ...]:
    """Name the point features that an encoder reads besides x, y, z.

    Args:
        encoder: The encoder.

    Returns:
        The names in the order in which it reads them.
    """
    config = getattr(encoder.config, "voxels", encoder.config)
    return tuple(getattr(config, "point_features", ()))


def _voxel_limit(encoder: Encoder) -> int | None:
    """The largest number of voxels of a scan that the encoder reads; None for an encoder without such a limit."""
    config = getattr(encoder.config, "voxels", encoder.config)
    limit: int | None = getattr(config, "max_voxels", None)
    return limit
