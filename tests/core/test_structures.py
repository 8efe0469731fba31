"""The values that flow: what they convert and refuse, what collation keeps, and what their messages and `repr` say."""

import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch

from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid, cell_centers, cells_of_centers
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels
from upcycle3d.core.frame import Calibration, Frame, labels_of
from upcycle3d.core.point_files import write_bin
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.core.structures import Boxes3D, Labels, LossTerms, PointCloud, Predictions

GRID = VoxelGrid(range=(0.0, -2.0, -1.0, 4.0, 2.0, 3.0), voxel_size=(0.5, 0.5, 0.5))
SPEC = CutSpec(layer="cut", channels=3, stride=(4, 2, 2), shape=(2, 4, 4), grid=GRID)


def scene(**changes) -> SmashedScene:
    values = {
        "spec": SPEC,
        "coords": torch.tensor([[0, 0, 1], [0, 3, 0], [1, 0, 0]], dtype=torch.int32),
        "features": torch.ones(3, 3),
        "codec": "fp16",
        "encoder_fingerprint": "ab" * 32,
        "scene_id": "0" * 32,
    }
    return SmashedScene(**{**values, **changes})


def features(cells: int, batch_size: int = 1, seed: int = 0) -> CutFeatures:
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(32, generator=generator)[:cells]
    coords = torch.stack([index * 0, index // 16, index // 4 % 4, index % 4], 1).int()
    voxels = SparseVoxels(
        features=torch.randn(cells, 3, generator=generator), coords=coords, shape=SPEC.shape, batch_size=batch_size
    )
    return CutFeatures(voxels=voxels, spec=SPEC)


# ---- smashed scenes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"features": torch.ones(3, 2)}, r"must be \(M, 3\) float, found \(3, 2\)"),
        ({"features": torch.ones(3, 3, dtype=torch.int64)}, "float, found .* int64"),
        ({"features": torch.ones(2, 3)}, "coords must be"),
        ({"coords": torch.rand(3, 3)}, "raw points cannot be stored"),
        ({"coords": torch.zeros(3, 4, dtype=torch.int32)}, "raw points cannot be stored"),
        ({"coords": torch.tensor([[0, 0, 1], [0, 3, 0], [2, 0, 0]], dtype=torch.int32)}, "leave the grid"),
        ({"coords": torch.tensor([[0, 0, -1], [0, 3, 0], [1, 0, 0]], dtype=torch.int32)}, "leave the grid"),
        ({"coords": torch.tensor([[0, 3, 0], [0, 0, 1], [1, 0, 0]], dtype=torch.int32)}, "unique and ascending"),
        ({"coords": torch.tensor([[0, 0, 1], [0, 0, 1], [1, 0, 0]], dtype=torch.int32)}, "unique and ascending"),
        ({"features": torch.tensor([[0, 0, 0], [0, float("nan"), 0], [0, 0, 0]])}, "NaN or inf"),
        ({"features": torch.full((3, 3), float("inf"))}, "NaN or inf"),
    ],
)
def test_a_smashed_scene_refuses_what_no_encoder_makes(changes, message):
    with pytest.raises(InvalidInput, match=message):
        scene(**changes)


def test_an_empty_smashed_scene_is_legal_and_has_no_place_for_time_or_pose():
    empty = scene(coords=torch.zeros(0, 3, dtype=torch.int32), features=torch.zeros(0, 3))
    assert len(empty.features) == 0
    assert len(empty.keypoint_cells) == len(empty.keypoint_features) == 0
    assert set(SmashedScene.__dataclass_fields__) == {
        "spec", "coords", "features", "keypoint_cells", "keypoint_features", "codec", "encoder_fingerprint", "scene_id",
        "schema_version",
    }  # fmt: skip


