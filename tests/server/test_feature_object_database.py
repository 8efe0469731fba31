"""The object database gives back what was written, reads no more than it is asked for, and no label can leak through it."""

import json
from dataclasses import replace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from feature_scenes import CONFIG, KEYPOINT_SPEC, SPEC, box, cut, full_scene, labels, with_keypoints

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, SparseVoxels
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.server.feature_gt import FeatureObject, cut_objects, sample_objects
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase, build_feature_object_database
from upcycle3d.perception.wire.codec import round_trip

SPLIT, ENCODER = "ab" * 32, "cd" * 32


def write(folder, objects: list[FeatureObject]) -> FeatureObjectDatabase:
    return FeatureObjectDatabase.write(
        folder, objects, spec=SPEC, config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER
    )


def read(folder) -> FeatureObjectDatabase:
    return FeatureObjectDatabase.open(folder, config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)


def test_a_database_gives_back_what_was_written(tmp_path):
    objects = [*cut(1, box(5.0, 4.0)), replace(cut(2, box(11.0, -4.0, 1.2), share=0.5)[0], class_index=2, num_points=7)]
    written = write(tmp_path / "db", objects)
    opened = read(tmp_path / "db")
    assert len(written) == len(opened) == 2
    for database in (written, opened):
        for index, expected in enumerate(objects):
            found = database[index]
            assert torch.equal(found.box, expected.box)
            assert (found.class_index, found.num_points) == (expected.class_index, expected.num_points)
            assert torch.equal(found.coords, expected.coords)
            assert torch.equal(found.features, expected.features)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["db"]  # nothing temporary is left


def test_a_database_of_another_split_or_encoder_is_refused(tmp_path):
    write(tmp_path / "db", cut(1, box(5.0, 4.0)))
    with pytest.raises(InvalidInput, match="leak labels"):
        FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint="00" * 32, encoder_fingerprint=ENCODER)
    with pytest.raises(InvalidInput, match="another encoder"):
        FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint="00" * 32)


def test_a_database_that_was_cut_otherwise_is_refused(tmp_path):
    write(tmp_path / "db", cut(1, box(5.0, 4.0)))
    for other in (
        replace(CONFIG, margin_cells=2.0),
        replace(CONFIG, size_shift=(-0.9, -0.5, -0.3)),
        replace(CONFIG, object_scale=(0.8, 1.2)),
    ):
        with pytest.raises(InvalidInput, match="was cut with"):
            FeatureObjectDatabase.open(tmp_path / "db", config=other, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)
    more = replace(CONFIG, max_objects=(9,))  # how many are pasted is no matter of the database
    assert (
        len(FeatureObjectDatabase.open(tmp_path / "db", config=more, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)) == 1
    )


def test_a_missing_broken_or_newer_database_is_refused(tmp_path):
    with pytest.raises(InvalidInput, match=r"there is no .*database.json"):
        read(tmp_path / "db")
    write(tmp_path / "db", [])
    meta = tmp_path / "db" / "database.json"
    text = meta.read_text()
    meta.write_text(text[:20])
    with pytest.raises(InvalidInput, match="not valid JSON"):
        read(tmp_path / "db")
    meta.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(InvalidInput, match="version 99"):
        read(tmp_path / "db")


