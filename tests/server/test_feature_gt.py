"""F-GT: which cells an object owns, that pasting touches nothing else, that no two objects meet, and that no label can leak."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels
from upcycle3d.core.structures import Boxes3D, Frame, Labels, PointCloud
from upcycle3d.ops.iou3d import iou_bev
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.encoders.second import SecondEncoder, SecondEncoderConfig
from upcycle3d.perception.server.feature_gt import (
    FeatureObject,
    cut_objects,
    footprint,
    keypoints_near,
    paste_objects,
    sample_objects,
)
from upcycle3d.perception.server.feature_object_database import FeatureObjectDatabase, build_feature_object_database
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig
from upcycle3d.perception.wire.codec import round_trip

GRID = VoxelGrid(range=(0.0, -8.0, -1.0, 16.0, 8.0, 3.0), voxel_size=(0.125, 0.125, 0.125))
SPEC = CutSpec(layer="cut", channels=3, stride=(16, 8, 8), shape=(2, 16, 16), grid=GRID)  # cells of 1 m, centres at i + 1/16
SPLIT, ENCODER = "ab" * 32, "cd" * 32
CONFIG = FeatureGtConfig(max_objects=(5,))


def box(x: float, y: float, yaw: float = 0.0, size: tuple[float, float, float] = (4.0, 2.0, 1.5)) -> list[float]:
    return [x, y, 0.0, *size, yaw]


def labels(*boxes: list[float], points: int = 50, **options) -> Labels:
    data = torch.tensor(boxes).view(-1, 7)
    counts = torch.full((len(data),), points, dtype=torch.int64)
    return Labels.make(data, torch.zeros(len(data), dtype=torch.int64), num_points=counts, **options)


def full_scene(seed: int, share: float = 1.0, batch_size: int = 1) -> CutFeatures:
    """A scene whose cells are active with probability ``share``, in a random order."""
    generator = torch.Generator().manual_seed(seed)
    cells = torch.randperm(512, generator=generator)[: int(512 * share)]
    coords = torch.stack([cells * 0, cells // 256, cells // 16 % 16, cells % 16], 1).int()
    voxels = SparseVoxels(
        features=torch.randn(len(cells), 3, generator=generator), coords=coords, shape=SPEC.shape, batch_size=batch_size
    )
    return CutFeatures(voxels=voxels, spec=SPEC)


def cells_of(split: CutFeatures) -> dict[tuple[int, int, int], list[float]]:
    coords = map(tuple, split.voxels.coords[:, 1:].tolist())
    return dict(zip(coords, split.voxels.features.tolist(), strict=True))


def owned(*boxes: list[float], margin: float = 1.0) -> set[tuple[int, int]]:
    """(y, x) cells in the footprint of any of the boxes."""
    mask = footprint(torch.tensor(boxes).view(-1, 7), SPEC, margin).any(0)
    return set(map(tuple, mask.nonzero().tolist()))


# ---- footprint


def test_footprint_of_a_straight_box():
    mask = footprint(torch.tensor([box(6.0, 1.0)]), SPEC, 0.0)[0]
    assert mask.shape == (16, 16)
    # x in [4, 8], cell centres at i + 0.0625: 4 .. 7. y in [0, 2], centres at -8 + i + 0.0625: rows 8 and 9.
    assert mask.any(0).nonzero().squeeze(1).tolist() == [4, 5, 6, 7]
    assert mask.any(1).nonzero().squeeze(1).tolist() == [8, 9]
    wider = footprint(torch.tensor([box(6.0, 1.0)]), SPEC, 1.0)[0]
    assert wider.any(0).nonzero().squeeze(1).tolist() == [3, 4, 5, 6, 7, 8]
    assert wider.any(1).nonzero().squeeze(1).tolist() == [7, 8, 9, 10]


def test_footprint_turns_with_the_box():
    across = owned(box(6.0, 1.0, math.pi / 2), margin=0.0)
    assert {x for _, x in across} == {5, 6}
    assert {y for y, _ in across} == {7, 8, 9, 10}
    # A long thin box along the diagonal of +x and +y (left) owns the diagonal cells; turned the other way, the other diagonal.
    thin = (8.0, 0.5, 1.0)
    assert owned(box(8.0625, 0.0625, math.pi / 4, thin), margin=0.0) == {(8 + i, 8 + i) for i in range(-2, 3)}
    assert owned(box(8.0625, 0.0625, -math.pi / 4, thin), margin=0.0) == {(8 - i, 8 + i) for i in range(-2, 3)}


def test_footprint_is_every_cell_whose_center_is_inside():
    generator = torch.Generator().manual_seed(3)
    for _ in range(20):
        x, y, yaw = (
            torch.rand(3, generator=generator) * torch.tensor([16.0, 16.0, 6.0]) - torch.tensor([0.0, 8.0, 3.0])
        ).tolist()
        mask = footprint(torch.tensor([box(x, y, yaw)]), SPEC, 0.5)[0]
        for row in range(16):
            for column in range(16):
                dx, dy = column + 0.0625 - x, row - 8 + 0.0625 - y
                along, across = math.cos(yaw) * dx + math.sin(yaw) * dy, math.cos(yaw) * dy - math.sin(yaw) * dx
                slack = max(abs(along) - 2.5, abs(across) - 1.5)
                if abs(slack) > 1e-4:
                    assert bool(mask[row, column]) == (slack < 0)


def test_a_cell_of_the_real_encoder_lies_in_the_middle_of_what_it_sees():
    """The footprint's cell centres, (8 i + 1/2) voxels, are those of the receptive field, 8 i - 7 to 8 i + 7."""
    grid = VoxelGrid(range=(0.0, -3.2, -1.0, 6.4, 3.2, 3.0), voxel_size=(0.1, 0.1, 0.1))
    encoder = SecondEncoder(SecondEncoderConfig(grid=grid, point_features=(), channels=(2, 2, 2, 2, 2))).eval()
    for voxel in range(16, 33):
        place = (voxel + 0.5) / 10
        cloud = PointCloud(xyz=torch.tensor([[place, place - 3.2, 0.55]]), features=torch.zeros(1, 1))
        with torch.no_grad():
            coords = encoder([cloud]).voxels.coords
        expected = [i for i in range(8) if 8 * i - 7 <= voxel <= 8 * i + 7]
        assert coords[:, 3].unique().tolist() == coords[:, 2].unique().tolist() == expected


