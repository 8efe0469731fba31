"""The box convention on hand values: headings, corners, residual codes, and KITTI's camera frame."""

import math

import pytest
import torch

from upcycle3d.core.boxes import (
    corners_3d,
    corners_bev,
    decode_residuals,
    encode_residuals,
    kitti_camera_to_lidar,
    lidar_to_kitti_camera,
    wrap_angle,
)

# Axes of an ideal KITTI rig: camera x = -lidar y, camera y = -lidar z, camera z = lidar x; the camera 0.27 m ahead, 0.08 m below.
LIDAR_TO_CAMERA = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, -0.08], [1, 0, 0, -0.27], [0, 0, 0, 1]], dtype=torch.float64)


def random_boxes(n: int, seed: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(n, 7, generator=generator, dtype=dtype)
    boxes[:, :3] = boxes[:, :3] * 8 - 4
    boxes[:, 3:6] = boxes[:, 3:6] * 4 + 0.3
    boxes[:, 6] = (boxes[:, 6] * 2 - 1) * 3.1
    return boxes


def test_corners_run_counter_clockwise_from_the_front_left_one():
    boxes = torch.tensor([[10.0, 5, 1, 4, 2, 1.5, 0], [10, 5, 1, 4, 2, 1.5, math.pi / 2]])
    bev = corners_bev(boxes)
    assert torch.allclose(bev[0], torch.tensor([[12.0, 6], [8, 6], [8, 4], [12, 4]]))
    # Heading left (+y): the front is at larger y, the left side at smaller x.
    assert torch.allclose(bev[1], torch.tensor([[9.0, 7], [9, 3], [11, 3], [11, 7]]), atol=1e-6)
    both = corners_3d(boxes)
    assert both.shape == (2, 8, 3)
    assert torch.equal(both[:, :4, :2], bev)
    assert torch.equal(both[:, 4:, :2], bev)
    assert both[..., :4, 2].unique().tolist() == [0.25]
    assert both[..., 4:, 2].unique().tolist() == [1.75]


def test_corners_of_any_box_enclose_its_area_and_keep_its_center():
    boxes = random_boxes(20, seed=1)
    x, y = corners_bev(boxes).unbind(-1)
    area = (x * y.roll(-1, 1) - y * x.roll(-1, 1)).sum(1) / 2  # positive for counter-clockwise corners
    assert torch.allclose(area, boxes[:, 3] * boxes[:, 4])
    assert torch.allclose(corners_3d(boxes).mean(1), boxes[:, :3])
    assert corners_3d(boxes[:0]).shape == (0, 8, 3)


def test_residuals_are_inverse_in_both_directions():
    boxes, anchors = random_boxes(50, seed=2), random_boxes(50, seed=3)
    codes = encode_residuals(boxes, anchors)
    assert torch.allclose(decode_residuals(codes, anchors), boxes, atol=1e-12)
    assert torch.allclose(encode_residuals(decode_residuals(codes, anchors), anchors), codes, atol=1e-12)
    assert torch.equal(encode_residuals(anchors, anchors), torch.zeros_like(anchors))


def test_residual_of_a_hand_example():
    anchor = torch.tensor([10.0, 0, 1, 4, 3, 2, 0])  # BEV diagonal 5
    box = torch.tensor([12.5, -1.0, 2.0, 4 * math.e, 3, 1, 0.5])
    expected = torch.tensor([0.5, -0.2, 0.5, 1.0, 0.0, -math.log(2), 0.5])
    assert torch.allclose(encode_residuals(box, anchor), expected, atol=1e-6)


def test_a_box_without_size_has_a_finite_code():
    assert torch.isfinite(encode_residuals(torch.zeros(1, 7), torch.ones(1, 7))).all()


def test_kitti_hand_example():
    # A car 20 m ahead and 2 m to the right of the camera, seen from behind: rotation_y -pi/2 looks along the camera's +z.
    box = kitti_camera_to_lidar(
        torch.tensor([[2.0, 1.65, 20.0]]), torch.tensor([[1.5, 1.6, 3.9]]), torch.tensor([-math.pi / 2]), LIDAR_TO_CAMERA
    )
    assert torch.allclose(box, torch.tensor([[20.27, -2.0, -1.73 + 0.75, 3.9, 1.6, 1.5, 0.0]]), atol=1e-5)
    # rotation_y 0 looks along camera x, to the right: yaw -pi/2.
    right = kitti_camera_to_lidar(torch.zeros(1, 3), torch.ones(1, 3), torch.zeros(1), LIDAR_TO_CAMERA)
    assert right[0, 6].item() == pytest.approx(-math.pi / 2)


def test_kitti_camera_round_trip():
    turn = torch.tensor(0.02, dtype=torch.float64)  # no rig is perfectly straight; a roll of the camera keeps z up
    rotation = torch.eye(4, dtype=torch.float64)
    rotation[:3, :3] = torch.tensor([[turn.cos(), -turn.sin(), 0], [turn.sin(), turn.cos(), 0], [0, 0, 1]])
    matrix = LIDAR_TO_CAMERA @ rotation
    boxes = random_boxes(40, seed=4, dtype=torch.float32)
    back = kitti_camera_to_lidar(*lidar_to_kitti_camera(boxes, matrix), matrix)
    assert (back - boxes).abs().max() < 1e-6
    location, dimensions, rotation_y = lidar_to_kitti_camera(boxes, matrix)
    again = lidar_to_kitti_camera(kitti_camera_to_lidar(location, dimensions, rotation_y, matrix), matrix)
    for found, expected in zip(again, (location, dimensions, rotation_y), strict=True):
        assert (found - expected).abs().max() < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_wrapped_angles_lie_in_one_turn_and_look_the_same_way(dtype):
    pi = torch.tensor(math.pi, dtype=dtype)
    seam = torch.stack([pi, -pi, 3 * pi, torch.nextafter(pi, pi + 1), torch.nextafter(pi, pi - 1), torch.nextafter(-pi, -pi - 1)])
    angles = torch.cat([seam, torch.linspace(-20, 20, 401, dtype=dtype), torch.tensor([-1e-9, 0.0], dtype=dtype)])
    wrapped = wrap_angle(angles)
    assert bool((wrapped >= -pi).all())
    assert bool((wrapped < pi).all())
    assert torch.allclose(wrapped.sin(), angles.sin(), atol=2e-6)
    assert torch.allclose(wrapped.cos(), angles.cos(), atol=2e-6)
    assert wrap_angle(pi[None]).item() == wrap_angle(-pi[None]).item() == -pi.item()


def test_codes_of_an_untrained_network_give_finite_boxes():
    anchors = torch.tensor([[0.0, 0, 0, 3.9, 1.6, 1.56, 0]]).expand(3, 7)
    codes = torch.tensor([[2e7] * 7, [-2e7] * 7, [200.0] * 7])
    boxes = decode_residuals(codes, anchors)
    assert torch.isfinite(boxes).all()
    assert (boxes[:, 3:6] > 0).all()
    assert boxes[:, 3].max() < 245
