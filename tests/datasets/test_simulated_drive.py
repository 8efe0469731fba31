"""A simulated drive: what stands stays in its place, what moves moves at its speed, and another visit sees the same street."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.simulation.drive import SimulatedDrive
from upcycle3d.datasets.simulation.places import CAR, KITTI, PEDESTRIAN, OpenPlace
from upcycle3d.datasets.simulation.world import Street, build_street, build_world, ground_height

DRIVE = SimulatedDrive(domain=KITTI, seed=4, street=1, num_frames=20)


def pose(drive: SimulatedDrive, index: int) -> tuple[float, float, float]:
    """Where the vehicle stands, from the drive's parts: independent of how a frame is made."""
    street = drive._streets()[0]
    _, beside, sway = drive._path()
    return street.road.bend(drive.position(index), street.road.lane + 0.3 * float(beside), 0.01 * float(sway))


def in_street(drive: SimulatedDrive, index: int, xyz: torch.Tensor) -> np.ndarray:
    """Points of a frame (N, 3) in the frame of the street."""
    x, y, yaw = pose(drive, index)
    c, s = np.cos(yaw), np.sin(yaw)
    points = xyz.double().numpy()
    z = points[:, 2] + drive.domain.sensor.height + ground_height(drive._streets()[0].world.waves, x, y)
    return np.stack([x + c * points[:, 0] - s * points[:, 1], y + s * points[:, 0] + c * points[:, 1], z], 1)


def centers(drive: SimulatedDrive, index: int, wanted: int) -> np.ndarray:
    """(N, 3) centers of the boxes of one class, in the frame of the street."""
    frame = drive.simulate(index).frame
    boxes = frame.labels.boxes.data[frame.labels.classes == wanted]
    return in_street(drive, index, boxes[:, :3])


def test_frames_are_reproducible_and_numbered():
    assert len(DRIVE) == 20
    one, again = DRIVE[3], SimulatedDrive(domain=KITTI, seed=4, street=1, num_frames=20)[3]
    assert torch.equal(one.points.xyz, again.points.xyz)
    assert one.id == "001_00_0003"
    with pytest.raises(IndexError):
        DRIVE[20]
    assert DRIVE.position(19) - DRIVE.position(0) == pytest.approx(19.0)


def test_a_street_of_the_usual_length_is_the_one_of_single_frames():
    one = build_world(KITTI.place, np.random.default_rng(7))
    street = build_street(KITTI.place, np.random.default_rng(7))
    assert np.array_equal(one.parts, street.world.parts)
    assert street.users.shape == (len(one.boxes), 3)
    for box, user in zip(one.boxes, street.users, strict=True):
        assert street.road.bend(*user)[:2] == pytest.approx(box[:2])


def test_parked_cars_stay_and_traffic_keeps_its_speed():
    """The size of a car tells it from all others: it is found again at the same place, or one second of driving further."""
    found = []
    for index in (4, 14):
        labels = DRIVE.simulate(index).frame.labels
        boxes = labels.boxes.data[labels.classes == CAR]
        places = in_street(DRIVE, index, boxes[:, :3])
        found.append({tuple(size): place for size, place in zip(boxes[:, 3:6].tolist(), places, strict=True)})
    moved = np.array([np.linalg.norm(found[0][size][:2] - found[1][size][:2]) for size in found[0].keys() & found[1].keys()])
    parked, driving = moved[moved < 1e-3], moved[moved >= 1e-3]
    assert len(parked) >= 3
    assert len(driving) >= 1
    assert ((driving > 7.9) & (driving < 14.2)).all()


def test_the_ground_and_the_houses_stay_where_they_are():
    """Points of two frames 10 m apart fall on the same surfaces, and do not without the motion between them."""
    first, later = DRIVE.simulate(2), DRIVE.simulate(12)
    standing = [f.frame.points.xyz[f.owners < 0] for f in (first, later)]
    here, there = in_street(DRIVE, 2, standing[0]), in_street(DRIVE, 12, standing[1])

    def shared(a: np.ndarray, b: np.ndarray) -> float:
        high = [p[(p[:, 2] > 1.0) & (p[:, 0] > 15) & (p[:, 0] < 40)] for p in (a, b)]
        cells = [set(map(tuple, np.floor(p / 0.5).astype(int))) for p in high]
        return len(cells[0] & cells[1]) / max(1, min(map(len, cells)))

    unmoved = [p.double().numpy() + np.array([0, 0, 1.73]) for p in standing]
    assert shared(here, there) > 0.4
    assert shared(here, there) > 2 * shared(*unmoved)


def test_another_visit_sees_the_same_houses_and_other_people():
    later = replace(DRIVE, visit=1)
    assert not np.allclose(later._path(), DRIVE._path())
    one, other = centers(DRIVE, 5, CAR), centers(later, 5, CAR)
    distance = np.linalg.norm(one[:, None, :2] - other[None, :, :2], axis=2).min(1)
    assert (distance < 1e-3).any()  # parked
    people = [centers(replace(DRIVE, visit=v, view="full"), 5, PEDESTRIAN) for v in (0, 1)]
    assert min(map(len, people)) > 0
    assert np.linalg.norm(people[0][:, None, :2] - people[1][None, :, :2], axis=2).min() > 0.01
    assert np.array_equal(DRIVE._streets()[0].world.parts, later._streets()[0].world.parts)


def test_nobody_stands_in_the_way():
    """No box comes near the path of the vehicle at any time, so a drive is one that could have happened."""
    for street in range(3):
        drive = SimulatedDrive(domain=KITTI, seed=0, street=street, num_frames=40, view="full")
        for index in (0, 13, 26, 39):
            boxes = drive.simulate(index).frame.labels.boxes.data
            near = (boxes[:, 0].abs() < 3.0) & (boxes[:, 1].abs() < 0.9)
            assert not near.any(), (street, index)


def test_a_standing_vehicle_sees_others_move():
    drive = replace(DRIVE, speed=0.0)
    one, other = drive.simulate(0), drive.simulate(10)
    assert pose(drive, 0) == pose(drive, 10)
    houses = [in_street(drive, 0, f.frame.points.xyz[f.owners < 0]) for f in (one, other)]
    assert abs(np.median(houses[0][:, 0]) - np.median(houses[1][:, 0])) < 2.0


def test_impossible_drives_are_refused():
    with pytest.raises(InvalidInput, match="400 m"):
        replace(DRIVE, num_frames=1000)
    with pytest.raises(InvalidInput, match="one frame"):
        replace(DRIVE, num_frames=0)
    place = OpenPlace.like(KITTI.place, trams=1.0)
    with pytest.raises(InvalidInput, match="open place"):
        SimulatedDrive(domain=replace(KITTI, place=place), seed=0)


def test_a_longer_street_bends_less():
    streets: list[Street] = [build_street(KITTI.place, np.random.default_rng(i), extent=200.0) for i in range(20)]
    assert max(abs(street.road.curvature) for street in streets) <= 1 / 480
