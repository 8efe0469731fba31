"""Frames from KITTI's object layout.

    root/ImageSets/<split>.txt                       one frame id per line
    root/training/velodyne/<id>.bin                  the full turn, float32 x y z intensity
    root/training/velodyne_reduced/<id>.bin          the same, only what the camera sees
    root/training/{label_2,calib}/<id>.txt           objects in the camera frame; how the frames are related
    root/training/image_2/<id>.png                   only its size is read

KITTI labels only what the camera sees, so a scan is cropped to the camera's view by default: outside of it an object would count
as background.

Read next: `kitti_text.py` for the label files, `raw.py` for the splits.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.frame import Calibration, Frame
from ..core.point_files import read_points
from ..core.rig import RigSpec
from ..core.structures import Labels, PointCloud
from ..ops.points_in_boxes import count_points_in_boxes
from .frame_source import DatasetOrigin, described_origin
from .kitti_text import KittiObjects, labels_from_kitti, read_objects

DEFAULT_IMAGE_SIZE = (1242, 375)
"""Width and height in pixels of most KITTI pictures; used where the picture itself is missing."""
KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
"""The classes of KITTI's benchmark."""
PointsFolder = Literal["auto", "velodyne", "velodyne_reduced"]
"""Which scans to read: the full turn, the scan that is cropped already, or the cropped one where it exists and cropping is asked."""


@dataclass(frozen=True)
class KittiDataset:
    """Frames of a folder in KITTI's object layout.

    Example:
        ids = read_ids("KITTI/ImageSets/val.txt")
        frames = KittiDataset("KITTI", ids, classes=("Car",), z_shift=1.73)
        frame = frames[0]
    """

    root: Path | str
    """Folder that holds `training`."""
    ids: tuple[str, ...] | list[str]
    """Which frames, in this order. See `read_ids`."""
    points_folder: PointsFolder = "auto"
    """Folder of the scans: `velodyne` is the full turn, `velodyne_reduced` is cropped already. `auto` takes velodyne_reduced where the
    frame has it and cropping is asked, else velodyne."""
    classes: tuple[str, ...] = KITTI_CLASSES
    """Names of the classes to keep; their order gives the class numbers. Neighboring types (Van for Car) are kept with weight 0."""
    z_shift: float = 0.0
    """Mounting height of the sensor in m, added to z of points and boxes so that the road lies near 0. The calibration subtracts it
    again, so projection and evaluation stay right. KITTI's sensor is at 1.73 m."""
    crop_to_camera: bool = True
    """Keep only points that the camera sees. Set it to False only for frames without labels."""
    with_labels: bool = True
    """False leaves `labels` None and never opens label_2."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "classes", tuple(self.classes))
        if not (Path(self.root) / "training").is_dir():
            raise InvalidInput(
                f"no folder {Path(self.root) / 'training'}; the root must hold training/velodyne, calib and label_2"
            )
        if self.points_folder not in ("auto", "velodyne", "velodyne_reduced"):
            raise InvalidInput(f"points_folder must be auto, velodyne or velodyne_reduced, found {self.points_folder!r}")

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Frame:
        """Read frame `index`. Raises `InvalidInput` with frame, path and root if a file is missing or broken."""
        frame_id = self.ids[index]
        calibration = self.calibration(frame_id)
        points = self._points(frame_id, calibration)
        labels = None
        if self.with_labels:
            labels = labels_from_kitti(self.kitti_objects(frame_id), calibration, self.classes)
            labels = with_point_counts(labels, points)
        return Frame(id=frame_id, points=points, labels=labels, calibration=calibration, rig=self.rig)

    @property
    def rig(self) -> RigSpec:
        """What this reader does to scans and boxes; KITTI's intensity is in 0..1 already."""
        return RigSpec(z_shift=self.z_shift)

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        options = {"z_shift": self.z_shift, "points": self.points_folder, "crop_to_camera": self.crop_to_camera}
        return described_origin("kitti", self.root, options | {"with_labels": self.with_labels})

    def kitti_objects(self, frame_id: str) -> KittiObjects:
        """Read a frame's label file unchanged: what evaluation compares detections with.

        Args:
            frame_id: Id of the frame.

        Returns:
            Every line in the order of the file, DontCare included.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        return read_objects(self.path("label_2", frame_id, ".txt"))

    def path(self, folder: str, frame_id: str, suffix: str) -> Path:
        """Find a file of a frame.

        Args:
            folder: Folder below `training`.
            frame_id: Id of the frame.
            suffix: End of the file name, with its dot.

        Returns:
            The path.

        Raises:
            InvalidInput: The file is missing.
        """
        path = Path(self.root) / "training" / folder / f"{frame_id}{suffix}"
        if not path.is_file():
            raise InvalidInput(
                f"frame {frame_id}: there is no file {path} (root {self.root}); check the root, the split and that {folder} is unpacked"
            )
        return path

    def calibration(self, frame_id: str) -> Calibration:
        """Read the calibration of a frame, with the z shift.

        Args:
            frame_id: Id of the frame.

        Returns:
            The calibration, with the size of the frame's picture, or `DEFAULT_IMAGE_SIZE` where there is no picture.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        picture = Path(self.root) / "training" / "image_2" / f"{frame_id}.png"
        size = read_png_size(picture) if picture.is_file() else DEFAULT_IMAGE_SIZE
        return shift_calibration(read_calibration(self.path("calib", frame_id, ".txt"), image_size=size), self.z_shift)

    def _points(self, frame_id: str, calibration: Calibration) -> PointCloud:
        name = self.points_folder
        if name == "auto":
            reduced = Path(self.root) / "training" / "velodyne_reduced" / f"{frame_id}.bin"
            name = "velodyne_reduced" if self.crop_to_camera and reduced.is_file() else "velodyne"
        points = read_points(self.path(name, frame_id, ".bin"))
        if self.z_shift:
            points = replace(points, xyz=self.rig.from_sensor(points.xyz))
        if self.crop_to_camera and name == "velodyne":  # the reduced scans were cropped with the true size of the picture
            points = crop_to_camera(points, calibration)
        return points