def flip(path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 64
    path.write_bytes(data)


def test_no_changed_byte_of_a_database_is_read(tmp_path):
    write(tmp_path / "db", [*cut(1, box(5.0, 4.0)), *cut(2, box(11.0, -4.0, 1.2))])
    opened = read(tmp_path / "db")
    for name, words in [
        ("features.f32", "features.f32 is damaged: its bytes have another checksum; delete this folder"),
        ("coords.i32", "coords.i32 is damaged: its bytes have another checksum; delete this folder"),
        ("index.parquet", "index.parquet is damaged: its bytes have another checksum"),
        ("database.json", "database.json"),
    ]:
        path = tmp_path / "db" / name
        before = path.read_bytes()
        flip(path, 3 if name != "database.json" else len(before) // 2)
        with pytest.raises(InvalidInput, match=words):
            read(tmp_path / "db")
        if path.suffix in (".f32", ".i32"):  # a database that was opened before, or is too large to be compared at once
            with pytest.raises(InvalidInput, match=r"object 0 of .* is damaged"):
                opened[0]
        path.write_bytes(before)
    assert len(read(tmp_path / "db")) == 2


def test_a_database_of_version_3_is_read(tmp_path):
    objects = cut(1, box(5.0, 4.0))
    write(tmp_path / "db", objects)
    meta, index = tmp_path / "db" / "database.json", tmp_path / "db" / "index.parquet"
    values = {name: value for name, value in json.loads(meta.read_text()).items() if name not in ("files", "digest")}
    meta.write_text(json.dumps(values | {"version": 3}))
    pq.write_table(pq.read_table(index).drop_columns(["crc32"]), index)
    opened = read(tmp_path / "db")
    assert torch.equal(opened[0].features, objects[0].features)
    for wrong in ({"channels": "3"}, {"channels": 10**9}, {"cutting": 1}, {"channels": None}):
        meta.write_text(json.dumps(values | {"version": 3} | wrong))
        with pytest.raises(InvalidInput, match=r"database\.json is damaged or was edited"):
            read(tmp_path / "db")


def test_a_database_is_never_overwritten_and_remains_of_a_crash_do_no_harm(tmp_path):
    leftovers = tmp_path / "db.tmp"
    leftovers.mkdir()
    (leftovers / "features.f32").write_bytes(b"half a fea")
    write(tmp_path / "db", cut(1, box(5.0, 4.0)))
    with pytest.raises(InvalidInput, match="already exists"):
        write(tmp_path / "db", [])
    assert len(read(tmp_path / "db")) == 1


def test_an_empty_database_is_legal(tmp_path):
    write(tmp_path / "db", [])
    opened = read(tmp_path / "db")
    assert len(opened) == 0
    assert sample_objects(opened, Labels.empty(), Boxes3D.empty(), CONFIG, np.random.default_rng(0)) == []


def test_one_object_reads_only_its_own_part_of_the_files(tmp_path, monkeypatch):
    objects = [replace(item, num_points=i) for i in range(20) for item in cut(i, box(5.0, 4.0))]
    database = write(tmp_path / "db", objects)
    copied: list[int] = []
    real = np.array
    monkeypatch.setattr(np, "array", lambda a, *rest, **options: copied.append(a.nbytes) or real(a, *rest, **options))
    item = database[13]
    assert item.num_points == 13
    assert sum(copied) == len(item.coords) * (3 + 3) * 4
    assert not any(isinstance(v, torch.Tensor) and v.numel() > 20 * 7 for v in vars(database).values())  # no feature is held


class GridEncoder(torch.nn.Module):
    """The mean position of the points of each cell, at the cut of SPEC."""

    spec = SPEC

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([1.0, 0.3, 0.7]))

    def forward(self, points: list[PointCloud]) -> CutFeatures:
        xyz = points[0].xyz
        cell = torch.stack([xyz[:, 0] * 0, xyz[:, 1] + 8, xyz[:, 0]], 1).floor().int()
        cells, owner = cell.unique(dim=0, return_inverse=True)
        mean = torch.zeros(len(cells), 3).index_add_(0, owner, xyz) / torch.bincount(owner)[:, None]
        coords = torch.nn.functional.pad(cells, (1, 0))
        voxels = SparseVoxels(features=mean * self.weight, coords=coords, shape=SPEC.shape, batch_size=1)
        return CutFeatures(voxels=voxels, spec=SPEC)


def test_building_passes_the_codec_and_skips_frames_that_nobody_labeled(tmp_path):
    generator = torch.Generator().manual_seed(0)
    cloud = PointCloud(xyz=torch.rand(300, 3, generator=generator) * torch.tensor([16.0, 16, 1]) - torch.tensor([0.0, 8, 0]),
                       features=torch.zeros(300, 1))  # fmt: skip
    frames = [
        Frame(id="a", points=cloud, labels=labels(box(6.0, 1.0))),
        Frame(id="b", points=cloud),
        Frame(id="c", points=cloud, labels=Labels.empty()),
    ]
    detector = Detector(GridEncoder(), torch.nn.Identity(), ("Car",)).train()

    def build():
        return build_feature_object_database(
            tmp_path / "db", frames, detector, codec="int8", config=CONFIG,
            split_fingerprint=SPLIT, encoder_fingerprint=ENCODER,
        )  # fmt: skip

    database = build()
    assert len(database) == 1
    with torch.no_grad():
        whole = detector.encode([cloud])
    stored = replace(whole, voxels=replace(whole.voxels, features=round_trip(whole.voxels.features, "int8")))
    [expected] = cut_objects(stored, labels(box(6.0, 1.0)), CONFIG)
    assert torch.equal(database[0].features, expected.features)
    assert not torch.equal(database[0].features, cut_objects(whole, labels(box(6.0, 1.0)), CONFIG)[0].features)
    with pytest.raises(InvalidInput, match="already exists"):
        build()


def test_objects_of_another_size_are_resized_before_they_are_encoded(tmp_path):
    cloud = PointCloud(xyz=torch.rand(600, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([16.0, 16, 1]) - torch.tensor([0.0, 8, 0]),
                       features=torch.zeros(600, 1))  # fmt: skip
    frames = [Frame(id="a", points=cloud, labels=labels(box(6.0, 1.0)))]
    detector = Detector(GridEncoder(), torch.nn.Identity(), ("Car",))
    config = replace(CONFIG, size_shift=(-1.0, -0.5, -0.25))
    database = build_feature_object_database(
        tmp_path / "db", frames, detector, codec="fp16", config=config, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER
    )
    assert torch.allclose(database[0].box, torch.tensor([6.0, 1.0, -0.125, 3.0, 1.5, 1.25, 0.0]))  # its bottom stays at -0.75
    mean_x = database[0].features[:, 0]
    assert mean_x.max() <= 16  # features are positions here: those of moved points, none of a point outside the scan


def test_objects_of_any_size_are_drawn_around_the_shifted_ones_and_are_the_same_when_built_again(tmp_path):
    cloud = PointCloud(xyz=torch.rand(600, 3, generator=torch.Generator().manual_seed(0)) * torch.tensor([16.0, 16, 1]) - torch.tensor([0.0, 8, 0]),
                       features=torch.zeros(600, 1))  # fmt: skip
    frames = [Frame(id=name, points=cloud, labels=labels(box(6.0, 1.0))) for name in "ab"]
    detector = Detector(GridEncoder(), torch.nn.Identity(), ("Car",))
    config = replace(CONFIG, size_shift=(-1.0, -0.5, -0.25), object_scale=(0.8, 1.25), side_scale=(0.9, 1.1))
    one, again = (
        build_feature_object_database(
            tmp_path / name, frames, detector, codec="fp16", config=config, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER
        )
        for name in ("one", "again")
    )
    factors = one.boxes[:, 3:6] / torch.tensor([3.0, 1.5, 1.25])
    assert torch.equal(one.boxes, again.boxes)
    assert not torch.equal(factors[0], factors[1])  # each object has its own
    assert (factors[0] - factors[0].mean()).abs().max() > 1e-3  # and each side
    assert 0.72 <= float(factors.min()) <= float(factors.max()) <= 1.375


def test_a_database_keeps_keypoints_and_objects_without_any(tmp_path):
    places = [box(6.0, 1.0), box(11.0, -4.0)]
    scene = with_keypoints(full_scene(0), torch.tensor([[6.0, 1.0, 0.0], [6.2, 1.0, 0.1]]))
    objects = cut_objects(scene, labels(*places), CONFIG)
    assert [len(o.keypoints.xyz) for o in objects] == [2, 0]
    for order, name in ((objects, "db"), (objects[::-1], "reversed"), (objects[1:], "none")):
        written = FeatureObjectDatabase.write(
            tmp_path / name, order, spec=KEYPOINT_SPEC, config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER
        )
        opened = read(tmp_path / name)
        for database in (written, opened):
            for found, expected in zip(map(database.__getitem__, range(len(order))), order, strict=True):
                assert torch.equal(found.keypoints.xyz, expected.keypoints.xyz)
                assert torch.equal(found.keypoints.features, expected.keypoints.features)
                assert torch.equal(found.features, expected.features)
    (tmp_path / "db" / "keypoint_features.f32").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"keypoint_features\.f32 holds 0 bytes"):
        read(tmp_path / "db")


def test_a_database_cut_short_is_refused(tmp_path):
    item = FeatureObject(
        box=torch.tensor([5.0, 0.0, 0.8, 4.0, 2.0, 1.6, 0.0]),
        class_index=0,
        num_points=9,
        coords=torch.tensor([[0, 1, 2], [0, 1, 3]], dtype=torch.int32),
        features=torch.ones(2, 4),
    )
    FeatureObjectDatabase.write(
        tmp_path / "db",
        [item, item],
        spec=replace(SPEC, channels=4),
        config=CONFIG,
        split_fingerprint="s",
        encoder_fingerprint="e",
    )
    assert len(FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint="s", encoder_fingerprint="e")) == 2
    path = tmp_path / "db" / "features.f32"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(InvalidInput, match="it is built again"):
        FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint="s", encoder_fingerprint="e")
