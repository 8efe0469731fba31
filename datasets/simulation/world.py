"""One random street: a curved road with traffic both ways, parked cars, people, houses, trees and posts on uneven ground.

Everything is placed in road coordinates (s meters along the road, d meters to its left), bent onto the road's arc, then turned by the vehicle's own
heading. Nothing overlaps: a candidate whose footprint comes near a placed one is dropped. All random numbers of a candidate are drawn before
that test. Read next: `bodies.py` for the road users, `raycast.py` for the rays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from .bodies import block, body, bush, post, tree
from .places import ANIMAL, CAR, CLASS_NAMES, CYCLIST, PEDESTRIAN, TRAILER, TRAM, TRUCK, VAN, OpenPlace, Place
from .raycast import COS, HALF_X, HALF_Y, OBJECT, SIN, X, Y, Z

EXTENT = 100.0  # m either way along the road
_TRIES = 40  # places an `OpenPlace` tries for one of its road users


@dataclass(frozen=True, kw_only=True)
class World:
    """A street around the sensor. x forward, y left, z up from the ground under the sensor."""

    parts: np.ndarray
    """(P, 17) float64, see `raycast.py`."""
    waves: np.ndarray
    """(W, 4) float64, the ground."""
    boxes: np.ndarray
    """(N, 7) float64 labeled road users."""
    classes: np.ndarray
    """(N,) int64 into `ALL_CLASS_NAMES`."""


@dataclass(frozen=True, kw_only=True)
class Road:
    """The course of a street: an arc through the vehicle's lane."""

    curvature: float
    """1 / radius in 1/m, positive to the left."""
    heading: float
    """Direction of x in the world, in rad from the direction of the road at s = 0."""
    lane: float
    """m from the middle of the road to the origin of the world, positive to the left."""

    def bend(self, s: float, d: float, yaw: float) -> tuple[float, float, float]:
        """Turn road coordinates into those of the world.

        Args:
            s: m along the road.
            d: m to the left of its middle.
            yaw: Direction in rad from that of the road.

        Returns:
            x, y, yaw.
        """
        k = self.curvature if abs(self.curvature) > 1e-6 else 1e-6
        x, y = math.sin(k * s) * (1 / k - d), (1 - math.cos(k * s)) / k + d * math.cos(k * s) - self.lane
        c, sn = math.cos(-self.heading), math.sin(-self.heading)
        return c * x - sn * y, sn * x + c * y, yaw + k * s - self.heading


@dataclass(frozen=True, kw_only=True)
class Street:
    """A world and how it lies along its road, so that a vehicle can drive through it."""

    world: World
    """The street, seen from s = 0."""
    road: Road
    """Its course."""
    half_road: float
    """m from the middle of the road to the edge of its outer lane."""
    users: np.ndarray
    """(N, 3) float64 road coordinates s, d, yaw of the road users of `world`; NaN for those that an `OpenPlace` adds."""


def ground_height(waves: np.ndarray, x: float, y: float) -> float:
    """Height of the ground, zero at the origin.

    Args:
        waves: (W, 4) float64, the ground.
        x: Position in m.
        y: Position in m.

    Returns:
        Height in m.
    """
    return float((waves[:, 0] * (np.sin(waves[:, 1] * x + waves[:, 2] * y + waves[:, 3]) - np.sin(waves[:, 3]))).sum())


def _waves(place: Place, rng: np.random.Generator) -> np.ndarray:
    """Two long waves (hills), two of the length of a house, two short ones (worn asphalt); slopes stay below about 6 %."""
    rows = []
    for amplitude, low, high in ((place.relief, 60, 160), (place.relief / 4, 15, 40), (0.008, 2, 5)):
        for _ in range(2):
            number, way = 2 * math.pi / rng.uniform(low, high), rng.uniform(0, 2 * math.pi)
            rows.append(
                [amplitude * rng.uniform(0.3, 1.0), number * math.cos(way), number * math.sin(way), rng.uniform(0, 2 * math.pi)]
            )
    return np.array(rows)


