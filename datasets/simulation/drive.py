"""A vehicle that drives through one simulated street, frame after frame, and other vehicles that come through later.

`simulate_frame` builds a street of its own for every frame. Here all frames of a drive show one street: houses, trees, posts and parked
cars stay, traffic and people move at constant speeds. Another visit sees the same street with other traffic and people, from another
part of the lane. This is what the linkage audit needs, and what no set of single frames can show. Streets of drives have no crossing.
Read next: `world.py` for the street, `simulate.py` for a frame.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from ...core.errors import require
from ...core.frame import Frame
from ..kitti import KITTI_CLASSES, with_point_counts
from ..kitti_text import labels_from_kitti
from .places import CYCLIST, PEDESTRIAN, Domain, OpenPlace, Place
from .raycast import COS, OBJECT, PHASE, SIN, WAVE_X, WAVE_Y, X, Y, Z
from .simulate import SimulatedFrame, View, observe, virtual_camera
from .world import EXTENT, Street, World, build_street, ground_height

_SIGHT = 75.0  # m of street beyond both ends of a drive
_ROOM = 9.0  # m from the vehicle to the next one of its lane, from middle to middle
_WALK, _RIDE = 1.3, 4.5  # m/s of people on foot and on bicycles
_STREET, _VISIT, _RAYS = 101, 102, 103  # purposes of a seed

_Pose = tuple[float, float, float]
"""x, y, yaw."""


@dataclass(frozen=True, kw_only=True)
class SimulatedDrive:
    """The frames of one drive as a frame source, made when asked for; nothing is written or kept.

    Frame i depends only on these fields and i. Labels are those of `SimulatedDataset`.

    Example:
        first = SimulatedDrive(domain=domain("kitti"), seed=1, street=0, num_frames=40)
        later = replace(first, visit=1)  # another vehicle in the same street
    """

    domain: Domain
    """Sensor and kind of street."""
    seed: int
    """Seed of the dataset."""
    street: int = 0
    """Number of the street."""
    visit: int = 0
    """Number of the visit to this street. Each has traffic, people and a path in the lane of its own."""
    num_frames: int = 40
    """Number of frames."""
    speed: float = 10.0
    """Speed of the vehicle in m/s; 0 for a vehicle that stands while the others move."""
    rate: float = 10.0
    """Frames per second."""
    view: View = "camera"
    """`camera` or `full`, as for `simulate_frame`."""
    classes: tuple[str, ...] = KITTI_CLASSES
    """Class names in label order."""

    def __post_init__(self) -> None:
        require(
            min(self.seed, self.street, self.visit) >= 0 and self.num_frames >= 1,
            f"SimulatedDrive needs a seed, street and visit of 0 or more and at least one frame, found {self.seed}, {self.street}, "
            f"{self.visit} and {self.num_frames}",
        )
        require(
            0 <= self.speed < math.inf and 0 < self.rate < math.inf and self.length <= 400,
            f"SimulatedDrive needs a speed of 0 or more, a positive rate and at most 400 m, found {self.speed} m/s, {self.rate} frames per "
            f"second and {self.length:.0f} m; simulate several streets instead",
        )
        require(
            not isinstance(self.domain.place, OpenPlace),
            f"{self.domain.place.name} is an open place, whose further users have no path along the road; drive in an ordinary one",
        )

    @property
    def length(self) -> float:
        """m from the first frame to the last."""
        return (self.num_frames - 1) * self.speed / self.rate

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> Frame:
        """Frame `index` from 0. Raises IndexError past the end."""
        made = self.simulate(index)
        labels = labels_from_kitti(made.objects, virtual_camera(), self.classes)
        return replace(made.frame, labels=with_point_counts(labels, made.frame.points))

    def position(self, index: int) -> float:
        """Say where the vehicle is.

        Args:
            index: Number of the frame.

        Returns:
            m along the street. Visits of one street count from the same place.
        """
        start = -self.length / 2 + float(self._path()[0])
        return start + index * self.speed / self.rate

    def simulate(self, index: int) -> SimulatedFrame:
        """Make one frame with what only a simulator knows.

        Args:
            index: Number of the frame.

        Returns:
            The frame, in the sensor frame.

        Raises:
            IndexError: The drive has fewer frames.
        """
        if not 0 <= index < self.num_frames:
            raise IndexError(f"frame {index} of {self.num_frames}")
        street, visit = self._streets()
        time, s = index / self.rate, self.position(index)
        _, beside, sway = self._path()
        lane = street.road.lane + 0.3 * float(beside)
        vehicle = street.road.bend(s, lane, 0.01 * float(sway))
        noise = int(np.random.SeedSequence([self.seed, self.street, self.visit, index, _RAYS]).generate_state(1, np.uint64)[0])
        movers = _moved(visit, street, self, lane, time)
        name = f"{self.street:03d}_{self.visit:02d}_{index:04d}"
        return observe(self.domain, _seen_from(_joined(street, movers), vehicle), noise=noise, view=self.view, frame_id=name)

    def _path(self) -> np.ndarray:
        """(3,) start in m, offset in the lane and direction, each a small random number of this visit."""
        rng = np.random.default_rng([self.seed, self.street, self.visit, _VISIT, 1])
        return rng.uniform((-5.0, -1.0, -1.0), (5.0, 1.0, 1.0))

    def _streets(self) -> tuple[Street, Street]:
        """The street without anybody who moves, and one with the traffic and the people of this visit."""
        place = replace(self.domain.place, crossing=0.0, turning=0.0)
        extent = max(EXTENT, self.length / 2 + _SIGHT)
        return _street(place, (self.seed, self.street, _STREET), extent), _street(
            place, (self.seed, self.street, self.visit, _VISIT), extent
        )


@lru_cache(maxsize=16)
def _street(place: Place, seed: tuple[int, ...], extent: float) -> Street:
    return build_street(place, np.random.default_rng(seed), extent)


def _speeds(visit: Street, drive: SimulatedDrive, lane: float) -> np.ndarray:
    """(N,) m/s along the road of every road user of a visit; NaN for those that are not part of it: parked or crossing the road."""
    s, d, yaw = visit.users.T
    classes = visit.world.classes
    forward = np.where(np.abs(np.cos(yaw)) < 0.7, np.nan, np.sign(np.cos(yaw)))
    rng = np.random.default_rng([drive.seed, drive.street, drive.visit, _VISIT, 2])
    width = drive.domain.place.lane_width
    numbers = np.floor(d / width).astype(int)  # of lanes, from the right
    per_lane = {n: float(rng.uniform(8.0, 14.0)) for n in range(-8, 8)}
    per_lane[math.floor(lane / width)] = drive.speed  # nobody runs into anybody in the vehicle's lane
    driving = np.array([per_lane[n] for n in np.clip(numbers, -8, 7)])
    own_lane = numbers == math.floor(lane / width)
    near = own_lane & (np.abs(s - drive.position(0)) < _ROOM)
    vehicles = np.where((np.abs(d) < visit.half_road) & ~near, driving, np.nan)
    speed = np.where(classes == PEDESTRIAN, _WALK, np.where(classes == CYCLIST, _RIDE, vehicles))
    return forward * speed


def _is_parked(street: Street) -> np.ndarray:
    """(N,) bool: vehicles beside the lanes."""
    return (np.abs(street.users[:, 1]) >= street.half_road) & ~np.isin(street.world.classes, (PEDESTRIAN, CYCLIST))


def _moved(visit: Street, street: Street, drive: SimulatedDrive, lane: float, time: float) -> World:
    """The traffic and the people of a visit, at a time, on the ground of the street."""
    speeds = _speeds(visit, drive, lane)
    extent = max(EXTENT, drive.length / 2 + _SIGHT)
    parts: list[np.ndarray] = []
    boxes: list[np.ndarray] = []
    classes: list[int] = []
    for user in np.flatnonzero(np.isfinite(speeds)):
        s, d, yaw = (float(v) for v in visit.users[user])
        now = (s + speeds[user] * time + extent) % (2 * extent) - extent  # who leaves at one end enters at the other
        before, after = visit.road.bend(s, d, yaw), street.road.bend(now, d, yaw)
        rise = ground_height(street.world.waves, *after[:2]) - ground_height(visit.world.waves, *before[:2])
        own = visit.world.parts[visit.world.parts[:, OBJECT] == user]
        box = visit.world.boxes[user : user + 1]
        parts.append(_carried(own, before, after, rise, owner=len(boxes)))
        boxes.append(_carried_boxes(box, before, after, rise))
        classes.append(visit.world.classes[user])
    return World(
        parts=np.concatenate(parts) if parts else np.zeros((0, street.world.parts.shape[1])),
        waves=street.world.waves,
        boxes=np.concatenate(boxes) if boxes else np.zeros((0, 7)),
        classes=np.array(classes, np.int64),
    )


def _joined(street: Street, movers: World) -> World:
    """The street with its parked vehicles, and the movers."""
    world, parked = street.world, _is_parked(street)
    number = np.append(np.where(parked, parked.cumsum() - 1, -2), -1)  # the last entry is what owner -1 reads
    owner = number[world.parts[:, OBJECT].astype(np.int64)]
    standing, moving = world.parts[owner != -2].copy(), movers.parts.copy()
    standing[:, OBJECT] = owner[owner != -2]
    moving[:, OBJECT] += int(parked.sum())
    return World(
        parts=np.concatenate([standing, moving]),
        waves=world.waves,
        boxes=np.concatenate([world.boxes[parked], movers.boxes]),
        classes=np.concatenate([world.classes[parked], movers.classes]),
    )


def _seen_from(world: World, vehicle: _Pose) -> World:
    """The world from the ground under a vehicle."""
    x, y, yaw = vehicle
    rise = -ground_height(world.waves, x, y)
    c, s = math.cos(yaw), math.sin(yaw)
    waves = world.waves.copy()
    waves[:, PHASE] += waves[:, WAVE_X] * x + waves[:, WAVE_Y] * y
    waves[:, WAVE_X], waves[:, WAVE_Y] = (
        c * world.waves[:, WAVE_X] + s * world.waves[:, WAVE_Y],
        c * world.waves[:, WAVE_Y] - s * world.waves[:, WAVE_X],
    )
    here = (0.0, 0.0, 0.0)
    return replace(
        world,
        parts=_carried(world.parts, vehicle, here, rise),
        waves=waves,
        boxes=_carried_boxes(world.boxes, vehicle, here, rise),
    )


def _carried(parts: np.ndarray, before: _Pose, after: _Pose, rise: float, owner: int | None = None) -> np.ndarray:
    """Parts that stand to the pose `after` as the given ones to `before`."""
    moved = parts.copy()
    moved[:, X], moved[:, Y] = _placed(parts[:, X], parts[:, Y], before, after)
    turn = after[2] - before[2]
    c, s = math.cos(turn), math.sin(turn)
    moved[:, COS], moved[:, SIN] = c * parts[:, COS] - s * parts[:, SIN], s * parts[:, COS] + c * parts[:, SIN]
    moved[:, Z] += rise
    if owner is not None:
        moved[:, OBJECT] = owner
    return moved


def _carried_boxes(boxes: np.ndarray, before: _Pose, after: _Pose, rise: float) -> np.ndarray:
    moved = boxes.copy()
    moved[:, 0], moved[:, 1] = _placed(boxes[:, 0], boxes[:, 1], before, after)
    moved[:, 2] += rise
    moved[:, 6] = (boxes[:, 6] + after[2] - before[2] + np.pi) % (2 * np.pi) - np.pi
    return moved


def _placed(x: np.ndarray, y: np.ndarray, before: _Pose, after: _Pose) -> tuple[np.ndarray, np.ndarray]:
    turn = after[2] - before[2]
    c, s = math.cos(turn), math.sin(turn)
    dx, dy = x - before[0], y - before[1]
    return after[0] + c * dx - s * dy, after[1] + s * dx + c * dy