def test_no_box_owns_no_cell():
    assert footprint(torch.zeros(0, 7), SPEC).shape == (0, 16, 16)
    assert not footprint(torch.tensor([box(100.0, 0.0)]), SPEC).any()


# ---- cut


def test_objects_are_cut_with_their_cells_and_only_the_learnable_ones():
    scene = full_scene(0)
    given = labels(box(6.0, 1.0), box(12.0, -4.0), box(4.0, -5.0))
    given = replace(given, num_points=torch.tensor([5, 4, 50]), weight=torch.tensor([1.0, 1, 0]), classes=torch.tensor([2, 0, 0]))
    [item] = cut_objects(scene, given, CONFIG)
    assert torch.equal(item.box, given.boxes.data[0])
    assert (item.class_index, item.num_points) == (2, 5)
    assert {(y, x) for _, y, x in item.coords.tolist()} == owned(box(6.0, 1.0))
    assert len(item.coords) == 2 * len(owned(box(6.0, 1.0)))  # all slices in z
    for cell, feature in zip(item.coords.tolist(), item.features.tolist(), strict=True):
        assert feature == cells_of(scene)[tuple(cell)]


def test_an_object_without_cells_is_not_cut_and_a_batch_is_refused():
    assert cut_objects(full_scene(0, share=0.0), labels(box(6.0, 1.0)), CONFIG) == []
    assert cut_objects(full_scene(0), Labels.empty(), CONFIG) == []
    with pytest.raises(InvalidInput, match="batch of 2"):
        cut_objects(full_scene(0, batch_size=2), labels(box(6.0, 1.0)), CONFIG)


# ---- paste


def cut(seed: int, *boxes: list[float], share: float = 1.0) -> list[FeatureObject]:
    return cut_objects(full_scene(seed, share), labels(*boxes), CONFIG)


def test_pasting_replaces_the_footprint_and_touches_no_other_cell():
    places = [box(5.0, 4.0, 0.3), box(11.0, -4.0, 1.8)]
    source, target = cut(1, *places, share=0.4), full_scene(2, share=0.6)
    before = cells_of(target)
    known = labels(box(13.0, 6.0), points=-1, exact=False, complete=False)
    pasted, joined = paste_objects(target, known, source, CONFIG, np.random.default_rng(0))
    after, inside = cells_of(pasted), owned(*places)
    assert len(after) == len(pasted.voxels.coords)  # no coordinate twice
    assert {c: f for c, f in after.items() if c[1:] not in inside} == {c: f for c, f in before.items() if c[1:] not in inside}
    expected = {tuple(c): f for item in source for c, f in zip(item.coords.tolist(), item.features.tolist(), strict=True)}
    assert {c: f for c, f in after.items() if c[1:] in inside} == expected  # cleared first: cells of the old scene are gone
    assert cells_of(target) == before
    tiny.assert_in_grid(pasted.voxels)
    assert joined.boxes.data.tolist() == torch.cat([known.boxes.data, torch.tensor(places)]).tolist()
    assert joined.exact.tolist() == [False, True, True]
    assert joined.weight.tolist() == [1, 1, 1]
    assert joined.num_points.tolist() == [-1, 50, 50]
    assert not joined.complete  # what the teacher missed is still not background