def _clash(a: np.ndarray, others: np.ndarray, margin: float) -> bool:
    """Whether footprint a (5,) x, y, half length, half width, yaw comes within `margin` of one of `others` (M, 5).

    Separating axes: two rectangles are apart if and only if their shadows on one of their four side directions are.
    """
    offset = others[:, :2] - a[:2]
    reach = np.hypot(a[2], a[3]) + np.hypot(others[:, 2], others[:, 3]) + margin
    near = (offset**2).sum(1) < reach**2
    others, offset = others[near], offset[near]
    if not len(others):
        return False
    apart = np.zeros(len(others), bool)
    turn = others[:, 4] - a[4]
    c, s = np.abs(np.cos(turn)), np.abs(np.sin(turn))
    for yaw, own, cross in (
        (np.full(len(others), a[4]), a[2], c * others[:, 2] + s * others[:, 3]),
        (np.full(len(others), a[4] + math.pi / 2), a[3], s * others[:, 2] + c * others[:, 3]),
        (others[:, 4], others[:, 2], c * a[2] + s * a[3]),
        (others[:, 4] + math.pi / 2, others[:, 3], s * a[2] + c * a[3]),
    ):
        apart |= np.abs(np.cos(yaw) * offset[:, 0] + np.sin(yaw) * offset[:, 1]) > own + cross + margin
    return not bool(apart.all())


class _Street:
    """What has been placed so far. Lives only inside `build_world`."""

    def __init__(self, place: Place, rng: np.random.Generator, extent: float) -> None:
        self.place, self.rng, self.extent = place, rng, extent
        self.longer = extent / EXTENT
        self.waves = _waves(place, rng)
        sharpest = 1 / (120 * self.longer**2)  # a longer street bends less, or it would meet the row of houses behind it
        self.curvature = float(np.clip(rng.normal(0, 1 / 350), -sharpest, sharpest))
        turning = rng.random() < place.turning
        self.heading = float(rng.uniform(-1.0, 1.0) if turning else rng.normal(0, 0.03))
        self.side = (rng.random(2) < place.angled).tolist()  # left, right: cars park at a right angle
        crossing = rng.random() < place.crossing
        ahead = rng.uniform(2, 8) if turning else rng.uniform(12, 60)
        self.crossing = float(ahead) if crossing or turning else math.inf
        self.half_road = place.lanes * place.lane_width
        self.lane = -0.5 * place.lane_width if place.lanes == 1 or rng.random() < 0.5 else -1.5 * place.lane_width
        self.road = Road(curvature=self.curvature, heading=self.heading, lane=self.lane)
        self.absent = {CLASS_NAMES.index(name) for name in place.absent} if isinstance(place, OpenPlace) else set()
        self.parts: list[np.ndarray] = []
        self.boxes: list[np.ndarray] = []
        self.classes: list[int] = []
        self.users: list[tuple[float, float, float]] = []
        self.footprints = np.zeros((1024, 5))  # x, y, half length, half width, yaw; the first is the vehicle itself
        self.footprints[0, 2:4] = 2.6, 1.1
        self.placed = 1

    def kerb(self, left: bool) -> float:
        """m from the middle of the road to the sidewalk."""
        return self.half_road + (5.2 if self.side[0 if left else 1] else self.place.parking_width)

    def bend(self, s: float, d: float, yaw: float) -> tuple[float, float, float]:
        """Road coordinates -> x, y, yaw seen from the vehicle, which stands at s = 0 in its lane."""
        return self.road.bend(s, d, yaw)

    def _put(self, parts: np.ndarray, x: float, y: float, yaw: float, z: float, owner: int) -> None:
        c, s = math.cos(yaw), math.sin(yaw)
        placed = parts.copy()
        placed[:, X], placed[:, Y] = x + c * parts[:, X] - s * parts[:, Y], y + s * parts[:, X] + c * parts[:, Y]
        placed[:, Z] += z
        placed[:, COS], placed[:, SIN], placed[:, OBJECT] = c, s, owner
        self.parts.append(placed)

    def _free(self, x: float, y: float, half: tuple[float, float], yaw: float, margin: float) -> bool:
        footprint = np.array([x, y, half[0], half[1], yaw])
        if self.placed == len(self.footprints) or _clash(footprint, self.footprints[: self.placed], margin):
            return False
        self.footprints[self.placed] = footprint
        self.placed += 1
        return True

    def add_user(self, class_index: int, s: float, d: float, yaw: float, *, sway: float) -> None:
        """A road user of random size and color at (s, d) heading `yaw` relative to the road, +- `sway` rad."""
        size = self.place.sizes[class_index].sample(self.rng)
        reflectivity = float(self.rng.uniform(0.06, 0.8) if class_index in (CAR, VAN, TRUCK) else self.rng.uniform(0.15, 0.7))
        style = int(self.rng.choice(4, p=self.place.car_styles))
        yaw += self.rng.normal(0, sway)
        if class_index not in self.absent:
            self.stand(class_index, size, reflectivity, style, self.bend(s, d, yaw), (s, d, yaw))

    def stand(
        self,
        class_index: int,
        size: np.ndarray,
        reflectivity: float,
        style: int,
        pose: tuple[float, float, float],
        on_road: tuple[float, float, float] = (math.nan, math.nan, math.nan),
    ) -> bool:
        """Put a road user of this look at `pose`, x y yaw seen from the vehicle, if there is room; returns whether."""
        x, y, yaw = pose
        margin = 0.15 if class_index in (PEDESTRIAN, CYCLIST, ANIMAL) else 0.3
        if not self._free(x, y, (size[0] / 2, size[1] / 2), yaw, margin):
            return False
        z = ground_height(self.waves, x, y)
        self._put(body(class_index, size, reflectivity, style), x, y, yaw, z, len(self.boxes))
        self.boxes.append(np.array([x, y, z + size[2] / 2, *size, yaw]))
        self.classes.append(class_index)
        self.users.append(on_road)
        return True

    def add_thing(self, parts: np.ndarray, s: float, d: float, yaw: float = 0.0, *, margin: float = 0.2) -> None:
        """Something that is no road user; its footprint is that of its largest part near the ground."""
        x, y, yaw = self.bend(s, d, yaw)
        low = parts[:1]
        if self._free(x, y, (low[0, HALF_X], low[0, HALF_Y]), yaw, margin):
            self._put(parts, x, y, yaw, ground_height(self.waves, x, y) - 0.1, -1)

    def vehicle_class(self) -> int:
        return int(self.rng.choice([CAR, VAN, TRUCK], p=self.place.vehicle_mix))

    def near_crossing(self, s: float, room: float) -> bool:
        return abs(s - self.crossing) < self.half_road + room


