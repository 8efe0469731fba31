"""One simulated frame: a random street, one turn of the sensor over it, and the labels that a perfect annotator would give.

Frame i depends only on the domain, the seed and i, so any number of workers and any resumed run write the same bytes. The label fields follow KITTI:
truncation and 2D boxes by a virtual camera, occlusion from the share of an object's rays that reach it. docs/simulation.md compares the result
with real scans. Read next: `world.py` for the street, `raycast.py` for the rays.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ...core.boxes import lidar_to_kitti_camera, wrap_angle
from ...core.errors import InvalidInput
from ...core.frame import Calibration, Frame
from ...core.structures import Labels, PointCloud
from ..kitti import KITTI_CLASSES, with_point_counts
from ..kitti_text import KittiObjects, labels_from_kitti, project_boxes
from .places import ALL_CLASS_NAMES, Domain
from .raycast import Z, cast
from .sensors import Sensor
from .world import World, build_world

View = Literal["camera", "full"]

IMAGE_SIZE = (1242, 375)
FOCAL, CENTER_U, CENTER_V = 720.0, 610.0, 175.0
_CAMERA_FORWARD, _CAMERA_BELOW = 0.27, 0.08  # m, camera in front of and below the LiDAR, as on KITTI's roof
# At least this share of an object's rays arrives: KITTI's "fully visible", "partly occluded", "largely occluded"; else "unknown".
_VISIBLE_SHARES = (0.9, 0.5, 0.1)


@dataclass(frozen=True, kw_only=True, repr=False)
class SimulatedFrame:
    """A frame with what only a simulator knows. `objects` and `visible` follow the order of `frame.labels`."""

    frame: Frame
    """Points, labels and calibration, in the sensor frame."""
    class_names: tuple[str, ...]
    """Names of the classes that `frame.labels.classes` counts."""
    objects: KittiObjects
    """The labels in KITTI's fields. Outside the picture the 2D box is NaN and truncation is 1."""
    visible: Tensor
    """(N,) float64, share of the object's rays that reach it."""
    beams: Tensor
    """(P,) int64 beam of each point."""
    owners: Tensor
    """(P,) int64 label that each point lies on, or -1."""

    @property
    def occlusion(self) -> Tensor:
        """(N,) int64: KITTI's 0 fully visible, 1 partly occluded, 2 largely occluded, 3 unknown."""
        return self.objects.occluded

    def in_picture(self) -> Tensor:
        """(N,) bool: which objects the virtual camera sees, at least in part."""
        return self.objects.bbox.isfinite().all(1)


def virtual_camera() -> Calibration:
    """A camera like KITTI's left color camera, which looks along x: 81 degrees wide, 1242 x 375 pixels."""
    lidar_to_camera = torch.tensor(
        [[0, -1, 0, 0], [0, 0, -1, -_CAMERA_BELOW], [1, 0, 0, -_CAMERA_FORWARD], [0, 0, 0, 1]], dtype=torch.float64
    )
    projection = torch.tensor([[FOCAL, 0, CENTER_U, 0], [0, FOCAL, CENTER_V, 0], [0, 0, 1, 0]], dtype=torch.float64)
    return Calibration(lidar_to_camera=lidar_to_camera, projection=projection, image_size=IMAGE_SIZE)


def _in_picture(xyz: np.ndarray, calibration: Calibration) -> np.ndarray:
    """(...) bool: which LiDAR points (..., 3) the camera sees; the rule of `kitti.crop_to_camera`, without torch's threads."""
    matrix, projection = calibration.lidar_to_camera.numpy(), calibration.projection.numpy()
    image = (xyz @ matrix[:3, :3].T + matrix[:3, 3]) @ projection[:, :3].T + projection[:, 3]
    u, v, depth = image[..., 0], image[..., 1], image[..., 2]
    width, height = calibration.image_size
    return (depth > 0) & (u >= 0) & (u < width * depth) & (v >= 0) & (v < height * depth)


def _truncation(boxes: np.ndarray, calibration: Calibration) -> np.ndarray:
    """(N,) float64: share of each box's volume outside the picture, from 8 x 4 x 3 points inside it."""
    steps = np.meshgrid(*((np.arange(n) + 0.5) / n - 0.5 for n in (8, 4, 3)), indexing="ij")
    local = np.stack(steps, -1).reshape(-1, 3) * boxes[:, None, 3:6]  # (N, 96, 3)
    cos, sin = np.cos(boxes[:, 6:7]), np.sin(boxes[:, 6:7])
    turned = [local[..., 0] * cos - local[..., 1] * sin, local[..., 0] * sin + local[..., 1] * cos, local[..., 2]]
    return 1 - _in_picture(np.stack(turned, -1) + boxes[:, None, :3], calibration).mean(1)


def _as_kitti(boxes: np.ndarray, classes: np.ndarray, visible: np.ndarray, calibration: Calibration) -> KittiObjects:
    """The label file's fields of boxes (N, 7) float64, also of those outside the picture."""
    location, dimensions, rotation_y = lidar_to_kitti_camera(torch.from_numpy(boxes), calibration.lidar_to_camera)
    bbox, seen = project_boxes(location, dimensions, rotation_y, calibration)
    return KittiObjects(
        types=tuple(ALL_CLASS_NAMES[c] for c in classes.tolist()),
        truncated=torch.where(seen, torch.from_numpy(_truncation(boxes, calibration)), 1.0),
        occluded=torch.from_numpy((visible[:, None] < _VISIBLE_SHARES).sum(1)),
        alpha=wrap_angle(rotation_y - torch.atan2(location[:, 0], location[:, 2])),
        bbox=torch.where(seen[:, None], bbox, torch.nan),
        dimensions=dimensions,
        location=location,
        rotation_y=rotation_y,
    )


