"""The ground-truth database: objects come back as they stood, serve their own split only, and are pasted where nothing is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.fingerprint import split_fingerprint
from upcycle3d.datasets.gt_database import MIN_POINTS, GtDatabase, build_gt_database
from upcycle3d.datasets.gt_sampling import GtSampler, paste
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.ops.iou3d import iou_bev
from upcycle3d.ops.points_in_boxes import count_points_in_boxes, points_in_boxes_mask

VERSION_1 = next((Path(__file__).parents[1] / "data" / "version_0_1" / "prepared" / "gt_database").glob("*/database.json")).parent
CLASSES = ("Car", "Pedestrian")
SIZES = torch.tensor([[4.0, 1.8, 1.6], [0.8, 0.8, 1.8]])


def make_frame(seed: int, *, objects: int = 6, inside: int = 20, ground: int = 800) -> Frame:
    """Objects at random places that do not overlap, ``inside`` points in each, and points elsewhere."""
    rng = np.random.default_rng(seed)
    classes = torch.arange(objects) % 2
    boxes = torch.zeros(0, 7)
    while len(boxes) < objects:
        box = torch.cat(
            [
                torch.from_numpy(rng.uniform([0, -20, -1], [40, 20, 0])).float(),
                SIZES[classes[len(boxes)]],
                torch.tensor([rng.uniform(-3, 3)]),
            ]
        )
        if len(boxes) == 0 or not (iou_bev(box.float()[None], boxes) > 0).any():
            boxes = torch.cat([boxes, box.float()[None]])
    local = torch.from_numpy(rng.uniform(-0.49, 0.49, (objects, inside, 3))).float() * boxes[:, None, 3:6]
    cos, sin = boxes[:, None, 6].cos(), boxes[:, None, 6].sin()
    turned = torch.stack(
        [local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos, local[..., 2]], -1
    )
    scene = torch.from_numpy(rng.uniform([0, -20, -2], [40, 20, 1], (ground, 3))).float()
    scene = scene[~points_in_boxes_mask(scene, boxes).any(0)]
    xyz = torch.cat([(turned + boxes[:, None, :3]).view(-1, 3), scene])
    labels = Labels.make(boxes, classes, difficulty=torch.arange(objects) % 3)
    return Frame(
        id=f"{seed:06d}",
        points=PointCloud(xyz=xyz, features=torch.from_numpy(rng.random((len(xyz), 1), np.float32))),
        labels=labels,
    )


def fingerprint(frames: Sequence[Frame]) -> str:
    return split_fingerprint([f.id for f in frames], [f.labels for f in frames], classes=CLASSES)


def build(frames: Sequence[Frame], out: Path) -> GtDatabase:
    return build_gt_database(frames, out, class_names=CLASSES, fingerprint=fingerprint(frames))


def labels_of(frame: Frame) -> Labels:
    assert frame.labels is not None
    return frame.labels


@pytest.fixture(scope="module")
def frames() -> list[Frame]:
    return [make_frame(seed) for seed in range(6)]


@pytest.fixture(scope="module")
def database(frames: list[Frame], tmp_path_factory: pytest.TempPathFactory) -> GtDatabase:
    return build(frames, tmp_path_factory.mktemp("gt"))


def sort_rows(rows: Tensor) -> Tensor:
    return torch.from_numpy(rows.numpy()[np.lexsort(rows.numpy().T)])


def test_objects_come_back_as_they_stood(frames: list[Frame], database: GtDatabase) -> None:
    assert len(database) == 36
    for i in range(len(database)):
        thing, frame = database[i], frames[i // 6]
        labels, k = labels_of(frame), i % 6
        assert thing.frame_id == frame.id
        assert torch.equal(thing.box, labels.boxes.data[k])
        assert (thing.class_index, thing.difficulty, len(thing.points)) == (int(labels.classes[k]), int(labels.difficulty[k]), 20)
        mask = points_in_boxes_mask(frame.points.xyz, labels.boxes.data[k : k + 1])[0]
        assert torch.equal(thing.points.xyz, frame.points.xyz[mask])
        assert torch.equal(thing.points.features, frame.points.features[mask])


def test_ignored_inexact_and_nearly_empty_objects_stay_out(tmp_path: Path) -> None:
    frame = make_frame(0)
    labels = labels_of(frame)
    weight, exact, boxes = torch.ones(6), torch.ones(6, dtype=torch.bool), labels.boxes.data.clone()
    weight[0], exact[1], boxes[2, 2] = 0, False, 50  # the third hangs in the air, without a point
    changed = replace(frame, labels=Labels.make(boxes, labels.classes, weight=weight, exact=exact))
    unlabeled, nothing = replace(make_frame(1), labels=None), replace(make_frame(2), labels=Labels.empty())
    no_points = replace(make_frame(3), points=PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1)))
    source = [changed, unlabeled, nothing, no_points]
    database = build(source, tmp_path / "a")
    assert torch.equal(database.boxes, boxes[3:])
    assert len(build([make_frame(4, inside=MIN_POINTS)], tmp_path / "b")) == 6
    assert len(build([make_frame(4, inside=MIN_POINTS - 1)], tmp_path / "b")) == 0
    empty = build(source[1:], tmp_path / "c")
    assert len(empty) == 0
    assert GtSampler(empty, {"Car": 3}).sample(np.random.default_rng(0), Labels.empty()) == []


def test_a_database_of_another_split_is_refused(frames: list[Frame], database: GtDatabase, tmp_path: Path) -> None:
    small = frames[:2]
    assert len(GtDatabase.open(database.path, expected_fingerprint=fingerprint(frames))) == 36
    with pytest.raises(InvalidInput, match=r"built from another labeled split.*\(6 frames, 36 objects\).*leak labels"):
        GtDatabase.open(database.path, expected_fingerprint=fingerprint(small))
    with pytest.raises(InvalidInput, match="no GT database in"):
        GtDatabase.open(tmp_path / "nowhere", expected_fingerprint=fingerprint(frames))


def test_a_database_cannot_take_the_name_of_a_split_it_was_not_made_from(frames: list[Frame], tmp_path: Path) -> None:
    build(frames[:2], tmp_path)
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(InvalidInput, match="the 6 frames given have the fingerprint"):
        build_gt_database(frames, tmp_path, class_names=CLASSES, fingerprint=fingerprint(frames[:2]))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before  # the good one is still there, and nothing else


def test_building_again_gives_the_same_bytes_and_replaces_what_was_there(
    frames: list[Frame], database: GtDatabase, tmp_path: Path
) -> None:
    build(frames[:1], tmp_path)
    build(frames, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {p.name: p.read_bytes() for p in database.path.iterdir()}


def test_a_prepared_split_makes_its_own_database(frames: list[Frame], tmp_path: Path) -> None:
    ids = [f.id for f in frames]
    prepare(frames, ids, tmp_path / "d", splits={"train": ids, "few": ids[:2]}, classes=CLASSES, workers=0)
    few = PreparedDataset(tmp_path / "d", "few")
    database = build_gt_database(few, tmp_path / "gt", class_names=few.classes, fingerprint=few.split_fingerprint())
    assert {database[i].frame_id for i in range(len(database))} == set(ids[:2])
    with pytest.raises(InvalidInput, match="another labeled split"):
        GtDatabase.open(tmp_path / "gt", expected_fingerprint=PreparedDataset(tmp_path / "d", "train").split_fingerprint())


def test_a_cut_off_database_is_refused(frames: list[Frame], tmp_path: Path) -> None:
    database = build(frames, tmp_path)
    objects = next(tmp_path.glob("objects-*.f32"))
    objects.write_bytes(objects.read_bytes()[:-4])
    with pytest.raises(InvalidInput, match="shorter than the index says"):
        GtDatabase.open(tmp_path, expected_fingerprint=database.fingerprint)


# In a process of its own: in one that ran other tests, the allocator's leftovers are larger than what is measured.
GROWTH = """
import os, sys
from pathlib import Path
import torch
from upcycle3d.datasets.fingerprint import split_fingerprint
from upcycle3d.datasets.gt_database import build_gt_database
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Labels, PointCloud

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