KEYPOINT_SPEC = replace(SPEC, keypoints=KeypointSpec(count=3, channels=2))
CELLS = torch.tensor([[7, 7, 7], [0, 0, 0], [0, 7, 1]], dtype=torch.int32)  # of the input grid, not of the cut; in any order


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"keypoint_cells": cell_centers(CELLS, GRID)}, r"keypoint_cells must be \(3, 3\) int32.*raw points cannot be stored"),
        ({"keypoint_cells": CELLS.long()}, "keypoint_cells must be"),
        ({"keypoint_cells": CELLS[:2]}, "keypoint_cells must be"),
        ({"keypoint_cells": CELLS + 1}, r"keypoint_cells leave the grid \(8, 8, 8\)"),
        ({"keypoint_cells": CELLS - 1}, "keypoint_cells leave the grid"),
        ({"keypoint_cells": CELLS[[0, 1, 0]]}, "keypoint_cells must be unique"),
        ({"keypoint_features": torch.ones(3, 3)}, r"keypoint_features must be \(M, 2\) float"),
        ({"keypoint_features": torch.ones(3, 2, dtype=torch.int32)}, "keypoint_features must be"),
        ({"keypoint_features": torch.full((3, 2), float("nan"))}, "keypoint_features hold NaN or inf"),
        ({"spec": replace(SPEC, keypoints=KeypointSpec(count=2, channels=2))}, "allows 2 keypoints per scene, found 3"),
        ({"spec": SPEC}, "keypoint_features must be"),
        ({"spec": SPEC, "keypoint_features": torch.ones(3, 0)}, "allows 0 keypoints per scene, found 3"),
        (
            {"spec": replace(SPEC, keypoints=KeypointSpec(count=3, channels=2, source="raw_points"))},
            "raw points of the scan; a smashed scene holds none.*voxel_centers",
        ),
    ],
)
def test_a_smashed_scene_refuses_keypoints_that_are_no_cells_of_the_input_grid(changes, message):
    good = {"spec": KEYPOINT_SPEC, "keypoint_cells": CELLS, "keypoint_features": torch.ones(3, 2)}
    assert torch.equal(scene(**good).keypoint_cells, CELLS)
    with pytest.raises(InvalidInput, match=message):
        scene(**good | changes)


# ---- keypoints


def test_cells_and_their_centers_are_inverse_and_a_raw_point_has_no_cell():
    centers = cell_centers(CELLS, GRID)
    assert centers.tolist() == [[3.75, 1.75, 2.75], [0.25, -1.75, -0.75], [0.75, 1.75, -0.75]]
    assert cell_centers(torch.tensor([[0, 0, 1]]), GRID, stride=2).tolist() == [[1.5, -1.5, -0.5]]
    assert torch.equal(cells_of_centers(centers, GRID), CELLS)
    assert cells_of_centers(centers[:0], GRID).shape == (0, 3)
    for raw in (centers + 0.002, torch.full((1, 3), float("nan"))):
        with pytest.raises(InvalidInput, match="only voxel centers leave a vehicle"):
            cells_of_centers(raw, GRID)
    fine = VoxelGrid(range=(-75.2, -75.2, -2.0, 75.2, 75.2, 4.0), voxel_size=(0.1, 0.1, 0.15))
    ends = torch.tensor([[0, 0, 0], [39, 1503, 1503], [17, 1, 1502]], dtype=torch.int32)
    assert torch.equal(cells_of_centers(cell_centers(ends, fine), fine), ends)


def test_keypoints_of_a_batch_keep_their_scenes_and_order():
    def some(k: int) -> CutFeatures:
        keypoints = Keypoints(xyz=torch.rand(k, 3), features=torch.rand(k, 2), starts=(0, k))
        return CutFeatures(voxels=features(2).voxels, spec=KEYPOINT_SPEC, keypoints=keypoints)

    scenes = [some(3), some(0), some(1), some(0)]
    batch = CutFeatures.collate([CutFeatures.collate(scenes[:2]), CutFeatures.collate(scenes[2:])])
    assert batch.keypoints.starts == (0, 3, 3, 4, 4)
    for index, alone in enumerate(scenes):
        assert torch.equal(batch.scene(index).keypoints.xyz, alone.keypoints.xyz)
        assert torch.equal(batch.scene(index).keypoints.features, alone.keypoints.features)
    chosen = scenes[0].keypoints.select(torch.tensor([2, 0]))
    assert torch.equal(chosen.xyz, scenes[0].keypoints.xyz[[2, 0]])
    with pytest.raises(InvalidInput, match="one scene at a time"):
        batch.keypoints.select(torch.tensor([0]))
    for bad in ((0,), (1, 4), (0, 3), (0, 5, 4)):
        with pytest.raises(InvalidInput, match="starts must rise"):
            replace(batch.keypoints, starts=bad)
    with pytest.raises(InvalidInput, match="the features have none"):
        replace(batch, keypoints=None)
    with pytest.raises(InvalidInput, match="keypoints do not fit"):
        replace(scenes[0], keypoints=batch.keypoints)


