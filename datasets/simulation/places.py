"""The places that the simulation stands in for: how large the road users are, how dense, and how the street is built.

A `Domain` is a sensor at a place. Both are frozen, so a domain gap can be taken apart by cause: for example `replace(WAYMO, sensor=KITTI_HDL64E)`
drives through the same Waymo streets, frame by frame, with KITTI's beams. docs/simulation.md lists the sources of the numbers. They were chosen
once and are not tuned to any method's result. Read next: `sensors.py`, `world.py`.
"""

from __future__ import annotations

import difflib
import math
from dataclasses import dataclass, fields, replace

import numpy as np

from ...core.errors import InvalidInput
from .sensors import KITTI_HDL64E, LYFT_ROOF, WAYMO_TOP, Sensor

CLASS_NAMES = ("Car", "Pedestrian", "Cyclist", "Van", "Truck")
ALL_CLASS_NAMES = (*CLASS_NAMES, "Tram", "Animal", "Trailer")  # the last three only where an `OpenPlace` asks for them
CAR, PEDESTRIAN, CYCLIST, VAN, TRUCK, TRAM, ANIMAL, TRAILER = range(8)

Sizes3 = tuple[float, float, float]


@dataclass(frozen=True, kw_only=True)
class SizeDistribution:
    """Sizes of one class: normal, each clipped to mean ± 2.5 standard deviations, and correlated in pairs."""

    mean: Sizes3
    """Mean length, width, height in m."""
    std: Sizes3
    """Standard deviation of length, width, height in m."""
    correlation: float = 0.5
    """Correlation of each pair of sizes, 0 to 1."""

    def sample(self, rng: np.random.Generator) -> np.ndarray:
        """Draw one size. It always takes four numbers from the generator.

        Args:
            rng: Random generator.

        Returns:
            (3,) float64 length, width, height in m.
        """
        common, own = rng.standard_normal(), rng.standard_normal(3)
        normal = self.correlation**0.5 * common + (1 - self.correlation) ** 0.5 * own
        return np.array(self.mean) + np.array(self.std) * np.clip(normal, -2.5, 2.5)


@dataclass(frozen=True, kw_only=True)
class Place:
    """A kind of street."""

    name: str
    """Name of the place."""
    sizes: tuple[SizeDistribution, SizeDistribution, SizeDistribution, SizeDistribution, SizeDistribution]
    """One distribution per name in `CLASS_NAMES`."""
    car_styles: tuple[float, float, float, float]
    """Weights of hatchback, sedan, SUV and pickup."""
    vehicle_mix: Sizes3
    """Weights of car, van and truck among vehicles."""
    lanes: int
    """Lanes per direction."""
    lane_width: float
    """Width of a lane in m."""
    parking_width: float
    """Width of the parking strip in m."""
    sidewalk_width: float
    """Width of the sidewalk in m."""
    slot: float
    """Mean length of a parking place in m."""
    parked: float
    """Share of parking places that are taken."""
    angled: float
    """Chance that cars on one side park at a right angle."""
    gap: float
    """Mean free distance in m between vehicles of a lane."""
    crossing: float
    """Chance of a crossing street ahead."""
    turning: float
    """Chance that the vehicle itself is turning."""
    pedestrians: float
    """Mean number of pedestrians within 100 m either way."""
    cyclists: float
    """Mean number of cyclists within 100 m either way."""
    setback: tuple[float, float]
    """Lowest and highest distance in m from sidewalk to buildings."""
    built: float
    """Share of the building line that is built."""
    trees: float
    """Mean number of trees per 100 m and side."""
    relief: float
    """Height in m of the long waves of the ground."""