out = Path(sys.argv[1])
cloud = PointCloud(xyz=torch.zeros(500_000, 3), features=torch.zeros(500_000, 1))  # one object of 8 MB a frame
labels = Labels.make(torch.tensor([[0.0, 0, 0, 4, 2, 2, 0]]), torch.zeros(1))
frames = [Frame(id=str(i), points=cloud, labels=labels) for i in range(10)]
few, all_of_them = (split_fingerprint([f.id for f in part], [f.labels for f in part], classes=("Car",)) for part in (frames[:2], frames))
build_gt_database(frames[:2], out / "warm", class_names=("Car",), fingerprint=few)[0]
before = resident()
database = build_gt_database(frames, out / "db", class_names=("Car",), fingerprint=all_of_them)
sizes = [len(database[i].points) for i in range(10)]
print(resident() - before, *sizes)
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_points_in_the_database(tmp_path: Path) -> None:
    # glibc keeps freed blocks for reuse unless they were mapped; a fixed threshold makes what is freed leave the process.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_ARENA_MAX": "1"}
    done = subprocess.run([sys.executable, "-c", GROWTH, str(tmp_path)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    growth, *sizes = map(int, done.stdout.split())
    assert sizes == [500_000] * 10
    assert growth < 25e6  # the database has 80 MB


MANY = """
import os, sys
from pathlib import Path
import numpy as np
import torch
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.fingerprint import combine_digests, frame_digest
from upcycle3d.datasets.gt_database import build_gt_database

torch.set_num_threads(1)
SEEN = []
BOXES = torch.cat([torch.cartesian_prod(torch.arange(8.0) * 8, torch.arange(5.0) * 8), torch.zeros(40, 1)], 1)
LABELS = Labels.make(torch.cat([BOXES, torch.tensor([[4.0, 2, 2, 0]]).repeat(40, 1)], 1), torch.zeros(40))

class FullTurns:
    def __len__(self):
        return 60

    def __getitem__(self, index):
        SEEN.append(int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE"))
        rng = np.random.default_rng(index)
        rows = rng.random((int(rng.integers(90_000, 130_000)), 4), np.float32) * np.array([64, 40, 2, 1], np.float32)
        points = torch.from_numpy(rows)
        cloud = PointCloud(xyz=points[:, :3].contiguous(), features=points[:, 3:].contiguous())
        return Frame(id=str(index), points=cloud, labels=LABELS)

fingerprint = combine_digests([frame_digest(str(i), LABELS, classes=("Car",)) for i in range(60)])
database = build_gt_database(FullTurns(), sys.argv[1], class_names=("Car",), fingerprint=fingerprint)
print(len(database), SEEN[-1] - SEEN[10])
"""


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="resident memory is read from /proc")
def test_memory_does_not_grow_with_the_number_of_scans(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", MANY, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    objects, growth = map(int, done.stdout.split())
    assert objects == 2400
    assert growth < 8e6  # masks of all boxes and points left 4 megabytes and more per scan: 319 for these


def test_a_damaged_object_is_refused_and_never_pasted(frames: list[Frame], tmp_path: Path) -> None:
    database = build(frames, tmp_path)
    objects = next(tmp_path.glob("objects-*.f32"))
    data = bytearray(objects.read_bytes())
    data[5 * 20 * 16 + 3] ^= 64  # an exponent of the sixth object
    objects.write_bytes(data)
    assert database.verify() == (5,)
    with pytest.raises(InvalidInput, match=r"objects-\w+\.f32 is damaged: the points of object 5 .* delete this folder"):
        database[5]
    with pytest.raises(InvalidInput, match="its bytes have another checksum than its name"):
        GtDatabase(tmp_path)


def test_a_header_or_an_index_that_was_changed_is_refused(frames: list[Frame], tmp_path: Path) -> None:
    build(frames, tmp_path)
    header = tmp_path / "database.json"
    text = header.read_text()
    for old, new, words in [
        ("Pedestrian", "Pedestrien", "another digest"),
        ('"num_frames": 6', '"num_frames": "6"', "num_frames must be int"),
        ('"schema_version": 2', '"schema_version": 1', "other columns"),
        ('"schema_version": 2', '"schema_version": 99', "has schema version 99"),
        ('"objects": "', '"objects": "../', "does not name the files"),
        ("{", "[", "is not valid JSON"),
    ]:
        header.write_text(text.replace(old, new, 1))
        with pytest.raises(InvalidInput, match=words) as error:
            GtDatabase(tmp_path)
        assert str(tmp_path) in str(error.value)
    header.write_text(text)
    index = next(tmp_path.glob("index-*.parquet"))
    index.write_bytes(index.read_bytes()[:-1])
    with pytest.raises(InvalidInput, match="have another checksum"):
        GtDatabase(tmp_path)


def test_a_database_of_version_1_is_read_and_its_points_are_compared(tmp_path: Path) -> None:
    shutil.copytree(VERSION_1, tmp_path / "old")
    database = GtDatabase(tmp_path / "old")
    assert len(database)
    assert database.verify() == ()
    objects = next((tmp_path / "old").glob("objects-*.f32"))
    data = bytearray(objects.read_bytes())
    data[3] ^= 1
    objects.write_bytes(data)
    with pytest.raises(InvalidInput, match="its bytes have another checksum than its name"):
        GtDatabase(tmp_path / "old")


def test_what_killed_builds_left_is_removed_by_the_next_build(frames: list[Frame], tmp_path: Path) -> None:
    build(frames[:1], tmp_path)
    for name in (".objects.4711.tmp", ".0123456789abcdef.tmp"):
        (tmp_path / name).write_bytes(b"half")
    build(frames[:1], tmp_path)
    assert [path.name for path in tmp_path.iterdir() if path.suffix == ".tmp"] == []


def test_sampling_fills_up_to_the_count_and_nothing_overlaps(frames: list[Frame], database: GtDatabase) -> None:
    sampler = GtSampler(database, {"Car": 10, "Pedestrian": 4})
    pasted = 0
    for seed in range(30):
        frame = frames[seed % 6]
        labels = labels_of(frame)
        labels = replace(
            labels, weight=(torch.arange(6) != 5).float()
        )  # the last pedestrian is ignored: it bars, but does not count
        objects = sampler.sample(np.random.default_rng(seed), labels)
        new = torch.tensor([o.class_index for o in objects])
        assert int((new == 0).sum()) <= 10 - 3
        assert int((new == 1).sum()) <= 4 - 2
        result = labels_of(paste(replace(frame, labels=labels), objects))
        assert len(result) == 6 + len(objects)
        overlap = iou_bev(result.boxes.data, result.boxes.data).fill_diagonal_(0)
        assert not overlap.any()
        assert frame.id not in {o.frame_id for o in objects}  # its own objects are already there
        pasted += len(objects)
    assert pasted > 100


def test_objects_of_different_classes_do_not_overlap_either(tmp_path: Path) -> None:
    car = torch.tensor([[10.0, 0, 0, 4, 2, 2, 0.3]])
    walker = torch.tensor([[10.5, 0.5, 0, 0.8, 0.8, 1.8, 0]])  # stands, in another scan, where the car is
    kinds = zip("ab", (car, walker), (torch.zeros(1), torch.ones(1)), strict=True)
    cloud = PointCloud(xyz=walker[:, :3].repeat(9, 1), features=torch.zeros(9, 1))
    database = build([Frame(id=i, points=cloud, labels=Labels.make(box, kind)) for i, box, kind in kinds], tmp_path)
    for first, second in (("Car", "Pedestrian"), ("Pedestrian", "Car")):
        objects = GtSampler(database, {first: 1, second: 1}).sample(np.random.default_rng(0), Labels.empty())
        assert [o.class_index for o in objects] == [CLASSES.index(first)]


def test_a_full_scene_gets_nothing_and_an_empty_one_gets_all(frames: list[Frame], database: GtDatabase) -> None:
    assert GtSampler(database, {"Car": 3, "Pedestrian": 0}).sample(np.random.default_rng(0), labels_of(frames[0])) == []
    assert paste(frames[0], []) is frames[0]
    objects = GtSampler(database, {"Car": 1, "Pedestrian": 1}).sample(np.random.default_rng(0), Labels.empty())
    bare = Frame(id="bare", points=PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1)), labels=Labels.empty())
    full = paste(bare, objects)
    assert (len(full.points), labels_of(full).num_points.tolist(), labels_of(full).classes.tolist()) == (40, [20, 20], [0, 1])
    assert len(GtSampler(database, {"Car": 999}).sample(np.random.default_rng(0), Labels.empty())) <= 18


