"""F-GT: which cells an object owns, that pasting touches nothing else, and that no two objects meet."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from feature_scenes import CONFIG, SPEC, box, cut, full_scene, labels, spread, with_keypoints

import tiny
from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures
from upcycle3d.core.structures import Boxes3D, Labels, PointCloud
from upcycle3d.ops.iou3d import iou_bev
from upcycle3d.perception.models.encoders.second import SecondEncoder, SecondEncoderConfig
from upcycle3d.perception.server.feature_gt import (
    FeatureObject,
    cut_objects,
    footprint,
    keypoints_near,
    paste_objects,
    sample_objects,
)
from upcycle3d.perception.server.upcycle_config import FeatureGtConfig


def cells_of(scene: CutFeatures) -> dict[tuple[int, int, int], list[float]]:
    coords = map(tuple, scene.voxels.coords[:, 1:].tolist())
    return dict(zip(coords, scene.voxels.features.tolist(), strict=True))


def owned(*boxes: list[float], margin: float = 1.0) -> set[tuple[int, int]]:
    """(y, x) cells in the footprint of any of the boxes."""
    mask = footprint(torch.tensor(boxes).view(-1, 7), SPEC, margin).any(0)
    return set(map(tuple, mask.nonzero().tolist()))


# ---- footprint


def test_footprint_of_a_straight_box():
    mask = footprint(torch.tensor([box(6.0, 1.0)]), SPEC, 0.0)[0]
    assert mask.shape == (16, 16)
    # x in [4, 8], cell centers at i + 0.0625: 4 .. 7. y in [0, 2], centers at -8 + i + 0.0625: rows 8 and 9.
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
    """The footprint's cell centers, (8 i + 1/2) voxels, are those of the receptive field, 8 i - 7 to 8 i + 7."""
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


# ---- sampling


class ObjectList(list[FeatureObject]):
    """An object database in memory: all that sampling asks for."""

    @property
    def boxes(self) -> torch.Tensor:
        return torch.stack([o.box for o in self])

    @property
    def classes(self) -> torch.Tensor:
        return torch.tensor([o.class_index for o in self])


@pytest.fixture(scope="module")
def database() -> ObjectList:
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
    return ObjectList(objects)


@pytest.mark.parametrize("seed", range(8))
def test_sampled_objects_touch_nothing(database, seed):
    known = labels(box(4.0, 4.0), box(12.0, -4.0, 0.5))
    obstacles = Boxes3D(data=torch.tensor([box(12.0, 4.0), box(4.0, -4.0, 1.0)]))
    chosen = sample_objects(database, known, obstacles, FeatureGtConfig(max_objects=(6, 8)), np.random.default_rng(seed))
    assert chosen
    boxes = torch.stack([o.box for o in chosen])
    assert iou_bev(boxes, torch.cat([known.boxes.data, obstacles.data])).max() == 0
    assert (iou_bev(boxes, boxes) - torch.eye(len(boxes))).abs().max() < 1e-5


@pytest.mark.parametrize("seed", range(3))
def test_a_clearance_stays_free_around_every_pasted_object(database, seed):
    """Shapely is the oracle: no other box lies within the clearance of a pasted one, and without a clearance some does."""
    shapely, affinity = pytest.importorskip("shapely"), pytest.importorskip("shapely.affinity")

    def outline(x, y, _z, length, width, _height, yaw):
        return affinity.rotate(
            shapely.box(x - length / 2, y - width / 2, x + length / 2, y + width / 2), yaw, (x, y), use_radians=True
        )

    def nearest(clearance: float) -> float:
        known = labels(box(4.0, 4.0), box(12.0, -4.0, 0.5))
        config = FeatureGtConfig(max_objects=(40, 40), clearance=clearance)
        chosen = sample_objects(database, known, Boxes3D.empty(), config, np.random.default_rng(seed))
        assert chosen
        pasted = [outline(*o.box.tolist()) for o in chosen]
        others = [outline(*row) for row in known.boxes.data.tolist()]
        return min(a.distance(b) for i, a in enumerate(pasted) for b in (*others, *pasted[:i]))

    assert nearest(0.8) >= 0.8 - 1e-4
    assert nearest(0.0) < 0.8


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
