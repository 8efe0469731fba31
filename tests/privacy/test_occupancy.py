"""The occupancy attack: it learns tiny scenes by heart. Oracles: the scans themselves, and code lengths counted by hand."""

import math
from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import CutFeatures
from upcycle3d.core.frame import Frame
from upcycle3d.perception.privacy.attacks.coordinates import occupied_voxels, voxel_centers
from upcycle3d.perception.privacy.attacks.occupancy import RECALL_WEIGHTS, OccupancyAttack, OccupancyConfig, focal_loss
from upcycle3d.perception.privacy.attacks.occupancy_decoder import DecoderSize
from upcycle3d.perception.privacy.attacks.occupancy_tree import OccupancyTree, children_of, row_of
from upcycle3d.perception.privacy.frames import AuditFrame, audit_frames

pytestmark = pytest.mark.usefixtures("one_thread")

SIZE = DecoderSize(bev_channels=16, bev_blocks=1, node_channels=16, node_blocks=1, keypoint_channels=8, frequencies=4)
CONFIG = OccupancyConfig(size=SIZE, steps=60, lr=0.01, calibration_share=0.0, focal_gamma=0.0)


def wall(x: float) -> Frame:
    """A wall across the road, 3 m wide and 0.8 m high, with a point in the middle of each of its 240 voxels."""
    y, z = torch.meshgrid(torch.arange(-1.45, 1.5, 0.1), torch.arange(0.05, 0.8, 0.1), indexing="ij")
    return Frame(id=f"wall at {x} m", points=tiny.cloud(torch.stack([torch.full_like(y, x), y, z], -1).view(-1, 3)))


def walls() -> list[AuditFrame]:
    """Two scenes that differ in where the wall is."""
    return audit_frames([wall(4.05), wall(8.85)], tiny.second_iou().eval().encoder, "fp16")


def pv_rcnn_frames(count: int = 2) -> list[AuditFrame]:
    return audit_frames([tiny.frame_with_car(k) for k in range(count)], tiny.pv_rcnn().eval().encoder, "fp16")


def without_cells(upload: CutFeatures) -> CutFeatures:
    return replace(upload, voxels=replace(upload.voxels, features=upload.voxels.features[:0], coords=upload.voxels.coords[:0]))


@pytest.fixture(scope="module")
def learned() -> tuple[OccupancyAttack, list[AuditFrame]]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    frames, attack = walls(), OccupancyAttack(CONFIG)
    attack.train(frames)
    torch.set_num_threads(before)
    return attack, frames


# ---- the tree


def test_the_tree_of_a_cut_ends_at_voxels():
    spec = tiny.second_iou().encoder.spec
    tree = OccupancyTree.of(spec)
    assert tree.levels == 3
    assert tree.shape(0) == spec.grid.shape
    assert tree.shape(3) == (5, *spec.shape[1:])


def test_truth_lists_the_ancestors_of_occupied_voxels():
    tree = OccupancyTree(grid=tiny.CUT_GRID, levels=2)
    truth = tree.truth(torch.tensor([[0, 0, 0, 0], [0, 7, 31, 30], [1, 0, 1, 1]], dtype=torch.int32))
    assert [len(keys) for keys in truth] == [3, 3, 3]
    top = torch.tensor([[0, 0, 0, 0], [0, 1, 7, 7], [1, 0, 0, 0]])
    assert truth[2].tolist() == tree.keys(top, 2).tolist()


def test_children_of_a_node_cover_it():
    children = children_of(torch.tensor([[1, 2, 3, 4]], dtype=torch.int32))[0]
    assert len({tuple(c) for c in children.tolist()}) == 8
    assert torch.equal(children[:, 1:] >> 1, torch.tensor([[2, 3, 4]] * 8, dtype=torch.int32))
    assert children[:, 0].tolist() == [1] * 8


def test_looking_up_keys():
    assert row_of(torch.tensor([2, 5, 9]), torch.tensor([5, 1, 9, 10])).tolist() == [1, -1, 2, -1]
    assert row_of(torch.empty(0, dtype=torch.int64), torch.tensor([5])).tolist() == [-1]


# ---- the attack


def test_two_scenes_are_learned_by_heart(learned):
    attack, frames = learned
    for frame in frames:
        truth = voxel_centers(frame.scan, frame.upload.spec.grid)
        rebuilt = attack.rebuild(frame.upload)
        best = rebuilt.xyz[rebuilt.score > 0.5]
        found = torch.cdist(truth.xyz, best).min(1).values < 0.1
        right = torch.cdist(best, truth.xyz).min(1).values < 0.1
        assert found.float().mean() > 0.8
        assert right.float().mean() > 0.8


def test_what_is_learned_costs_few_bits(learned):
    attack, frames = learned
    fresh = OccupancyAttack(replace(CONFIG, steps=1))
    fresh.train(frames)
    known, unknown = (a.code_length(frames[0].upload, frames[0].scan) for a in (attack, fresh))
    assert known < 3.0
    assert known < 0.4 * unknown


