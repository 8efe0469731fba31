"""The one box convention, its geometry, its coders, and conversions at the edge of the toolkit.

A box is (x, y, z, dx, dy, dz, yaw), meters and radians, center of the box, LiDAR frame:

              x forward                      bird's-eye view (BEV), yaw = +30 degrees
                  ^                                     ^ x
                  |                               .--.  |
       y left <---o  z up (towards you)          /  / yaw, counter-clockwise from +x towards +y
                                                /  /    |
    dx = length, along the heading             '--'     |
    dy = width, across it              y <--------------o
    dz = height

Examples: yaw 0 looks along +x, yaw +pi/2 along +y (left), yaw -pi/2 along -y (right). Datasets are read with yaw in [-pi, pi);
functions accept any number of turns.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

LARGEST_SIZE_CODE = math.log(1000 / 16)
"""Largest size residual that `decode_residuals` uses: a factor of 62.5, torchvision's limit for boxes in pictures."""


def wrap_angle(angle: Tensor) -> Tensor:
    """Move angles by whole turns into [-pi, pi).

    Args:
        angle: Angles of any shape, in radians.

    Returns:
        Angles of the same shape that look the same way.
    """
    wrapped = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
    return torch.where(wrapped >= math.pi, torch.full_like(wrapped, -math.pi), wrapped)  # float rounding at the seam


def rotate_z(xyz: Tensor, angle: Tensor) -> Tensor:
    """Turn points about the vertical axis.

    Args:
        xyz: (..., 3) points.
        angle: (...) angles in radians, counter-clockwise in BEV.

    Returns:
        (..., 3) points.
    """
    cos, sin = torch.cos(angle), torch.sin(angle)
    x, y, z = xyz.unbind(-1)
    return torch.stack([x * cos - y * sin, x * sin + y * cos, z], -1)


def corners_bev(boxes: Tensor) -> Tensor:
    """Find the four corners of boxes in BEV.

    Args:
        boxes: (N, 7) boxes.

    Returns:
        (N, 4, 2) x, y in meters, counter-clockwise, starting front left.
    """
    signs = boxes.new_tensor([[1, 1], [-1, 1], [-1, -1], [1, -1]]) / 2
    local = boxes[:, None, 3:5] * signs  # (N, 4, 2)
    cos, sin = torch.cos(boxes[:, 6:7]), torch.sin(boxes[:, 6:7])
    x = local[..., 0] * cos - local[..., 1] * sin
    y = local[..., 0] * sin + local[..., 1] * cos
    return torch.stack([x, y], -1) + boxes[:, None, :2]


def corners_3d(boxes: Tensor) -> Tensor:
    """Find the eight corners of boxes.

    Args:
        boxes: (N, 7) boxes.

    Returns:
        (N, 8, 3) x, y, z in meters: the four corners of `corners_bev` at the bottom, then the same four at the top.
    """
    bev = corners_bev(boxes)
    half = boxes[:, None, 5:6] / 2
    z = boxes[:, None, 2:3].expand(-1, 4, 1)
    return torch.cat([torch.cat([bev, z - half], -1), torch.cat([bev, z + half], -1)], 1)


def encode_residuals(boxes: Tensor, anchors: Tensor) -> Tensor:
    """Encode boxes relative to anchors, the way SECOND does.

    The code is the x and y offsets divided by the anchor's BEV diagonal, the z offset divided by its height, the logarithms of the
    size ratios, and the difference of yaw (not wrapped). Source: Yan et al., SECOND (2018), section 3.2; OpenPCDet,
    `box_coder_utils.ResidualCoder`.

    Args:
        boxes: (..., 7) boxes. A size below 1e-5 m counts as 1e-5 m, so that its logarithm is finite.
        anchors: (..., 7) anchors.

    Returns:
        (..., 7) codes.
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
    """Decode boxes, the inverse of `encode_residuals`. Yaw is not wrapped.

    A size is at most 62.5 times the anchor's and at least a 62.5th of it (`LARGEST_SIZE_CODE`): a network that has hardly been
    trained answers with codes whose exponential is infinite, and its boxes shall be absurd but finite.

    Args:
        codes: (..., 7) codes.
        anchors: (..., 7) anchors.

    Returns:
        (..., 7) boxes.
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
    """Turn the fields of KITTI labels into boxes.

    Args:
        location: (N, 3) center of the *bottom* face in the rectified camera frame, in meters.
        dimensions: (N, 3) height, width, length in meters, in the order of KITTI's files.
        rotation_y: (N,) rotation about the camera's y axis (down) in radians, 0 along camera x.
        lidar_to_camera: (4, 4) LiDAR frame to rectified camera frame.

    Returns:
        (N, 7) float32 boxes in the LiDAR frame, yaw in [-pi, pi).
    """
    camera_to_lidar = torch.linalg.inv(lidar_to_camera.double())
    bottom = location.double() @ camera_to_lidar[:3, :3].T + camera_to_lidar[:3, 3]
    h, w, length = dimensions.double().unbind(-1)
    yaw = wrap_angle(-math.pi / 2 - rotation_y.double())
    return torch.stack([bottom[:, 0], bottom[:, 1], bottom[:, 2] + h / 2, length, w, h, yaw], -1).float()


def lidar_to_kitti_camera(boxes: Tensor, lidar_to_camera: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Turn boxes into the fields of KITTI labels, the inverse of `kitti_camera_to_lidar`.

    Args:
        boxes: (N, 7) boxes in the LiDAR frame.
        lidar_to_camera: (4, 4) LiDAR frame to rectified camera frame.

    Returns:
        location: (N, 3) float64 center of the bottom face in the camera frame, in meters.
        dimensions: (N, 3) float64 height, width, length in meters.
        rotation_y: (N,) float64 in [-pi, pi).
    """
    b = boxes.double()
    bottom = torch.stack([b[:, 0], b[:, 1], b[:, 2] - b[:, 5] / 2], -1)
    matrix = lidar_to_camera.double()
    location = bottom @ matrix[:3, :3].T + matrix[:3, 3]
    rotation_y = wrap_angle(-math.pi / 2 - b[:, 6])
    return location, b[:, [5, 4, 3]], rotation_y
