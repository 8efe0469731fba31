"""The LiDARs that the simulation stands in for: beams, mounting, noise and reach of three published rigs.

The numbers come from data sheets and dataset papers; docs/simulation.md lists them with their sources, and the reason for each choice where nothing is
published. They were chosen once and are not tuned to any method's result.
"""

from __future__ import annotations

from dataclasses import dataclass

from ...core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class Sensor:
    """A spinning LiDAR with its mounting."""

    name: str
    """Name of the sensor."""
    elevations: tuple[float, ...]
    """Degrees above the horizon, one per beam, from the highest down."""
    azimuths: int
    """Firings per turn."""
    height: float
    """Height above the ground in m."""
    min_range: float
    """Nearest distance in m."""
    max_range: float
    """Farthest distance in m."""
    range_noise: float
    """Standard deviation of the range in m."""
    jitter: float
    """Standard deviation in degrees of both angles of one ray."""
    reach: float
    """Distance in m at which a surface that reflects 10 %, hit squarely, still answers half of the pulses."""
    dropout: float
    """Share of pulses that are lost, whatever they hit."""
    intensity_gain: float
    """Intensity is this gain times reflectivity times the root of cos incidence, clipped to 0 to 1."""
    intensity_noise: float
    """Relative standard deviation of the intensity."""

    def __post_init__(self) -> None:
        descending = all(a > b for a, b in zip(self.elevations, self.elevations[1:], strict=False))
        if not self.elevations or not descending:
            raise InvalidInput(
                f"Sensor {self.name!r}: elevations must be at least one angle, from the highest down, found {self.elevations}"
            )
        if self.azimuths < 4 or not 0 < self.min_range < self.max_range or self.height <= 0:
            raise InvalidInput(
                f"Sensor {self.name!r}: need azimuths >= 4, 0 < min_range < max_range and height > 0, found "
                f"{self.azimuths}, {self.min_range}, {self.max_range}, {self.height}"
            )


def _evenly(first: float, last: float, count: int) -> tuple[float, ...]:
    return tuple(first + (last - first) * i / (count - 1) for i in range(count))


def _widening(first: float, last: float, count: int, ratio: float) -> tuple[float, ...]:
    """`count` angles from `first` to `last` whose gaps grow linearly, the last `ratio` times the first."""
    gaps = [1 + (ratio - 1) * i / (count - 2) for i in range(count - 1)]
    scale = (last - first) / sum(gaps)
    angles = [first]
    for gap in gaps:
        angles.append(angles[-1] + gap * scale)
    return tuple(angles)


KITTI_HDL64E = Sensor(
    name="Velodyne HDL-64E, KITTI",
    elevations=_evenly(2.0, -8.33, 32) + _evenly(-8.83, -24.8, 32),
    azimuths=2083,
    height=1.73,
    min_range=2.5,
    max_range=80.0,
    range_noise=0.02,
    jitter=0.02,
    reach=80.0,
    dropout=0.02,
    intensity_gain=1.6,
    intensity_noise=0.2,
)

WAYMO_TOP = Sensor(
    name="Waymo top LiDAR",
    elevations=_widening(2.4, -17.6, 64, 4.0),
    azimuths=2650,
    height=2.15,
    min_range=2.0,
    max_range=75.0,
    range_noise=0.02,
    jitter=0.01,
    reach=150.0,
    dropout=0.02,
    intensity_gain=0.6,
    intensity_noise=0.3,
)

LYFT_ROOF = Sensor(
    name="Lyft roof LiDAR, 64 beams",
    elevations=(15.0, 11.0, 8.0, 5.0, 3.0, *_evenly(2.03, -6.06, 49), *_evenly(-7.0, -14.0, 8), -19.0, -25.0),
    azimuths=1800,
    height=1.83,
    min_range=2.0,
    max_range=120.0,
    range_noise=0.02,
    jitter=0.01,
    reach=200.0,
    dropout=0.02,
    intensity_gain=1.0,
    intensity_noise=0.15,
)
