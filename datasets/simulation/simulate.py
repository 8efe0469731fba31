"""One simulated frame: a random street, one turn of the sensor over it, and the labels a perfect annotator would give.

Frame i depends only on the domain, the seed and i, so any number of workers and any resumed run write the same bytes.
The label fields follow KITTI: truncation and 2D boxes by a virtual camera, occlusion from the share of an object's rays
that reach it. ``docs/simulation.md`` compares the result with real scans.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from ...perception.boxes import corners_3d
from ...perception.structures import Calibration, Frame, InvalidInput, Labels, PointCloud
from .places import CLASS_NAMES, Domain
from .raycast import Z, cast
from .sensors import Sensor
from .world import build_world

View = Literal["camera", "full"]

IMAGE_SIZE = (1242, 375)
FOCAL, CENTRE_U, CENTRE_V = 720.0, 610.0, 175.0
_CAMERA_FORWARD, _CAMERA_BELOW = 0.27, 0.08  # m, camera in front of and below the LiDAR, as on KITTI's roof
_VISIBLE_SHARES = (0.8, 0.5, 0.15)  # at least this share of rays arrives: fully visible, partly occluded, largely occluded


@dataclass(frozen=True, kw_only=True, repr=False)
class SimulatedFrame:
    """A frame with what only a simulator knows. Arrays follow the order of ``frame.labels``.

    class_names: what ``frame.labels.classes`` counts. boxes_2d: (N, 4) float64 left, top, right, bottom pixels, clipped to the
    picture; NaN for an object outside it. truncation: (N,) share of the 2D box outside the picture. visible: (N,) share of the
    object's rays that reach it. occlusion: (N,) int64 KITTI level 0 to 3. beams: (P,) int32 beam of each point.
    objects: (P,) int64 index of the label each point lies on, -1 for none.
    """

    frame: Frame
    class_names: tuple[str, ...]
    boxes_2d: np.ndarray
    truncation: np.ndarray
    visible: np.ndarray
    occlusion: np.ndarray
    beams: np.ndarray
    objects: np.ndarray


def virtual_camera() -> Calibration:
    """A camera like KITTI's left colour camera, looking along x: 81 degrees wide, 1242 x 375 pixels."""
    lidar_to_camera = torch.tensor(
        [[0, -1, 0, 0], [0, 0, -1, -_CAMERA_BELOW], [1, 0, 0, -_CAMERA_FORWARD], [0, 0, 0, 1]], dtype=torch.float64
    )
    projection = torch.tensor([[FOCAL, 0, CENTRE_U, 0], [0, FOCAL, CENTRE_V, 0], [0, 0, 1, 0]], dtype=torch.float64)
    return Calibration(lidar_to_camera=lidar_to_camera, projection=projection, image_size=IMAGE_SIZE)


def _project(points: np.ndarray, calibration: Calibration) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """LiDAR points (..., 3) -> u, v in pixels and depth in m; u and v mean nothing where the depth is not positive."""
    camera = points @ calibration.lidar_to_camera.numpy()[:3, :3].T + calibration.lidar_to_camera.numpy()[:3, 3]
    depth = camera[..., 2]
    safe = np.where(depth > 1e-3, depth, 1.0)
    return FOCAL * camera[..., 0] / safe + CENTRE_U, FOCAL * camera[..., 1] / safe + CENTRE_V, depth


def in_picture(points: np.ndarray, calibration: Calibration) -> np.ndarray:
    """(N,) bool: which LiDAR points (N, 3) the camera sees, the rule behind KITTI's reduced scans."""
    u, v, depth = _project(points, calibration)
    return (depth > 0.1) & (u >= 0) & (u < IMAGE_SIZE[0]) & (v >= 0) & (v < IMAGE_SIZE[1])


def _picture_boxes(boxes: np.ndarray, calibration: Calibration) -> tuple[np.ndarray, np.ndarray]:
    """2D boxes (N, 4) clipped to the picture, NaN where none is left, and truncation (N,)."""
    corners = corners_3d(torch.from_numpy(boxes)).numpy()
    corners[..., 0] = np.maximum(corners[..., 0], _CAMERA_FORWARD + 0.1)  # what reaches behind the camera is cut at its plane
    u, v, _ = _project(corners, calibration)
    whole = np.stack([u.min(1), v.min(1), u.max(1), v.max(1)], 1)
    limit = np.array([IMAGE_SIZE[0] - 1, IMAGE_SIZE[1] - 1] * 2, np.float64)
    clipped = np.clip(whole, 0, limit)
    width, height = clipped[:, 2] - clipped[:, 0], clipped[:, 3] - clipped[:, 1]
    area = (whole[:, 2] - whole[:, 0]) * (whole[:, 3] - whole[:, 1])
    outside = (width <= 0) | (height <= 0) | (boxes[:, 0] <= _CAMERA_FORWARD)
    clipped[outside] = np.nan
    return clipped, np.where(outside, 1.0, 1 - width * height / np.maximum(area, 1e-9))