# ---- points and boxes from outside

ROWS = [[1.5, -2.0, 0.5, 0.25, 7.0], [10.0, 20.0, -1.75, 1.0, 8.0], [-3.0, 4.0, 0.0, 0.0, 9.0]]
ROAD_USERS = [[10.0, -2, 0.8, 4.2, 1.8, 1.6, 0.1], [5.0, 3, 0.9, 0.8, 0.6, 1.7, 9.0]]


@pytest.mark.parametrize("table", [ROWS, np.array(ROWS), np.array(ROWS, np.float32), torch.tensor(ROWS, dtype=torch.float64)])
def test_a_scan_of_an_array_takes_its_columns_in_any_order(table):
    cloud = PointCloud.from_array(table, columns=("x", "y", "z", "intensity", "_"))
    assert cloud.xyz.dtype == cloud.features.dtype == torch.float32
    assert cloud.xyz.tolist() == [row[:3] for row in ROWS]
    assert cloud.features.tolist() == [[row[3]] for row in ROWS]
    turned = PointCloud.from_array(table, columns=("y", "x", "z", "intensity", "ring"))
    assert turned.xyz.tolist() == [[row[1], row[0], row[2]] for row in ROWS]
    assert turned.feature_names == ("intensity", "ring")


def test_a_scan_does_not_change_with_the_array_it_came_from():
    rows = np.array(ROWS, np.float32)[:, :4]
    by_columns, by_fields = PointCloud.from_array(rows), PointCloud(xyz=rows[:, :3], features=rows[:, 3:])
    rows[:] = 0
    assert by_columns.xyz.tolist() == by_fields.xyz.tolist() == [row[:3] for row in ROWS]


def test_points_that_are_not_finite_are_counted_or_left_out():
    rows = np.array(ROWS)[:, :4]
    rows[0, 3], rows[2, 1] = np.nan, np.inf
    with pytest.raises(InvalidInput, match=r"2 of 3 points hold NaN or inf; .* drop_non_finite"):
        PointCloud.from_array(rows)
    assert PointCloud.from_array(rows, drop_non_finite=True).xyz.tolist() == [[10.0, 20.0, -1.75]]


@pytest.mark.parametrize(
    ("table", "columns", "message"),
    [
        (ROWS, ("x", "y", "z"), r"\(N, 3\) for the columns"),
        (ROWS, ("x", "y", "a", "b", "_"), "the columns must hold x, y and z"),
        (ROWS, ("x", "y", "z", "y", "_"), "columns must hold each name once, found y more than once"),
        (ROWS, ("x", "y", "z", "ring", "ring"), "columns must hold each name once, found ring more than once"),
        (ROWS, "xyzir", r"columns must be a sequence of names, such as \(\"x\", .* found 'xyzir'"),
        (ROWS, None, "columns must be a sequence of names"),
        (ROWS, (0, 1, 2, 3, 4), "columns must be a sequence of names"),
        ([[1.0, 2, 3], [1.0, 2]], ("x", "y", "z"), "rows of 3 numbers each"),
        ([["a", "b", "c"]], ("x", "y", "z"), "rows of 3 numbers each"),
        (np.array([["a", "b", "c"]]), ("x", "y", "z"), "must be a tensor or numpy array of numbers, found .* <U1 numpy array"),
        (7, ("x", "y", "z"), "found a value of type int"),
    ],
)
def test_what_is_no_scan_is_refused_with_the_type_found(table, columns, message):
    with pytest.raises(InvalidInput, match=message):
        PointCloud.from_array(table, columns)


@pytest.mark.parametrize("names", ["i", ("a", "a")])
def test_names_of_point_features_are_checked_where_a_scan_is_made(names):
    with pytest.raises(InvalidInput, match=r"PointCloud.feature_names must "):
        PointCloud(xyz=torch.zeros(1, 3), features=torch.zeros(1, len(names)), feature_names=names)


