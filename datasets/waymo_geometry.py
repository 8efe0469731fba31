"""One Waymo frame as both file formats give it, and the way from its range images to points.

A range image has a row per beam, from the highest down, and a column per azimuth, clockwise from behind the vehicle: column j of W
looks along pi (1 - (2 j + 1) / W) in the vehicle's frame. A pixel is (range in m, intensity, elongation, no-label-zone flag); a pixel
with a range of zero or less is empty. The vehicle moves while the TOP laser turns, so each of its pixels has the vehicle's pose at
its own moment:

    laser --extrinsic--> vehicle at the pixel's moment --pixel pose--> world --inverse frame pose--> vehicle of the frame

The last is the frame of points and labels: x forward, y left, z up, origin on the ground below the rear axle. The other lasers
have no pixel poses; their images are already given for the frame's pose (waymo-open-dataset, `dataset.proto`).

Read next: `waymo_proto.py` (v1) and `waymo_parquet.py` (v2), which read such frames; `waymo.py`, which makes ours of them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import InvalidInput
from ..core.structures import PointCloud

LASERS = {1: "TOP", 2: "FRONT", 3: "SIDE_LEFT", 4: "SIDE_RIGHT", 5: "REAR"}
"""Waymo's LaserName."""
TOP = 1
"""Number of the laser on the roof, the only one with pixel poses."""
TYPES = {1: "Vehicle", 2: "Pedestrian", 3: "Sign", 4: "Cyclist"}
"""Waymo's Label.Type."""
MOST_POINTS_LEVEL_2 = 5
"""An object with at most this number of points is LEVEL_2, unless its label says something else."""
FEATURE_NAMES = ("intensity", "elongation")
"""Point features of every Waymo frame."""

Matrix = NDArray[np.float64]
"""A transform (4, 4), or another float64 table."""
Image = NDArray[np.float32]
"""A range image (H, W, C)."""


@dataclass(frozen=True, kw_only=True)
class LaserScan:
    """One turn of one laser."""

    name: int
    """Key of `LASERS`."""
    returns: tuple[Image, ...]
    """Range images (H, W, 4) of the first and, if there is one, the second return."""
    pixel_poses: Image | None
    """(H, W, 6) roll, pitch, yaw in radians and x, y, z in m, vehicle to world; None for all lasers but TOP."""
    extrinsic: Matrix
    """(4, 4), laser to vehicle."""
    inclinations: Matrix | None
    """(H,) radians from the lowest beam up; None for beams at even distances, see `beam_inclinations`."""
    inclination_range: tuple[float, float]
    """Lowest and highest inclination in radians, the borders of the beams at even distances."""


@dataclass(frozen=True, kw_only=True)
class WaymoObjects:
    """The labeled objects of a frame, of every type."""

    boxes: Matrix
    """(N, 7) float64 center, length, width, height, heading in the vehicle's frame."""
    types: NDArray[np.int64]
    """(N,) keys of `TYPES`."""
    num_points: NDArray[np.int64]
    """(N,) LiDAR points inside as the label says, -1 where it does not say."""
    levels: NDArray[np.int64]
    """(N,) 1 or 2 as the label says, 0 where it does not say."""
    names: tuple[str, ...]
    """Waymo's ids of the objects, for messages."""


@dataclass(frozen=True, kw_only=True)
class WaymoFrame:
    """One frame as it is stored."""

    segment: str
    """Context name of the sequence."""
    timestamp: int
    """Time in microseconds."""
    pose: Matrix | None
    """(4, 4), vehicle to world; None if it is not given."""
    lasers: tuple[LaserScan, ...]
    """The scans of the lasers; empty where they were not read."""
    objects: WaymoObjects | None
    """The labels; None where they were not read."""


def frame_points(frame: WaymoFrame, *, second_return: bool = True, drop_no_label_zones: bool = True) -> PointCloud:
    """Turn the range images of a frame into points.

    Args:
        frame: The frame.
        second_return: Also take the second echoes.
        drop_no_label_zones: Leave out points whose flag is not -1. Nobody labeled there, so an object would count as background
            (OpenPCDet, `waymo_dataset.get_lidar`).

    Returns:
        The points in the vehicle's frame, laser by laser, first return before second; no point if every pixel is empty. The features
        are "intensity", tanh of Waymo's unbounded value as in OpenPCDet, so that it lies in 0..1, and "elongation", unchanged.

    Raises:
        InvalidInput: Images, angles and poses do not fit together, or give NaN.
    """
    rows = [np.zeros((0, 5), np.float32)]
    for scan in frame.lasers:
        for image in scan.returns[: 2 if second_return else 1]:
            rows.append(_points(frame, scan, image, drop_no_label_zones))
    points = torch.from_numpy(np.concatenate(rows))
    return PointCloud(xyz=points[:, :3].contiguous(), features=points[:, 3:].contiguous(), feature_names=FEATURE_NAMES)


def count_no_label_points(frame: WaymoFrame, *, second_return: bool = True) -> int:
    """Count the points that `frame_points` leaves out because nobody labeled in their zone.

    Args:
        frame: The frame.
        second_return: As in `frame_points`.

    Returns:
        Number of filled pixels whose flag is not -1.
    """
    images = [image for scan in frame.lasers for image in scan.returns[: 2 if second_return else 1]]
    return sum(int(((image[..., 0] > 0) & (image[..., 3] != -1)).sum()) for image in images)


