"""Augmentations of features: cells and boxes move together, exactly where the map allows it, and nothing else changes.

The synthetic object is a block of cells whose middle is the middle of its box, in metres of cell centres, (i * stride + 1/2)
voxels. So after any move the features' centre of mass must be the moved box's centre: exactly for flips and quarter turns, and
within a tenth of a cell where bilinear sampling rounds the block's outline. Half a cell would be a fault of convention.
"""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels
from upcycle3d.core.structures import Labels
from upcycle3d.perception.server.feature_augmentation import (
    add_noise,
    cut_mix,
    drop_cells,
    drop_channels,
    flip_x,
    flip_y,
    rotate_free,
    rotate_quarter,
    scale_map,
)

GRID = VoxelGrid(range=(0.0, -12.0, -1.0, 24.0, 12.0, 3.0), voxel_size=(0.125, 0.125, 0.125))
SPEC = CutSpec(layer="cut", channels=2, stride=(16, 8, 8), shape=(2, 24, 24), grid=GRID)
CELL = 1.0  # m
MOVES = [flip_x, flip_y, rotate_quarter, rotate_free, scale_map]


class Fixed(np.random.Generator):
    """A generator whose next coin, integer and angle are known."""

    def __init__(self, *, coin: float = 0.9, integer: int = 1, uniform: float = 0.3) -> None:
        super().__init__(np.random.PCG64(0))
        self.coin, self.integer, self.drawn = coin, integer, uniform

    def random(self, *args, **options):
        return self.coin if not args else super().random(*args, **options)

    def integers(self, *args, **options):
        return self.integer

    def uniform(self, *args, **options):
        return self.drawn


def scene_of(coords: torch.Tensor, features: torch.Tensor, spec: CutSpec = SPEC) -> CutFeatures:
    voxels = SparseVoxels(features=features, coords=coords.int(), shape=spec.shape, batch_size=1)
    return CutFeatures(voxels=voxels, spec=spec)


def position(row: float, column: float) -> tuple[float, float]:
    """x, y m of a place in cells."""
    return column * CELL + 0.0625, row * CELL - 12 + 0.0625


def block(rows: range, columns: range) -> tuple[CutFeatures, Labels]:
    """Cells of ones, in both slices, and the box around them: long along x, looking forward and a bit left."""
    cells = [[0, z, y, x] for z in range(2) for y in rows for x in columns]
    x, y = position((rows[0] + rows[-1]) / 2, (columns[0] + columns[-1]) / 2)
    box = torch.tensor([[x, y, 0.5, float(len(columns)), float(len(rows)), 2.0, 0.2]])
    return scene_of(torch.tensor(cells), torch.ones(len(cells), 2)), Labels.make(box, torch.zeros(1))