def test_pasting_an_object_back_into_its_own_scene_changes_nothing():
    scene = full_scene(1, share=0.5)
    items = cut_objects(scene, labels(box(5.0, 4.0, 0.3)), CONFIG)
    pasted, _ = paste_objects(scene, Labels.empty(), items, CONFIG, np.random.default_rng(0))
    assert torch.equal(pasted.voxels.dense(), scene.voxels.dense())


def test_neighbors_whose_margins_meet_share_no_cell():
    near = [box(5.0, 0.0), box(5.0, 2.5)]
    source = [*cut(1, near[0]), *cut(2, near[1])]
    pasted, _ = paste_objects(full_scene(3), Labels.empty(), source, CONFIG, np.random.default_rng(0))
    after = cells_of(pasted)
    assert len(after) == len(pasted.voxels.coords) == 512
    for cell in map(tuple, source[0].coords.tolist()):
        assert after[cell] == cells_of(full_scene(1))[cell]  # the first one keeps the cells that both claim


def test_pasting_nothing_and_pasting_into_nothing():
    scene, none = full_scene(0), Labels.empty(complete=False)
    assert paste_objects(scene, none, [], CONFIG, np.random.default_rng(0)) == (scene, none)
    [item] = cut(1, box(5.0, 0.0))
    pasted, joined = paste_objects(full_scene(0, share=0.0), none, [item], CONFIG, np.random.default_rng(0))
    assert len(pasted.voxels.coords) == len(item.coords)
    assert len(joined) == 1


# ---- keypoints


KEYPOINT_SPEC = replace(SPEC, keypoints=KeypointSpec(count=40, channels=2))


def with_keypoints(scene: CutFeatures, xyz: torch.Tensor, seed: int = 0) -> CutFeatures:
    features = torch.randn(len(xyz), 2, generator=torch.Generator().manual_seed(seed))
    keypoints = Keypoints(xyz=xyz, features=features, starts=(0, len(xyz)))
    return CutFeatures(voxels=scene.voxels, spec=KEYPOINT_SPEC, keypoints=keypoints)


def spread(count: int, seed: int) -> torch.Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([16.0, 16, 1]) - torch.tensor(
        [0, 8, 0.5]
    )


def test_keypoints_are_cut_with_a_box_that_is_a_fifth_of_a_metre_larger():
    # Half length 2, half width 1, half height 0.75; enlarged by 0.1 on each side.
    xyz = torch.tensor([[7.95, 1, 0], [8.05, 1, 0], [8.15, 1, 0], [6, 2.05, 0], [6, 2.15, 0], [6, 1, 0.84], [6, 1, 0.86]])
    scene = with_keypoints(full_scene(0), xyz)
    [item] = cut_objects(scene, labels(box(6.0, 1.0)), CONFIG)
    assert torch.equal(item.keypoints.xyz, xyz[[0, 1, 3, 5]])
    assert torch.equal(item.keypoints.features, scene.keypoints.features[[0, 1, 3, 5]])
    [bare] = cut_objects(scene, labels(box(6.0, 1.0)), replace(CONFIG, keypoint_margin=0.0))
    assert torch.equal(bare.keypoints.xyz, xyz[[0, 5]][:1])