@dataclass(frozen=True, kw_only=True)
class OpenPlace(Place):
    """A street that also holds road users that a detector of cars, pedestrians and cyclists has not learned, or that lacks some.

    Further users are put in after everything else, so the street is otherwise the same. This is a class of its own and not fields of `Place`, so that
    the record of an ordinary simulated folder stays as it was.
    """

    trams: float = 0.0
    """Mean number of trams within 100 m either way."""
    trucks: float = 0.0
    """Mean number of trucks, in addition to those of `vehicle_mix`."""
    trailers: float = 0.0
    """Mean number of trailers without a vehicle."""
    animals: float = 0.0
    """Mean number of animals."""
    absent: tuple[str, ...] = ()
    """Names in `CLASS_NAMES` whose places stay empty."""
    tram_size: SizeDistribution = SizeDistribution(mean=(28.0, 2.65, 3.60), std=(2.0, 0.04, 0.06))
    """Sizes of trams."""
    trailer_size: SizeDistribution = SizeDistribution(mean=(5.50, 2.35, 2.50), std=(0.60, 0.06, 0.20))
    """Sizes of trailers."""
    animal_sizes: tuple[SizeDistribution, SizeDistribution, SizeDistribution] = (
        SizeDistribution(mean=(0.85, 0.28, 0.62), std=(0.10, 0.03, 0.06)),
        SizeDistribution(mean=(1.45, 0.45, 1.45), std=(0.10, 0.04, 0.10)),
        SizeDistribution(mean=(2.05, 0.62, 1.95), std=(0.06, 0.03, 0.10)),
    )
    """Sizes of dogs, deer and horses."""
    animal_mix: Sizes3 = (0.4, 0.3, 0.3)
    """Weights of dogs, deer and horses."""

    def __post_init__(self) -> None:
        numbers = (self.trams, self.trucks, self.trailers, self.animals)
        if not all(0 <= n < math.inf for n in numbers):
            raise InvalidInput(f"numbers of trams, trucks, trailers and animals must be finite and not negative, found {numbers}")
        strangers = [name for name in self.absent if name not in CLASS_NAMES]
        if strangers:
            raise InvalidInput(f"absent names {', '.join(strangers)}; ordinary streets hold {', '.join(CLASS_NAMES)}")

    @classmethod
    def like(
        cls,
        place: Place,
        *,
        trams: float = 0.0,
        trucks: float = 0.0,
        trailers: float = 0.0,
        animals: float = 0.0,
        absent: tuple[str, ...] = (),
    ) -> OpenPlace:
        """A place with further road users; seed by seed the street itself is the same.

        Args:
            place: The ordinary place.
            trams: Mean number of trams within 100 m either way.
            trucks: Mean number of additional trucks.
            trailers: Mean number of trailers.
            animals: Mean number of animals.
            absent: Names in `CLASS_NAMES` whose places stay empty.

        Returns:
            The open place.

        Raises:
            InvalidInput: A number is negative or not finite, or a name is unknown.
        """
        street = {f.name: getattr(place, f.name) for f in fields(Place)}
        return cls(**street, trams=trams, trucks=trucks, trailers=trailers, animals=animals, absent=absent)


@dataclass(frozen=True, kw_only=True)
class Domain:
    """A sensor at a place: what one simulated dataset comes from."""

    name: str
    """Name of the domain."""
    sensor: Sensor
    """The LiDAR with its mounting."""
    place: Place
    """The streets."""


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

# Two places that stand in for no dataset: cars of other sizes, to develop methods on before they are tried on the three above.
COMPACT_SUBURB = replace(
    PALO_ALTO,
    name="a suburb with compact cars",
    sizes=(SizeDistribution(mean=(4.15, 1.75, 1.50), std=(0.40, 0.10, 0.14)), *PALO_ALTO.sizes[1:]),
)
LARGE_CAR_TOWN = replace(
    KARLSRUHE,
    name="a town with large cars",
    sizes=(SizeDistribution(mean=(5.35, 2.20, 1.95), std=(0.40, 0.10, 0.14)), *KARLSRUHE.sizes[1:]),
)

KITTI = Domain(name="kitti", sensor=KITTI_HDL64E, place=KARLSRUHE)
WAYMO = Domain(name="waymo", sensor=WAYMO_TOP, place=WAYMO_CITIES)
LYFT = Domain(name="lyft", sensor=LYFT_ROOF, place=PALO_ALTO)
COMPACT = Domain(name="compact", sensor=KITTI_HDL64E, place=COMPACT_SUBURB)
LARGE = Domain(name="large", sensor=LYFT_ROOF, place=LARGE_CAR_TOWN)
DOMAINS = (KITTI, WAYMO, LYFT)
DEVELOPMENT_DOMAINS = (COMPACT, LARGE)


def domain(name: str) -> Domain:
    """Look up a domain.

    Args:
        name: `kitti`, `waymo`, `lyft`, or `compact` and `large`, which stand in for no dataset.

    Returns:
        The domain.

    Raises:
        InvalidInput: There is none of this name; the message suggests the nearest.
    """
    known = {d.name: d for d in (*DOMAINS, *DEVELOPMENT_DOMAINS)}
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name.lower(), known, n=1, cutoff=0.4)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise InvalidInput(f"there is no simulated domain {name!r}{hint} Known: {', '.join(known)}")
