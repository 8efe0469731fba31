"""Voxelization: the fixed rule against a dictionary written out by hand and a stored KITTI frame, and the loss over the limit."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.features import VoxelCounts
from upcycle3d.ops.voxelize import Voxels, cell_priority, voxelize, voxelize_reference

GRID = {"point_range": (0.0, -2.0, -1.0, 4.0, 2.0, 1.0), "voxel_size": (0.5, 0.5, 1.0)}  # 8 x 8 x 2 cells

both = pytest.mark.parametrize("function", [voxelize, voxelize_reference])


def mix(x: int) -> int:
    """MurmurHash3's 32-bit finalizer in Python's own integers."""
    x = ((x ^ (x >> 16)) * 0x85EBCA6B) % 2**32
    x = ((x ^ (x >> 13)) * 0xC2B2AE35) % 2**32
    return x ^ (x >> 16)


def by_dictionary(points: Tensor, max_points: int, max_voxels: int) -> Voxels:
    start, size = np.float32(GRID["point_range"][:3]), np.float32(GRID["voxel_size"])
    kept: dict[tuple[int, int, int], list[np.ndarray]] = {}
    outside = 0
    for point in points.numpy():
        x, y, z = (int(k) for k in np.floor((point[:3] - start) / size))
        if not (0 <= x < 8 and 0 <= y < 8 and 0 <= z < 2):
            outside += 1
            continue
        group = kept.setdefault((z, y, x), [])
        if len(group) < max_points:
            group.append(point)
    occupied = len(kept)
    if occupied > max_voxels:
        by_priority = sorted(kept, key=lambda c: mix(((c[0] * 8 + c[1]) * 8 + c[2]) ^ mix(occupied)))
        kept = {cell: group for cell, group in kept.items() if cell in by_priority[:max_voxels]}
    means = [sum(group[1:], group[0]) / np.float32(len(group)) for group in kept.values()]
    return Voxels(
        features=torch.tensor(np.array(means, np.float32).reshape(-1, points.shape[1])),
        coords=torch.tensor(list(kept), dtype=torch.int32).view(-1, 3),
        num_points=torch.tensor([len(group) for group in kept.values()], dtype=torch.int32),
        counts=VoxelCounts(
            points=len(points), points_outside=outside, cells=occupied, cells_over_limit=max(0, occupied - max_voxels)
        ),
    )


def assert_bit_equal(a: Voxels, b: Voxels) -> None:
    for name in ("features", "coords", "num_points"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.dtype == right.dtype
        assert torch.equal(left, right), name
    assert a.counts == b.counts


@both
def test_hand_example_keeps_first_points_and_arrival_order(function):
    points = torch.tensor(
        [
            [3.9, 1.9, 0.9, 10.0],  # cell z 1, y 7, x 7
            [0.1, -1.9, -0.9, 20.0],  # cell 0 0 0
            [3.7, 1.7, 0.5, 30.0],  # second point of the first voxel
            [3.6, 1.6, 0.4, 99.0],  # third: one too many
            [4.1, 0.0, 0.0, 99.0],  # outside
            [0.2, -1.8, -0.8, 40.0],  # known voxels still take points
        ]
    )
    voxels = function(points, max_points=2, max_voxels=2, **GRID)
    assert voxels.counts == VoxelCounts(points=6, points_outside=1, cells=2, cells_over_limit=0)
    assert voxels.coords.tolist() == [[1, 7, 7], [0, 0, 0]]
    assert voxels.num_points.tolist() == [2, 2]
    assert voxels.features[:, 3].tolist() == [20.0, 30.0]
    torch.testing.assert_close(voxels.features[0, :3], torch.tensor([3.8, 1.8, 0.7]))
    assert (voxels.features.dtype, voxels.coords.dtype, voxels.num_points.dtype) == (torch.float32, torch.int32, torch.int32)


@both
@pytest.mark.parametrize(("max_points", "max_voxels"), [(1, 1000), (3, 1000), (1000, 20), (2, 1)])
def test_bit_equal_to_a_dictionary(function, max_points, max_voxels):
    generator = torch.Generator().manual_seed(0)
    points = torch.rand(700, 5, generator=generator) * 6 - torch.tensor([1.0, 3, 3, 0, 0])  # a part is outside
    points = torch.cat([points, points[:100]])  # duplicates
    expected = by_dictionary(points, max_points, max_voxels)
    assert_bit_equal(function(points, max_points=max_points, max_voxels=max_voxels, **GRID), expected)


def full_turn(points: int = 40_000) -> Tensor:
    """(N, 3) points of a spinning sensor in file order, which goes around once with all beams at a time."""
    generator = torch.Generator().manual_seed(3)
    azimuth = torch.linspace(-math.pi, math.pi, points // 20).repeat_interleave(20)
    distance = 3 + 45 * torch.rand(len(azimuth), generator=generator)
    z = torch.linspace(-0.9, 0.9, 20).repeat(points // 20)
    return torch.stack([distance * azimuth.cos(), distance * azimuth.sin(), z], 1)


TURN = {"point_range": (-50.0, -50.0, -1.0, 50.0, 50.0, 1.0), "voxel_size": (0.5, 0.5, 0.5), "max_points": 5}


def largest_deviation(kept: Tensor, everything: Tensor) -> float:
    """How far the share of cells lost in a 30-degree sector or a range ring lies from the whole share, in standard deviations."""
    nx = 200
    is_kept = torch.isin(
        (everything[:, 0] * nx + everything[:, 1]) * nx + everything[:, 2], (kept[:, 0] * nx + kept[:, 1]) * nx + kept[:, 2]
    )
    y, x = everything[:, 1] - 99.5, everything[:, 2] - 99.5
    sector = ((torch.atan2(y, x) + math.pi) / math.radians(30)).long().clamp(0, 11)
    ring = (torch.hypot(x, y) / 20).long()
    share, worst = 1 - len(kept) / len(everything), 0.0
    for group in [*(sector == k for k in range(12)), *(ring == k for k in range(5))]:
        cells = int(group.sum())
        lost = cells - int((group & is_kept).sum())
        worst = max(worst, abs(lost - share * cells) / math.sqrt(max(1.0, share * (1 - share) * cells)))
    return worst


@both
@pytest.mark.parametrize("share", [0.03, 0.3, 0.9])
def test_the_loss_over_the_limit_is_even_in_every_sector_and_range_ring(function, share):
    points = full_turn()
    everything = function(points, max_voxels=10**6, **TURN)
    limit = round((1 - share) * len(everything.coords))
    kept = function(points, max_voxels=limit, **TURN)
    assert len(kept.coords) == limit
    assert kept.counts.cells == len(everything.coords)
    assert kept.counts.cells_over_limit == len(everything.coords) - limit
    assert largest_deviation(kept.coords, everything.coords) < 4  # file order fails this by far:
    assert largest_deviation(everything.coords[:limit], everything.coords) > 15


@both
def test_which_cells_stay_does_not_depend_on_the_order_of_the_points(function):
    points = full_turn(8_000)
    shuffled = points[torch.randperm(len(points), generator=torch.Generator().manual_seed(5))]
    one, other = (function(p, max_voxels=1500, **TURN) for p in (points, shuffled))
    assert {tuple(c) for c in one.coords.tolist()} == {tuple(c) for c in other.coords.tolist()}
    assert one.coords.tolist() != other.coords.tolist()  # each in the order of its own first points


def test_both_implementations_are_bit_equal_over_the_limit():
    points = torch.cat([full_turn(), torch.full((3, 3), 80.0)])
    for limit in (1, 777, 20_000):
        assert_bit_equal(voxelize(points, max_voxels=limit, **TURN), voxelize_reference(points, max_voxels=limit, **TURN))


def test_the_priorities_of_cells_are_the_documented_ones_and_never_repeat():
    cells = torch.cat([torch.arange(100_000), torch.tensor([2**31 - 1])])
    priority = cell_priority(cells, 40_321)
    assert priority[[0, 1, 99_999, 100_000]].tolist() == [mix(c ^ mix(40_321)) for c in (0, 1, 99_999, 2**31 - 1)]
    assert len(priority.unique()) == len(cells)


@both
def test_a_scan_at_its_limit_loses_nothing_and_other_scans_lose_other_cells(function):
    points = full_turn(8_000)
    everything = function(points, max_voxels=10**6, **TURN)
    at_limit = function(points, max_voxels=len(everything.coords), **TURN)
    assert_bit_equal(at_limit, everything)
    fewer = function(points[:-40], max_voxels=1500, **TURN)
    limited = function(points, max_voxels=1500, **TURN)
    common = {tuple(c) for c in fewer.coords.tolist()} & {tuple(c) for c in limited.coords.tolist()}
    assert len(common) < 0.8 * 1500


@both
def test_lower_border_is_inside_upper_border_and_beyond_outside(function):
    points = torch.tensor([[0.0, -2.0, -1.0], [4.0, 0.0, 0.0], [0.0, 2.0, 0.0], [0.0, 0.0, 1.0], [-1e-3, 0.0, 0.0], [1e30, 0, 0]])
    assert function(points, max_points=5, max_voxels=9, **GRID).coords.tolist() == [[0, 0, 0]]


@both
def test_no_point_one_point_and_all_points_outside(function):
    nothing = function(torch.empty(0, 4), max_points=5, max_voxels=9, **GRID)
    assert nothing.features.shape == (0, 4)
    assert nothing.coords.shape == (0, 3)
    assert nothing.num_points.shape == (0,)
    outside = function(torch.full((3, 4), 50.0), max_points=5, max_voxels=9, **GRID)
    assert outside.features.shape == (0, 4)
    one = function(torch.tensor([[1.0, 0.0, 0.5, 7.0]]), max_points=5, max_voxels=9, **GRID)
    assert one.features.tolist() == [[1.0, 0.0, 0.5, 7.0]]


@both
def test_takes_views_and_double_precision(function):
    points = torch.rand(4, 50, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    assert_bit_equal(
        function(points.T, max_points=5, max_voxels=9, **GRID),
        function(points.T.float().contiguous(), max_points=5, max_voxels=9, **GRID),
    )


@both
def test_non_finite_points_are_counted_in_the_error(function):
    points = torch.zeros(6, 4)
    points[1, 0], points[1, 1], points[4, 3] = float("nan"), float("inf"), float("nan")
    with pytest.raises(InvalidInput, match="2 of 6 points"):
        function(points, max_points=5, max_voxels=9, **GRID)


@both
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"points": torch.zeros(3, 2)}, "floating-point"),
        ({"points": torch.zeros(3, 4, dtype=torch.int32)}, "floating-point"),
        ({"max_points": 0}, "positive"),
        ({"voxel_size": (0.0, 1.0, 1.0)}, "no grid"),
        ({"point_range": (0.0, 0.0, 0.0, -1.0, 1.0, 1.0)}, "no grid"),
        ({"voxel_size": (1e-4, 1e-4, 1e-4)}, "cells"),
        ({"voxel_size": (100.0, 1.0, 1.0)}, "cells"),
    ],
)
def test_wrong_arguments_are_refused(function, change, message):
    arguments = {"points": torch.zeros(3, 4), "max_points": 5, "max_voxels": 9, **GRID, **change}
    with pytest.raises(InvalidInput, match=message):
        function(arguments.pop("points"), **arguments)


@both
def test_kitti_frame_000003_is_voxelized_as_the_reference_does(function):
    what = "our voxels of a KITTI scan are those of OpenPCDet"
    expected, scan = (
        tiny.golden("second_iou_kitti.npz", what),
        tiny.shared("data/kitti/training/velodyne_reduced/000003.bin", what),
    )
    points = torch.from_numpy(np.fromfile(scan, np.float32).reshape(-1, 4))
    points = points[(points[:, 0] >= 0) & (points[:, 0] <= 70.4) & (points[:, 1] >= -40) & (points[:, 1] <= 40)]
    voxels = function(
        points, point_range=(0, -40, -3, 70.4, 40, 1), voxel_size=(0.05, 0.05, 0.1), max_points=5, max_voxels=40_000
    )
    np.testing.assert_array_equal(voxels.coords.numpy(), expected["voxel_coords_zyx"])
    np.testing.assert_array_equal(voxels.num_points.numpy(), expected["voxel_num_points"])
    np.testing.assert_array_equal(voxels.features.numpy(), expected["voxel_mean_features"])
