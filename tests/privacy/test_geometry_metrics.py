"""Scores of rebuilt scans, against brute-force distances and hand-made scenes whose scores can be read off."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle3d.core.boxes import rotate_z
from upcycle3d.core.cut import VoxelGrid
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.perception.privacy.frames import Rebuilt
from upcycle3d.perception.privacy.geometry_metrics import (
    MATCHED,
    FScores,
    GeometryScores,
    OperatingPoint,
    choose_best,
    score_all,
    score_rebuilt,
)
from upcycle3d.perception.privacy.leak_share import leak_share
from upcycle3d.perception.privacy.mean_score import MeanScore
from upcycle3d.perception.privacy.true_scan import RegionRules, RoadHeight, TrueScan

GRID = VoxelGrid(range=(0.0, -8.0, -1.0, 16.0, 8.0, 3.0), voxel_size=(0.1, 0.1, 0.1))
EVERYTHING = OperatingPoint(threshold=-1.0)
RULES = RegionRules(classes=("Car", "Pedestrian"))


def cloud(xyz: torch.Tensor) -> PointCloud:
    return PointCloud(xyz=xyz, features=torch.zeros(len(xyz), 1))


def truth_of(xyz: torch.Tensor, labels: Labels | None = None, rules: RegionRules = RULES) -> TrueScan:
    return TrueScan(cloud(xyz), labels, GRID, rules)


def rebuilt_of(xyz: torch.Tensor, score: torch.Tensor | None = None) -> Rebuilt:
    return Rebuilt(xyz=xyz, score=torch.ones(len(xyz)) if score is None else score)


def road(step: float = 0.4) -> torch.Tensor:
    x, y = torch.meshgrid(torch.arange(0.2, 15.8, step), torch.arange(-7.8, 7.8, step), indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), torch.zeros(x.numel())], 1)


def one(score: MeanScore) -> float:
    assert score.frames == 1
    return score.total


def f_by_hand(rebuilt: np.ndarray, true: np.ndarray, here: np.ndarray, there: np.ndarray, t: float) -> float:
    """F of a region from the full table of distances."""
    table = np.sqrt(((rebuilt[:, None].astype(float) - true[None].astype(float)) ** 2).sum(2))
    precision = (table.min(1) <= t)[here].mean() if here.any() else 0.0
    recall = (table.min(0) <= t)[there].mean()
    return 0.0 if precision + recall == 0 else 2 * precision * recall / (precision + recall)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(seed=st.integers(0, 10_000), n=st.integers(1, 60), m=st.integers(1, 60))
def test_distances_and_scores_equal_the_full_table(seed: int, n: int, m: int):
    generator = torch.Generator().manual_seed(seed)
    near = torch.tensor([1.0, 1.0, 1.0])
    true, guess = (torch.rand(k, 3, generator=generator) * near + torch.tensor([5.0, 0.0, 0.0]) for k in (n, m))
    scores = score_rebuilt(rebuilt_of(guess), truth_of(true), EVERYTHING)
    a, b = guess.numpy(), true.numpy()
    table = np.sqrt(((a[:, None].astype(float) - b[None].astype(float)) ** 2).sum(2))
    assert one(scores.chamfer) == pytest.approx((table.min(1).mean() + table.min(0).mean()) / 2)
    assert one(scores.hausdorff) == pytest.approx(max(table.min(1).max(), table.min(0).max()))
    everything = np.ones(m, bool), np.ones(n, bool)
    for found, t in zip((scores.scene.f_10cm, scores.scene.f_20cm, scores.scene.f_50cm), (0.1, 0.2, 0.5), strict=True):
        assert one(found) == pytest.approx(f_by_hand(a, b, *everything, t))
    cells_a, cells_b = ({tuple(c) for c in np.floor((p - np.float32([0, -8, -1])) / np.float32(0.1)).astype(int)} for p in (a, b))
    assert one(scores.iou) == pytest.approx(len(cells_a & cells_b) / len(cells_a | cells_b))
    assert one(scores.points_per_voxel) == pytest.approx(m / len(cells_b))


def test_the_scan_itself_scores_one_everywhere():
    box = torch.tensor([[8.0, 1.0, 0.8, 4.0, 2.0, 1.6, 0.7], [3.0, -3.0, 0.9, 0.8, 0.8, 1.8, 0.0]])
    body = (torch.rand(300, 3, generator=torch.Generator().manual_seed(0)) - 0.5) * box[0, 3:6]
    car = rotate_z(body, box[0, 6]) + box[0, :3]
    wall = torch.stack([torch.full((50,), 12.0), torch.linspace(-6, 6, 50), torch.linspace(0.8, 2.5, 50)], 1)
    scan = torch.cat([road(), car, wall, box[1:, :3] + torch.rand(20, 3) * 0.3])
    truth = truth_of(scan, Labels.make(box, [0, 1]))
    scores = score_rebuilt(rebuilt_of(scan), truth, EVERYTHING)
    for region in (scores.scene, scores.background, scores.background_above_road, *(c.scores for c in scores.objects)):
        assert [one(s) for s in (region.f_10cm, region.f_20cm, region.f_50cm, region.precision_20cm, region.recall_20cm)] == [
            1
        ] * 5
    assert (one(scores.chamfer), one(scores.hausdorff), one(scores.iou)) == (0, 0, 1)
    assert one(scores.voxels.f_10cm) == 1  # no point of a 0.1 m voxel is further than 0.087 m from its center


def test_the_centers_of_the_true_voxels_are_the_upper_bound_at_matched_density():
    scan = torch.rand(500, 3, generator=torch.Generator().manual_seed(1)) * torch.tensor([3.0, 3.0, 1.0]) + 1
    scores = score_rebuilt(rebuilt_of(torch.from_numpy(truth_of(scan).voxels).float()), truth_of(scan))
    assert [one(s) for s in (scores.iou, scores.points_per_voxel, scores.scene.f_10cm, scores.voxels.f_10cm)] == [1, 1, 1, 1]
    assert 0.04 < one(scores.chamfer) < 0.055  # the mean distance from a point of a 0.1 m cube to its center is 0.048 m


def test_a_shifted_scan_scores_by_its_shift():
    scan = road(step=1.5)
    scores = score_rebuilt(rebuilt_of(scan + torch.tensor([0.0, 0.0, 0.3])), truth_of(scan), EVERYTHING)
    assert one(scores.chamfer) == pytest.approx(0.3) == one(scores.hausdorff)
    assert [one(s) for s in (scores.scene.f_10cm, scores.scene.f_20cm, scores.scene.f_50cm)] == [0, 0, 1]


def test_half_of_the_points_and_as_many_false_ones():
    """Precision 1/2 and recall 1/2 give F = 1/2 at every distance."""
    scan = road(step=1.5)
    scan = scan[: len(scan) // 2 * 2]
    guess = torch.cat([scan[::2], scan[1::2] + torch.tensor([0.0, 0.0, 2.0])])
    scores = score_rebuilt(rebuilt_of(guess), truth_of(scan), EVERYTHING)
    assert [one(s) for s in (scores.scene.f_10cm, scores.scene.f_50cm, scores.scene.recall_20cm)] == [0.5, 0.5, 0.5]


@pytest.mark.parametrize("yaw", [0.0, math.pi / 2, 0.6, -2.0, 7.0])
def test_objects_are_turned_boxes_with_a_margin(yaw: float):
    """One point just inside the enlarged front face and one just outside it: only the first belongs to the car."""
    box = torch.tensor([[8.0, 1.0, 1.0, 4.0, 1.0, 2.0, yaw]])
    ends = rotate_z(torch.tensor([[2.19, 0.0, 0.0], [2.21, 0.0, 0.0], [0.0, 0.69, 0.0], [0.0, 0.71, 0.0]]), torch.tensor(yaw))
    truth = truth_of(torch.cat([road(), ends + box[0, :3]]), Labels.make(box, [0]))
    car, pedestrian = truth.regions.objects
    assert car is not None
    assert car[-4:].tolist() == [True, False, True, False]
    assert pedestrian is None
    assert truth.regions.background is not None
    assert truth.regions.background.tolist() == (~car).tolist()


def test_a_box_of_weight_0_is_neither_object_nor_background():
    box = torch.tensor([[8.0, 1.0, 1.0, 4.0, 1.0, 2.0, 0.0]])
    inside = torch.tensor([[8.0, 1.0, 1.0]])
    truth = truth_of(torch.cat([road(), inside]), Labels.make(box, [0], weight=[0.0]))
    assert truth.regions.objects == (None, None)
    assert truth.regions.background is not None
    assert not truth.regions.background[-1]


def test_background_above_the_road_ignores_road_and_objects():
    """The attack rebuilds the road and the car and misses the wall: the scene scores high, the background above the road 0."""
    box = torch.tensor([[8.0, 1.0, 0.8, 4.0, 2.0, 1.6, 0.0]])
    car = box[0, :3] + (torch.rand(200, 3, generator=torch.Generator().manual_seed(0)) - 0.5) * box[0, 3:6]
    wall = torch.stack([torch.full((50,), 14.0), torch.linspace(-6, 6, 50), torch.full((50,), 2.0)], 1)
    truth = truth_of(torch.cat([road(), car, wall]), Labels.make(box, [0]))
    assert truth.regions.above_road is not None
    assert truth.regions.above_road.sum() == 50
    scores = score_rebuilt(rebuilt_of(torch.cat([road(), car])), truth, EVERYTHING)
    assert one(scores.scene.f_20cm) > 0.95
    assert one(scores.background.f_20cm) > 0.9
    assert one(scores.objects[0].scores.f_20cm) == 1
    assert one(scores.background_above_road.f_20cm) == 0
    assert scores.objects[1].scores.f_20cm.frames == 0


def test_the_road_may_climb_and_walls_and_reflections_do_not_lift_it():
    x, y = np.meshgrid(np.arange(0, 60, 0.5), np.arange(-20, 20, 0.5), indexing="ij")
    slope = 0.04 * x
    plane = np.stack([x.ravel(), y.ravel(), slope.ravel()], 1)
    blind = (plane[:, 0] > 30) & (plane[:, 0] < 35) & (plane[:, 1] > 5) & (plane[:, 1] < 10)  # only a wall is seen here
    rng = np.random.default_rng(0)
    wall = np.stack([rng.uniform(30.1, 34.9, 300), rng.uniform(5.1, 9.9, 300), rng.uniform(3.5, 6.0, 300)], 1)
    ghosts = np.stack([rng.uniform(0, 60, 40), rng.uniform(-20, 20, 40), np.full(40, -4.0)], 1)
    height = RoadHeight(np.concatenate([plane[~blind], wall, ghosts])).at(plane)
    assert np.abs(height - plane[:, 2]).max() < 0.5  # so no point of the road counts as above it
    above = RoadHeight(np.concatenate([plane[~blind], wall, ghosts])).at(wall) + 0.5
    assert (wall[:, 2] > above).all()


def test_matched_density_takes_the_surest_points_as_many_as_there_are_true_voxels():
    scan = torch.tensor([[1.05, 0.05, 0.05], [1.06, 0.05, 0.05], [3.05, 0.05, 0.05]])  # two voxels
    guess = torch.tensor([[9.0, 0.0, 0.0], [3.05, 0.05, 0.05], [1.05, 0.05, 0.05]])
    scores = score_rebuilt(rebuilt_of(guess, torch.tensor([0.1, 0.8, 0.9])), truth_of(scan))
    assert (one(scores.scene.f_10cm), one(scores.points_per_voxel)) == (1, 1)
    assert (MATCHED.name, EVERYTHING.name) == ("matched", "best")
    few = score_rebuilt(rebuilt_of(guess[1:2], torch.ones(1)), truth_of(scan))
    assert one(few.points_per_voxel) == 0.5


def test_the_best_threshold_is_the_one_that_trying_all_of_them_finds():
    generator = torch.Generator().manual_seed(3)
    development = []
    for _ in range(3):
        true = torch.rand(80, 3, generator=generator) * torch.tensor([6.0, 6.0, 1.0]) + 1
        right = true + 0.05 * torch.randn(80, 3, generator=generator)
        false = torch.rand(120, 3, generator=generator) * torch.tensor([6.0, 6.0, 1.0]) + 1
        score = torch.cat([torch.rand(80, generator=generator) + 0.4, torch.rand(120, generator=generator)])
        development.append((rebuilt_of(torch.cat([right, false]), score), truth_of(true)))
    every = sorted({float(s) for rebuilt, _ in development for s in rebuilt.score})

    def mean_f(threshold: float) -> float:
        scores = score_all(development, OperatingPoint(threshold=threshold))
        assert scores.scene.f_20cm.mean is not None
        return scores.scene.f_20cm.mean

    best = choose_best(development, candidates=len(every))
    assert best.threshold is not None
    assert mean_f(best.threshold) == pytest.approx(max(mean_f(t) for t in every), abs=1e-9)
    coarse = choose_best(development)
    assert coarse.threshold is not None
    assert mean_f(coarse.threshold) > mean_f(best.threshold) - 0.02


def test_attacks_with_one_score_keep_everything():
    scan = road(1.5)
    assert choose_best([(rebuilt_of(scan), truth_of(scan))]).threshold == 1
    nothing = rebuilt_of(torch.zeros(0, 3))
    assert choose_best([(nothing, truth_of(scan))]).threshold == 0


def test_what_is_empty_counts_as_documented_and_never_as_nan():
    scan, nothing = road(1.5), torch.zeros(0, 3)
    box = torch.tensor([[8.0, 1.0, 0.2, 4.0, 2.0, 1.6, 0.0]])
    labeled = Labels.make(box, [0])
    for point in (MATCHED, EVERYTHING):
        silent = score_rebuilt(rebuilt_of(nothing), truth_of(scan, labeled), point)
        assert [one(s) for s in (silent.scene.f_50cm, silent.background.f_50cm, silent.iou, silent.points_per_voxel)] == [0] * 4
        assert one(silent.objects[0].scores.f_20cm) == 0
        assert (silent.chamfer, silent.hausdorff) == (MeanScore(), MeanScore())
        blank = score_rebuilt(rebuilt_of(nothing), truth_of(nothing, labeled), point)
        assert blank == GeometryScores(objects=blank.objects)
        assert all(c.scores == FScores() for c in blank.objects)
    invented = score_rebuilt(rebuilt_of(scan), truth_of(nothing), EVERYTHING)
    assert (one(invented.iou), invented.scene.f_20cm.frames, invented.chamfer.frames) == (0, 0, 0)
    total = invented + silent + score_rebuilt(rebuilt_of(scan), truth_of(scan), EVERYTHING)
    assert (total.scene.f_20cm, total.chamfer.frames) == (MeanScore(total=1.0, frames=2), 1)
    unlabeled = score_rebuilt(rebuilt_of(scan), truth_of(scan), EVERYTHING)
    assert (unlabeled.background.f_20cm.frames, unlabeled.scene.f_20cm.frames) == (0, 1)


def test_points_outside_the_grid_are_false_ones():
    scan = road(1.5)
    far = torch.tensor([[1e6, 0.0, 0.0], [-1e30, 0.0, 0.0]])
    scores = score_rebuilt(rebuilt_of(torch.cat([scan, far])), truth_of(scan), EVERYTHING)
    assert one(scores.scene.precision_20cm) == pytest.approx(len(scan) / (len(scan) + 2))
    assert one(scores.iou) == pytest.approx(len(scan) / (len(scan) + 2))


def test_what_is_no_number_is_refused():
    scan = road(1.5)
    with pytest.raises(InvalidInput, match="NaN or infinite"):
        score_rebuilt(rebuilt_of(torch.full((1, 3), math.nan)), truth_of(scan))
    with pytest.raises(InvalidInput, match="have no order"):
        score_rebuilt(rebuilt_of(scan[:1], torch.full((1,), math.nan)), truth_of(scan))
    with pytest.raises(InvalidInput, match="names of all classes"):
        truth_of(scan, Labels.make(torch.ones(1, 7), [5]))


def test_the_leak_share_counts_from_what_nothing_gives():
    def mean(value: float, frames: int = 4) -> MeanScore:
        return MeanScore(total=value * frames, frames=frames)

    share = leak_share(mean(0.652), nothing=mean(0.401), undefended=mean(0.822))
    assert share.value == pytest.approx(0.596, abs=1e-3)  # the region filter of 1 m
    assert share.frames == 4
    with pytest.raises(InvalidInput, match="sees no leak"):
        leak_share(mean(0.5), nothing=mean(0.4), undefended=mean(0.4))
    with pytest.raises(InvalidInput, match="sees no leak"):  # noise divided by noise: a share of 10
        leak_share(mean(0.5), nothing=mean(0.4), undefended=mean(0.41))
    with pytest.raises(InvalidInput, match="same frames"):
        leak_share(mean(0.5), nothing=mean(0.4, 3), undefended=mean(0.6))
    with pytest.raises(InvalidInput, match="same frames"):
        leak_share(MeanScore(), nothing=MeanScore(), undefended=MeanScore())
