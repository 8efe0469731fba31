"""The simulated LiDAR: the ray-caster against brute force, the physics it promises, and the dataset it writes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon

from upcycle3d.core.boxes import corners_bev
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.kitti import KittiDataset, crop_to_camera, read_ids
from upcycle3d.datasets.simulation.bodies import block, body, part
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.layout_lyft import write_lyft_layout
from upcycle3d.datasets.simulation.layout_waymo import write_waymo_layout
from upcycle3d.datasets.simulation.places import CAR, DOMAINS, KITTI, LYFT, WAYMO, Domain, domain
from upcycle3d.datasets.simulation.raycast import (
    BOX,
    COS,
    CYLINDER,
    ELLIPSOID,
    GLOSS,
    HALF_X,
    HALF_Z,
    KIND,
    OBJECT,
    PASS_CHANCE,
    SIN,
    TAPER_FRONT,
    TAPER_SIDE,
    Hits,
    X,
    Y,
    Z,
    _intersect,
    cast,
)
from upcycle3d.datasets.simulation.sensors import Sensor
from upcycle3d.datasets.simulation.simulate import SimulatedDataset, SimulatedFrame, simulate_frame
from upcycle3d.datasets.simulation.world import build_world
from upcycle3d.datasets.simulation.writing import claim_folder

FLAT = np.zeros((1, 4))
# Answers every pulse, without noise, on an even grid of 0.2 degrees.
IDEAL = Sensor(
    name="ideal",
    elevations=tuple(2.0 - 0.2 * i for i in range(120)),
    azimuths=1800,
    height=1.73,
    min_range=0.5,
    max_range=100.0,
    range_noise=0.0,
    jitter=0.0,
    reach=1e6,
    dropout=0.0,
    intensity_gain=1.0,
    intensity_noise=0.0,
)


def turn(parts: np.ndarray, *, sensor: Sensor = IDEAL, waves: np.ndarray = FLAT) -> Hits:
    objects = int(parts[:, OBJECT].max()) + 1 if len(parts) else 0
    columns, beams = np.arange(sensor.azimuths), np.arange(len(sensor.elevations))
    return cast(parts, waves, objects, sensor, seed=3, columns=columns, beams=beams)


def placed(parts: np.ndarray, x: float, y: float, yaw: float, owner: int = -1) -> np.ndarray:
    """Parts of a body standing on flat ground under the sensor."""
    out = parts.copy()
    c, s = np.cos(yaw), np.sin(yaw)
    out[:, X], out[:, Y] = x + c * parts[:, X] - s * parts[:, Y], y + s * parts[:, X] + c * parts[:, Y]
    out[:, Z] -= IDEAL.height
    out[:, COS], out[:, SIN], out[:, OBJECT] = c, s, owner
    return out


def solid_car() -> np.ndarray:
    parts = body(CAR, np.array([4.0, 1.7, 1.5]), 0.5, style=0)
    parts[:, PASS_CHANCE] = 0  # no ray passes the glass
    parts[:, GLOSS] = 0  # and none is mirrored away
    return parts


@pytest.fixture(scope="module")
def frames() -> dict[str, list[SimulatedFrame]]:
    return {d.name: [simulate_frame(d, seed=5, index=i, view="camera") for i in range(12)] for d in DOMAINS}


def test_beams_draw_rings_on_flat_ground() -> None:
    hits = turn(np.zeros((0, 17)))
    radius = np.hypot(hits.points[:, 0], hits.points[:, 1])
    elevation = np.deg2rad(np.array(IDEAL.elevations))[hits.beams]
    np.testing.assert_allclose(radius, IDEAL.height / np.tan(-elevation), rtol=1e-4)
    np.testing.assert_allclose(hits.points[:, 2], -IDEAL.height, atol=1e-3)


def test_points_lie_on_wavy_ground() -> None:
    waves = np.array([[0.3, 0.08, 0.03, 1.0], [0.05, 0.0, 0.4, 2.0]])
    hits = turn(np.zeros((0, 17)), waves=waves)
    x, y, z = hits.points[:, :3].astype(np.float64).T
    truth = -IDEAL.height + sum(a * (np.sin(kx * x + ky * y + p) - np.sin(p)) for a, kx, ky, p in waves)
    near = np.hypot(x, y) < 30
    assert near.sum() > 50_000
    assert np.abs(z - truth)[near].max() < 0.02
    assert np.abs(z - truth).max() < 0.1


def inside_part(shape: np.ndarray, p: np.ndarray) -> np.ndarray:
    """Whether points (..., 3) lie in a part, from its definition rather than from planes and roots."""
    half, taper = shape[HALF_X : HALF_Z + 1], shape[TAPER_FRONT : TAPER_SIDE + 1]
    x, y, z = np.moveaxis(p - shape[[X, Y, Z]], -1, 0)
    x, y = shape[COS] * x + shape[SIN] * y, shape[COS] * y - shape[SIN] * x
    flat = (x / half[0]) ** 2 + (y / half[1]) ** 2
    if shape[KIND] == ELLIPSOID:
        return flat + (z / half[2]) ** 2 <= 1
    if shape[KIND] == CYLINDER:
        return (flat <= 1) & (np.abs(z) <= half[2])
    rise = (z + half[2]) / (2 * half[2])
    ends = (x <= half[0] - taper[0] * rise) & (x >= taper[1] * rise - half[0])
    return ends & (np.abs(y) <= half[1] - taper[2] * rise) & (np.abs(z) <= half[2])


@pytest.mark.parametrize("kind", [BOX, ELLIPSOID, CYLINDER])
def test_intersections_agree_with_marching_along_the_ray(kind: int) -> None:
    rng = np.random.default_rng(kind)
    step, met = 0.005, 0
    steps = np.arange(0.0, 16.0, step)
    for _ in range(150):
        half, taper = rng.uniform(0.3, 1.5, 3), tuple(rng.uniform(0, 0.25, 3)) if kind == BOX else (0.0, 0.0, 0.0)
        shape = placed(part(kind, (0, 0, 1.7), tuple(half), 0.5, taper=taper)[None], *rng.uniform(4, 9, 2), rng.uniform(-3, 3))[0]
        aim = shape[[X, Y, Z]] + rng.uniform(-1.2, 1.2, 3) * half
        direction = aim / np.linalg.norm(aim)
        entry, leave, cosine = _intersect(shape, *direction)
        along = np.nonzero(inside_part(shape, direction * steps[:, None]))[0] * step
        if len(along) > 2:
            met += 1
            assert entry == pytest.approx(along[0] - step / 2, abs=step)
            assert leave == pytest.approx(along[-1] + step / 2, abs=step)
            assert 0 < cosine <= 1 + 1e-9
        else:  # a miss, or an edge that the march steps over
            assert entry > leave - 3 * step
    assert 40 < met < 140


def test_points_of_a_car_fall_with_the_square_of_the_range() -> None:
    counts = {r: (turn(placed(solid_car(), r, 0.0, 0.6, owner=0)).objects == 0).sum() for r in (10, 20, 40)}
    assert counts[10] / counts[20] == pytest.approx(4, rel=0.2)
    assert counts[20] / counts[40] == pytest.approx(4, rel=0.25)


def test_a_wall_hides_what_stands_behind_it() -> None:
    car = placed(solid_car(), 20.0, 0.0, np.pi / 2, owner=0)
    alone = turn(car)
    assert alone.visible[0] == alone.reachable[0] > 100
    half_hidden = turn(np.concatenate([car, placed(block((0.1, 4.0, 3.0), 0.4), 12.0, 4.0, 0.0)]))
    assert half_hidden.reachable[0] == alone.reachable[0]
    assert half_hidden.visible[0] / half_hidden.reachable[0] == pytest.approx(0.5, abs=0.1)
    hidden = turn(np.concatenate([car, placed(block((0.1, 4.0, 3.0), 0.4), 12.0, 0.0, 0.0)]))
    assert hidden.visible[0] == 0
    assert not (hidden.objects == 0).any()


def test_leaves_let_some_rays_through() -> None:
    leaves = placed(part(ELLIPSOID, (0, 0, 1.7), (1, 1, 1), 0.5, free_path=1.0)[None], 10, 0, 0, owner=0)
    wall = placed(block((0.1, 3.0, 4.0), 0.4), 15.0, 0.0, 0.0, owner=1)
    hits = turn(np.concatenate([leaves, wall]))
    behind = hits.points[(hits.objects == 1) & (np.hypot(hits.points[:, 1], hits.points[:, 2]) < 0.7)]
    inside = hits.points[hits.objects == 0]
    assert len(behind) > 20
    assert len(inside) > 100
    assert np.ptp(np.linalg.norm(inside[:, :3], axis=1)) > 1.0  # not only the skin answers


@pytest.mark.parametrize("d", DOMAINS, ids=lambda d: d.name)
def test_labels_hold_their_points(d: Domain, frames: dict[str, list[SimulatedFrame]]) -> None:
    inside = total = 0
    for frame in frames[d.name]:
        labels, owners = frame.frame.labels, frame.owners
        assert labels is not None
        on = owners >= 0
        torch.testing.assert_close(torch.bincount(owners[on], minlength=len(labels)), labels.num_points)
        assert int(labels.num_points.min()) >= 1
        box = labels.boxes.data[owners[on]].double()
        offset = frame.frame.points.xyz[on].double() - box[:, :3]
        c, s = torch.cos(box[:, 6]), torch.sin(box[:, 6])
        local = torch.stack([c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0], offset[:, 2]], 1)
        inside += int((local.abs() <= box[:, 3:6] / 2 + 0.05).all(1).sum())
        total += int(on.sum())
    assert inside / total > 0.99


@pytest.mark.parametrize("d", DOMAINS, ids=lambda d: d.name)
def test_frames_are_as_busy_as_real_ones(d: Domain, frames: dict[str, list[SimulatedFrame]]) -> None:
    cars, moderate = [], []
    for frame in frames[d.name]:
        labels = frame.frame.labels
        assert labels is not None
        car = labels.classes == CAR
        near = labels.boxes.data[:, :2].norm(dim=1) < 50
        cars.append(int((car & near & (labels.num_points >= 5)).sum()))
        moderate.append(int((car & (labels.difficulty >= 0) & (labels.difficulty <= 1)).sum()))
        points = torch.cat([frame.frame.points.xyz, frame.frame.points.features], 1)
        assert points.isfinite().all()
        assert points[:, 3].min() >= 0
        assert points[:, 3].max() <= 1
        assert frame.frame.points.xyz.norm(dim=1).max() < d.sensor.max_range + 1
        assert 5_000 < len(points) < 40_000
    assert 4 <= np.mean(cars) <= 9
    assert np.mean(moderate) >= 2
    assert set(torch.cat([f.objects.occluded for f in frames[d.name]]).tolist()) == {0, 1, 2, 3}


def test_road_users_do_not_overlap() -> None:
    for d in DOMAINS:
        for index in range(3):
            world = build_world(d.place, np.random.default_rng(index))
            shapes = [Polygon(c) for c in corners_bev(torch.from_numpy(world.boxes)).numpy()]
            for i, a in enumerate(shapes):
                assert all(a.distance(b) > 0.1 for b in shapes[:i])


def test_domains_differ_in_sensor_and_car_size(frames: dict[str, list[SimulatedFrame]]) -> None:
    size, beams = {}, {}
    for d in DOMAINS:
        boxes = torch.cat([f.frame.labels.boxes.data[f.frame.labels.classes == CAR] for f in frames[d.name] if f.frame.labels])
        size[d.name] = boxes[:, 3:6].mean(0)
        beams[d.name] = len(set(simulate_frame(d, seed=5, index=0, view="full").beams.tolist()))
    assert (size["waymo"] - size["kitti"] > torch.tensor([0.6, 0.35, 0.15])).all()
    assert (size["waymo"] - size["lyft"]).abs().max() < 0.35
    assert all(50 < n <= 64 for n in beams.values())


def test_sensor_and_sizes_can_be_swapped_alone() -> None:
    other_sensor = simulate_frame(replace(KITTI, sensor=WAYMO.sensor), seed=2, index=0, view="full")
    same = simulate_frame(KITTI, seed=2, index=0, view="full")
    shared = [b for b in other_sensor.objects.rotation_y.tolist() if b in same.objects.rotation_y.tolist()]
    assert len(shared) > 0.8 * len(same.objects)  # the same street, seen by other beams from another height
    bigger = replace(KITTI, place=replace(KITTI.place, sizes=WAYMO.place.sizes))
    a = build_world(KITTI.place, np.random.default_rng(0))
    b = build_world(bigger.place, np.random.default_rng(0))
    stay = (np.abs(a.boxes[:, None, :2] - b.boxes[None, :, :2]).max(-1) < 1e-9).any(1)
    assert stay.mean() > 0.8
    np.testing.assert_array_equal(a.waves, b.waves)


@pytest.mark.parametrize("d", DOMAINS, ids=lambda d: d.name)
def test_camera_view_is_the_cropped_full_turn_bit_by_bit(d: Domain) -> None:
    full = simulate_frame(d, seed=9, index=4, view="full")
    camera = simulate_frame(d, seed=9, index=4, view="camera")
    assert full.frame.calibration is not None
    cropped = crop_to_camera(full.frame.points, full.frame.calibration)
    assert torch.equal(cropped.xyz, camera.frame.points.xyz)
    assert torch.equal(cropped.features, camera.frame.points.features)
    assert len(full.frame.points) > 80_000


def files_of(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


def test_same_bytes_for_one_worker_two_workers_and_a_resumed_run(tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    splits = {"train": 3, "val": [3, 2]}
    one, two, resumed = tmp_path / "one", tmp_path / "two", tmp_path / "resumed"
    made = write_kitti_layout(
        one, LYFT, num_frames=4, seed=1, workers=1, splits=splits, progress=lambda done, total: seen.append((done, total))
    )
    assert made == 4
    assert seen == [(i, 4) for i in range(1, 5)]
    write_kitti_layout(two, LYFT, num_frames=4, seed=1, workers=2, splits=splits)
    write_kitti_layout(resumed, LYFT, num_frames=2, seed=1, workers=1)
    (resumed / "training" / "label_2" / "000001.txt").unlink()  # as if the run had been killed in frame 1
    assert write_kitti_layout(resumed, LYFT, num_frames=4, seed=1, workers=1, splits=splits) == 3
    assert files_of(one) == files_of(two) == files_of(resumed)
    assert write_kitti_layout(one, LYFT, num_frames=4, seed=1, workers=1, splits=splits) == 0
    write_kitti_layout(tmp_path / "other", LYFT, num_frames=1, seed=2, workers=1)
    name = "training/velodyne_reduced/000000.bin"
    assert files_of(one)[name] != files_of(tmp_path / "other")[name]


@pytest.mark.parametrize("view", ["camera", "full"])
def test_the_kitti_reader_reads_what_was_simulated(tmp_path: Path, view: str) -> None:
    write_kitti_layout(tmp_path, KITTI, num_frames=1, seed=11, workers=1, view=view)  # type: ignore[arg-type]
    assert read_ids(tmp_path / "ImageSets" / "train.txt") == ("000000",)
    read = KittiDataset(root=tmp_path, ids=("000000",))[0]
    made = SimulatedDataset(domain=KITTI, seed=11, num_frames=1)[0]
    assert torch.equal(read.points.xyz, made.points.xyz)
    assert read.labels is not None
    assert made.labels is not None
    torch.testing.assert_close(read.labels.boxes.data, made.labels.boxes.data, atol=1e-4, rtol=0)
    assert torch.equal(read.labels.classes, made.labels.classes)
    assert torch.equal(read.labels.difficulty, made.labels.difficulty)
    truth = simulate_frame(KITTI, seed=11, index=0, view="camera").frame.labels
    assert truth is not None
    cars = truth.classes == CAR
    exact = made.labels.weight > 0
    torch.testing.assert_close(
        made.labels.boxes.data[exact & (made.labels.classes == 0)], truth.boxes.data[cars], atol=1e-4, rtol=0
    )


def test_a_folder_of_another_simulation_is_refused(tmp_path: Path) -> None:
    write_kitti_layout(tmp_path / "a", KITTI, num_frames=1, seed=1, workers=1)
    before = files_of(tmp_path / "a")
    for changed in (dict(seed=2), dict(view="full"), dict(domain=replace(KITTI, sensor=LYFT.sensor))):
        arguments = {"domain": KITTI, "seed": 1, "view": "camera", **changed}
        with pytest.raises(InvalidInput, match="another simulation"):
            write_kitti_layout(tmp_path / "a", num_frames=1, workers=1, **arguments)  # type: ignore[arg-type]
    assert files_of(tmp_path / "a") == before
    assert json.loads(before["simulation.json"])["domain"]["sensor"]["azimuths"] == KITTI.sensor.azimuths
    (tmp_path / "real" / "training").mkdir(parents=True)
    with pytest.raises(InvalidInput, match="no simulated dataset"):
        write_kitti_layout(tmp_path / "real", KITTI, num_frames=1, seed=1)


@pytest.mark.parametrize("name", ["dataset.json", "parts", ".git", "points.tmp"])
@pytest.mark.parametrize("layout", ["kitti", "waymo", "lyft"])
def test_a_folder_that_holds_anything_else_is_refused_before_anything_is_written(tmp_path: Path, name: str, layout: str) -> None:
    (tmp_path / name).write_text("not simulated")
    before = files_of(tmp_path)
    write = {"kitti": write_kitti_layout, "waymo": write_waymo_layout, "lyft": write_lyft_layout}[layout]
    with pytest.raises(InvalidInput, match=rf"is not empty \({name}\) and holds no simulation.json"):
        write(tmp_path, KITTI, num_frames=1, seed=1, workers=1)
    assert files_of(tmp_path) == before
    with pytest.raises(InvalidInput, match="is a file"):
        write(tmp_path / name, KITTI, num_frames=1, seed=1, workers=1)


def test_what_a_killed_run_leaves_does_not_stop_the_next_one(tmp_path: Path) -> None:
    (tmp_path / ".0123456789abcdef.tmp").write_text('{"half":')
    claim_folder(tmp_path, KITTI, 1, "camera")
    claim_folder(tmp_path, KITTI, 1, "camera")


@pytest.mark.parametrize("splits", [{"train": 3}, {"train": 1, "val": 2}, {"val": [5]}, {"val": [0, 0]}, {"val": 0}])
def test_impossible_splits_are_refused_before_anything_is_written(tmp_path: Path, splits: dict[str, int]) -> None:
    with pytest.raises(InvalidInput, match="split"):
        write_kitti_layout(tmp_path / "new", KITTI, num_frames=2, seed=0, splits=splits)
    assert not (tmp_path / "new").exists()


def test_errors_say_what_to_do() -> None:
    with pytest.raises(InvalidInput, match="did you mean 'waymo'"):
        domain("waimo")
    assert domain("kitti") is KITTI
    with pytest.raises(InvalidInput, match="view must be"):
        simulate_frame(KITTI, seed=0, index=0, view="front")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="negative"):
        simulate_frame(KITTI, seed=-1, index=0, view="full")
    with pytest.raises(InvalidInput, match="from the highest down"):
        replace(IDEAL, elevations=(-1.0, 1.0))
    with pytest.raises(InvalidInput, match="max_range"):
        replace(IDEAL, max_range=0.1)
    with pytest.raises(IndexError):
        SimulatedDataset(domain=KITTI, seed=0, num_frames=2)[2]
