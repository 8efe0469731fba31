"""Size normalisation and random object scaling: points move with their box, everything else stays, the wheels stay on the road."""

import math

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Frame
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.object_sizes import resize_objects, scale_sizes, shift_sizes
from upcycle3d.ops.points_in_boxes import points_in_boxes

BOXES = torch.tensor([[10.0, 2, 0.8, 4, 2, 1.6, 0.5], [20.0, -5, 1.0, 0.8, 0.6, 1.8, -2.0]])


def frame(background: int = 200, seed: int = 0) -> Frame:
    """Two boxes with 50 points each, then background points that lie clearly outside of both."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for box in BOXES:
        local = (torch.rand(50, 3, generator=generator) - 0.5) * 0.98 * box[3:6]
        c, s = math.cos(box[6]), math.sin(box[6])
        turned = torch.stack([c * local[:, 0] - s * local[:, 1], s * local[:, 0] + c * local[:, 1], local[:, 2]], 1)
        parts.append(turned + box[:3])
    rest = torch.rand(background, 3, generator=generator) * torch.tensor([30.0, 20, 3]) - torch.tensor([0.0, 10, 0])
    rest = rest[points_in_boxes(rest, BOXES + torch.tensor([0, 0, 0, 0.3, 0.3, 0.3, 0])) < 0]
    xyz = torch.cat([*parts, rest])
    points = PointCloud(xyz=xyz, features=torch.arange(len(xyz))[:, None].float())
    return Frame(id="a", points=points, labels=Labels.make(BOXES, torch.tensor([0, 1])))


def local_shares(points: torch.Tensor, box: torch.Tensor) -> torch.Tensor:
    """Points in the box's frame in halves of its size."""
    offset = points - box[:3]
    c, s = math.cos(box[6]), math.sin(box[6])
    turned = torch.stack([c * offset[:, 0] + s * offset[:, 1], -s * offset[:, 0] + c * offset[:, 1], offset[:, 2]], 1)
    return turned / (box[3:6] / 2)


def test_points_keep_their_place_within_the_box_and_the_bottom_stays():
    before, after = frame(), resize_objects(frame(), torch.tensor([[3.0, 1.5, 1.2], [0.7, 0.5, 1.7]]))
    boxes = after.labels.boxes.data
    assert torch.equal(boxes[:, [0, 1, 6]], BOXES[:, [0, 1, 6]])
    assert torch.allclose(boxes[:, 2] - boxes[:, 5] / 2, BOXES[:, 2] - BOXES[:, 5] / 2)
    assert torch.allclose(boxes[:, 3:6], torch.tensor([[3.0, 1.5, 1.2], [0.7, 0.5, 1.7]]))
    for k in range(2):
        rows = slice(50 * k, 50 * k + 50)
        old, new = local_shares(before.points.xyz[rows], BOXES[k]), local_shares(after.points.xyz[rows], boxes[k])
        assert torch.allclose(old, new, atol=1e-4)
    assert torch.equal(after.points.xyz[100:], before.points.xyz[100:])  # smaller boxes hide nothing
    assert torch.equal(after.points.features, before.points.features)


def test_a_grown_box_hides_the_background_it_swallows():
    after = resize_objects(frame(background=5000), torch.tensor([[8.0, 6.0, 3.0], [0.8, 0.6, 1.8]]))
    inside = points_in_boxes(after.points.xyz, after.labels.boxes.data)
    kept = after.points.features[:, 0].long()
    assert (kept[inside == 0] < 50).all()
    assert len(kept) < len(frame(background=5000).points)
    assert set(range(100)) <= set(kept.tolist())


def test_a_shift_adds_metres_and_spares_what_would_vanish():
    boxes = shift_sizes(frame(), (-0.91, -0.49, -0.26)).labels.boxes.data
    assert torch.allclose(boxes[0, 3:6], BOXES[0, 3:6] - torch.tensor([0.91, 0.49, 0.26]))
    assert torch.equal(boxes[1, 3:6], BOXES[1, 3:6])  # a pedestrian 0.8 m long


def test_factors_are_drawn_for_each_object_and_reproducible():
    sizes = [
        scale_sizes(frame(), (0.75, 0.95), np.random.default_rng(s)).labels.boxes.data[:, 3:6] / BOXES[:, 3:6] for s in (0, 0, 1)
    ]
    assert torch.equal(sizes[0], sizes[1])
    assert not torch.equal(sizes[0], sizes[2])
    assert torch.allclose(sizes[0], sizes[0][:, :1].expand(2, 3), atol=1e-5)  # one factor for all three sides
    assert bool((sizes[0][0, 0] - sizes[0][1, 0]).abs() > 1e-3)
    assert bool(((sizes[0] >= 0.75 - 1e-5) & (sizes[0] <= 0.95 + 1e-5)).all())


def test_no_objects_no_points_no_labels():
    empty = Frame(id="b", points=PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1)), labels=Labels.empty())
    assert len(shift_sizes(empty, (1, 1, 1)).labels) == 0
    bare = Frame(id="c", points=empty.points)
    with pytest.raises(InvalidInput, match="no labels"):
        shift_sizes(bare, (1, 1, 1))
    with pytest.raises(InvalidInput, match="smallest first"):
        scale_sizes(empty, (0.9, 0.5), np.random.default_rng(0))


def test_points_that_noise_puts_outside_the_box_move_with_it_and_the_road_does_not():
    """Left behind, they would keep showing the old size: half of the points of a surface lie outside its box."""
    box = torch.tensor([[10.0, 0.0, 0.75, 4.0, 2.0, 1.5, 0.0]])
    near = torch.tensor([[12.04, 0.3, 0.7], [10.0, -1.05, 0.5], [9.0, 0.2, 1.56]])
    road = torch.tensor([[10.5, 0.3, -0.03], [12.5, 0.0, 0.02], [10.0, 1.3, 0.4]])
    points = PointCloud(xyz=torch.cat([near, road]), features=torch.zeros(6, 1))
    after = resize_objects(Frame(id="a", points=points, labels=Labels.make(box, torch.zeros(1))), torch.tensor([[2.0, 1.0, 1.2]]))
    wanted = torch.tensor([[11.02, 0.15, 0.56], [10.0, -0.525, 0.4], [9.5, 0.1, 1.248]])
    torch.testing.assert_close(after.points.xyz, torch.cat([wanted, road]), rtol=0, atol=1e-5)


def test_sides_are_scaled_apart_and_only_where_that_is_asked_for():
    """With one factor for all sides a detector learns one number; the draw of that factor stays what it was."""
    rng = np.random.default_rng(0)
    one = scale_sizes(frame(), (0.8, 1.2), np.random.default_rng(0)).labels.boxes.data[:, 3:6] / BOXES[:, 3:6]
    torch.testing.assert_close(one, one[:, :1].expand(2, 3))
    apart = scale_sizes(frame(), (0.8, 1.2), rng, sides=(0.9, 1.1)).labels.boxes.data[:, 3:6] / BOXES[:, 3:6]
    further = apart / one
    assert bool(((further >= 0.9) & (further <= 1.1)).all())
    assert float((further - further[:, :1]).abs().max()) > 0.01
    with pytest.raises(InvalidInput, match="must be finite and positive"):
        scale_sizes(frame(), (0.8, 1.2), rng, sides=(1.1, 0.9))