def test_a_certain_and_right_prediction_costs_no_bits(learned):
    _, frames = learned
    sharp = OccupancyAttack(replace(CONFIG, steps=1))
    sharp.train(frames)
    # Every logit of an empty scan says no, a thousand times over.
    sharp.decoder.calibration = torch.tensor([[0.0, -1000.0]]).repeat(2, 4, 1)
    assert sharp.code_length(frames[0].upload, tiny.NO_POINTS) == 0.0
    # At even odds every candidate costs one bit, whatever the truth: all roots, and eight children for each occupied node above voxels.
    sharp.decoder.calibration = torch.zeros(2, 4, 2)
    tree, scan, grid = sharp.decoder.tree, frames[0].scan, frames[0].upload.spec.grid
    voxels = torch.nn.functional.pad(occupied_voxels(scan, grid), (1, 0))
    nodes = [len(level) for level in tree.truth(voxels)]
    candidates = len(tree.roots(1)) + 8 * sum(nodes[1:])
    assert sharp.code_length(frames[0].upload, scan) == pytest.approx(candidates / nodes[0])


def test_the_recall_weight_is_chosen_or_given(learned):
    attack, frames = learned
    given = OccupancyAttack(replace(CONFIG, steps=1, recall_weight=0.3))
    given.train(frames)
    assert given.recall_weight == 0.3
    assert attack.recall_weight in RECALL_WEIGHTS


def test_the_same_seed_gives_the_same_scan():
    frames, config = walls(), replace(CONFIG, steps=4)
    scans = []
    for seed in (0, 0, 1):
        attack = OccupancyAttack(replace(config, seed=seed))
        attack.train(frames)
        scans.append(attack.code_length(frames[0].upload, frames[0].scan))
    assert scans[0] == scans[1] != scans[2]


def test_training_leaves_the_global_generator_alone():
    frames = walls()
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    OccupancyAttack(replace(CONFIG, steps=1)).train(frames)
    assert torch.equal(torch.rand(1), expected)


def test_an_upload_without_cells_is_attacked_too(learned):
    attack, frames = learned
    rebuilt = attack.rebuild(without_cells(frames[0].upload))
    assert bool(torch.isfinite(rebuilt.xyz).all())
    assert math.isfinite(attack.code_length(without_cells(frames[0].upload), frames[0].scan))


def test_an_attacker_that_only_has_empty_uploads_learns_the_typical_scan():
    frames = [replace(f, upload=without_cells(f.upload)) for f in walls()]
    attack = OccupancyAttack(replace(CONFIG, steps=60))
    attack.train(frames)
    assert attack.losses[-1] < 0.7 * attack.losses[0]
    assert attack.code_length(frames[0].upload, frames[0].scan) == attack.code_length(frames[1].upload, frames[0].scan)


@pytest.mark.parametrize("sees", ["coordinates", "nothing"])
def test_what_is_not_shown_changes_nothing(sees):
    frames = pv_rcnn_frames()
    attack = OccupancyAttack(replace(CONFIG, steps=3, sees=sees))
    attack.train(frames)
    upload = frames[0].upload
    other = replace(upload, voxels=replace(upload.voxels, features=upload.voxels.features + 1.0))
    assert upload.keypoints is not None
    other = replace(other, keypoints=replace(upload.keypoints, features=upload.keypoints.features + 1.0))
    scan = frames[0].scan
    assert attack.code_length(upload, scan) == attack.code_length(other, scan)
    moved = attack.code_length(frames[1].upload, scan)
    assert (moved == attack.code_length(upload, scan)) == (sees == "nothing")


def test_other_numbers_of_channels_and_keypoints():
    wide = audit_frames([tiny.frame_with_car(0)], tiny.second_iou(tiny.second_iou_config(width=24)).eval().encoder, "int8")
    for frames in (wide, pv_rcnn_frames(1)):
        attack = OccupancyAttack(replace(CONFIG, steps=2))
        attack.train(frames)
        assert math.isfinite(attack.code_length(frames[0].upload, frames[0].scan))
    with pytest.raises(InvalidInput, match="another cut"):
        attack.rebuild(wide[0].upload)


def test_features_of_keypoints_are_read():
    frames = pv_rcnn_frames()
    attack = OccupancyAttack(replace(CONFIG, steps=3))
    attack.train(frames)
    upload = frames[0].upload
    assert upload.keypoints is not None
    other = replace(upload, keypoints=replace(upload.keypoints, features=upload.keypoints.features.flip(0)))
    assert attack.code_length(upload, frames[0].scan) != attack.code_length(other, frames[0].scan)


def test_a_cut_at_full_resolution_has_no_levels_below():
    tree = OccupancyTree.of(tiny.CUT)
    assert tree.levels == 0
    assert tree.shape(0) == tiny.CUT_GRID.shape


def test_unusable_input_is_refused():
    with pytest.raises(InvalidInput, match="at least one frame"):
        OccupancyAttack().train([])
    with pytest.raises(InvalidInput, match="not trained"):
        OccupancyAttack().rebuild(walls()[0].upload)
    with pytest.raises(InvalidInput, match="keep"):
        OccupancyConfig(keep=0.0)


def test_focal_loss_is_cross_entropy_without_gamma():
    logit, target = torch.tensor([2.0, -1.0]), torch.tensor([1.0, 1.0])
    expected = torch.tensor([math.log(1 + math.exp(-2)), math.log(1 + math.exp(1))])
    assert torch.allclose(focal_loss(logit, target, 0.0), expected)
    p = torch.sigmoid(logit)
    assert torch.allclose(focal_loss(logit, target, 2.0), expected * (1 - p) ** 2)