@pytest.mark.parametrize(
    ("value", "advice"), [(255.0, "give intensity_scale 1/255"), (-0.5, "no sensor gives -0.5: look at the columns")]
)
def test_intensity_outside_0_to_1_is_kept_with_a_warning_that_says_what_to_do(value, advice):
    rows = [[1.0, 2.0, 0.5, 0.25], [1.0, 2.0, 0.5, value]]
    with pytest.warns(UserWarning, match=rf"intensity reaches {value:g}, expected 0..1; {advice}") as caught:
        cloud = PointCloud.from_array(rows)
    assert caught[0].filename == __file__  # the warning names the line of the caller
    assert cloud.features.tolist() == [[0.25], [value]]


def test_only_intensity_outside_0_to_1_gives_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        PointCloud.from_array([[1.0, 2.0, 0.5, 0.0], [1.0, 2.0, 0.5, 1.0]])
        PointCloud.from_array([[1.0, 2.0, 0.5, 255.0]], columns=("x", "y", "z", "ring"))
        PointCloud.from_array(np.zeros((0, 4)))


def test_a_scan_comes_from_a_file_by_its_name(tmp_path):
    cloud = PointCloud.from_array(np.array(ROWS)[:, :4])
    write_bin(str(tmp_path / "scan.bin"), cloud)
    found = PointCloud.from_file(str(tmp_path / "scan.bin"))
    assert torch.equal(found.xyz, cloud.xyz)
    assert torch.equal(found.features, cloud.features)


@pytest.mark.parametrize("table", [ROAD_USERS, np.array(ROAD_USERS), torch.tensor(ROAD_USERS)])
def test_boxes_of_an_array_are_taken_as_they_are(table):
    boxes = Boxes3D.from_array(table)
    assert torch.equal(boxes.data, torch.tensor(ROAD_USERS))
    assert len(Boxes3D.from_array([])) == 0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0.0, "size .* zero or negative"),
        (-4.2, "size .* zero or negative"),
        (math.nan, "NaN or infinite"),
        (math.inf, "NaN or inf"),
    ],
)
def test_boxes_that_cannot_be_are_refused_with_their_row(value, message):
    table = np.array(ROAD_USERS)
    table[1, 3] = value
    with pytest.raises(InvalidInput, match=f"1 of 2 boxes have a.*{message}.*row 1"):
        Boxes3D.from_array(table)


def test_boxes_of_a_network_are_not_checked():
    wild = torch.full((1, 7), torch.nan, requires_grad=True)
    boxes = Boxes3D(data=wild)
    assert boxes.data is wild


def test_values_refuse_wrong_types_and_say_how_to_make_them():
    box, cloud = torch.tensor(ROAD_USERS), PointCloud.from_array(np.array(ROWS)[:, :4])
    labels = Labels.make(np.array(ROAD_USERS), [0, 1])
    assert torch.equal(labels.boxes.data, box)
    assert labels.classes.tolist() == [0, 1]
    with pytest.raises(
        InvalidInput, match=r"Boxes3D.data must be a tensor or numpy array of numbers, found a value of type list"
    ):
        Boxes3D(data=ROAD_USERS)
    with pytest.raises(InvalidInput, match=r"PointCloud.xyz must be a tensor .* bool"):
        PointCloud(xyz=cloud.xyz > 0, features=cloud.features)
    with pytest.raises(InvalidInput, match=r"Labels.boxes must be Boxes3D, found .*; use Labels.make"):
        replace(labels, boxes=box)
    with pytest.raises(
        InvalidInput, match=r"Labels.exact must be a tensor \(2,\) .* found a value of type list; use Labels.make"
    ):
        replace(labels, exact=[True, True])
    with pytest.raises(InvalidInput, match=r"Frame.points must be a PointCloud, found \(3, 3\) float32; .*from_array"):
        Frame(id="1", points=cloud.xyz)
    with pytest.raises(InvalidInput, match=r"Frame.labels must be Labels or None"):
        Frame(id="1", points=cloud, labels=box)
    with pytest.raises(InvalidInput, match=r"Predictions.boxes must be Boxes3D"):
        replace(Predictions.empty(), boxes=torch.zeros(0, 7))
    with pytest.raises(InvalidInput, match=r"Predictions.scores must be a tensor \(0,\)"):
        replace(Predictions.empty(), scores=torch.zeros(1))
    with pytest.raises(InvalidInput, match=r"Calibration.projection must be a tensor \(3, 4\)"):
        Calibration(lidar_to_camera=torch.eye(4), projection=torch.eye(4), image_size=(2, 2))