def test_pasted_keypoints_replace_the_scenes_own_and_the_count_stays():
    place = box(6.0, 1.0, 0.4)
    source = with_keypoints(full_scene(1), torch.cat([torch.tensor(place[:3]) + spread(9, 6) / 20, spread(5, 2)]), seed=1)
    objects = cut_objects(source, labels(place), CONFIG)
    own = objects[0].keypoints
    target = with_keypoints(full_scene(2), torch.cat([spread(38, 3), torch.tensor([place[:3]])]), seed=2)
    pasted, _ = paste_objects(target, Labels.empty(complete=False), objects, CONFIG, np.random.default_rng(0))
    found = pasted.keypoints
    assert len(found.xyz) == len(target.keypoints.xyz) == 39
    n = len(own.xyz)
    assert n >= 5
    assert torch.equal(found.xyz[:n], own.xyz)  # first, so that balls around the object take them first
    assert torch.equal(found.features[:n], own.features)
    inside = keypoints_near(target.keypoints, torch.tensor([place]), CONFIG)[0]
    assert inside.any()
    rest = set(map(tuple, found.xyz[n:].tolist()))
    background = set(map(tuple, target.keypoints.xyz[~inside].tolist()))
    assert rest <= background
    assert len(rest) == 39 - n
    again, _ = paste_objects(target, Labels.empty(), objects, CONFIG, np.random.default_rng(0))
    other, _ = paste_objects(target, Labels.empty(), objects, CONFIG, np.random.default_rng(1))
    assert torch.equal(again.keypoints.xyz, found.xyz)
    assert not torch.equal(other.keypoints.xyz, found.xyz)


def test_a_keypoint_between_two_pasted_objects_is_pasted_once():
    places = [box(5.0, 0.0), box(5.0, 2.1)]  # 0.1 m apart: their rims of 0.1 m meet
    source = with_keypoints(full_scene(1), torch.tensor([[5.0, 1.05, 0.0], [5.0, 0.0, 0.0], [5.0, 2.1, 0.0]]))
    objects = cut_objects(source, labels(*places), CONFIG)
    assert [len(o.keypoints.xyz) for o in objects] == [2, 2]
    target = with_keypoints(full_scene(2), spread(20, 3) + torch.tensor([20.0, 0, 0]))
    pasted, _ = paste_objects(target, Labels.empty(), objects, CONFIG, np.random.default_rng(0))
    assert sorted(map(tuple, pasted.keypoints.xyz[:3].tolist())) == sorted(map(tuple, source.keypoints.xyz.tolist()))
    assert len(pasted.keypoints.xyz.unique(dim=0)) == 20


def test_a_scene_with_few_keypoints_gets_no_more_than_it_had():
    place = box(6.0, 1.0)
    objects = cut_objects(with_keypoints(full_scene(1), torch.tensor([place[:3]]).repeat(7, 1)), labels(place), CONFIG)
    for had in (0, 3):
        target = with_keypoints(full_scene(2), spread(had, 5))
        pasted, joined = paste_objects(target, Labels.empty(), objects, CONFIG, np.random.default_rng(0))
        assert len(pasted.keypoints.xyz) == had
        assert len(joined) == 1


def test_a_database_keeps_keypoints_and_objects_without_any(tmp_path):
    places = [box(6.0, 1.0), box(11.0, -4.0)]
    scene = with_keypoints(full_scene(0), torch.tensor([[6.0, 1.0, 0.0], [6.2, 1.0, 0.1]]))
    objects = cut_objects(scene, labels(*places), CONFIG)
    assert [len(o.keypoints.xyz) for o in objects] == [2, 0]
    for order, name in ((objects, "db"), (objects[::-1], "reversed"), (objects[1:], "none")):
        written = FeatureObjectDatabase.write(
            tmp_path / name, order, spec=KEYPOINT_SPEC, config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER
        )
        opened = FeatureObjectDatabase.open(tmp_path / name, config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)
        for database in (written, opened):
            for found, expected in zip(map(database.__getitem__, range(len(order))), order, strict=True):
                assert torch.equal(found.keypoints.xyz, expected.keypoints.xyz)
                assert torch.equal(found.keypoints.features, expected.keypoints.features)
                assert torch.equal(found.features, expected.features)
    (tmp_path / "db" / "keypoint_features.f32").write_bytes(b"")
    with pytest.raises(InvalidInput, match=r"keypoint_features\.f32 holds 0 bytes"):
        FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)


# ---- database


def write(folder, objects: list[FeatureObject]) -> FeatureObjectDatabase:
    return FeatureObjectDatabase.write(
        folder, objects, spec=SPEC, config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER
    )


def test_a_database_gives_back_what_was_written(tmp_path):
    objects = [*cut(1, box(5.0, 4.0)), replace(cut(2, box(11.0, -4.0, 1.2), share=0.5)[0], class_index=2, num_points=7)]
    written = write(tmp_path / "db", objects)
    opened = FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)
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
    for other in (replace(CONFIG, margin_cells=2.0), replace(CONFIG, size_shift=(-0.9, -0.5, -0.3))):
        with pytest.raises(InvalidInput, match="was cut with"):
            FeatureObjectDatabase.open(tmp_path / "db", config=other, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)
    more = replace(CONFIG, max_objects=(9,))  # how many are pasted is no matter of the database
    assert (
        len(FeatureObjectDatabase.open(tmp_path / "db", config=more, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)) == 1
    )