def beam_inclinations(scan: LaserScan, height: int) -> Matrix:
    """Find the inclination of each row of a range image.

    Args:
        scan: The scan.
        height: Number of rows.

    Returns:
        (height,) radians from the top row down: the listed ones, or even steps within `inclination_range`, half a step from its ends.

    Raises:
        InvalidInput: The scan lists another number of inclinations.
    """
    if scan.inclinations is not None and len(scan.inclinations):
        if len(scan.inclinations) != height:
            raise InvalidInput(
                f"laser {LASERS[scan.name]}: {len(scan.inclinations)} beam inclinations for a range image of {height} rows"
            )
        return scan.inclinations[::-1]
    low, high = scan.inclination_range
    return (low + (np.arange(height) + 0.5) / height * (high - low))[::-1]


def _points(frame: WaymoFrame, scan: LaserScan, image: Image, drop_no_label_zones: bool) -> Image:
    """(N, 5) float32: x, y, z, intensity, elongation of the filled pixels, row by row."""
    where = f"laser {LASERS.get(scan.name, scan.name)}"
    if scan.name not in LASERS or image.ndim != 3 or image.shape[2] != 4:
        raise InvalidInput(f"{where}: a range image must be (rows, columns, 4) of a laser 1 to 5, found {image.shape}")
    height, width = image.shape[:2]
    filled = image[..., 0] > 0
    if drop_no_label_zones:
        filled &= image[..., 3] == -1
    pixels = np.flatnonzero(filled)
    row, column = np.divmod(pixels, width)
    values = image.reshape(-1, 4)[pixels]

    # Columns look along fixed directions of the vehicle, whatever way the laser is mounted: its own yaw is subtracted here and
    # comes back with the extrinsic.
    azimuth = np.pi * (1 - (2 * np.arange(width) + 1) / width) - np.arctan2(scan.extrinsic[1, 0], scan.extrinsic[0, 0])
    inclination = beam_inclinations(scan, height)
    distance = values[:, 0].astype(np.float64)
    across = distance * np.cos(inclination)[row]
    in_laser = np.stack([across * np.cos(azimuth)[column], across * np.sin(azimuth)[column], distance * np.sin(inclination)[row]])
    xyz = _rotate(_rotation(scan.extrinsic, f"{where}: the extrinsic"), in_laser) + scan.extrinsic[:3, 3:]
    if scan.name == TOP and len(pixels):
        xyz = _to_frame(frame, scan, xyz, pixels, (height, width))

    points = np.empty((len(pixels), 5), np.float32)
    points[:, :3] = xyz.T
    points[:, 3] = np.tanh(values[:, 1])
    points[:, 4] = values[:, 2]
    if not np.isfinite(points).all():
        bad = int((~np.isfinite(points)).any(1).sum())
        raise InvalidInput(f"{where}: {bad} of {len(pixels)} points hold NaN or inf; its range image or poses are damaged")
    return points


def _to_frame(frame: WaymoFrame, scan: LaserScan, xyz: Matrix, pixels: NDArray[np.int64], shape: tuple[int, int]) -> Matrix:
    """(3, N) from the vehicle at each pixel's moment to the vehicle of the frame, in float64: world coordinates are kilometers."""
    if scan.pixel_poses is None or frame.pose is None:
        missing = "pose for each pixel of the TOP laser" if scan.pixel_poses is None else "vehicle pose"
        raise InvalidInput(
            f"there is no {missing}: its points would lie in other coordinates than the labels and the other lasers; "
            "read the component lidar_pose (v2) or range_image_pose_compressed (v1), and vehicle_pose"
        )
    if scan.pixel_poses.shape != (*shape, 6):
        raise InvalidInput(
            f"laser TOP: poses {scan.pixel_poses.shape} do not fit a range image of {shape}; expected {(*shape, 6)}"
        )
    pose = scan.pixel_poses.reshape(-1, 6)[pixels].T.astype(np.float64)
    (sr, sp, sy), (cr, cp, cy) = np.sin(pose[:3]), np.cos(pose[:3])
    x, y, z = xyz
    y, z = cr * y - sr * z, sr * y + cr * z  # roll about x, then pitch about y, then yaw about z
    x, z = cp * x + sp * z, cp * z - sp * x
    x, y = cy * x - sy * y, sy * x + cy * y
    offset = pose[3:] - frame.pose[:3, 3:]  # first, while all is float64 and still large
    return _rotate(_rotation(frame.pose, "the vehicle pose").T, np.stack([x, y, z]) + offset)


def _rotation(transform: Matrix, what: str) -> Matrix:
    """The (3, 3) rotation of a (4, 4) transform. Raises InvalidInput if it is not a rotation: damaged numbers would distort the scene
    silently."""
    rotation = transform[:3, :3]
    if not np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-3:
        raise InvalidInput(f"{what} is not a rotation but a distortion: {rotation.round(3).tolist()}; the file is damaged")
    return rotation


def _rotate(matrix: Matrix, xyz: Matrix) -> Matrix:
    """(3, 3) times (3, N) without BLAS, whose threads cost more than such a narrow product, above all in forked workers."""
    return np.einsum("ij,jn->in", matrix, xyz)
