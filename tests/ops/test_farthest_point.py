"""Farthest point sampling: against a full search in numpy, the plain torch version, and stored picks of the reference."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.farthest_point import farthest_point_sample, farthest_point_sample_reference

both = pytest.mark.parametrize("sample", [farthest_point_sample, farthest_point_sample_reference])


def cloud(count: int, seed: int = 0) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([70.0, 80, 4])


def full_search(points: np.ndarray, count: int) -> list[int]:
    nearest, rows = np.full(len(points), np.inf, np.float32), [0]
    while len(rows) < count:
        dx, dy, dz = (points - points[rows[-1]]).T
        nearest = np.minimum(nearest, dx * dx + dy * dy + dz * dz)
        nearest[rows] = -1
        rows.append(int(nearest.argmax()))
    return rows


@both
@pytest.mark.parametrize("count", [1, 2, 300, 1500])
def test_picks_are_those_of_a_full_search(sample, count):
    points = cloud(1500)
    rows, bounds = sample(points, (0, 1500), count)
    assert rows.dtype == torch.int64
    assert bounds == (0, count)
    assert rows.tolist() == full_search(points.numpy(), count)


@both
def test_equal_distances_go_to_the_lowest_row(sample):
    steps = torch.arange(12.0)
    points = torch.cartesian_prod(steps, steps, torch.arange(2.0))  # a lattice: nearly every pick is a tie
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(1))]
    rows, _ = sample(points, (0, len(points)), 200)
    assert rows.tolist() == full_search(points.numpy(), 200)
    square = torch.tensor([[0.0, 0, 0], [1, 1, 0], [1, 0, 0], [0, 1, 0]])
    assert sample(square, (0, 4), 4)[0].tolist() == [0, 1, 2, 3]


@both
def test_repeated_points_are_picked_last_and_no_row_twice(sample):
    points = cloud(40)[torch.arange(200) % 40]
    rows, _ = sample(points, (0, 200), 200)
    assert sorted(rows[:40].tolist()) == list(range(40))
    assert rows[40:].tolist() == list(range(40, 200))
    assert sample(torch.ones(70, 3), (0, 70), 70)[0].tolist() == list(range(70))


@both
def test_scenes_are_sampled_each_on_its_own(sample):
    points, starts = cloud(700), (0, 0, 300, 305, 305, 700, 700)
    rows, bounds = sample(points, starts, 50)
    assert bounds == (0, 0, 50, 55, 55, 105, 105)
    for k, (low, high) in enumerate(pairwise(starts)):
        if high > low:
            alone, _ = sample(points[low:high], (0, high - low), 50)
            assert (rows[bounds[k] : bounds[k + 1]] - low).tolist() == alone.tolist()


@both
@pytest.mark.parametrize("starts", [(0,), (0, 0), (0, 0, 0)])
def test_no_point_gives_no_pick(sample, starts):
    rows, bounds = sample(torch.zeros(0, 3), starts, 5)
    assert rows.shape == (0,)
    assert bounds == starts


def test_points_far_apart_and_near_together():
    points = torch.cat([cloud(200), cloud(200, 1) * 1e-3, torch.tensor([[1e6, -1e6, 0.0], [1e18, 0, 0]])])
    rows, _ = farthest_point_sample(points, (0, len(points)), 300)
    assert rows.tolist() == full_search(points.numpy(), 300)


def test_one_and_two_threads_give_the_same_rows():
    points, starts = cloud(900), (0, 400, 900)
    results = tiny.for_thread_counts(lambda: farthest_point_sample(points, starts, 100)[0])
    assert torch.equal(*results)
    assert torch.equal(results[0], farthest_point_sample_reference(points, starts, 100)[0])


@both
def test_bad_input_is_refused(sample):
    with pytest.raises(InvalidInput, match=r"\(N, 3\)"):
        sample(torch.zeros(5, 4), (0, 5), 2)
    with pytest.raises(InvalidInput, match=r"\(N, 3\)"):
        sample(torch.zeros(5, 3, dtype=torch.int64), (0, 5), 2)
    for starts in [(), (0, 4), (1, 5), (0, 4, 3, 5)]:
        with pytest.raises(InvalidInput, match="bounds"):
            sample(torch.zeros(5, 3), starts, 2)
    with pytest.raises(InvalidInput, match="positive"):
        sample(torch.zeros(5, 3), (0, 5), 0)
    points = torch.zeros(5, 3)
    points[2, 1] = torch.nan
    with pytest.raises(InvalidInput, match="1 of 5"):
        sample(points, (0, 5), 2)


def test_stored_keypoints_of_the_reference():
    stored = tiny.golden("pv_rcnn_kitti.npz", "the keypoints of a KITTI scan are those of OpenPCDet")
    points = torch.from_numpy(stored["points"][:, :3])
    rows, _ = farthest_point_sample(points, (0, len(points)), 2048)
    assert rows.tolist() == stored["keypoint_index"].tolist()
    assert torch.equal(points[rows], torch.from_numpy(stored["keypoints"]))
