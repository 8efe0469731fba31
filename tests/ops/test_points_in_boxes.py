"""Membership of points in rotated boxes, against a rotation matrix in float64."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from upcycle3d.core.errors import InvalidInput
from upcycle3d.ops import points_in_boxes as ops

NAMES = ("points_in_boxes", "points_in_boxes_mask", "count_points_in_boxes")


def scene(points: int, boxes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    b = torch.rand(boxes, 7, generator=generator) * torch.tensor([8, 8, 2, 4, 3, 2, 12]) + torch.tensor(
        [0, 0, 0, 0.5, 0.5, 0.5, -6]
    )
    return torch.rand(points, 3, generator=generator) * torch.tensor([8, 8, 3]), b


def by_rotation_matrix(points: Tensor, boxes: Tensor) -> np.ndarray:
    mask = np.zeros((len(boxes), len(points)), bool)
    for row, box in enumerate(boxes.double().numpy()):
        cos, sin = math.cos(-box[6]), math.sin(-box[6])
        local = (points.double().numpy() - box[:3]) @ np.array([[cos, -sin, 0], [sin, cos, 0], [0, 0, 1]]).T
        mask[row] = (np.abs(local) <= box[3:6] / 2).all(1)
    return mask


@pytest.mark.parametrize("end", ["", "_reference"])
def test_random_scene_agrees_with_a_rotation_matrix(end):
    points, boxes = scene(2000, 12)
    expected = by_rotation_matrix(points, boxes)
    assert 0.02 < expected.mean() < 0.5
    np.testing.assert_array_equal(getattr(ops, "points_in_boxes_mask" + end)(points, boxes).numpy(), expected)
    first = np.where(expected.any(0), expected.argmax(0), -1)
    np.testing.assert_array_equal(getattr(ops, "points_in_boxes" + end)(points, boxes).numpy(), first)
    np.testing.assert_array_equal(getattr(ops, "count_points_in_boxes" + end)(points, boxes).numpy(), expected.sum(1))


def test_a_search_finds_the_same_points_box_by_box_for_scans_of_any_size():
    search = ops.BoxSearch()
    for seed, (points, boxes) in enumerate([(500, 12), (0, 3), (2000, 5), (30, 0), (1999, 9)]):
        p, b = scene(points, boxes, seed)
        search.load(p, b)
        expected = ops.points_in_boxes_mask_reference(p, b)
        for box in range(boxes):
            np.testing.assert_array_equal(search.rows(box), expected[box].nonzero()[:, 0].numpy())
    with pytest.raises(InvalidInput, match=r"\(N, 3\)"):
        search.load(torch.zeros(4, 2), b)


@pytest.mark.parametrize("end", ["", "_reference"])
def test_faces_belong_to_the_box(end):
    box = torch.tensor([[10.0, -2, 1, 4, 2, 1, 0]])
    points = torch.tensor([[12.0, -1, 1.5], [8, -3, 0.5], [12.0001, -2, 1], [10, -0.9999, 1], [10, -2, 1.5001]])
    assert getattr(ops, "points_in_boxes" + end)(points, box).tolist() == [0, 0, -1, -1, -1]


@pytest.mark.parametrize("end", ["", "_reference"])
def test_heading_turns_counter_clockwise_and_the_first_box_wins(end):
    boxes = torch.tensor([[0.0, 0, 0, 10, 1, 2, math.pi / 4], [0, 0, 0, 20, 20, 2, 0]])
    points = torch.tensor([[3.0, 3, 0], [3, -3, 0], [50, 0, 0], [3, 3, 0]])  # one point twice
    assert getattr(ops, "points_in_boxes" + end)(points, boxes).tolist() == [0, 1, -1, 0]
    assert getattr(ops, "count_points_in_boxes" + end)(points, boxes).tolist() == [2, 3]


@pytest.mark.parametrize("end", ["", "_reference"])
@pytest.mark.parametrize(("points", "boxes"), [(0, 0), (5, 0), (0, 4), (1, 1)])
def test_shapes_of_small_scenes(end, points, boxes):
    arguments = scene(points, boxes)
    shapes = [(points,), (boxes, points), (boxes,)]
    types = [torch.int64, torch.bool, torch.int64]
    for name, shape, dtype in zip(NAMES, shapes, types):
        result = getattr(ops, name + end)(*arguments)
        assert result.shape == shape
        assert result.dtype == dtype
    if boxes == 0:
        assert getattr(ops, "points_in_boxes" + end)(*arguments).eq(-1).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("end", ["", "_reference"])
def test_bad_boxes_are_refused_bad_points_are_nowhere(name, end):
    function = getattr(ops, name + end)
    points, boxes = scene(10, 3)
    boxes[:, 3:6] = 1000
    points[:3] = torch.tensor([[math.nan, 0, 0], [math.inf, 0, 0], [0, 0, -math.inf]])
    mask = ops.points_in_boxes_mask(points, boxes)
    assert not mask[:, :3].any()
    assert mask[:, 3:].all()
    assert torch.equal(function(points, boxes), getattr(ops, name)(points, boxes))
    boxes[1, 3] = math.inf
    with pytest.raises(InvalidInput, match="1 of 3 boxes"):
        function(points, boxes)
    with pytest.raises(InvalidInput, match=r"\(N, 3\)"):
        function(torch.zeros(5, 4), boxes)