# ---- voxels and batches


def test_dense_places_features_by_batch_z_y_x():
    coords = torch.tensor([[0, 1, 2, 3], [1, 0, 3, 1]], dtype=torch.int32)
    voxels = SparseVoxels(features=torch.tensor([[1.0, 2], [3, 4]]), coords=coords, shape=(2, 4, 5), batch_size=3)
    dense = voxels.dense()
    assert dense.shape == (3, 2, 2, 4, 5)
    assert dense[0, :, 1, 2, 3].tolist() == [1, 2]
    assert dense[1, :, 0, 3, 1].tolist() == [3, 4]
    assert dense.count_nonzero() == 4


def test_dense_passes_the_gradient_to_its_voxels():
    sparse = features(5)
    f = sparse.voxels.features.requires_grad_()
    (sparse.voxels.dense() ** 2).sum().backward()
    assert torch.equal(f.grad, 2 * f.detach())


def test_collate_keeps_empty_scenes_and_order():
    scenes = [features(4, seed=1), features(0), features(6, seed=2), features(0)]
    batch = CutFeatures.collate(scenes)
    assert batch.batch_size == 4
    assert batch.voxels.dense().shape[0] == 4
    for index, alone in enumerate(scenes):
        assert torch.equal(batch.scene(index).voxels.features, alone.voxels.features)
        assert torch.equal(batch.scene(index).voxels.coords, alone.voxels.coords)
        assert batch.scene(index).batch_size == 1
    nested = CutFeatures.collate([CutFeatures.collate(scenes[:2]), CutFeatures.collate(scenes[2:])])
    assert torch.equal(nested.voxels.coords, batch.voxels.coords)
    assert nested.batch_size == 4


def test_features_of_another_cut_are_refused():
    other = replace(SPEC, layer="elsewhere")
    with pytest.raises(
        InvalidInput, match=r"different cuts .*; layer: the first has 'cut', number 1 has 'elsewhere'; use one encoder"
    ):
        CutFeatures.collate([features(1), replace(features(1), spec=other)])
    with pytest.raises(InvalidInput, match="do not fit the cut 'cut'"):
        CutFeatures(voxels=replace(features(1).voxels, shape=(2, 4, 5)), spec=SPEC)
    with pytest.raises(InvalidInput, match="at least one"):
        CutFeatures.collate([])


def test_coordinates_of_another_type_are_refused():
    good = features(3).voxels
    with pytest.raises(InvalidInput, match="int32"):
        replace(good, coords=good.coords.long())
    with pytest.raises(InvalidInput, match=r"needs tensors, found .* numpy array"):
        replace(good, features=good.features.numpy())


@pytest.mark.parametrize("size", [(0.3, 0.5, 0.5), (0.5, 0.5, 8.0), (0.0, 0.5, 0.5), (-0.5, 0.5, 0.5)])
def test_a_range_that_is_no_whole_number_of_voxels_is_refused(size):
    with pytest.raises(InvalidInput, match="VoxelGrid"):
        VoxelGrid(range=GRID.range, voxel_size=size)


def test_grid_and_cell_sizes():
    assert GRID.shape == (8, 8, 8)
    assert SPEC.cell_size() == (1.0, 1.0)
    assert VoxelGrid(range=(0.0, -40.0, -3.0, 70.4, 40.0, 1.0), voxel_size=(0.05, 0.05, 0.1)).shape == (40, 1600, 1408)