def _window(sensor: Sensor, view: View) -> tuple[np.ndarray, np.ndarray]:
    """Columns and beams to fire: all of them, or those that can reach the picture (a little more; the points are cut exactly)."""
    columns, beams = np.arange(sensor.azimuths), np.arange(len(sensor.elevations))
    if view == "full":
        return columns, beams
    azimuth = np.abs(2 * np.pi * columns / sensor.azimuths - np.pi)
    wide = np.arctan(max(CENTER_U, IMAGE_SIZE[0] - CENTER_U) / FOCAL) + np.deg2rad(1)
    down = np.arctan((IMAGE_SIZE[1] - CENTER_V) / FOCAL) + np.deg2rad(1)
    return columns[azimuth < wide], beams[np.deg2rad(np.array(sensor.elevations)) > -down]


def simulate_frame(domain: Domain, *, seed: int, index: int, view: View) -> SimulatedFrame:
    """Make one frame of the dataset that a domain and a seed define.

    Coordinates are in the sensor frame: the ground lies at about z = -domain.sensor.height. The points of the camera view are among those of the full
    turn, bit by bit.

    Args:
        domain: Sensor and place.
        seed: Seed of the dataset.
        index: Number of the frame.
        view: `full`: the whole turn, with labels of all objects that have a point. `camera`: only the points and objects that the virtual
            camera sees.

    Returns:
        The frame.

    Raises:
        InvalidInput: The view is unknown, or seed or index is negative.

    Example:
        points = simulate_frame(domain("kitti"), seed=1, index=0, view="camera").frame.points
    """
    if view not in ("camera", "full"):
        raise InvalidInput(f"view must be 'camera' or 'full', found {view!r}")
    if seed < 0 or index < 0:
        raise InvalidInput(f"seed and index must not be negative, found {seed} and {index}")
    street, rays = np.random.SeedSequence([seed, index]).spawn(2)
    world = build_world(domain.place, np.random.default_rng(street))
    return observe(domain, world, noise=int(rays.generate_state(1, np.uint64)[0]), view=view, frame_id=f"{index:06d}")


def observe(domain: Domain, world: World, *, noise: int, view: View, frame_id: str) -> SimulatedFrame:
    """Turn the sensor once in a world.

    Args:
        domain: The sensor.
        world: What stands around it, from the ground under the sensor.
        noise: Seed of the rays.
        view: As for `simulate_frame`.
        frame_id: Name of the frame.

    Returns:
        The frame.
    """
    parts, boxes = world.parts.copy(), world.boxes.copy()
    parts[:, Z] -= domain.sensor.height
    boxes[:, 2] -= domain.sensor.height

    columns, beams = _window(domain.sensor, view)
    hits = cast(parts, world.waves, len(boxes), domain.sensor, seed=noise, columns=columns, beams=beams)
    points, owners, rings = hits.points, hits.objects, hits.beams
    calibration = virtual_camera()
    if view == "camera":
        seen = _in_picture(points[:, :3].astype(np.float64), calibration)
        points, owners, rings = points[seen], owners[seen], rings[seen]

    num_points = np.bincount(owners[owners >= 0], minlength=len(boxes))
    visible = hits.visible / np.maximum(hits.reachable, 1)
    objects = _as_kitti(boxes, world.classes, visible, calibration)
    keep = num_points > 0
    if view == "camera":
        keep &= objects.bbox.isfinite().all(1).numpy()
    new_index = np.append(np.where(keep, keep.cumsum() - 1, -1), -1)  # the last entry is what owner -1 reads
    objects = objects.select(torch.from_numpy(keep))
    labels = Labels.make(
        torch.from_numpy(boxes[keep]).float(),
        torch.from_numpy(world.classes[keep]),
        num_points=torch.from_numpy(num_points[keep]),
        difficulty=objects.difficulty(),
    )
    cloud = PointCloud(xyz=torch.from_numpy(points[:, :3].copy()), features=torch.from_numpy(points[:, 3:].copy()))
    return SimulatedFrame(
        frame=Frame(id=frame_id, points=cloud, labels=labels, calibration=calibration),
        class_names=ALL_CLASS_NAMES,
        objects=objects,
        visible=torch.from_numpy(visible[keep]),
        beams=torch.from_numpy(rings),
        owners=torch.from_numpy(new_index[owners]),
    )


@dataclass(frozen=True, kw_only=True)
class SimulatedDataset:
    """Simulated frames as a frame source, made when asked for; nothing is written or kept.

    Labels are the KITTI reader's: neighboring types (vans for cars) have weight 0, and points are counted in the boxes.
    """

    domain: Domain
    """Sensor and place."""
    seed: int
    """Seed of the dataset."""
    num_frames: int
    """Number of frames."""
    view: View = "camera"
    """`camera` or `full`, as for `simulate_frame`."""
    classes: tuple[str, ...] = KITTI_CLASSES
    """Class names in label order."""

    def __len__(self) -> int:
        return self.num_frames

    def __getitem__(self, index: int) -> Frame:
        """Frame `index` from 0. Raises IndexError past the end."""
        if not 0 <= index < self.num_frames:
            raise IndexError(f"frame {index} of {self.num_frames}")
        made = simulate_frame(self.domain, seed=self.seed, index=index, view=self.view)
        labels = labels_from_kitti(made.objects, virtual_camera(), self.classes)
        return replace(made.frame, labels=with_point_counts(labels, made.frame.points))
