"""Raw augmentation: every movement can be undone, moves points and boxes alike, and is drawn from the generator given."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from upcycle3d.core.boxes import corners_3d
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Calibration, Frame
from upcycle3d.core.structures import Labels, PointCloud
from upcycle3d.datasets.augment import (
    AugmentationRanges,
    Compose,
    FlipX,
    FlipY,
    Movement,
    Scale,
    Yaw,
    labeled_example,
    sample_augmentation,
)
from upcycle3d.datasets.fingerprint import split_fingerprint
from upcycle3d.datasets.gt_database import build_gt_database
from upcycle3d.datasets.gt_sampling import GtSampler
from upcycle3d.ops.points_in_boxes import points_in_boxes_mask

MOVEMENTS = [
    FlipY(),
    FlipX(),
    Yaw(0.7),
    Yaw(-3.0),
    Yaw(9.0),
    Scale(0.95),
    Scale(1.3),
    Compose(()),
    Compose((FlipY(), FlipX(), Yaw(2.5), Scale(1.05))),
    Compose((Compose((Yaw(1.0), FlipX())), Scale(0.9))),
]
EVERYWHERE = (-100.0, -100.0, -5.0, 100.0, 100.0, 5.0)
STILL = AugmentationRanges(flip_y=0, yaw=(0, 0), scale=(1, 1))


def make_boxes(count: int = 12, seed: int = 0) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    low, high = [-60, -40, -2, 0.5, 0.5, 1, -math.pi], [60, 40, 1, 9, 3, 3, math.pi]
    boxes = torch.from_numpy(rng.uniform(low, high, (count, 7))).float()
    boxes[0, 6], boxes[1, 6] = -math.pi, 0.0  # the seam
    return boxes


def make_frame(id: str = "a", *, points: int = 500, boxes: torch.Tensor | None = None) -> Frame:
    rng = np.random.default_rng(1)
    boxes = make_boxes() if boxes is None else boxes
    calibration = Calibration(lidar_to_camera=torch.eye(4).double(), projection=torch.eye(3, 4).double(), image_size=(10, 10))
    xyz = torch.from_numpy(rng.uniform([-60, -40, -2], [60, 40, 1], (points, 3))).float()
    cloud = PointCloud(xyz=xyz, features=torch.arange(points).float()[:, None] / max(points, 1))
    return Frame(id=id, points=cloud, labels=Labels.make(boxes, torch.zeros(len(boxes))), calibration=calibration)


def assert_same_boxes(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a[:, :6], b[:, :6], atol=2e-5, rtol=1e-5)
    turn = torch.remainder(a[:, 6] - b[:, 6] + math.pi, 2 * math.pi) - math.pi
    assert turn.abs().max() < 2e-6


@pytest.mark.parametrize("movement", MOVEMENTS, ids=repr)
def test_the_inverse_undoes_the_movement(movement: Movement) -> None:
    boxes, xyz = make_boxes(), make_frame().points.xyz
    there = movement.boxes(boxes)
    assert bool(((there[:, 6] >= -math.pi) & (there[:, 6] < math.pi)).all())
    assert_same_boxes(movement.inverse().boxes(there), boxes)
    torch.testing.assert_close(movement.inverse().points(movement.points(xyz)), xyz, atol=2e-5, rtol=1e-5)
    assert_same_boxes(movement.inverse().inverse().boxes(boxes), there)


@pytest.mark.parametrize("movement", MOVEMENTS, ids=repr)
def test_points_and_boxes_move_together(movement: Movement) -> None:
    boxes = make_boxes()
    inner = boxes.clone()
    inner[:, 3:6] *= 0.99
    outer = boxes.clone()
    outer[:, 3:6] *= 1.01
    moved = movement.boxes(boxes)
    for k in range(len(boxes)):
        inside, outside = movement.points(corners_3d(inner[k : k + 1])[0]), movement.points(corners_3d(outer[k : k + 1])[0])
        assert bool(points_in_boxes_mask(inside, moved[k : k + 1]).all())
        assert not bool(points_in_boxes_mask(outside, moved[k : k + 1]).any())
    front = boxes[:, :3] + torch.stack([boxes[:, 6].cos(), boxes[:, 6].sin(), torch.zeros(len(boxes))], 1)
    heading = torch.nn.functional.normalize(movement.points(front) - moved[:, :3], dim=1)  # where the nose points
    torch.testing.assert_close(heading[:, :2], torch.stack([moved[:, 6].cos(), moved[:, 6].sin()], 1), atol=1e-4, rtol=0)


def test_movements_do_what_their_names_say() -> None:
    box = torch.tensor([[1.0, 2, 3, 4, 5, 6, 0.5]])
    assert FlipY().boxes(box)[0, :2].tolist() == [1, -2]
    assert FlipY().boxes(box)[0, 6].item() == pytest.approx(-0.5)
    assert FlipX().boxes(box)[0, :2].tolist() == [-1, 2]
    assert FlipX().boxes(box)[0, 6].item() == pytest.approx(math.pi - 0.5)
    torch.testing.assert_close(
        Yaw(math.pi / 2).points(torch.tensor([[1.0, 0, 0]])), torch.tensor([[0.0, 1, 0]]), atol=1e-6, rtol=0
    )
    torch.testing.assert_close(Scale(2.0).boxes(box), torch.tensor([[2.0, 4, 6, 8, 10, 12, 0.5]]))
    last_first = Compose((Yaw(math.pi / 2), FlipY())).points(torch.tensor([[1.0, 0, 0]]))
    torch.testing.assert_close(last_first, torch.tensor([[0.0, -1, 0]]), atol=1e-6, rtol=0)


def test_a_moved_frame_keeps_its_rest_and_drops_the_camera() -> None:
    frame = make_frame()
    moved = Yaw(0.3).frame(frame)
    assert moved.calibration is None
    assert moved.id == frame.id
    assert moved.labels is not None
    assert frame.labels is not None
    assert torch.equal(moved.points.features, frame.points.features)
    assert torch.equal(moved.labels.classes, frame.labels.classes)
    torch.testing.assert_close(moved.labels.boxes.data, Yaw(0.3).boxes(frame.labels.boxes.data))
    empty = replace(make_frame(points=0, boxes=torch.zeros(0, 7)))
    assert len(MOVEMENTS[8].frame(empty).points) == 0
    assert MOVEMENTS[8].frame(replace(empty, labels=None)).labels is None


def test_augmentations_stay_in_their_ranges_and_follow_the_generator() -> None:
    ranges = AugmentationRanges(flip_x=0.3, yaw=(-0.2, 0.4), scale=(0.9, 1.2))
    rng = np.random.default_rng(0)
    drawn = [sample_augmentation(rng, ranges).movements for _ in range(1000)]
    yaws = [m.angle for d in drawn for m in d if isinstance(m, Yaw)]
    scales = [m.factor for d in drawn for m in d if isinstance(m, Scale)]
    assert -0.2 <= min(yaws) < -0.19
    assert 0.39 < max(yaws) <= 0.4
    assert 0.9 <= min(scales) < 0.91
    assert 1.19 < max(scales) <= 1.2
    assert 250 < sum(FlipX() in d for d in drawn) < 350
    assert 450 < sum(FlipY() in d for d in drawn) < 550
    assert sample_augmentation(np.random.default_rng(5), ranges) == sample_augmentation(np.random.default_rng(5), ranges)
    # Whatever is drawn, the generator has moved on by the same amount: an ablated range leaves the rest of the run alone.
    after = []
    for r in (ranges, STILL):
        rng = np.random.default_rng(5)
        sample_augmentation(rng, r)
        after.append(rng.random())
    assert after[0] == after[1]


def test_impossible_ranges_are_refused() -> None:
    for bad in ({"flip_x": 1.5}, {"yaw": (1.0, -1.0)}, {"scale": (0.0, 1.0)}, {"scale": (1.1, 1.0)}):
        with pytest.raises(InvalidInput):
            AugmentationRanges(**bad)  # type: ignore[arg-type]
    with pytest.raises(InvalidInput, match="must be positive"):
        Scale(0.0)


def test_an_example_is_shuffled_cropped_to_the_range_and_repeatable() -> None:
    frame = make_frame()
    assert frame.labels is not None
    example = labeled_example(frame, np.random.default_rng(3), STILL, None, (0.0, -20.0, -3.0, 60.0, 20.0, 1.0))
    assert example.labels is not None
    boxes = frame.labels.boxes.data
    inside = (boxes[:, 0] >= 0) & (boxes[:, 0] < 60) & (boxes[:, 1] >= -20) & (boxes[:, 1] < 20)
    assert 0 < int(inside.sum()) < len(boxes)
    torch.testing.assert_close(example.labels.boxes.data, boxes[inside])
    order = example.points.features[:, 0].argsort()  # features count the points
    assert not torch.equal(example.points.xyz, frame.points.xyz)
    torch.testing.assert_close(example.points.xyz[order], frame.points.xyz)

    again, other = (
        labeled_example(frame, np.random.default_rng(seed), AugmentationRanges(), None, EVERYWHERE) for seed in (3, 4)
    )
    same = labeled_example(frame, np.random.default_rng(3), AugmentationRanges(), None, EVERYWHERE)
    assert torch.equal(again.points.xyz, same.points.xyz)
    assert not torch.equal(again.points.xyz, other.points.xyz)


def test_an_example_of_nothing_is_legal_and_an_unlabeled_one_is_not() -> None:
    empty = make_frame(points=0, boxes=torch.zeros(0, 7))
    example = labeled_example(empty, np.random.default_rng(0), AugmentationRanges(), None, EVERYWHERE)
    assert example.labels is not None
    assert (len(example.points), len(example.labels)) == (0, 0)
    with pytest.raises(InvalidInput, match="cannot be a labeled example"):
        labeled_example(replace(empty, labels=None), np.random.default_rng(0), AugmentationRanges(), None, EVERYWHERE)


def test_sampled_objects_are_pasted_before_the_scene_moves(tmp_path: Path) -> None:
    boxes = torch.tensor([[float(x), float(y), 0.0, 4.0, 2.0, 1.6, 0.4] for x in (10, 20, 30) for y in (-10, 0, 10)])
    cloud = PointCloud(xyz=boxes[:, :3].repeat_interleave(10, 0) + 0.1, features=torch.zeros(90, 1))
    labeled = [Frame(id="gt", points=cloud, labels=Labels.make(boxes, torch.zeros(9)))]
    name = split_fingerprint(["gt"], [labeled[0].labels], classes=("Car",))
    database = build_gt_database(labeled, tmp_path, class_names=("Car",), fingerprint=name)
    bare = make_frame(boxes=boxes[:1], points=300)
    example = labeled_example(bare, np.random.default_rng(0), AugmentationRanges(), GtSampler(database, {"Car": 5}), EVERYWHERE)
    assert example.labels is not None
    assert 1 < len(example.labels) <= 5
    pasted = example.labels.select(example.labels.num_points >= 0)
    assert len(pasted) == len(example.labels) - 1
    assert points_in_boxes_mask(example.points.xyz, pasted.boxes.data).sum(1).tolist() == pasted.num_points.tolist()