def test_a_missing_broken_or_newer_database_is_refused(tmp_path):
    def open_it():
        return FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)

    with pytest.raises(InvalidInput, match="no readable object database"):
        open_it()
    write(tmp_path / "db", [])
    meta = tmp_path / "db" / "database.json"
    text = meta.read_text()
    meta.write_text(text[:20])
    with pytest.raises(InvalidInput, match="no readable object database"):
        open_it()
    meta.write_text(json.dumps(json.loads(text) | {"version": 99}))
    with pytest.raises(InvalidInput, match="version 99"):
        open_it()


def test_a_database_is_never_overwritten_and_remains_of_a_crash_do_no_harm(tmp_path):
    leftovers = tmp_path / "db.tmp"
    leftovers.mkdir()
    (leftovers / "features.f32").write_bytes(b"half a fea")
    write(tmp_path / "db", cut(1, box(5.0, 4.0)))
    with pytest.raises(InvalidInput, match="already exists"):
        write(tmp_path / "db", [])
    assert (
        len(FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)) == 1
    )


def test_an_empty_database_is_legal(tmp_path):
    write(tmp_path / "db", [])
    opened = FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint=SPLIT, encoder_fingerprint=ENCODER)
    assert len(opened) == 0
    config = FeatureGtConfig(max_objects=(5,))
    assert sample_objects(opened, Labels.empty(), Boxes3D.empty(), config, np.random.default_rng(0)) == []


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
            tmp_path / "db", frames, detector, codec="int8", config=FeatureGtConfig(max_objects=(5,)),
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


# ---- sampling


@pytest.fixture
def database(tmp_path) -> FeatureObjectDatabase:
    """60 objects of two classes at random places."""
    generator = torch.Generator().manual_seed(4)
    objects = []
    for i in range(60):
        x, y, yaw = (
            torch.rand(3, generator=generator) * torch.tensor([14.0, 14.0, 6.0]) + torch.tensor([1.0, -7.0, -3.0])
        ).tolist()
        size = (3.0, 1.5, 1.5) if i % 2 == 0 else (0.8, 0.6, 1.7)
        objects.append(
            FeatureObject(
                box=torch.tensor(box(x, y, yaw, size)),
                class_index=i % 2,
                num_points=9,
                coords=torch.zeros(1, 3, dtype=torch.int32),
                features=torch.zeros(1, 3),
            )
        )
    return write(tmp_path / "db", objects)


@pytest.mark.parametrize("seed", range(8))
def test_sampled_objects_touch_nothing(database, seed):
    known = labels(box(4.0, 4.0), box(12.0, -4.0, 0.5))
    obstacles = Boxes3D(data=torch.tensor([box(12.0, 4.0), box(4.0, -4.0, 1.0)]))
    chosen = sample_objects(database, known, obstacles, FeatureGtConfig(max_objects=(6, 8)), np.random.default_rng(seed))
    assert chosen
    boxes = torch.stack([o.box for o in chosen])
    assert iou_bev(boxes, torch.cat([known.boxes.data, obstacles.data])).max() == 0
    assert (iou_bev(boxes, boxes) - torch.eye(len(boxes))).abs().max() < 1e-5


def test_classes_are_filled_up_to_their_maximum_counting_what_is_there(database):
    known = labels(box(200.0, 0.0), box(210.0, 0.0))  # two cars, far outside
    none = Boxes3D.empty()

    def counts(*maximum: int) -> list[int]:
        chosen = sample_objects(database, known, none, FeatureGtConfig(max_objects=maximum), np.random.default_rng(0))
        return [sum(o.class_index == c for o in chosen) for c in (0, 1)]

    assert counts(4, 3) == [2, 3]
    assert counts(2, 0) == [0, 0]
    assert counts(1, 1) == [0, 1]
    assert counts(4) == [2, 0]


def test_sampling_is_a_function_of_the_generator(database):
    config = FeatureGtConfig(max_objects=(6, 8))

    def places(seed: int) -> list[list[float]]:
        chosen = sample_objects(database, Labels.empty(), Boxes3D.empty(), config, np.random.default_rng(seed))
        return [o.box.tolist() for o in chosen]

    assert places(1) == places(1)
    assert places(1) != places(2)
    assert len(set(map(tuple, places(1)))) == len(places(1))


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
    with pytest.raises(InvalidInput, match="build it again"):
        FeatureObjectDatabase.open(tmp_path / "db", config=CONFIG, split_fingerprint="s", encoder_fingerprint="e")
