"""The values that flow: what they refuse, what collation keeps, and what their messages and repr tell."""

from dataclasses import replace

import pytest
import torch

from upcycle3d.core.cut import CutSpec, KeypointSpec, VoxelGrid, cell_centers, cells_of_centers
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures, Keypoints, SparseVoxels
from upcycle3d.core.smashed_scene import SmashedScene
from upcycle3d.core.structures import Boxes3D, Frame, Labels, LossTerms, PointCloud, Predictions, labels_of

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
        ({"spec": replace(SPEC, keypoints=KeypointSpec(count=2, channels=2))}, "allows 2 keypoints a scene, found 3"),
        ({"spec": SPEC}, "keypoint_features must be"),
        ({"spec": SPEC, "keypoint_features": torch.ones(3, 0)}, "allows 0 keypoints a scene, found 3"),
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
        with pytest.raises(InvalidInput, match="only voxel centres leave a vehicle"):
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
    with pytest.raises(InvalidInput, match="the features have None"):
        replace(batch, keypoints=None)
    with pytest.raises(InvalidInput, match="keypoints do not fit"):
        replace(scenes[0], keypoints=batch.keypoints)


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
    split = features(5)
    f = split.voxels.features.requires_grad_()
    (split.voxels.dense() ** 2).sum().backward()
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
    with pytest.raises(InvalidInput, match="different cuts"):
        CutFeatures.collate([features(1), replace(features(1), spec=other)])
    with pytest.raises(InvalidInput, match="do not fit the cut 'cut'"):
        CutFeatures(voxels=replace(features(1).voxels, shape=(2, 4, 5)), spec=SPEC)
    with pytest.raises(InvalidInput, match="at least one"):
        CutFeatures.collate([])


def test_coordinates_out_of_range_are_named():
    good = features(3).voxels
    assert good.check_range() is good
    for bad in ([0, 2, 0, 0], [1, 0, 0, 0], [0, 0, -1, 0]):
        voxels = replace(good, coords=torch.tensor([bad] * 3, dtype=torch.int32))
        with pytest.raises(InvalidInput, match="out of range"):
            voxels.check_range()
    with pytest.raises(InvalidInput, match="int32"):
        replace(good, coords=good.coords.long())


@pytest.mark.parametrize("size", [(0.3, 0.5, 0.5), (0.5, 0.5, 8.0), (0.0, 0.5, 0.5), (-0.5, 0.5, 0.5)])
def test_a_range_that_is_no_whole_number_of_voxels_is_refused(size):
    with pytest.raises(InvalidInput, match="VoxelGrid"):
        VoxelGrid(range=GRID.range, voxel_size=size)


def test_grid_and_cell_sizes():
    assert GRID.shape == (8, 8, 8)
    assert SPEC.cell_size() == (1.0, 1.0)
    assert VoxelGrid(range=(0.0, -40.0, -3.0, 70.4, 40.0, 1.0), voxel_size=(0.05, 0.05, 0.1)).shape == (40, 1600, 1408)


# ---- labels, predictions, points


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
    with pytest.raises(InvalidInput, match=r"Labels.weight must be \(3,\)"):
        replace(labels, weight=torch.ones(2))


def test_values_check_their_shapes():
    with pytest.raises(InvalidInput, match=r"\(N, 7\), found \(2, 6\)"):
        Boxes3D(data=torch.zeros(2, 6))
    with pytest.raises(InvalidInput, match=r"\(N, 3\)"):
        PointCloud(xyz=torch.zeros(2, 4), features=torch.zeros(2, 1))
    with pytest.raises(InvalidInput, match=r"\(2, 1\) for the names"):
        PointCloud(xyz=torch.zeros(2, 3), features=torch.zeros(3, 1))
    with pytest.raises(InvalidInput, match="different features"):
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


def test_loss_terms_add_scale_and_name_the_first_that_is_not_finite():
    terms = LossTerms(terms={"class": torch.tensor(1.0), "box": torch.tensor(2.0)})
    assert terms.total() == 3
    assert terms.scaled(0.5, "unlabeled_").floats() == {"unlabeled_class": 0.5, "unlabeled_box": 1.0}
    assert terms.first_non_finite() is None
    bad = terms.merged(LossTerms(terms={"iou": torch.tensor(float("nan")), "corner": torch.tensor(float("inf"))}))
    assert bad.first_non_finite() == "iou"
    with pytest.raises(InvalidInput, match=r"share a name: \['box'\]"):
        terms.merged(LossTerms(terms={"box": torch.tensor(0.0)}))
