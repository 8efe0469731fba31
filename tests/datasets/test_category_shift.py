"""Category shift on simulated streets: what the new road users look like, what each scenario holds, and that ordinary streets stay."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from shapely.geometry import Polygon

from upcycle3d.core.boxes import corners_bev
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.kitti import KittiDataset, read_ids
from upcycle3d.datasets.kitti_text import labels_from_kitti, parse_objects
from upcycle3d.datasets.nuscenes import LYFT_DIALECT, NuScenesDataset
from upcycle3d.datasets.nuscenes_tables import read_tables
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation.bodies import body
from upcycle3d.datasets.simulation.category_shift import (
    PRIVATE_CLASSES,
    SOURCE_CLASSES,
    category_shift,
    known_classes,
    private_classes,
    source_domain,
)
from upcycle3d.datasets.simulation.layout_kitti import write_kitti_layout
from upcycle3d.datasets.simulation.layout_lyft import CATEGORIES, OPEN_CATEGORIES, VERSION, write_lyft_layout
from upcycle3d.datasets.simulation.layout_waymo import waymo_frame
from upcycle3d.datasets.simulation.places import (
    ALL_CLASS_NAMES,
    ANIMAL,
    DOMAINS,
    KITTI,
    LYFT,
    TRAILER,
    TRAM,
    TRUCK,
    WAYMO,
    Domain,
    OpenPlace,
    SizeDistribution,
)
from upcycle3d.datasets.simulation.raycast import (
    BOX,
    COS,
    HALF_X,
    HALF_Z,
    KIND,
    OBJECT,
    PASS_CHANCE,
    SIN,
    TAPER_FRONT,
    TAPER_SIDE,
    X,
    Y,
    Z,
    cast,
)
from upcycle3d.datasets.simulation.sensors import Sensor
from upcycle3d.datasets.simulation.simulate import SimulatedDataset, simulate_frame, virtual_camera
from upcycle3d.datasets.simulation.world import World, build_world

KINDS = ("closed", "partial", "open", "open_partial")
ALL_SEVEN = (*SOURCE_CLASSES, *PRIVATE_CLASSES)
PLACE = OpenPlace.like(KITTI.place)
# class, style, sizes of every new body
BODIES: dict[str, tuple[int, int, SizeDistribution]] = {
    "tram": (TRAM, 0, PLACE.tram_size),
    "box trailer": (TRAILER, 0, PLACE.trailer_size),
    "flat trailer": (TRAILER, 1, PLACE.trailer_size),
    "dog": (ANIMAL, 0, PLACE.animal_sizes[0]),
    "deer": (ANIMAL, 1, PLACE.animal_sizes[1]),
    "horse": (ANIMAL, 2, PLACE.animal_sizes[2]),
}
# Answers every pulse, without noise, from 1.2 m above the road.
IDEAL = Sensor(
    name="ideal",
    elevations=tuple(12.0 - 0.2 * i for i in range(200)),
    azimuths=1800,
    height=1.2,
    min_range=0.5,
    max_range=60.0,
    range_noise=0.0,
    jitter=0.0,
    reach=1e6,
    dropout=0.0,
    intensity_gain=1.0,
    intensity_noise=0.0,
)


def world(domain: Domain, seed: int) -> World:
    return build_world(domain.place, np.random.default_rng(seed))


def scanned(parts: np.ndarray, distance: float, turns: tuple[float, ...] = (0.3, 2.0, 3.6, 5.2)) -> np.ndarray:
    """Points (N, 3) on a body, in its own frame, from several sides."""
    clouds = []
    for turn in turns:
        c, s = np.cos(turn), np.sin(turn)
        here = parts.copy()
        here[:, X], here[:, Y] = distance + c * parts[:, X] - s * parts[:, Y], s * parts[:, X] + c * parts[:, Y]
        here[:, Z] -= IDEAL.height
        here[:, COS], here[:, SIN], here[:, OBJECT] = c, s, 0
        columns = np.arange(IDEAL.azimuths)[np.abs(np.arange(IDEAL.azimuths) - IDEAL.azimuths // 2) < 500]
        hits = cast(here, np.zeros((1, 4)), 1, IDEAL, seed=1, columns=columns, beams=np.arange(len(IDEAL.elevations)))
        x, y, z = hits.points[hits.objects == 0, :3].astype(np.float64).T
        clouds.append(np.stack([c * (x - distance) + s * y, c * y - s * (x - distance), z + IDEAL.height], 1))
    return np.concatenate(clouds)


@pytest.fixture(scope="module")
def clouds() -> dict[str, np.ndarray]:
    mean = {name: np.array(sizes.mean) for name, (_, _, sizes) in BODIES.items()}
    return {
        name: scanned(body(c, mean[name], 0.5, style), 4 + 0.6 * mean[name][0]) / mean[name]
        for name, (c, style, _) in BODIES.items()
    }


@pytest.mark.parametrize("name", BODIES)
def test_points_on_a_body_fill_its_box_and_stay_inside(name: str, clouds: dict[str, np.ndarray]) -> None:
    points = clouds[name]  # in units of the box
    assert len(points) > 3000
    assert (np.abs(points[:, :2]) <= 0.5 + 1e-4).all()
    assert (points[:, 2] >= -1e-4).all()
    assert (points[:, 2] <= 1 + 1e-4).all()
    assert (np.ptp(points, axis=0) > 0.9).all()


@pytest.mark.parametrize("name", BODIES)
def test_bodies_of_any_size_touch_all_sides_of_their_box(name: str) -> None:
    class_index, style, sizes = BODIES[name]
    rng = np.random.default_rng(0)
    for _ in range(50):
        size = sizes.sample(rng)
        parts = body(class_index, size, 0.5, style)
        assert (parts[:, HALF_X : HALF_Z + 1] > 0).all()
        tapers = parts[:, TAPER_FRONT : TAPER_SIDE + 1]
        assert (tapers >= 0).all()
        assert (tapers[:, 0] + tapers[:, 1] <= 2 * parts[:, HALF_X] + 1e-9).all()
        assert (tapers[:, 2] <= parts[:, HALF_X + 1]).all()
        low, high = (
            (parts[:, X : Z + 1] + s * parts[:, HALF_X : HALF_Z + 1]) for s in (-1, 1)
        )  # a tapered box is widest at the bottom
        box = np.array([[-size[0] / 2, -size[1] / 2, 0], [size[0] / 2, size[1] / 2, size[2]]])
        np.testing.assert_allclose([low.min(0), high.max(0)], box, atol=0.03 * float(size.min()))
        assert (low.min(0) > box[0] - 1e-6).all()
        assert (high.max(0) < box[1] + 1e-6).all()


def test_new_bodies_have_shapes_of_their_own(clouds: dict[str, np.ndarray]) -> None:
    for name in ("dog", "deer", "horse"):  # on four legs, with air between them
        x, _, z = clouds[name].T
        assert ((z < 0.3) & (np.abs(x + 0.12) < 0.08)).sum() == 0
        assert ((z < 0.3) & (x < -0.2)).sum() > 20
        assert ((z < 0.3) & (x > 0.0)).sum() > 20
        assert z[x > 0.45].min() > 0.5  # the head is in front, and it is up
    for name in ("box trailer", "flat trailer"):  # before the box there is only the drawbar, and below it only wheels
        x, y, z = clouds[name].T
        before = x > 0.3
        assert before.sum() > 50
        assert z[before].max() < 0.4
        assert np.abs(y[before]).max() < 0.2
        assert ((z < 0.15) & (x < -0.3)).sum() == 0
    x, y, z = clouds["tram"].T  # cars joined by narrow bellows
    length = PLACE.tram_size.mean[0]
    waists = [
        a for a in np.arange(-0.45, 0.45, 0.25 / length) if np.abs(y[(np.abs(x - a) < 0.1 / length) & (z > 0.15)]).max() < 0.45
    ]
    assert len(waists) >= 3
    assert 0.4 < np.ptp(waists) < 0.6
    assert x[z > 0.6].max() < x[z < 0.2].max()  # a nose that leans back
    glass = body(TRAM, np.array(PLACE.tram_size.mean), 0.5, 0)
    assert ((glass[:, KIND] == BOX) & (glass[:, PASS_CHANCE] > 0)).sum() >= 3


GOLDEN = {  # of the version before there were open places
    "kitti": "e9f4b7e7f3db0683",
    "waymo": "e88fd991c3b8721e",
    "lyft": "4061e43b0f41646d",
}


def fingerprint(domain: Domain) -> str:
    """Of the record in simulation.json and of 12 streets to the millimetre, so that another CPU's last digit does not matter."""
    digest = hashlib.sha256(json.dumps(asdict(domain)).encode())
    for seed in range(12):
        made = world(domain, seed)
        for values in (made.parts, made.waves, made.boxes, made.classes):
            digest.update(np.rint(values * 1000).astype("<i8").tobytes())
    return digest.hexdigest()[:16]


