"""Describes a scan by a few numbers, before any network runs: how many points there are, and where.

They are what tells sensors, places and weather apart at the price of some histograms: a sensor with few beams has few points at few
elevations, fog has no far points, and rain dims the intensity. Points with a NaN or infinite value are left out and counted. A scan without
points has the description of nothing: all shares are 0. Read next: `context_gate.py`, which decides by it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require, require_numbers
from ....core.structures import PointCloud


@dataclass(frozen=True, kw_only=True)
class ScanDescriptorConfig:
    """Borders of the histograms. Empty borders leave a histogram out. Field names are stored in files."""

    ranges: tuple[float, ...] = (5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 60.0)
    """Horizontal distances from the sensor in meters."""
    heights: tuple[float, ...] = (-0.5, 0.2, 0.5, 1.0, 2.0, 4.0)
    """Heights above the road in meters."""
    elevations: tuple[float, ...] = (-20.0, -15.0, -10.0, -7.0, -5.0, -3.0, -1.0, 1.0)
    """Elevations of the beams in degrees, as seen from the sensor."""
    intensities: tuple[float, ...] = (0.1, 0.2, 0.3, 0.5, 0.7)
    """Intensities. A scan without intensity is refused unless they are empty."""
    sensor_height: float = 0.0
    """Height of the sensor above the road in meters, from which elevations are seen: the z shift of the rig."""

    def __post_init__(self) -> None:
        for name in ("ranges", "heights", "elevations", "intensities"):
            borders: tuple[float, ...] = getattr(self, name)
            require_numbers("ScanDescriptorConfig", least=-1e4, most=1e4, **{name: borders})
            rising = all(a < b for a, b in pairwise(borders))
            require(
                rising and len(borders) <= 256,
                f"ScanDescriptorConfig.{name} must be at most 256 rising borders, found {borders[:8]}",
            )
        require_numbers("ScanDescriptorConfig", least=-1e4, most=1e4, sensor_height=self.sensor_height)

    @property
    def width(self) -> int:
        """Number of values of a description, D."""
        borders = (self.ranges, self.heights, self.elevations, self.intensities)
        return 1 + sum(len(one) + 1 for one in borders if one)


@dataclass(frozen=True, kw_only=True, eq=False)
class DescribedScan:
    """A scan as numbers."""

    values: Tensor
    """(D,) float64: the logarithm of the number of points, then shares of the points in each histogram, which sum to 1."""
    points: int
    """Number of points that were counted."""
    non_finite: int
    """Number of points that were left out, because a value of them is NaN or infinite."""


def describe_scan(points: PointCloud, config: ScanDescriptorConfig) -> DescribedScan:
    """Describe a scan.

    Args:
        points: A scan in the shifted frame (after the rig), where the road lies near z = 0.
        config: Borders of the histograms.

    Returns:
        The description. A point on a border counts to the part above it.

    Raises:
        InvalidInput: The scan lacks the intensity that the histograms need.

    Example:
        ```python
        described = describe_scan(scan, ScanDescriptorConfig(sensor_height=1.73))
        print(described.points, described.values)
        ```
    """
    names = points.feature_names
    if config.intensities and "intensity" not in names:
        raise InvalidInput(
            f"the description of a scan counts intensities, and this scan has the features {names}; fit the gate with intensities=()"
        )
    columns = [points.xyz] + ([points.features[:, names.index("intensity"), None]] if config.intensities else [])
    rows = torch.cat(columns, 1).double().cpu()
    finite = rows.isfinite().all(1)
    rows = rows[finite]
    distance = torch.hypot(rows[:, 0], rows[:, 1])
    elevation = torch.rad2deg(torch.atan2(rows[:, 2] - config.sensor_height, distance))
    parts = [torch.log1p(torch.tensor([len(rows)], dtype=torch.float64))]
    for value, borders in ((distance, config.ranges), (rows[:, 2], config.heights), (elevation, config.elevations)):
        parts += _shares(value, borders)
    parts += _shares(rows[:, -1], config.intensities)
    return DescribedScan(values=torch.cat(parts), points=len(rows), non_finite=int((~finite).sum()))


def _shares(values: Tensor, borders: tuple[float, ...]) -> list[Tensor]:
    """Shares of the values in each part of a histogram; nothing without borders."""
    if not borders:
        return []
    part = torch.bucketize(values.contiguous(), torch.tensor(borders, dtype=torch.float64), right=True)
    return [torch.bincount(part, minlength=len(borders) + 1).double() / max(1, len(values))]