# ---- labels, predictions, points


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"classes": [0.7]}, r"classes must be whole numbers, not below -1, found 0\.69"),
        ({"classes": torch.tensor([0.5])}, "classes must be whole numbers"),
        ({"classes": np.array([np.nan])}, "classes must be whole numbers"),
        ({"classes": [1e30]}, "classes must be whole numbers"),
        ({"classes": [-2]}, "classes must be whole numbers, not below -1, found -2"),
        ({"classes": ["Car"]}, r"classes must be whole numbers \(int64\), .*\['Car'\]; the number of a class is its position"),
        ({"classes": None}, "classes must be whole numbers .* found None"),
        ({"classes": [True]}, r"classes must be whole numbers .* found \(1,\) bool"),
        ({"num_points": [0.5]}, "num_points must be whole numbers"),
        ({"difficulty": np.array([1.5])}, "difficulty must be whole numbers"),
        ({"weight": [math.nan]}, "weight must be finite numbers, not below 0, found nan"),
        ({"weight": [-1]}, "weight must be finite numbers"),
        ({"box_weight": np.array([np.inf])}, "box_weight must be finite numbers"),
        ({"box_weight": torch.tensor([-1])}, "box_weight must be finite numbers"),
        ({"exact": [0.5]}, r"exact must be True and False \(bool\)"),
        ({"exact": torch.ones(1)}, r"exact must be True and False \(bool\)"),
    ],
)
def test_labels_from_outside_are_refused_where_their_numbers_cannot_be(columns, message):
    with pytest.raises(InvalidInput, match=message):
        Labels.make(np.array(ROAD_USERS[:1]), **{"classes": [0], **columns})


def test_labels_become_columns_of_the_types_that_are_documented():
    labels = Labels.make(
        np.array(ROAD_USERS),
        np.array([1.0, 0.0]),
        num_points=[3, -1],
        difficulty=np.array([2, 200], np.uint8),
        weight=[1, 0],
        exact=[True, False],
        box_weight=torch.tensor([1, 0]),
    )
    found = {
        name: getattr(labels, name).dtype for name in ("classes", "num_points", "difficulty", "weight", "exact", "box_weight")
    }
    assert list(found.values()) == [torch.int64] * 3 + [torch.float32, torch.bool, torch.float32]
    assert labels.difficulty.tolist() == [2, 200]
    assert Labels.make(np.array(ROAD_USERS), [-1, 0]).classes.tolist() == [-1, 0]  # evaluation: a class that is not asked for
    assert len(Labels.make(Boxes3D.empty(), [], weight=[], exact=[])) == 0
    rows = np.array([1, 0])
    labels = Labels.make(np.array(ROAD_USERS), rows)
    rows[:] = 7
    assert labels.classes.tolist() == [1, 0]


def test_tensors_of_the_right_type_are_taken_as_they_are():
    """Labels are made inside training, which must not wait for the GPU, so a look at the values would be wrong here."""
    classes, weight = torch.tensor([0, 1]), torch.tensor([math.nan, 1.0])
    labels = Labels.make(torch.tensor(ROAD_USERS), classes, weight=weight)
    assert labels.classes is classes
    assert labels.weight is weight
    values = Labels.make(
        torch.zeros(2, 7, device="meta"), torch.zeros(2, device="meta", dtype=torch.int32), weight=torch.ones(2).half()
    )
    assert (values.classes.dtype, values.weight.dtype) == (torch.int64, torch.float32)  # no value was read: "meta" has none


@pytest.mark.parametrize(
    ("name", "wrong", "message"),
    [
        ("classes", torch.float32, r"Labels\.classes must hold whole numbers \(int64\), found \(2,\) float32; use Labels\.make"),
        ("num_points", torch.int32, r"Labels\.num_points must hold whole numbers"),
        ("difficulty", torch.float32, r"Labels\.difficulty must hold whole numbers"),
        ("weight", torch.int64, r"Labels\.weight must hold numbers \(float32\)"),
        ("exact", torch.float32, r"Labels\.exact must hold True and False \(bool\)"),
        ("box_weight", torch.int64, r"Labels\.box_weight must hold numbers \(float32\)"),
    ],
)
def test_a_column_of_labels_has_one_type(name, wrong, message):
    with pytest.raises(InvalidInput, match=message):
        replace(Labels.make(np.array(ROAD_USERS), [0, 1]), **{name: torch.ones(2, dtype=wrong)})


