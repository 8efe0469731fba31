"""One Waymo frame as both of its file formats give it, and its range images turned into points.

A range image has a row per beam, from the highest down, and a column per azimuth, from behind the vehicle clockwise: column j of W
looks along pi (1 - (2 j + 1) / W) in the vehicle's frame. A pixel is (range m, intensity, elongation, no-label-zone flag); a range of
zero or less is empty. The vehicle moves while the TOP laser turns, so each of its pixels has the vehicle's pose at its own moment:

    laser --extrinsic--> vehicle at the pixel's moment --pixel pose--> world --inverse frame pose--> vehicle of the frame

The last is the frame of points and labels: x forward, y left, z up, origin on the ground below the rear axle. The other lasers
have no pixel poses; their images are already given for the frame's pose (waymo-open-dataset, ``dataset.proto``).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from ..core.errors import InvalidInput
from ..core.structures import PointCloud

LASERS = {1: "TOP", 2: "FRONT", 3: "SIDE_LEFT", 4: "SIDE_RIGHT", 5: "REAR"}  # LaserName
TOP = 1
TYPES = {1: "Vehicle", 2: "Pedestrian", 3: "Sign", 4: "Cyclist"}  # Label.Type
FEATURE_NAMES = ("intensity", "elongation")

Matrix = NDArray[np.float64]
Image = NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class LaserScan:
    """One turn of one laser. name: key of ``LASERS``.

    returns: range images (H, W, 4) float32 of the first and, if there is one, the second return. pixel_poses: (H, W, 6) float32
    roll, pitch, yaw rad and x, y, z m, vehicle to world, or None. extrinsic: (4, 4), laser to vehicle.
    inclinations: (H,) rad from the lowest beam up, or None: evenly between inclination_range (lowest, highest), half a step inside.
    """

    name: int
    returns: tuple[Image, ...]
    pixel_poses: Image | None
    extrinsic: Matrix
    inclinations: Matrix | None
    inclination_range: tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class WaymoObjects:
    """The labelled objects of a frame, of every type.

    boxes: (N, 7) float64, centre, length, width, height, heading, vehicle frame. types: (N,) int64, keys of ``TYPES``.
    num_points: (N,) int64, LiDAR points inside as the label says, -1 if it does not. levels: (N,) int64, 1 or 2, 0 if not said.
    names: Waymo's object ids, for messages.
    """

    boxes: Matrix
    types: NDArray[np.int64]
    num_points: NDArray[np.int64]
    levels: NDArray[np.int64]
    names: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class WaymoFrame:
    """One frame. segment: the sequence's context name. timestamp: us. pose: (4, 4), vehicle to world, or None if not given.

    objects: None where the labels were not read.
    """

    segment: str
    timestamp: int
    pose: Matrix | None
    lasers: tuple[LaserScan, ...]
    objects: WaymoObjects | None


def frame_points(frame: WaymoFrame, *, second_return: bool = True, drop_no_label_zones: bool = True) -> PointCloud:
    """All points of a frame, vehicle frame, laser by laser, first return before second; none if every pixel is empty.

    Features: "intensity", tanh of Waymo's unbounded value as OpenPCDet does, so that it lies in 0..1; "elongation", as it is.
    second_return: also take the second echoes. drop_no_label_zones: leave out points whose flag is not -1: nobody labelled there, so
    an object would count as background (OpenPCDet, ``waymo_dataset.get_lidar``).
    Raises InvalidInput for images, angles and poses that do not fit together, or that give NaN.
    """
    rows = [np.zeros((0, 5), np.float32)]
    for scan in frame.lasers:
        for image in scan.returns[: 2 if second_return else 1]:
            rows.append(_points(frame, scan, image, drop_no_label_zones))
    points = torch.from_numpy(np.concatenate(rows))
    return PointCloud(xyz=points[:, :3].contiguous(), features=points[:, 3:].contiguous(), feature_names=FEATURE_NAMES)


def beam_inclinations(scan: LaserScan, height: int) -> Matrix:
    """(height,) rad, of each row of the image from the top row down. Raises InvalidInput if the listed ones are of another count."""
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

    # Columns look along fixed directions of the vehicle, whatever way round the laser is mounted: its own yaw is taken off here
    # and comes back with the extrinsic.
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
    """(3, N) from the vehicle at each pixel's moment to the vehicle of the frame, in float64: world coordinates are kilometres."""
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
    """The (3, 3) rotation of a (4, 4) transform. Raises InvalidInput if it is none: damaged numbers would bend the scene silently."""
    rotation = transform[:3, :3]
    if not np.abs(rotation @ rotation.T - np.eye(3)).max() < 1e-3:
        raise InvalidInput(f"{what} does not turn but distort: {rotation.round(3).tolist()}; the file is damaged")
    return rotation


def _rotate(matrix: Matrix, xyz: Matrix) -> Matrix:
    """(3, 3) times (3, N), not by BLAS: its threads cost more than so narrow a product, twice over in forked workers."""
    return np.einsum("ij,jn->in", matrix, xyz)