def _traffic(street: _Street) -> None:
    """Vehicles in lanes, right-hand traffic, and on the crossing street."""
    place, rng = street.place, street.rng
    for lane in range(place.lanes):
        for way in (1, -1):
            s = -street.extent + rng.exponential(place.gap)
            while s < street.extent:
                d = -way * (lane + 0.5) * place.lane_width + rng.normal(0, 0.2)
                street.add_user(street.vehicle_class(), s, d, 0.0 if way == 1 else math.pi, sway=0.03)
                s += 6.5 + rng.exponential(place.gap)
    if math.isfinite(street.crossing):
        for way in (1, -1):
            d = -60 + rng.exponential(place.gap)
            while d < 60:
                s = street.crossing + way * 0.5 * place.lane_width + rng.normal(0, 0.2)
                turn = rng.normal(0, 0.3) if abs(d) < street.half_road else 0.0
                street.add_user(street.vehicle_class(), s, d, way * math.pi / 2 + turn, sway=0.03)
                d += 6.5 + rng.exponential(place.gap)


def _parking(street: _Street) -> None:
    place, rng = street.place, street.rng
    for left in (True, False):
        angled = street.side[0 if left else 1]
        sign = 1 if left else -1
        s = -street.extent
        while s < street.extent:
            s += 2.7 if angled else place.slot + rng.uniform(-0.5, 0.5)
            d = sign * (street.half_road + (2.7 if angled else 0.5 * place.parking_width) + rng.normal(0, 0.12))
            along = (
                (0.0 if left == (rng.random() < 0.08) else math.pi) if not angled else sign * math.pi / 2 * rng.choice([1, -1])
            )
            taken, class_index = rng.random() < place.parked, street.vehicle_class()
            if taken and class_index != TRUCK and not street.near_crossing(s, 5.0):
                street.add_user(class_index, s, d, along, sway=0.025)


