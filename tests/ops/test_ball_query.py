"""Ball query: against distances in float64, the plain torch version, and stored neighbors of the reference."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops.ball_query import Neighbors, ball_query, ball_query_reference

both = pytest.mark.parametrize("query", [ball_query, ball_query_reference])


def cloud(count: int, seed: int) -> Tensor:
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) * torch.tensor([12.0, 9, 2]) - 3


def lists(neighbors: Neighbors) -> list[list[int]]:
    assert neighbors.index.dtype == neighbors.starts.dtype == torch.int64
    bounds = neighbors.starts.tolist()
    assert bounds[0] == 0
    assert bounds[-1] == len(neighbors.index)
    return [neighbors.index[low:high].tolist() for low, high in pairwise(bounds)]


def assert_same(one: list[Neighbors], other: list[Neighbors]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other):
        assert torch.equal(a.starts, b.starts)
        assert torch.equal(a.index, b.index)


@both
def test_agrees_with_distances_in_float64(query):
    radii, limits = (1.3, 0.3, 30.0), (9, 4, 1000)
    centers, points = cloud(80, 0), cloud(600, 1)
    center_starts, point_starts = (0, 30, 80), (0, 250, 600)
    distance = np.linalg.norm(centers.double().numpy()[:, None] - points.double().numpy(), axis=2)
    results = query(centers, center_starts, points, point_starts, radii, limits)
    for radius, limit, result in zip(radii, limits, results):
        assert np.abs(distance - radius).min() > 1e-6  # no pair that float32 may see on the other side
        for q, row in enumerate(lists(result)):
            low, high = point_starts[q >= 30], point_starts[(q >= 30) + 1]
            assert row == (low + np.flatnonzero(distance[q, low:high] < radius))[:limit].tolist()


@both
def test_a_point_at_the_radius_is_no_neighbor(query):
    points = torch.tensor([[2.0, 0, 0], [0, -2, 0], [0, 0, 2], [math.nextafter(2, 0) - 1e-6, 0, 0], [0, 0, 0], [0, 0, 0]])
    result = query(torch.zeros(1, 3), (0, 1), points, (0, 6), [2.0, 1e-3], [8, 8])
    assert [lists(r) for r in result] == [[[3, 4, 5]], [[4, 5]]]


@pytest.mark.parametrize("radius", [0.1, 0.4, 1.2, 4.8])
def test_lattice_at_the_radius_and_at_cell_borders_equals_the_reference(radius):
    """Every distance is a multiple of a lattice step that divides the radius: the rounding decides."""
    ticks = torch.arange(-8, 9) * torch.tensor(radius) / 4
    points = torch.cartesian_prod(ticks, ticks, ticks[6:11]) + torch.tensor([20.3, -7.7, 0.1])
    points = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(0))]
    args = (points[::3], (0, len(points[::3])), points, (0, len(points)), (radius, radius / 2), (40, 7))
    assert_same(ball_query(*args), ball_query_reference(*args))


@both
def test_scenes_without_centers_or_points(query):
    centers, points = cloud(40, 0), cloud(50, 1)
    radii, limits = (2.0, 0.5), (5, 3)
    result = query(centers, (0, 10, 10, 40, 40), points, (0, 0, 20, 50, 50), radii, limits)
    alone = query(centers[10:], (0, 30), points[20:], (0, 30), radii, limits)
    for whole, part in zip(result, alone):
        assert lists(whole)[:10] == [[]] * 10
        assert lists(whole)[10:] == [[20 + i for i in row] for row in lists(part)]


@both
@pytest.mark.parametrize(("centers", "points"), [(0, 0), (0, 7), (7, 0), (1, 1)])
def test_few_centers_and_points(query, centers, points):
    result = query(torch.zeros(centers, 3), (0, centers), torch.zeros(points, 3), (0, points), [1.0], [10**9])
    assert lists(result[0]) == [list(range(points))] * centers
    assert lists(query(torch.zeros(0, 3), (0,), torch.zeros(0, 3), (0,), [1.0], [4])[0]) == []


def test_centers_far_apart_and_points_far_away():
    points = torch.cat([cloud(300, 0), torch.tensor([[1e30, 0, 0], [-1e7, 1e7, 0], [3e38, -3e38, 0]])])
    centers = torch.cat([cloud(20, 1), torch.tensor([[1e6, -1e6, 0.0], [-1e7, 1e7, 0]])])
    args = (centers, (0, len(centers)), points, (0, len(points)), (0.7, 2.0), (6, 100))
    result = ball_query(*args)
    assert lists(result[0])[-2:] == [[], [301]]
    assert_same(result, ball_query_reference(*args))


def test_one_and_two_threads_give_the_same_neighbors():
    args = (cloud(5000, 0), (0, 700, 5000), cloud(900, 1), (0, 400, 900), (0.6, 1.5), (8, 16))
    results = tiny.for_thread_counts(lambda: ball_query(*args))
    assert_same(*results)
    assert_same(results[0], ball_query_reference(*args))


@both
def test_bad_input_is_refused(query):
    good = {"centers": torch.zeros(4, 3), "center_starts": (0, 4), "points": torch.zeros(5, 3), "point_starts": (0, 5)}
    good |= {"radii": [1.0], "limits": [2]}
    nan = torch.zeros(5, 3)
    nan[1] = torch.nan
    bad = [
        ({"centers": torch.zeros(4, 2)}, r"centers.*\(N, 3\)"),
        ({"points": torch.zeros(5, 4)}, r"points.*\(N, 3\)"),
        ({"points": nan}, "1 of 5"),
        ({"points": torch.full((5, 3), 1e300, dtype=torch.float64)}, "5 of 5"),  # infinite in float32
        ({"center_starts": (0, 3)}, "centers.*bounds"),
        ({"point_starts": (0, 3, 2, 5)}, "points.*bounds"),
        ({"center_starts": (0, 2, 4)}, "2 scenes"),
        ({"radii": [0.0]}, "radius"),
        ({"radii": [math.inf]}, "radius"),
        ({"radii": [], "limits": []}, "radius"),
        ({"limits": [0]}, "radius"),
        ({"limits": [1, 2]}, "radius"),
    ]
    for change, message in bad:
        with pytest.raises(InvalidInput, match=message):
            query(**{**good, **change})


def stored(name: str) -> dict[str, np.ndarray]:
    return tiny.golden(name, "the neighbors of the keypoints of a KITTI scan are those of OpenPCDet")


SOURCES = {
    "raw": ((0.4, 0.8), (16, 16)),
    "conv1": ((0.4, 0.8), (16, 16)),
    "conv2": ((0.8, 1.2), (16, 32)),
    "conv3": ((1.2, 2.4), (16, 32)),
    "conv4": ((2.4, 4.8), (16, 32)),
}


def without_repeats(row: np.ndarray) -> list[int]:
    """Padded by repeating the first hit, -1 first in an empty ball."""
    return [] if row[0] < 0 else [int(row[0]), *row[1:][row[1:] != row[0]].tolist()]


@pytest.mark.parametrize("source", SOURCES)
def test_stored_neighbors_of_the_reference(source):
    golden = stored("pv_rcnn_kitti.npz")
    if source == "raw":
        points = torch.from_numpy(golden["points"][:, :3])
    else:
        stride = 2 ** (int(source[-1]) - 1)
        cells = torch.from_numpy(stored("second_iou_kitti.npz")[f"{source}_coords_zyx"][:, ::-1].astype(np.float32))
        points = (cells + 0.5) * torch.tensor([0.05, 0.05, 0.1]) * stride + torch.tensor([0.0, -40, -3])
    keypoints = torch.from_numpy(golden["keypoints"])
    radii, limits = SOURCES[source]
    results = ball_query(keypoints, (0, 2048), points, (0, len(points)), radii, limits)
    flagged = golden["keypoint_near_ball_boundary"]
    for radius, result in zip(radii, results):
        rows = lists(result)
        for q, expected in enumerate(golden[f"ball_{source}_r{radius}"]):
            assert flagged[q] or rows[q] == without_repeats(expected)
        empty = np.array([not row for row in rows])
        assert abs(empty.sum() - golden[f"ball_empty_{source}_r{radius}"]) <= (empty & flagged).sum()


def test_stored_neighbors_of_the_region_grid():
    golden = stored("pv_rcnn_kitti.npz")
    regions = golden["roi_pooled_rows"]
    rois = torch.from_numpy(golden["rois"])[regions]
    ticks = (torch.arange(6) + 0.5) / 6 - 0.5
    x, y, z = (torch.cartesian_prod(ticks, ticks, ticks) * rois[:, None, 3:6]).unbind(2)
    cos, sin = rois[:, None, 6].cos(), rois[:, None, 6].sin()
    grid = (torch.stack([x * cos - y * sin, x * sin + y * cos, z], 2) + rois[:, None, :3]).flatten(0, 1)
    results = ball_query(grid, (0, len(grid)), torch.from_numpy(golden["keypoints"]), (0, 2048), (0.8, 1.6), (16, 16))
    for radius, result in zip((0.8, 1.6), results):
        rows, expected = lists(result), golden[f"ball_roi_r{radius}"]
        for r, region in enumerate(regions):
            if not golden["roi_own_ball_near_boundary"][region]:
                assert rows[216 * r : 216 * (r + 1)] == [without_repeats(row) for row in expected[r]]
    assert not golden["roi_own_ball_near_boundary"][regions].all()