def test_sampling_follows_its_generator_only(frames: list[Frame], database: GtDatabase) -> None:
    sampler = GtSampler(database, {"Car": 9})

    def chosen(seed: int) -> list[tuple[float, ...]]:
        return [tuple(o.box.tolist()) for o in sampler.sample(np.random.default_rng(seed), labels_of(frames[0]))]

    first = chosen(1)
    np.random.seed(0)
    torch.manual_seed(0)
    assert chosen(1) == first
    assert len({tuple(chosen(seed)) for seed in range(5)}) > 1


def test_pasted_points_replace_the_scene_points_in_the_box(frames: list[Frame], database: GtDatabase) -> None:
    objects = GtSampler(database, {"Car": 9, "Pedestrian": 9}).sample(np.random.default_rng(3), labels_of(frames[0]))
    scene = frames[0].points
    extra = torch.stack([o.box[:3] for o in objects])  # one more scene point in the middle of every place
    scene = PointCloud.concatenate([scene, PointCloud(xyz=extra, features=torch.full((len(extra), 1), 0.123))])
    result = paste(replace(frames[0], points=scene), objects)
    boxes = torch.stack([o.box for o in objects])
    outside = ~points_in_boxes_mask(scene.xyz, boxes).any(0)
    assert int((~outside).sum()) >= len(objects) > 3
    rows = torch.cat([result.points.xyz, result.points.features], 1)
    expected = torch.cat(
        [torch.cat([scene.xyz, scene.features], 1)[outside], *(torch.cat([o.points.xyz, o.points.features], 1) for o in objects)]
    )
    assert torch.equal(sort_rows(rows), sort_rows(expected))
    assert torch.equal(count_points_in_boxes(result.points.xyz, boxes), labels_of(result).num_points[6:])
    assert bool(labels_of(result).exact.all())
    assert labels_of(result).difficulty[6:].tolist() == [o.difficulty for o in objects]
    assert len(frames[0].points) + len(extra) == len(scene)  # the scene given is untouched


def test_misuse_is_named(frames: list[Frame], database: GtDatabase) -> None:
    with pytest.raises(InvalidInput, match=r"asks for \['Tram'\]"):
        GtSampler(database, {"Tram": 3})
    with pytest.raises(InvalidInput, match="has no labels, so objects cannot be pasted"):
        paste(replace(frames[0], labels=None), [database[0]])
    with pytest.raises(IndexError):
        database[36]
