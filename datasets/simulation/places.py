"""The places that the simulation stands in for: how large the road users are, how dense, and how the street is built.

A ``Domain`` is a sensor at a place. Both are frozen, so a domain gap can be taken apart by cause: for example
``replace(WAYMO, sensor=KITTI_HDL64E)`` drives the Waymo streets, frame by frame the same, with KITTI's beams.
Sources of the numbers: ``docs/simulation.md``. They were chosen once and are not tuned to any method's result.
"""

from __future__ import annotations

import difflib
from dataclasses import dataclass

import numpy as np

from ...perception.structures import InvalidInput
from .sensors import KITTI_HDL64E, LYFT_ROOF, WAYMO_TOP, Sensor

CLASS_NAMES = ("Car", "Pedestrian", "Cyclist", "Van", "Truck")
CAR, PEDESTRIAN, CYCLIST, VAN, TRUCK = range(5)

Triple = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class SizeDistribution:
    """Length, width, height in m: normal, each clipped to mean +- 2.5 std, pairwise correlated by ``correlation``."""

    mean: Triple
    std: Triple
    correlation: float = 0.5

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """(3,) float64 length, width, height. Always takes four numbers from ``rng``."""
        common, own = rng.standard_normal(), rng.standard_normal(3)
        normal = self.correlation**0.5 * common + (1 - self.correlation) ** 0.5 * own
        return np.array(self.mean) + np.array(self.std) * np.clip(normal, -2.5, 2.5)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A kind of street.

    sizes: one distribution per name in ``CLASS_NAMES``. car_styles: weights of hatchback, sedan, SUV, pickup.
    vehicle_mix: weights of car, van, truck among vehicles. lanes: per direction. lane_width, parking_width,
    sidewalk_width, slot: m (slot: mean length of a parking place). parked: share of parking places taken. angled: chance that a side parks at a right angle.
    gap: mean free m between vehicles of a lane. crossing: chance of a crossing street ahead. turning: chance that the
    vehicle itself is turning. pedestrians, cyclists: mean number within 100 m either way. setback: (low, high) m from
    sidewalk to buildings. built: share of the building line that is built. trees: mean number per 100 m and side.
    relief: m, height of the long waves of the ground.
    """

    name: str
    sizes: tuple[SizeDistribution, SizeDistribution, SizeDistribution, SizeDistribution, SizeDistribution]
    car_styles: tuple[float, float, float, float]
    vehicle_mix: Triple
    lanes: int
    lane_width: float
    parking_width: float
    sidewalk_width: float
    slot: float
    parked: float
    angled: float
    gap: float
    crossing: float
    turning: float
    pedestrians: float
    cyclists: float
    setback: tuple[float, float]
    built: float
    trees: float
    relief: float


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A sensor at a place: what one simulated dataset comes from."""

    name: str
    sensor: Sensor
    place: Place


KARLSRUHE = Place(
    name="Karlsruhe",
    sizes=(
        SizeDistribution(mean=(3.89, 1.61, 1.53), std=(0.40, 0.09, 0.12)),
        SizeDistribution(mean=(0.80, 0.60, 1.73), std=(0.18, 0.10, 0.11)),
        SizeDistribution(mean=(1.76, 0.60, 1.73), std=(0.10, 0.09, 0.08)),
        SizeDistribution(mean=(5.00, 1.90, 2.20), std=(0.55, 0.12, 0.30)),
        SizeDistribution(mean=(9.50, 2.50, 3.20), std=(2.20, 0.15, 0.35)),
    ),
    car_styles=(0.60, 0.28, 0.11, 0.01),
    vehicle_mix=(0.86, 0.10, 0.04),
    lanes=1,
    lane_width=3.3,
    parking_width=2.2,
    sidewalk_width=2.2,
    slot=5.2,
    parked=0.28,
    angled=0.10,
    gap=32.0,
    crossing=0.50,
    turning=0.10,
    pedestrians=8.0,
    cyclists=3.0,
    setback=(0.5, 6.0),
    built=0.60,
    trees=6.0,
    relief=0.30,
)

WAYMO_CITIES = Place(
    name="San Francisco, Phoenix, Mountain View",
    sizes=(
        SizeDistribution(mean=(4.80, 2.10, 1.79), std=(0.45, 0.14, 0.20)),
        SizeDistribution(mean=(0.91, 0.86, 1.73), std=(0.18, 0.12, 0.12)),
        SizeDistribution(mean=(1.78, 0.84, 1.78), std=(0.12, 0.10, 0.10)),
        SizeDistribution(mean=(5.80, 2.25, 2.40), std=(0.50, 0.12, 0.30)),
        SizeDistribution(mean=(9.00, 2.75, 3.20), std=(2.00, 0.20, 0.40)),
    ),
    car_styles=(0.15, 0.37, 0.35, 0.13),
    vehicle_mix=(0.92, 0.04, 0.04),
    lanes=2,
    lane_width=3.5,
    parking_width=2.6,
    sidewalk_width=2.5,
    slot=6.2,
    parked=0.30,
    angled=0.10,
    gap=38.0,
    crossing=0.60,
    turning=0.10,
    pedestrians=10.0,
    cyclists=1.5,
    setback=(1.0, 10.0),
    built=0.60,
    trees=5.0,
    relief=0.40,
)

PALO_ALTO = Place(
    name="Palo Alto",
    sizes=(
        SizeDistribution(mean=(4.73, 1.90, 1.71), std=(0.40, 0.11, 0.22)),
        SizeDistribution(mean=(0.80, 0.76, 1.76), std=(0.15, 0.10, 0.12)),
        SizeDistribution(mean=(1.76, 0.63, 1.72), std=(0.12, 0.10, 0.10)),
        SizeDistribution(mean=(5.60, 2.10, 2.35), std=(0.50, 0.12, 0.30)),
        SizeDistribution(mean=(9.50, 2.75, 3.30), std=(2.00, 0.20, 0.40)),
    ),
    car_styles=(0.20, 0.42, 0.32, 0.06),
    vehicle_mix=(0.93, 0.03, 0.04),
    lanes=2,
    lane_width=3.5,
    parking_width=2.5,
    sidewalk_width=2.0,
    slot=6.2,
    parked=0.25,
    angled=0.05,
    gap=36.0,
    crossing=0.50,
    turning=0.10,
    pedestrians=5.0,
    cyclists=3.0,
    setback=(4.0, 12.0),
    built=0.50,
    trees=8.0,
    relief=0.20,
)

KITTI = Domain(name="kitti", sensor=KITTI_HDL64E, place=KARLSRUHE)
WAYMO = Domain(name="waymo", sensor=WAYMO_TOP, place=WAYMO_CITIES)
LYFT = Domain(name="lyft", sensor=LYFT_ROOF, place=PALO_ALTO)
DOMAINS = (KITTI, WAYMO, LYFT)


def domain(name: str) -> Domain:
    """The domain called ``name``; ``InvalidInput`` with the nearest name if there is none."""
    known = {d.name: d for d in DOMAINS}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidInput(f"there is no simulated domain {name!r}{hint} Known: {', '.join(known)}")