def read_ids(path: Path | str) -> tuple[str, ...]:
    """Read a list of names, one per line: the frame ids of a split.

    Args:
        path: A text file.

    Returns:
        The names in the order of the file.

    Raises:
        InvalidInput: The file is missing or empty, a name occurs twice, or a name cannot be a file name.
    """
    path = Path(path)
    if not path.is_file():
        found = sorted(p.stem for p in path.parent.glob("*.txt"))
        raise InvalidInput(f"there is no split file {path}; the folder holds {', '.join(found) or 'no split'}")
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{path} is not a text file: {error}") from error
    ids = tuple(line.strip() for line in lines if line.strip())
    if not ids:
        raise InvalidInput(f"{path} names no frame; write one id per line")
    seen: set[str] = set()
    for frame_id in ids:
        if frame_id in seen or frame_id != Path(frame_id).name:
            raise InvalidInput(f"{path}: {frame_id!r} {'occurs twice' if frame_id in seen else 'cannot be a file name'}")
        seen.add(frame_id)
    return ids


def read_calibration(path: Path | str, *, image_size: tuple[int, int] = DEFAULT_IMAGE_SIZE) -> Calibration:
    """Read a KITTI calibration file: P2 (camera to pixels) and R0_rect @ Tr_velo_to_cam (LiDAR to the rectified camera frame).

    Args:
        path: The file.
        image_size: Width and height of the picture in pixels.

    Returns:
        The calibration of the LiDAR frame without a z shift.

    Raises:
        InvalidInput: The file cannot be read, or a row is missing or has another number of values.
    """
    rows: dict[str, list[str]] = {}
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot read the calibration {path}: {error}") from error
    for line in lines:
        name, separator, numbers = line.partition(":")
        if separator:
            rows[name.strip()] = numbers.split()

    def matrix(name: str, shape: tuple[int, int]) -> Tensor:
        if name not in rows:
            raise InvalidInput(
                f"{path}: there is no row {name}; KITTI's calibration needs P2, R0_rect and Tr_velo_to_cam, found "
                f"{', '.join(rows) or 'none'}"
            )
        try:
            return torch.tensor([float(n) for n in rows[name]], dtype=torch.float64).reshape(shape)
        except (ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"{path}: row {name} must hold {shape[0] * shape[1]} numbers, found {' '.join(rows[name])!r}"
            ) from error

    rectify, velodyne_to_camera = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    rectify[:3, :3] = matrix("R0_rect", (3, 3))
    velodyne_to_camera[:3] = matrix("Tr_velo_to_cam", (3, 4))
    return Calibration(lidar_to_camera=rectify @ velodyne_to_camera, projection=matrix("P2", (3, 4)), image_size=image_size)


def read_png_size(path: Path | str) -> tuple[int, int]:
    """Read the size of a PNG picture from its first 24 bytes (signature, IHDR chunk), which needs no picture library.

    Args:
        path: The picture.

    Returns:
        Width and height in pixels.

    Raises:
        InvalidInput: The file is not a PNG picture.
    """
    with open(path, "rb") as file:
        head = file.read(24)
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n" or head[12:16] != b"IHDR":
        raise InvalidInput(f"{path} is not a PNG picture; remove or replace it")
    width, height = struct.unpack(">II", head[16:24])
    return width, height


def shift_calibration(calibration: Calibration, z_shift: float) -> Calibration:
    """Adapt a calibration to points whose z was raised.

    Args:
        calibration: Calibration of the sensor frame.
        z_shift: Meters that were added to z.

    Returns:
        Calibration of the shifted frame.
    """
    back = torch.eye(4, dtype=torch.float64)
    back[2, 3] = -z_shift
    return replace(calibration, lidar_to_camera=calibration.lidar_to_camera @ back)


def project_points(xyz: Tensor, calibration: Calibration) -> tuple[Tensor, Tensor]:
    """Project LiDAR points into the picture.

    Args:
        xyz: (N, 3) points in the LiDAR frame of the calibration, in m.
        calibration: The calibration.

    Returns:
        (N, 2) pixels and (N,) depths in front of the camera in m, both float64. Pixels mean nothing where the depth is 0 or less.
    """
    matrix = calibration.lidar_to_camera.to(xyz.device)
    camera = xyz.double() @ matrix[:3, :3].T + matrix[:3, 3]
    projection = calibration.projection.to(xyz.device)
    image = camera @ projection[:, :3].T + projection[:, 3]
    return image[:, :2] / image[:, 2:], camera[:, 2]


def crop_to_camera(points: PointCloud, calibration: Calibration) -> PointCloud:
    """Keep the points in front of the camera whose projection lies in the picture.

    Args:
        points: A scan in the LiDAR frame of the calibration.
        calibration: The calibration.

    Returns:
        The points that the camera sees, in their order.
    """
    pixels, depth = project_points(points.xyz, calibration)
    width, height = calibration.image_size
    u, v = pixels.unbind(-1)
    return points.select((depth > 0) & (u >= 0) & (u < width) & (v >= 0) & (v < height))


def with_point_counts(labels: Labels, points: PointCloud) -> Labels:
    """Count the points in each labeled box.

    Args:
        labels: Labels in the frame of the points.
        points: The scan.

    Returns:
        The labels with `num_points` of this scan.
    """
    return replace(labels, num_points=count_points_in_boxes(points.xyz, labels.boxes.data).to(torch.int64))