@pytest.mark.parametrize("d", DOMAINS, ids=lambda d: d.name)
def test_ordinary_streets_are_what_they_were(d: Domain) -> None:
    assert fingerprint(d) == GOLDEN[d.name]
    same = replace(d, place=OpenPlace.like(d.place))  # an open place that asks for nothing
    a, b = (simulate_frame(each, seed=4, index=1, view="camera") for each in (d, same))
    assert torch.equal(a.frame.points.xyz, b.frame.points.xyz)
    assert torch.equal(a.frame.points.features, b.frame.points.features)
    assert a.objects.types == b.objects.types
    assert torch.equal(a.owners, b.owners)


@pytest.mark.parametrize("d", DOMAINS, ids=lambda d: d.name)
@pytest.mark.parametrize("kind", KINDS)
def test_a_scenario_holds_exactly_its_classes(d: Domain, kind: str) -> None:
    for lacking in ("Cyclist", "Car") if d is KITTI else ("Pedestrian",):
        shifted = category_shift(d, kind, lacking=lacking)  # type: ignore[arg-type]
        found = {ALL_CLASS_NAMES[c] for seed in range(5) for c in world(shifted, seed).classes}
        expected = {*SOURCE_CLASSES, *(PRIVATE_CLASSES if "open" in kind else ())} - ({lacking} if "partial" in kind else set())
        assert found == expected
        assert set(known_classes(kind, lacking=lacking)) | set(private_classes(kind)) == expected  # type: ignore[arg-type]