def _people(street: _Street) -> None:
    place, rng = street.place, street.rng
    for _ in range(rng.poisson(place.pedestrians * street.longer)):
        s, left = rng.uniform(-0.6 * street.extent, 0.6 * street.extent), rng.random() < 0.5
        on_road = rng.random() < 0.15
        beside = street.kerb(left) + rng.uniform(0.4, place.sidewalk_width)
        d = rng.uniform(-street.half_road, street.half_road) if on_road else (1 if left else -1) * beside
        yaw = rng.choice([-1, 1]) * math.pi / 2 if on_road else rng.choice([0, math.pi])
        street.add_user(PEDESTRIAN, s, d, yaw, sway=0.3)
    for _ in range(rng.poisson(place.cyclists * street.longer)):
        s, left = rng.uniform(-0.6 * street.extent, 0.6 * street.extent), rng.random() < 0.5
        d = (1 if left else -1) * (street.half_road - rng.uniform(0.4, 0.9))
        street.add_user(CYCLIST, s, d, math.pi if left else 0.0, sway=0.08)


def _surroundings(street: _Street) -> None:
    """Posts and trees at the kerb, houses, walls and gardens behind the sidewalk."""
    place, rng = street.place, street.rng
    for left in (True, False):
        sign, kerb = (1 if left else -1), street.kerb(left)
        for _ in range(rng.poisson(place.trees * 2 * street.longer)):
            s, height = rng.uniform(-street.extent, street.extent), rng.uniform(4, 11)
            parts = tree(height, crown=height * rng.uniform(0.2, 0.32), trunk=rng.uniform(0.1, 0.25))
            if not street.near_crossing(s, 4):
                street.add_thing(parts, s, sign * (kerb + rng.uniform(0.3, 0.6)))
        for s in np.arange(-street.extent, street.extent, 25.0) + rng.uniform(0, 25):
            parts = post(rng.uniform(2.4, 7), rng.uniform(0.04, 0.1), sign=bool(rng.random() < 0.5))
            street.add_thing(parts, float(s), sign * (kerb + 0.25), yaw=math.pi)
        s = -street.extent
        while s < street.extent:
            width, depth, height = rng.uniform(8, 24), rng.uniform(4, 9), rng.uniform(4, 13)
            setback, built, reflectivity = rng.uniform(*place.setback), rng.random() < place.built, rng.uniform(0.2, 0.6)
            low, fenced = rng.uniform(0.8, 2.2), rng.random() < 0.3
            line = kerb + place.sidewalk_width + 0.3
            middle = s + width / 2
            if not street.near_crossing(middle, width / 2 + 3):
                if built:
                    house = block((width / 2 - 0.5, depth, height / 2), reflectivity)
                    street.add_thing(house, middle, sign * (line + setback + depth), margin=0.0)
                else:
                    for _ in range(4):
                        half = tuple(rng.uniform((0.5, 0.5, 0.4), (1.8, 1.8, 1.6)))
                        street.add_thing(bush(half), s + rng.uniform(0, width), sign * (line + rng.uniform(1.5, 12)))
                    for _ in range(2):
                        garden = rng.uniform(4, 9)
                        parts = tree(garden, crown=garden * rng.uniform(0.22, 0.35), trunk=0.2)
                        street.add_thing(parts, s + rng.uniform(0, width), sign * (line + rng.uniform(4, 15)))
                if fenced:
                    street.add_thing(block((width / 2 - 0.7, 0.1, low / 2), 0.35), middle, sign * (line + 0.15), margin=0.0)
            s += width
        # Where the street crosses or the building line is open, the view ends at something far: a row of houses or a wood.
        far = block((street.extent, 2.0, rng.uniform(3, 6)), rng.uniform(0.3, 0.5))
        street.add_thing(far, 0.0, sign * (kerb + rng.uniform(45, 60)), margin=-100.0)


def _in_a_lane(street: _Street, rng: np.random.Generator, middle: float) -> tuple[float, float, float]:
    """s, d, yaw in a lane, or with chance `middle` in the middle of the road; now and then on the crossing street."""
    place, way = street.place, 1 if rng.random() < 0.5 else -1
    beside = -way * (int(rng.integers(place.lanes)) + 0.5) * place.lane_width
    beside = (0.0 if rng.random() < middle else beside) + rng.normal(0, 0.1)
    along, crosses = rng.uniform(-0.85, 0.85) * street.extent, rng.random() < 0.2
    if crosses and math.isfinite(street.crossing):
        return street.crossing + way * 0.5 * place.lane_width, 0.6 * along, way * math.pi / 2
    return along, beside, 0.0 if way == 1 else math.pi