def random_scene(seed: int, cells: int = 60) -> tuple[CutFeatures, Labels]:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(2 * 24 * 24, generator=generator)[:cells]
    coords = torch.stack([index * 0, index // 576, index // 24 % 24, index % 24], 1)
    boxes = torch.rand(5, 7, generator=generator) * torch.tensor([20.0, 20, 1, 3, 3, 3, 6]) + torch.tensor(
        [2, -10, 0, 1, 1, 1, -3.0]
    )
    return scene_of(coords, torch.randn(cells, 2, generator=generator)), Labels.make(boxes, torch.arange(5))


def empty_scene() -> tuple[CutFeatures, Labels]:
    return scene_of(torch.zeros(0, 4), torch.zeros(0, 2)), Labels.empty()


def center_of_mass(scene: CutFeatures) -> tuple[float, float]:
    weight = scene.voxels.features[:, 0]
    row, column = ((scene.voxels.coords[:, axis] * weight).sum() / weight.sum() for axis in (2, 3))
    return position(float(row), float(column))


def same_cells(a: CutFeatures, b: CutFeatures) -> bool:
    return torch.equal(a.voxels.dense(), b.voxels.dense()) and len(a.voxels.coords) == len(b.voxels.coords)


def same_boxes(a: Labels, b: Labels) -> bool:
    turn = (a.boxes.data[:, 6] - b.boxes.data[:, 6] + math.pi).remainder(2 * math.pi) - math.pi
    return torch.allclose(a.boxes.data[:, :6], b.boxes.data[:, :6], atol=1e-5) and bool((turn.abs() < 1e-5).all())


# ---- boxes follow cells


@pytest.mark.parametrize(
    ("move", "rng", "tolerance", "yaw"),
    [
        (flip_y, Fixed(), 1e-4, -0.2),
        (flip_x, Fixed(), 1e-4, math.pi - 0.2),
        (rotate_quarter, Fixed(integer=1), 1e-4, 0.2 + math.pi / 2),
        (rotate_quarter, Fixed(integer=2), 1e-4, 0.2 - math.pi),
        (rotate_quarter, Fixed(integer=3), 1e-4, 0.2 - math.pi / 2),
        (rotate_free, Fixed(uniform=0.5), 0.1 * CELL, 0.7),
        (rotate_free, Fixed(uniform=-0.7), 0.1 * CELL, -0.5),
        (scale_map, Fixed(uniform=1.1), 0.1 * CELL, 0.2),
        (scale_map, Fixed(uniform=0.9), 0.1 * CELL, 0.2),
    ],
)
@pytest.mark.parametrize(("rows", "columns"), [(range(5, 8), range(13, 18)), (range(14, 16), range(7, 11))])
def test_a_box_stays_on_its_cells(move, rng, tolerance, yaw, rows, columns):
    scene, labels = block(rows, columns)
    moved, boxes = move(scene, labels, rng)
    assert len(boxes) == 1
    x, y = center_of_mass(moved)
    assert math.hypot(x - boxes.boxes.data[0, 0], y - boxes.boxes.data[0, 1]) < tolerance
    before = center_of_mass(scene)
    assert math.hypot(x - before[0], y - before[1]) > 0.3 * CELL  # it did move
    assert boxes.boxes.data[0, 6].item() == pytest.approx(yaw, abs=1e-5)
    assert boxes.classes.tolist() == [0]
    tiny.assert_in_grid(moved.voxels)


def test_quarter_turns_are_counter_clockwise():
    """An object ahead and to the right of the middle comes to lie ahead and to the left."""
    scene, labels = block(range(5, 8), range(17, 20))
    _, boxes = rotate_quarter(scene, labels, Fixed(integer=1))
    middle = position(11.5, 11.5)
    before, after = labels.boxes.data[0, :2] - torch.tensor(middle), boxes.boxes.data[0, :2] - torch.tensor(middle)
    assert torch.allclose(after, torch.stack([-before[1], before[0]]), atol=1e-5)


@pytest.mark.parametrize("row", [8, 11, 15])
def test_cut_mix_takes_each_side_whole(row):
    a, labels_a = random_scene(1)
    b, labels_b = random_scene(2)
    mixed, labels = cut_mix(a, labels_a, b, labels_b, Fixed(integer=row))
    dense = mixed.voxels.dense()
    assert torch.equal(dense[..., :row, :], a.voxels.dense()[..., :row, :])
    assert torch.equal(dense[..., row:, :], b.voxels.dense()[..., row:, :])
    border = position(row - 0.5, 0)[1]
    expected = [x for x in labels_a.boxes.data.tolist() if x[1] < border] + [
        x for x in labels_b.boxes.data.tolist() if x[1] >= border
    ]
    assert labels.boxes.data.tolist() == expected
    # A box whose middle is the middle of a cell goes where its cell goes.
    for cell, side in ((row - 1, a), (row, b)):
        alone, label = block(range(cell, cell + 1), range(4, 6))
        nothing, none = empty_scene()
        parts = (alone, label, nothing, none) if side is a else (nothing, none, alone, label)
        kept, kept_labels = cut_mix(*parts, Fixed(integer=row))
        assert len(kept.voxels.coords) == 4
        assert len(kept_labels) == 1


# ---- exactness


@pytest.mark.parametrize("flip", [flip_x, flip_y])
def test_flipping_twice_changes_nothing(flip):
    scene, labels = random_scene(3)
    once, boxes = flip(scene, labels, Fixed())
    assert not same_cells(once, scene)
    twice, again = flip(once, boxes, Fixed())
    assert same_cells(twice, scene)
    assert torch.equal(twice.voxels.features, scene.voxels.features)
    assert same_boxes(again, labels)


def test_four_quarter_turns_are_none_and_two_are_both_flips():
    scene, labels = random_scene(4)
    step, boxes = scene, labels
    for count in range(4):
        step, boxes = rotate_quarter(step, boxes, Fixed(integer=1))
        at_once, boxes_at_once = rotate_quarter(scene, labels, Fixed(integer=(count + 1) % 4))
        assert same_cells(step, at_once)
        assert same_boxes(boxes, boxes_at_once)
    assert torch.equal(step.voxels.coords, scene.voxels.coords)
    assert same_boxes(boxes, labels)
    half, half_boxes = rotate_quarter(scene, labels, Fixed(integer=2))
    flipped, flipped_boxes = flip_x(*flip_y(scene, labels, Fixed()), Fixed())
    assert same_cells(half, flipped)
    assert same_boxes(half_boxes, flipped_boxes)


def test_a_free_quarter_turn_and_no_scaling_agree_with_the_exact_ones():
    scene, labels = random_scene(5)
    exact, boxes = rotate_quarter(scene, labels, Fixed(integer=1))
    free, free_boxes = rotate_free(scene, labels, Fixed(uniform=math.pi / 2))
    assert torch.allclose(free.voxels.dense(), exact.voxels.dense(), atol=1e-4)
    assert same_boxes(free_boxes, boxes)
    scaled, scaled_boxes = scale_map(scene, labels, Fixed(uniform=1.0))
    assert torch.allclose(scaled.voxels.dense(), scene.voxels.dense(), atol=1e-5)
    assert same_boxes(scaled_boxes, labels)


def test_scaling_scales_boxes_in_every_size():
    scene, labels = block(range(10, 13), range(9, 14))
    _, boxes = scale_map(scene, labels, Fixed(uniform=1.05))
    assert torch.allclose(boxes.boxes.data[:, 3:6], labels.boxes.data[:, 3:6] * 1.05)


@pytest.mark.parametrize("flip", [flip_x, flip_y])
def test_half_of_the_scenes_are_not_flipped(flip):
    scene, labels = random_scene(3)
    assert flip(scene, labels, Fixed(coin=0.4)) == (scene, labels)
    flips = sum(flip(scene, labels, np.random.default_rng(seed))[0] is not scene for seed in range(40))
    assert 10 < flips < 30


def test_quarter_turns_need_a_square_map():
    grid = VoxelGrid(range=(0.0, -12.0, -1.0, 16.0, 12.0, 3.0), voxel_size=(0.125, 0.125, 0.125))
    spec = replace(SPEC, grid=grid, shape=(2, 24, 16))
    with pytest.raises(InvalidInput, match="24 x 16 cells"):
        rotate_quarter(scene_of(torch.zeros(1, 4), torch.ones(1, 2), spec), Labels.empty(), Fixed())


def test_boxes_that_leave_the_map_are_dropped():
    _, labels = block(range(1, 3), range(1, 3))
    scene = empty_scene()[0]
    assert len(rotate_free(scene, labels, Fixed(uniform=math.pi / 4))[1]) == 0
    assert len(rotate_quarter(scene, labels, Fixed(integer=1))[1]) == 1


# ---- values


def test_noise_keeps_cells_and_boxes_and_follows_each_channel():
    scene, labels = random_scene(6, cells=800)
    scene = replace(scene, voxels=replace(scene.voxels, features=scene.voxels.features * torch.tensor([1.0, 20.0])))
    noisy, same = add_noise(scene, labels, np.random.default_rng(0), sigma=0.1)
    assert same is labels
    assert torch.equal(noisy.voxels.coords, scene.voxels.coords)
    ratio = (noisy.voxels.features - scene.voxels.features).std(0) / scene.voxels.features.std(0)
    assert torch.allclose(ratio, torch.full((2,), 0.1), atol=0.01)


def test_dropped_channels_are_zero_everywhere_and_the_others_scaled_up():
    generator = torch.Generator().manual_seed(0)
    spec = replace(SPEC, channels=200)
    scene = scene_of(random_scene(7)[0].voxels.coords, torch.rand(60, 200, generator=generator) + 1, spec)
    dropped, _ = drop_channels(scene, Labels.empty(), np.random.default_rng(0), share=0.25)
    silent = (dropped.voxels.features == 0).all(0)
    assert 30 < int(silent.sum()) < 70
    assert torch.allclose(dropped.voxels.features[:, ~silent], scene.voxels.features[:, ~silent] / 0.75)
    assert torch.equal(dropped.voxels.coords, scene.voxels.coords)


def test_dropped_cells_are_gone_and_the_others_untouched():
    scene, labels = random_scene(8, cells=1000)
    fewer, same = drop_cells(scene, labels, np.random.default_rng(0), share=0.2)
    assert same is labels
    assert 750 < len(fewer.voxels.coords) < 850
    before = {tuple(c): f for c, f in zip(scene.voxels.coords.tolist(), scene.voxels.features.tolist(), strict=True)}
    assert all(before[tuple(c)] == f for c, f in zip(fewer.voxels.coords.tolist(), fewer.voxels.features.tolist(), strict=True))


@pytest.mark.parametrize("change", [*MOVES, add_noise, drop_channels, drop_cells])
def test_an_empty_scene_stays_one(change):
    for seed in range(3):
        scene, labels = change(*empty_scene(), np.random.default_rng(seed))
        assert scene.voxels.features.shape == (0, 2)
        assert scene.voxels.coords.shape == (0, 4)
        assert scene.voxels.coords.dtype == torch.int32
        assert len(labels) == 0
        assert cut_mix(*empty_scene(), *empty_scene(), np.random.default_rng(seed))[0].voxels.features.shape == (0, 2)


@pytest.mark.parametrize("change", [*MOVES, add_noise, drop_channels, drop_cells])
def test_a_change_is_a_function_of_the_generator_and_leaves_its_argument_alone(change):
    scene, labels = random_scene(9)
    before = scene.voxels.dense().clone(), labels.boxes.data.clone()
    (a, labels_a), (b, labels_b) = (change(scene, labels, np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(a.voxels.features, b.voxels.features)
    assert torch.equal(a.voxels.coords, b.voxels.coords)
    assert torch.equal(labels_a.boxes.data, labels_b.boxes.data)
    assert torch.equal(scene.voxels.dense(), before[0])
    assert torch.equal(labels.boxes.data, before[1])
    assert len(a.voxels.coords.unique(dim=0)) == len(a.voxels.coords)


# ---- keypoints

KEYPOINT_SPEC = replace(SPEC, keypoints=KeypointSpec(count=600, channels=2))


def with_keypoints(scene: CutFeatures, xyz: torch.Tensor, seed: int = 0) -> CutFeatures:
    features = torch.randn(len(xyz), 2, generator=torch.Generator().manual_seed(seed))
    keypoints = Keypoints(xyz=xyz, features=features, starts=(0, len(xyz)))
    return CutFeatures(voxels=scene.voxels, spec=KEYPOINT_SPEC, keypoints=keypoints)


def centers_of_cells(scene: CutFeatures) -> torch.Tensor:
    """(M, 3) the middle of every cell, at a height of its slice."""
    _, z, y, x = scene.voxels.coords.unbind(1)
    return torch.stack([x * CELL + 0.0625, y * CELL - 12 + 0.0625, z.float()], 1)


@pytest.mark.parametrize(
    ("move", "rng"), [(flip_x, Fixed()), (flip_y, Fixed()), *((rotate_quarter, Fixed(integer=n)) for n in range(4))]
)
def test_a_keypoint_in_the_middle_of_a_cell_stays_there_under_exact_moves(move, rng):
    plain, labels = random_scene(1)
    scene = with_keypoints(plain, centers_of_cells(plain))
    moved, _ = move(scene, labels, rng)
    assert len(moved.keypoints.xyz) == 60
    assert torch.allclose(moved.keypoints.xyz, centers_of_cells(moved), atol=1e-4)
    assert torch.equal(moved.keypoints.features, scene.keypoints.features)
    assert moved.keypoints.starts == (0, 60)


@pytest.mark.parametrize(
    ("move", "rng"),
    [(flip_x, Fixed()), (flip_y, Fixed()), (rotate_quarter, Fixed()), (rotate_free, Fixed()), (scale_map, Fixed(uniform=0.95))],
)
def test_a_keypoint_in_the_middle_of_a_box_stays_there_and_without_keypoints_all_else_is_the_same(move, rng):
    plain, labels = random_scene(2)
    scene = with_keypoints(plain, labels.boxes.data[:, :3])
    moved, boxes = move(scene, labels, rng)
    assert torch.allclose(moved.keypoints.xyz[:, :2], boxes.boxes.data[:, :2], atol=1e-4)
    assert torch.equal(moved.keypoints.xyz[:, 2], boxes.boxes.data[:, 2])
    bare, bare_boxes = move(plain, labels, rng)
    assert bare.keypoints is None
    assert same_cells(bare, moved)
    assert same_boxes(bare_boxes, boxes)


def test_keypoints_that_leave_the_map_are_dropped_with_their_features():
    x, y = position(11.5, 11.5)
    scene = with_keypoints(empty_scene()[0], torch.tensor([[1.0, -11, 0], [x, y, 0], [23, 11, 0]]))
    moved, _ = rotate_free(scene, Labels.empty(), Fixed(uniform=math.pi / 4))
    assert torch.allclose(moved.keypoints.xyz, torch.tensor([[x, y, 0.0]]), atol=1e-4)
    assert torch.equal(moved.keypoints.features, scene.keypoints.features[1:2])


def test_noise_and_dropout_change_the_features_of_keypoints_too():
    plain, labels = random_scene(6)
    xyz = torch.rand(600, 3, generator=torch.Generator().manual_seed(1)) * 10
    scene = with_keypoints(plain, xyz)
    noisy, _ = add_noise(scene, labels, np.random.default_rng(0), sigma=0.1)
    assert torch.equal(noisy.keypoints.xyz, xyz)
    ratio = (noisy.keypoints.features - scene.keypoints.features).std(0) / scene.keypoints.features.std(0)
    assert torch.allclose(ratio, torch.full((2,), 0.1), atol=0.02)
    silent = {
        tuple((drop_channels(scene, labels, np.random.default_rng(seed), share=0.5)[0].keypoints.features == 0).all(0).tolist())
        for seed in range(20)
    }
    assert silent == {(a, b) for a in (True, False) for b in (True, False)}
    fewer, _ = drop_cells(scene, labels, np.random.default_rng(0), share=0.2)
    assert 450 < len(fewer.keypoints.xyz) < 510
    before = dict(zip(map(tuple, xyz.tolist()), scene.keypoints.features.tolist(), strict=True))
    kept = zip(map(tuple, fewer.keypoints.xyz.tolist()), fewer.keypoints.features.tolist(), strict=True)
    assert all(before[place] == features for place, features in kept)


@pytest.mark.parametrize("row", [8, 15])
def test_cut_mix_cuts_keypoints_where_it_cuts_cells(row):
    (a, labels_a), (b, labels_b) = random_scene(1, cells=500), random_scene(2, cells=500)
    a, b = (with_keypoints(s, centers_of_cells(s), seed) for seed, s in enumerate((a, b)))
    mixed, _ = cut_mix(a, labels_a, b, labels_b, Fixed(integer=row))
    assert torch.allclose(mixed.keypoints.xyz, centers_of_cells(mixed))
    left = int((a.voxels.coords[:, 2] < row).sum())
    assert torch.equal(mixed.keypoints.features[:left], a.keypoints.features[a.voxels.coords[:, 2] < row])
    assert torch.equal(mixed.keypoints.features[left:], b.keypoints.features[b.voxels.coords[:, 2] >= row])


def test_cut_mix_of_two_crowded_halves_holds_no_more_keypoints_than_the_cut_allows():
    (a, labels_a), (b, labels_b) = random_scene(1, cells=500), random_scene(2, cells=500)
    spec = replace(KEYPOINT_SPEC, keypoints=replace(KEYPOINT_SPEC.keypoints, count=100))
    a, b = (replace(with_keypoints(s, centers_of_cells(s), seed), spec=spec) for seed, s in enumerate((a, b)))
    mixed, _ = cut_mix(a, labels_a, b, labels_b, np.random.default_rng(0))
    assert len(mixed.keypoints.xyz) == 100
    assert len(mixed.keypoints.xyz.unique(dim=0)) == 100


@pytest.mark.parametrize("change", [*MOVES, add_noise, drop_channels, drop_cells])
@pytest.mark.parametrize("count", [0, 1])
def test_scenes_with_hardly_any_keypoint_are_legal(change, count):
    scene = with_keypoints(empty_scene()[0], torch.tensor([[12.0, 0, 0]])[:count])
    before = scene.keypoints.xyz.clone(), scene.keypoints.features.clone()
    for seed in range(3):
        changed, _ = change(scene, Labels.empty(), np.random.default_rng(seed))
        assert len(changed.keypoints.xyz) <= count
        assert torch.isfinite(changed.keypoints.features).all()
        mixed, _ = cut_mix(scene, Labels.empty(), scene, Labels.empty(), np.random.default_rng(seed))
        assert len(mixed.keypoints.xyz) == count  # each keypoint is on one side of the line
    assert torch.equal(scene.keypoints.xyz, before[0])
    assert torch.equal(scene.keypoints.features, before[1])