def test_scenarios_of_a_domain_share_their_streets() -> None:
    source = source_domain(WAYMO)
    assert source.place.cyclists == WAYMO.place.pedestrians  # the source can learn both; the target stays as it is
    source = replace(source, place=replace(source.place, cyclists=WAYMO.place.cyclists))
    closed, partial, opened = (category_shift(WAYMO, kind) for kind in ("closed", "partial", "open"))  # type: ignore[arg-type]
    for seed in range(4):
        plain, same, less, more = (world(d, seed) for d in (source, closed, partial, opened))
        np.testing.assert_array_equal(plain.parts, same.parts)
        np.testing.assert_array_equal(plain.boxes, more.boxes[: len(plain.boxes)])
        np.testing.assert_array_equal(plain.parts, more.parts[: len(plain.parts)])
        np.testing.assert_array_equal(plain.waves, more.waves)
        assert (more.classes[len(plain.boxes) :] >= TRUCK).all()
        np.testing.assert_array_equal(less.boxes, plain.boxes[plain.classes != ALL_CLASS_NAMES.index("Cyclist")])
        shapes = [Polygon(c) for c in corners_bev(torch.from_numpy(more.boxes)).numpy()]
        assert all(a.distance(b) > 0.1 for i, a in enumerate(shapes) for b in shapes[:i])


def test_more_of_one_class_leaves_the_others_where_they_are() -> None:
    some, trams = (OpenPlace.like(KITTI.place, animals=5, trams=n) for n in (0, 2))
    for seed in range(3):
        a, b = (build_world(place, np.random.default_rng(seed)) for place in (some, trams))
        animals = [w.boxes[w.classes == ANIMAL] for w in (a, b)]
        stay = (np.abs(animals[0][:, None] - animals[1]).max(-1) < 1e-9).any(1)
        assert stay.sum() >= len(stay) - 2


def test_private_objects_are_seen_often_enough_and_hold_their_points() -> None:
    shifted, seen = category_shift(KITTI, "open_partial"), Counter[str]()
    for index in range(20):
        made = simulate_frame(shifted, seed=0, index=index, view="camera")
        labels = made.frame.labels
        assert labels is not None
        seen.update(made.objects.types[i] for i in torch.nonzero(labels.num_points >= 5)[:, 0].tolist())
        on = made.owners >= 0
        box = labels.boxes.data[made.owners[on]].double()
        offset = made.frame.points.xyz[on].double() - box[:, :3]
        c, s = torch.cos(box[:, 6]), torch.sin(box[:, 6])
        local = torch.stack([c * offset[:, 0] + s * offset[:, 1], c * offset[:, 1] - s * offset[:, 0], offset[:, 2]], 1)
        assert (local.abs() <= box[:, 3:6] / 2 + 0.1).all(1).double().mean() > 0.99
    assert set(seen) == {"Car", "Pedestrian", *PRIVATE_CLASSES}
    assert min(seen[name] for name in PRIVATE_CLASSES) >= 12  # 60 of 100 frames