def _parked_trailer(street: _Street, rng: np.random.Generator) -> tuple[float, float, float]:
    """s, d, yaw at the kerb, or in a drive between the houses."""
    left, s, in_drive = rng.random() < 0.5, rng.uniform(-0.85, 0.85) * street.extent, rng.random() < 0.2
    sign, along = (1 if left else -1), (math.pi if left else 0.0)
    if street.near_crossing(s, 5.0):
        s -= 2 * (street.half_road + 5.0)
    if in_drive:
        return s, sign * (street.kerb(left) + street.place.sidewalk_width + rng.uniform(3.5, 6.0)), -sign * math.pi / 2
    return s, sign * (street.half_road + 1.3), along


def _loose_animal(street: _Street, rng: np.random.Generator) -> tuple[float, float, float]:
    """s, d, yaw on the sidewalk, in a garden or on the road."""
    s, sign, where = rng.uniform(-60, 60), (1 if rng.random() < 0.5 else -1), rng.random()
    kerb, sidewalk, beyond = street.kerb(sign == 1), street.place.sidewalk_width, rng.random()
    if where < 0.5:
        d = kerb + 0.3 + beyond * (sidewalk - 0.3)
    else:
        d = kerb + sidewalk + 1.0 + 8.0 * beyond if where < 0.75 else street.half_road * beyond
    return s, sign * d, rng.uniform(-math.pi, math.pi)


def _further_users(street: _Street, place: OpenPlace) -> None:
    """What an open place adds, the longest first. Each class has a generator of its own: more of one class moves no other one, but
    where they want the same spot."""
    rngs = map(np.random.default_rng, street.rng.integers(2**63, size=4))
    for class_index, number, rng in zip(
        (TRAM, TRUCK, TRAILER, ANIMAL), (place.trams, place.trucks, place.trailers, place.animals), rngs
    ):
        for _ in range(rng.poisson(number)):
            style = int(rng.choice(3, p=place.animal_mix)) if class_index == ANIMAL else int(rng.integers(2))
            sizes = {TRAM: place.tram_size, TRUCK: place.sizes[TRUCK], TRAILER: place.trailer_size}
            size = (place.animal_sizes[style] if class_index == ANIMAL else sizes[class_index]).sample(rng)
            reflectivity, sway = float(rng.uniform(0.15, 0.7)), rng.normal(0, 0.02)
            for _ in range(_TRIES):
                if class_index == TRAILER:
                    s, d, yaw = _parked_trailer(street, rng)
                elif class_index == ANIMAL:
                    s, d, yaw = _loose_animal(street, rng)
                else:
                    s, d, yaw = _in_a_lane(street, rng, middle=0.3 if class_index == TRAM else 0.0)
                if street.stand(class_index, size, reflectivity, style, street.bend(s, d, yaw + sway)):
                    break


def build_world(place: Place, rng: np.random.Generator) -> World:
    """Build a random street. The same generator state gives the same street.

    Args:
        place: Kind of street.
        rng: Random generator.

    Returns:
        The street.
    """
    return build_street(place, rng).world


def build_street(place: Place, rng: np.random.Generator, extent: float = EXTENT) -> Street:
    """Build a random street with its course. The same generator state gives the same street.

    Args:
        place: Kind of street.
        rng: Random generator.
        extent: m of street either way; a longer one bends less.

    Returns:
        The street.
    """
    street = _Street(place, rng, extent)
    _traffic(street)
    _parking(street)
    _people(street)
    _surroundings(street)
    if isinstance(place, OpenPlace):
        _further_users(street, place)
    boxes = np.stack(street.boxes) if street.boxes else np.zeros((0, 7))
    boxes[:, 6] = (boxes[:, 6] + np.pi) % (2 * np.pi) - np.pi
    world = World(parts=np.concatenate(street.parts), waves=street.waves, boxes=boxes, classes=np.array(street.classes, np.int64))
    users = np.array(street.users, np.float64).reshape(-1, 3)
    return Street(world=world, road=street.road, half_road=street.half_road, users=users)
