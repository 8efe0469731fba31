"""Which points the occupancy attack claims first. Oracle: a plain loop over all pairs of voxels."""

import pytest
import torch

import tiny
from upcycle3d.perception.privacy.attacks.occupancy_points import neighbors, worth_of_points
from upcycle3d.perception.privacy.attacks.occupancy_tree import OccupancyTree

TREE = OccupancyTree(grid=tiny.CUT_GRID, levels=0)


def nodes_of(cells: list[tuple[int, int, int]]) -> torch.Tensor:
    return torch.tensor([(0, *cell) for cell in sorted(cells)], dtype=torch.int32).view(-1, 4)


def test_neighbors_are_all_voxels_within_reach():
    generator = torch.Generator().manual_seed(0)
    index = torch.randperm(8 * 32 * 32, generator=generator)[:900].sort().values
    nodes = torch.nn.functional.pad(tiny.cells(index), (1, 0))
    near = neighbors(nodes, TREE, 0.75)
    centers = TREE.centers(nodes, 0)
    for row in range(0, 900, 37):
        gaps = (centers - centers[row]).norm(dim=1)
        assert sorted(near[row][near[row] >= 0].tolist()) == (gaps <= 0.75).nonzero()[:, 0].tolist()


def test_a_voxel_without_neighbors_is_worth_its_chance_and_its_points():
    nodes = nodes_of([(0, 0, 0), (0, 10, 10)])
    worth = worth_of_points(torch.tensor([0.5, 0.25]), torch.tensor([1.0, 3.0]), neighbors(nodes, TREE, 0.75))
    # 0.75 voxels are expected and 1.25 points, so one expected point counts 0.6
    assert worth.tolist() == pytest.approx([0.5 + 0.6 * 0.5, 0.25 + 0.6 * 0.75])


def test_a_row_of_sure_voxels_is_claimed_with_gaps():
    nodes = nodes_of([(0, 0, x) for x in range(9)])
    worth = worth_of_points(torch.full((9,), 0.9), torch.ones(9), neighbors(nodes, TREE, 0.75))
    first = worth.topk(3).indices.sort().values
    assert int(first.diff().min()) >= 2
    # Whatever is left was found already and is worth its chance to be right alone.
    assert bool((worth.sort().values[:3] <= 1.0).all())


def test_a_point_inside_a_dense_cloud_of_doubts_comes_before_a_lonely_doubt():
    cloud = [(z, y, x) for z in range(3) for y in range(3) for x in range(3)]
    nodes = nodes_of([*cloud, (7, 20, 20)])
    probability = torch.full((28,), 0.1)
    probability[-1] = 0.3
    worth = worth_of_points(probability, torch.ones(28), neighbors(nodes, TREE, 0.9))
    assert int(worth.argmax()) == 13  # the middle of the cloud


def test_no_voxel():
    nodes = nodes_of([])
    assert worth_of_points(torch.empty(0), torch.empty(0), neighbors(nodes, TREE, 0.75)).shape == (0,)
