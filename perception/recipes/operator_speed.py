"""Calls of the CPU operators on made-up scenes of real size: voxelization, rotated IoU and NMS, PV-RCNN's point operators.

Read next: `speed.py`, which measures them.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ...ops.ball_query import Neighbors, ball_query
from ...ops.bev_interpolate import bev_interpolate
from ...ops.farthest_point import farthest_point_sample
from ...ops.iou3d import iou_3d, iou_bev
from ...ops.nms import nms_rotated
from ...ops.segment_max import segment_max
from ...ops.voxelize import voxelize

Calls = dict[str, Callable[[], object]]
"""What is measured, by the name that the table shows."""


def operator_calls() -> Calls:
    """Every operator at the sizes of a full-size detector: 120,000 points, 4,096 boxes, 2,048 keypoints."""
    points = _scan(120_000)
    anchors, objects = _clustered_boxes(4096, 60, spread=0.5, seed=1), _clustered_boxes(512, 60, spread=0.5, seed=1)
    tight, loose = _clustered_boxes(4096, 60, spread=0.2, seed=2), _clustered_boxes(4096, 300, spread=0.6, seed=3)
    scores = torch.rand(4096, generator=torch.Generator().manual_seed(4))
    around = (-75.2, -75.2, -2.0, 75.2, 75.2, 4.0)

    def voxels(limit: int) -> object:
        return voxelize(points, point_range=around, voxel_size=(0.1, 0.1, 0.15), max_points=5, max_voxels=limit)

    return {
        "voxelize 120,000 points": lambda: voxels(150_000),
        "voxelize 120,000 points, over the limit": lambda: voxels(20_000),
        "BEV IoU 4096 x 512": lambda: iou_bev(anchors, objects),
        "3D IoU 4096 x 512": lambda: iou_3d(anchors, objects),
        "NMS 4096, 0.7, first 100": lambda: nms_rotated(tight, scores, 0.7, post_max=100),
        "NMS 4096, 0.7, tight clusters": lambda: nms_rotated(tight, scores, 0.7),
        "NMS 4096, 0.7, loose clusters": lambda: nms_rotated(loose, scores, 0.7),
        "NMS 4096, 0.1, loose clusters": lambda: nms_rotated(loose, scores, 0.1),
        **_point_operator_calls(),
    }


def _scan(points: int) -> Tensor:
    """(points, 4) x, y, z, intensity of a spinning 64-beam LiDAR 1.73 m above flat ground inside a wavy wall, beam by beam."""
    generator = torch.Generator().manual_seed(0)
    turns = points // 64 + 1
    azimuth = torch.linspace(0, 2 * math.pi, turns).repeat(64)
    elevation = torch.deg2rad(torch.linspace(2, -24.8, 64)).repeat_interleave(turns)
    wall = 35 + 20 * torch.sin(3 * azimuth) + 5 * torch.sin(40 * azimuth)
    ground = torch.where(elevation < 0, 1.73 / torch.sin(-elevation).clamp_min(1e-3), 1e3)
    distance = torch.minimum(wall / elevation.cos(), ground) + 0.02 * torch.randn(len(wall), generator=generator)
    x, y = distance * elevation.cos() * azimuth.cos(), distance * elevation.cos() * azimuth.sin()
    return torch.stack([x, y, distance * elevation.sin(), torch.rand(len(wall), generator=generator)], 1)[:points]


def _clustered_boxes(count: int, objects: int, *, spread: float, seed: int) -> Tensor:
    """(count, 7) car-sized boxes around `objects` places on 70 x 80 m, like the boxes that an anchor head predicts.

    `spread` is the standard deviation of the center in meters; heading and size vary along with it.
    """
    generator = torch.Generator().manual_seed(seed)
    center = torch.rand(objects, 3, generator=generator) * torch.tensor([70.0, 80.0, 0.5]) - torch.tensor([0.0, 40.0, 1.0])
    heading = 2 * math.pi * torch.rand(objects, 1, generator=generator)
    place = torch.cat([center, torch.tensor([3.9, 1.6, 1.56]).expand(objects, 3), heading], 1)
    noise = torch.randn(count, 7, generator=generator) * spread * torch.tensor([1, 1, 0.3, 0.5, 0.2, 0.2, 0.3])
    return (place[torch.randint(objects, (count,), generator=generator)] + noise).clamp_min(
        torch.tensor([-math.inf, -math.inf, -math.inf, 0.5, 0.5, 0.5, -math.inf])
    )


def _cells(points: Tensor, stride: int) -> Tensor:
    """(M, 3) int64 z, y, x of the cells of 0.05 x 0.05 x 0.1 m times `stride` that hold points, ascending."""
    size = stride * torch.tensor([0.1, 0.05, 0.05])
    return torch.unique(((points[:, :3].flip(1) - torch.tensor([-3.0, -40, 0])) / size).floor().long(), dim=0)


def _point_operator_calls() -> Calls:
    """The point operators at the size of PV-RCNN on KITTI: a fifth of a scan, in front of the vehicle, 2,048 keypoints."""
    points = _scan(120_000)[:, :3]
    points = points[(points[:, 0] > 0) & (points[:, 1].abs() < 0.75 * points[:, 0]) & (points[:, 2] > -3) & (points[:, 2] < 1)]
    points = points.contiguous()
    scene = (0, len(points))
    keypoints, key_scene = points[farthest_point_sample(points, scene, 2048)[0]], (0, 2048)
    # Radii and limits of the raw points and of the four sparse stages. Occupied cells replace what strided convolutions leave.
    sources = [(points, (0.4, 0.8), (16, 16))]
    for stride, radii, limits in (
        (1, (0.4, 0.8), (16, 16)),
        (2, (0.8, 1.2), (16, 32)),
        (4, (1.2, 2.4), (16, 32)),
        (8, (2.4, 4.8), (16, 32)),
    ):
        center = (_cells(points, stride).flip(1) + 0.5) * torch.tensor([0.05, 0.05, 0.1]) * stride + torch.tensor([0.0, -40, -3])
        sources.append((center, radii, limits))
    boxes = _clustered_boxes(128, 40, spread=0.3, seed=5)
    boxes[:, :3] = keypoints[::16]  # proposals stand where points are
    steps = (torch.arange(6) + 0.5) / 6 - 0.5
    # The grid is not rotated with the box, unlike in PV-RCNN. That hardly changes how many neighbors a point has.
    grid = (torch.cartesian_prod(steps, steps, steps) * boxes[:, None, 3:6] + boxes[:, None, :3]).flatten(0, 1)

    def all_sources() -> list[list[Neighbors]]:
        return [ball_query(keypoints, key_scene, s, (0, len(s)), radii, limits) for s, radii, limits in sources]

    generator = torch.Generator().manual_seed(6)
    neighbors = all_sources()[-1][1]
    values = torch.randn(len(neighbors.index), 64, generator=generator, requires_grad=True)
    coarse = _cells(points, 8)
    coords = torch.cat([torch.zeros(len(coarse), 1, dtype=torch.int64), coarse], 1).int()
    coords[:, 1] //= 3  # the two levels that are left after the last convolution
    coords = torch.unique(coords, dim=0)
    features = torch.randn(len(coords), 128, generator=generator, requires_grad=True)
    positions = (keypoints[:, :2] + torch.tensor([0.0, 40])) / 0.4

    def interpolate() -> Tensor:
        return bev_interpolate(features, coords, (2, 200, 176), positions, key_scene, 1)

    return {
        f"2,048 farthest of {len(points):,}": lambda: farthest_point_sample(points, scene, 2048),
        "balls, 2,048 in 5 sources": all_sources,
        "balls, 27,648 in 2,048": lambda: ball_query(grid, (0, len(grid)), keypoints, key_scene, (0.8, 1.6), (16, 16)),
        f"segment max {len(values):,} x 64": lambda: segment_max(values, neighbors.starts),
        "segment max and gradient": lambda: segment_max(values, neighbors.starts).sum().backward(),
        "BEV at 2,048 points, 128 x 2": interpolate,
        "BEV at points and gradient": lambda: interpolate().sum().backward(),
    }