def test_frames_repeat_and_the_camera_sees_part_of_the_turn() -> None:
    shifted = category_shift(LYFT, "open")
    full = simulate_frame(shifted, seed=6, index=0, view="full")
    again = simulate_frame(shifted, seed=6, index=0, view="full")
    assert torch.equal(full.frame.points.xyz, again.frame.points.xyz)
    assert full.objects.types == again.objects.types
    camera = simulate_frame(shifted, seed=6, index=0, view="camera")
    everything = set(map(tuple, full.frame.points.xyz.tolist()))
    assert set(map(tuple, camera.frame.points.xyz.tolist())) <= everything


def test_kitti_layout_keeps_the_new_classes_and_readers_of_three_drop_them(tmp_path: Path) -> None:
    shifted, frames = category_shift(KITTI, "open"), 4
    write_kitti_layout(tmp_path / "raw", shifted, num_frames=frames, seed=2, workers=1)
    assert json.loads((tmp_path / "raw" / "simulation.json").read_text())["domain"]["place"]["trams"] > 0
    ids = read_ids(tmp_path / "raw" / "ImageSets" / "train.txt")
    seven = KittiDataset(tmp_path / "raw", ids, classes=ALL_SEVEN)
    three = KittiDataset(tmp_path / "raw", ids)
    prepare(seven, ids, tmp_path / "out", splits={"train": ids}, classes=ALL_SEVEN, workers=1)
    prepared, made = (
        PreparedDataset(tmp_path / "out", "train"),
        SimulatedDataset(domain=shifted, seed=2, num_frames=frames, classes=ALL_SEVEN),
    )
    found: set[int] = set()
    for i in range(frames):
        labels, fewer, truth, stored = seven[i].labels, three[i].labels, made[i].labels, prepared[i].labels
        assert labels is not None
        assert fewer is not None
        assert truth is not None
        assert stored is not None
        torch.testing.assert_close(labels.boxes.data, truth.boxes.data, atol=1e-4, rtol=0)
        assert torch.equal(labels.classes, truth.classes)
        assert bool((labels.weight == 1).all())
        assert torch.equal(stored.classes, labels.classes)
        torch.testing.assert_close(stored.boxes.data, labels.boxes.data)
        known = labels.classes < len(SOURCE_CLASSES)
        assert torch.equal(fewer.boxes.data, labels.boxes.data[known])
        assert torch.equal(fewer.classes, labels.classes[known])
        assert bool((fewer.weight == 1).all())
        found |= set(labels.classes.tolist())
    assert found == set(range(len(ALL_SEVEN)))


def test_a_type_nobody_asked_for_is_dropped_from_labels() -> None:
    line = "0 0 0 600 150 650 200 1.5 1.7 4 0 1.7 20 0\n"
    objects = parse_objects("".join(f"{name} {line}" for name in ("Elephant", "Car", "Van", "Tram", "Trailer")), "label")
    labels = labels_from_kitti(objects, virtual_camera(), SOURCE_CLASSES)
    assert labels.weight.tolist() == [1, 0]  # the van alone is neither car nor background
    assert labels_from_kitti(objects, virtual_camera(), ("Elephant", "Tram")).classes.tolist() == [0, 1]


def test_other_layouts_have_names_for_the_new_classes(tmp_path: Path) -> None:
    shifted = category_shift(LYFT, "open")
    small = replace(shifted, sensor=replace(LYFT.sensor, azimuths=360))
    write_lyft_layout(tmp_path, small, num_frames=2, seed=1, workers=1)
    tables = read_tables(tmp_path, VERSION)
    class_map = {category: name for name, category in (CATEGORIES | OPEN_CATEGORIES).items()}
    reader = NuScenesDataset(tables, tables.samples, LYFT_DIALECT, classes=ALL_SEVEN, class_map=class_map)
    made = simulate_frame(small, seed=1, index=0, view="full")
    read = reader[0].labels
    assert read is not None
    assert [ALL_SEVEN[c] for c in read.classes.tolist()] == list(made.objects.types)
    types = waymo_frame(made, small.sensor, segment="s", index=0).objects
    assert types is not None
    kind_of = {"Pedestrian": 2, "Cyclist": 4, "Animal": 0}
    assert types.types.tolist() == [kind_of.get(name, 1) for name in made.objects.types]


def test_errors_say_what_can_be_asked_for() -> None:
    with pytest.raises(InvalidInput, match="kind must be one of closed, partial, open, open_partial"):
        category_shift(KITTI, "open-partial")  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="found 'Tram'"):
        category_shift(KITTI, "partial", lacking="Tram")
    with pytest.raises(InvalidInput, match="not negative"):
        OpenPlace.like(KITTI.place, trams=-1)
    with pytest.raises(InvalidInput, match="absent names Horse"):
        OpenPlace.like(KITTI.place, absent=("Horse",))