def _difficulty(boxes_2d: np.ndarray, occlusion: np.ndarray, truncation: np.ndarray) -> np.ndarray:
    """(N,) int64: KITTI's easy 0, moderate 1, hard 2, or -1; by height in pixels, occlusion and truncation."""
    height = np.nan_to_num(boxes_2d[:, 3] - boxes_2d[:, 1])
    level = np.full(len(height), -1, np.int64)
    for index, (least, most_occluded, most_truncated) in reversed(list(enumerate(((40, 0, 0.15), (25, 1, 0.30), (25, 2, 0.50))))):
        level[(height >= least) & (occlusion <= most_occluded) & (truncation <= most_truncated)] = index
    return level


def _window(sensor: Sensor, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Columns and beams to fire: all of them, or those that can reach the picture (a little more; the points are cut exactly)."""
    columns, beams = np.arange(sensor.azimuths), np.arange(len(sensor.elevations))
    if view == "full":
        return columns, beams
    azimuth = np.abs(2 * np.pi * columns / sensor.azimuths - np.pi)
    wide = np.arctan(max(CENTRE_U, IMAGE_SIZE[0] - CENTRE_U) / FOCAL) + np.deg2rad(1)
    down = np.arctan((IMAGE_SIZE[1] - CENTRE_V) / FOCAL) + np.deg2rad(1)
    return columns[azimuth < wide], beams[np.deg2rad(np.array(sensor.elevations)) > -down]


def simulate_frame(domain: Domain, *, seed: int, index: int, view: View) -> SimulatedFrame:
    """Frame ``index`` of the dataset that ``domain`` and ``seed`` define.

    view "full": the whole turn, labels of all objects with a point. "camera": only the points the virtual camera sees, and
    labels of the objects in its picture; these points are among those of the full turn, bit by bit.
    Coordinates are the sensor's: the ground lies at about z = -domain.sensor.height. Raises ``InvalidInput`` for another view
    or a negative seed or index.
    """
    if view not in ("camera", "full"):
        raise InvalidInput(f"view must be 'camera' or 'full', found {view!r}")
    if seed < 0 or index < 0:
        raise InvalidInput(f"seed and index must not be negative, found {seed} and {index}")
    street, rays = np.random.SeedSequence([seed, index]).spawn(2)
    world = build_world(domain.place, np.random.default_rng(street))
    parts, boxes = world.parts.copy(), world.boxes.copy()
    parts[:, Z] -= domain.sensor.height
    boxes[:, 2] -= domain.sensor.height

    columns, beams = _window(domain.sensor, view)
    hits = cast(
        parts,
        world.waves,
        len(boxes),
        domain.sensor,
        seed=int(rays.generate_state(1, np.uint64)[0]),
        columns=columns,
        beams=beams,
    )
    calibration = virtual_camera()
    points, owners, rings = hits.points, hits.objects, hits.beams
    if view == "camera":
        seen = in_picture(points[:, :3].astype(np.float64), calibration)
        points, owners, rings = points[seen], owners[seen], rings[seen]

    num_points = np.bincount(owners[owners >= 0], minlength=len(boxes))
    boxes_2d, truncation = _picture_boxes(boxes, calibration)
    keep = num_points > 0
    if view == "camera":
        keep &= np.isfinite(boxes_2d[:, 0])
    number = np.full(len(boxes) + 1, -1, np.int64)  # old index -> index among the kept; the last entry serves owner -1
    number[:-1][keep] = np.arange(keep.sum())
    visible = (hits.visible / np.maximum(hits.reachable, 1))[keep]
    occlusion = (visible[:, None] < np.array(_VISIBLE_SHARES)).sum(1)
    boxes_2d, truncation = boxes_2d[keep], truncation[keep]
    labels = Labels.make(
        torch.from_numpy(boxes[keep]).float(),
        torch.from_numpy(world.classes[keep]),
        num_points=torch.from_numpy(num_points[keep]),
        difficulty=torch.from_numpy(_difficulty(boxes_2d, occlusion, truncation)),
    )
    cloud = PointCloud(xyz=torch.from_numpy(points[:, :3].copy()), features=torch.from_numpy(points[:, 3:].copy()))
    return SimulatedFrame(
        frame=Frame(id=f"{index:06d}", points=cloud, labels=labels, calibration=calibration),
        class_names=CLASS_NAMES,
        boxes_2d=boxes_2d,
        truncation=truncation,
        visible=visible,
        occlusion=occlusion,
        beams=rings,
        objects=number[owners],
    )