def test_columns_of_predictions_have_a_type():
    for name in ("scores", "class_scores", "iou_scores"):
        assert len(replace(Predictions.empty(), **{name: torch.zeros(0).half()})) == 0  # of a network in half precision
        with pytest.raises(InvalidInput, match=rf"Predictions\.{name} must hold numbers of a float type, found \(0,\) int64"):
            replace(Predictions.empty(), **{name: torch.zeros(0, dtype=torch.int64)})
    with pytest.raises(InvalidInput, match=r"Predictions\.classes must hold whole numbers \(int64\), found \(0,\) float32"):
        replace(Predictions.empty(), classes=torch.zeros(0))


def test_labels_keep_their_columns_together():
    labels = Labels.make(torch.arange(21.0).view(3, 7), torch.tensor([2, 0, 1]), weight=torch.tensor([1.0, 0, 1]), exact=False)
    chosen = labels.select(torch.tensor([2, 0]))
    assert chosen.classes.tolist() == [1, 2]
    assert chosen.boxes.data[:, 0].tolist() == [14, 0]
    assert chosen.num_points.tolist() == chosen.difficulty.tolist() == [-1, -1]
    both = Labels.concatenate([chosen, Labels.empty(complete=False)])
    assert len(both) == 2
    assert not both.complete
    assert Labels.concatenate([chosen, Labels.empty()]).complete
    with pytest.raises(InvalidInput, match=r"Labels.weight must be a tensor \(3,\)"):
        replace(labels, weight=torch.ones(2))


def test_values_check_their_shapes():
    with pytest.raises(InvalidInput, match=r"\(N, 7\), found \(2, 6\)"):
        Boxes3D(data=torch.zeros(2, 6))
    with pytest.raises(InvalidInput, match=r"\(N, 3\)"):
        PointCloud(xyz=torch.zeros(2, 4), features=torch.zeros(2, 1))
    with pytest.raises(InvalidInput, match=r"\(2, 1\) for the names"):
        PointCloud(xyz=torch.zeros(2, 3), features=torch.zeros(3, 1))
    with pytest.raises(InvalidInput, match="the same features"):
        PointCloud.concatenate(
            [PointCloud(xyz=torch.zeros(1, 3), features=torch.zeros(1, n), feature_names=tuple("ab"[:n])) for n in (1, 2)]
        )
    assert len(Predictions.empty()) == 0


def test_repr_shows_shapes_and_never_numbers():
    text = repr(scene())
    assert "coords=(3, 3) int32" in text
    assert "features=(3, 3) float32" in text
    assert "tensor(" not in text
    assert "data=(2, 7) float32" in repr(Labels.make(torch.zeros(2, 7), torch.zeros(2)))


def test_moving_a_value_moves_what_is_inside():
    labels = Labels.make(torch.zeros(2, 7), torch.zeros(2)).to("meta")
    assert labels.boxes.data.device.type == labels.weight.device.type == "meta"
    assert features(3).to("meta").voxels.coords.device.type == "meta"


def test_labels_stay_beside_their_scans_or_are_refused():
    points = PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1))
    frames = [Frame(id=str(i), points=points, labels=Labels.make(torch.zeros(i, 7), torch.zeros(i))) for i in range(3)]
    assert [len(found) for found in labels_of(frames)] == [0, 1, 2]
    assert labels_of([]) == []
    with pytest.raises(InvalidInput, match=r"2 of 3 frames have no labels \(0, 1\)"):
        labels_of([replace(frames[0], labels=None), replace(frames[1], labels=None), frames[2]])


# ---- losses


def test_loss_terms_add_up_and_name_the_first_that_is_not_finite():
    terms = LossTerms(terms={"class": torch.tensor(1.0), "box": torch.tensor(2.0)})
    assert terms.total() == 3
    assert terms.floats() == {"class": 1.0, "box": 2.0}
    assert terms.first_non_finite() is None
    bad = terms.merged(LossTerms(terms={"iou": torch.tensor(float("nan")), "corner": torch.tensor(float("inf"))}))
    assert bad.first_non_finite() == "iou"
    with pytest.raises(InvalidInput, match=r"share a name: \['box'\]"):
        terms.merged(LossTerms(terms={"box": torch.tensor(0.0)}))
