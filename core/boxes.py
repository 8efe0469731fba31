"""The one box convention, its geometry, its coders, and conversions at the edge of the toolkit.

A box is (x, y, z, dx, dy, dz, yaw), metres and radians, centre of the box, LiDAR frame:

              x forward                      seen from above, yaw = +30 degrees
                  ^                                     ^ x
                  |                               .--.  |
       y left <---o  z up (towards you)          /  / yaw, counter-clockwise from +x towards +y
                                                /  /    |
    dx = length, along the heading             '--'     |
    dy = width, across it              y <--------------o
    dz = height

Examples: yaw 0 looks along +x, yaw +pi/2 along +y (left), yaw -pi/2 along -y (right). Yaw is kept in [-pi, pi).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_SIZE_CODE = math.log(1000 / 16)


def wrap_angle(angle: Tensor) -> Tensor:
    """``angle`` (radians) moved by whole turns into [-pi, pi)."""
    wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    return torch.where(wrapped >= math.pi, torch.full_like(wrapped, -math.pi), wrapped)  # float rounding at the seam


def rotate_z(xyz: Tensor, angle: Tensor) -> Tensor:
    """Points (..., 3) turned about the vertical axis by ``angle`` (...) rad, counter-clockwise from above."""
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y, z = xyz.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos, z], -1)


def corners_bev(boxes: Tensor) -> Tensor:
    """Corners seen from above: (N, 7) -> (N, 4, 2) x, y, counter-clockwise, starting front left."""
    signs = boxes.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = boxes[:, None, 3:5] * signs  # (N, 4, 2)
    cos, sin = torch.cos(boxes[:, 6:7]), torch.sin(boxes[:, 6:7])
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return torch.stack([x, y], -1) + boxes[:, None, :2]


def corners_3d(boxes: Tensor) -> Tensor:
    """All corners: (N, 7) -> (N, 8, 3); the four of ``corners_bev`` at the bottom, then the same four at the top."""
    bev = corners_bev(boxes)
    half = boxes[:, None, 5:6] / 2
    z = boxes[:, None, 2:3].expand(-1, 4, 1)
    return torch.cat([torch.cat([bev, z - half], -1), torch.cat([bev, z + half], -1)], 1)


def encode_residuals(boxes: Tensor, anchors: Tensor) -> Tensor:
    """SECOND's residual code of ``boxes`` relative to ``anchors``, both (..., 7) -> (..., 7).

    x and y offsets over the anchor's BEV diagonal, z over its height, log size ratios, yaw difference (not wrapped).
    Source: Yan et al., SECOND (2018), section 3.2; OpenPCDet ``box_coder_utils.ResidualCoder``.
    """
    diagonal = torch.hypot(anchors[..., 3], anchors[..., 4])
    return torch.stack(
        [
            (boxes[..., 0] - anchors[..., 0]) / diagonal,
            (boxes[..., 1] - anchors[..., 1]) / diagonal,
            (boxes[..., 2] - anchors[..., 2]) / anchors[..., 5],
            torch.log(boxes[..., 3].clamp_min(1e-5) / anchors[..., 3]),
            torch.log(boxes[..., 4].clamp_min(1e-5) / anchors[..., 4]),
            torch.log(boxes[..., 5].clamp_min(1e-5) / anchors[..., 5]),
            boxes[..., 6] - anchors[..., 6],
        ],
        -1,
    )


def decode_residuals(codes: Tensor, anchors: Tensor) -> Tensor:
    """The inverse of ``encode_residuals``: codes and anchors (..., 7) -> boxes (..., 7). Yaw is not wrapped.

    A size is at most 62.5 times the anchor's and at least a 62.5th of it, torchvision's limit for boxes in pictures: a network that has
    hardly been trained answers with codes whose exponential is infinite, and its boxes shall be absurd but finite.
    """
    sizes = codes[..., 3:6].clamp(-LARGEST_SIZE_CODE, LARGEST_SIZE_CODE).exp()
    diagonal = torch.hypot(anchors[..., 3], anchors[..., 4])
    return torch.stack(
        [
            codes[..., 0] * diagonal + anchors[..., 0],
            codes[..., 1] * diagonal + anchors[..., 1],
            codes[..., 2] * anchors[..., 5] + anchors[..., 2],
            sizes[..., 0] * anchors[..., 3],
            sizes[..., 1] * anchors[..., 4],
            sizes[..., 2] * anchors[..., 5],
            codes[..., 6] + anchors[..., 6],
        ],
        -1,
    )


def kitti_camera_to_lidar(location: Tensor, dimensions: Tensor, rotation_y: Tensor, lidar_to_camera: Tensor) -> Tensor:
    """KITTI label fields -> boxes (N, 7) in the LiDAR frame, float32.

    location: (N, 3) m, rectified camera frame, centre of the *bottom* face. dimensions: (N, 3) height, width, length m,
    in KITTI's file order. rotation_y: (N,) rad about the camera's y (down), 0 along camera x.
    lidar_to_camera: (4, 4).
    """
    camera_to_lidar = torch.linalg.inv(lidar_to_camera.double())
    bottom = location.double() @ camera_to_lidar[:3, :3].T + camera_to_lidar[:3, 3]
    h, w, length = dimensions.double().unbind(-1)
    yaw = wrap_angle(-math.pi / 2 - rotation_y.double())
    return torch.stack([bottom[:, 0], bottom[:, 1], bottom[:, 2] + h / 2, length, w, h, yaw], -1).float()


def lidar_to_kitti_camera(boxes: Tensor, lidar_to_camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The inverse of ``kitti_camera_to_lidar``: boxes (N, 7) -> location (N, 3), dimensions (N, 3) h w l, rotation_y (N,), float64."""
    b = boxes.double()
    bottom = torch.stack([b[:, 0], b[:, 1], b[:, 2] - b[:, 5] / 2], -1)
    matrix = lidar_to_camera.double()
    location = bottom @ matrix[:3, :3].T + matrix[:3, 3]
    rotation_y = wrap_angle(-math.pi / 2 - b[:, 6])
    return location, b[:, [5, 4, 3]], rotation_y
