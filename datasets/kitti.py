"""Frames from KITTI's object layout.

    root/ImageSets/<split>.txt                       one frame id per line
    root/training/velodyne/<id>.bin                  the full turn, float32 x y z intensity
    root/training/velodyne_reduced/<id>.bin          the same, only what the camera sees
    root/training/{label_2,calib}/<id>.txt           objects in the camera frame; how the frames are related
    root/training/image_2/<id>.png|jpg               only its size is read
    root/testing/...                                 the same without label_2: the frames of the split `test`

KITTI labels only what the camera sees, so a scan is cropped to the camera's view by default: outside of it an object would count
as background.

Training and testing frames have the same numbers in KITTI. So a testing frame is called `testing-<id>` here.

Read next: `kitti_text.py` for the label files, `kitti_calibration.py` for the calibrations, `layouts.py` for the splits.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.foreign_text import check_name
from ..core.frame import Calibration, Frame
from ..core.ledger import Ledger
from ..core.point_files import read_scan
from ..core.rig import RigSpec
from ..core.scan_options import ScanOptions
from ..core.structures import Labels, PointCloud
from ..ops.points_in_boxes import count_points_in_boxes
from .class_names import ClassRule
from .frame_source import DatasetOrigin, described_origin
from .id_lists import read_ids as read_ids
from .kitti_calibration import calibration_files, find_calibration, is_off_center, read_calibration, shift_calibration
from .kitti_text import KittiObjects, count_label_types, dropped_types, ignored_types, labels_from_kitti, read_objects, read_types
from .picture_size import find_picture, read_picture_size

KITTI_CLASSES = ("Car", "Pedestrian", "Cyclist")
"""The classes of KITTI's benchmark."""
TESTING = "testing-"
"""What the ids of frames in `testing` start with."""
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
    """Names of the classes to keep; their order gives the class numbers. Case does not matter. Neighboring types (Van for Car) are kept
    with weight 0."""
    z_shift: float = 0.0
    """Mounting height of the sensor in m, added to z of points and boxes so that the road lies near 0. The calibration subtracts it
    again, so projection and evaluation stay right. KITTI's sensor is at 1.73 m."""
    crop_to_camera: bool = True
    """Keep only points that the camera sees. Set it to False only for frames without labels."""
    with_labels: bool = True
    """False leaves `labels` None and never opens label_2."""
    class_map: Mapping[str, str] = field(default_factory=dict)
    """Type of the label files -> class, for example Vehicle -> Car."""
    unlabeled: tuple[str, ...] | frozenset[str] = ()
    """Ids of frames whose label files are not opened. Frames of `testing` have none in any case."""
    scan: ScanOptions = ScanOptions()
    """How the scan files are read. Its `image_size` is the size of every picture; by default that of the frame's own picture. Its z shift
    must be that of `z_shift`, or None."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "root", Path(self.root))
        object.__setattr__(self, "ids", tuple(self.ids))
        object.__setattr__(self, "classes", tuple(self.classes))
        object.__setattr__(self, "unlabeled", frozenset(self.unlabeled))
        if not (Path(self.root) / "training").is_dir() and not all(i.startswith(TESTING) for i in self.ids or ("",)):
            raise InvalidInput(
                f"no folder {Path(self.root) / 'training'}; the root must hold training/velodyne, calib and label_2"
            )
        if self.points_folder not in ("auto", "velodyne", "velodyne_reduced"):
            raise InvalidInput(f"points_folder must be auto, velodyne or velodyne_reduced, found {self.points_folder!r}")
        if self.scan.z_shift not in (None, self.z_shift):
            raise InvalidInput(
                f"z_shift is {self.z_shift:g} and that of scan is {self.scan.z_shift:g}; give one of them, or the same"
            )
        if self.scan.axes != ("x", "y", "z"):
            raise InvalidInput(
                f"the axes of scans in KITTI's layout cannot be turned (found {' '.join(self.scan.axes)}), because the calibrations belong "
                "to the file's axes; correct Tr_velo_to_cam instead"
            )
        for frame_id in self.ids:
            check_name(frame_id, "frame id")
        self._rule  # noqa: B018 - it checks classes and class map

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Frame:
        """Read frame `index`. Raises `InvalidInput` with frame, path and root if a file is missing or broken."""
        frame_id = self.ids[index]
        calibration = self.calibration(frame_id)
        points, reading = self._points(frame_id, calibration)
        reading = reading + Ledger(scans_off_center=int(is_off_center(calibration)))
        labels = None
        if self.has_labels(frame_id):
            objects = self.kitti_objects(frame_id)
            labels = labels_from_kitti(objects, calibration, self.classes, self.class_map)
            labels = with_point_counts(labels, points)
            reading = reading + Ledger(
                types_dropped=dropped_types(objects.types, self._rule), types_ignored=ignored_types(objects.types, self._rule)
            )
        return Frame(id=frame_id, points=points, labels=labels, calibration=calibration, rig=self.rig, reading=reading)

    @cached_property
    def _rule(self) -> ClassRule:
        return ClassRule(self.classes, self.class_map)

    @property
    def rig(self) -> RigSpec:
        """What this reader does to scans and boxes; KITTI's own intensity is in 0..1 already."""
        return RigSpec(z_shift=self.z_shift, intensity_scale=self.scan.rig().intensity_scale)

    @property
    def origin(self) -> DatasetOrigin:
        """Where the frames come from."""
        options: dict[str, object] = {
            "z_shift": self.z_shift,
            "points": self.points_folder,
            "crop_to_camera": self.crop_to_camera,
        }
        options |= {"with_labels": self.with_labels, "class_map": self.class_map}
        return described_origin("kitti", self.root, options | scan_settings(self.scan))

    def has_labels(self, frame_id: str) -> bool:
        """Say whether the label file of a frame is read.

        Args:
            frame_id: Id of the frame.

        Returns:
            False for frames of `testing`, those of `unlabeled`, and all where `with_labels` is False.
        """
        return self.with_labels and frame_id not in self.unlabeled and not frame_id.startswith(TESTING)

    def files_of(self, frame_id: str) -> tuple[Path, ...]:
        """Name the files that a frame is read from; see `FiledSource`.

        Args:
            frame_id: Id of the frame.

        Returns:
            Its scan in either folder, every calibration that may be its own, its picture, and its label file where that is opened.
        """
        base, name = self._base(frame_id), _name(frame_id)
        scans = [base / folder / f"{name}.bin" for folder in ("velodyne", "velodyne_reduced")]
        picture = None if self.scan.image_size is not None else find_picture(base / "image_2", name)
        labels = [base / "label_2" / f"{name}.txt"] if self.has_labels(frame_id) else []
        return (*scans, *calibration_files(base / "calib", name), *([] if picture is None else [picture]), *labels)

    def label_types(self) -> Mapping[str, int]:
        """Count the objects of all labeled frames by type, without reading a scan. A file that is broken counts as empty here.

        Returns:
            Number of objects by type as spelled in the files, without DontCare.

        Raises:
            InvalidInput: An angle is not in radians, or no file can be read.
        """
        labeled = [i for i in self.ids if self.has_labels(i)]
        return count_label_types((self._base(i) / "label_2" / f"{_name(i)}.txt" for i in labeled), read_types)

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
            folder: Folder below `training` or `testing`.
            frame_id: Id of the frame.
            suffix: End of the file name, with its dot.

        Returns:
            The path.

        Raises:
            InvalidInput: The file is missing.
        """
        path = self._base(frame_id) / folder / f"{_name(frame_id)}{suffix}"
        if not path.is_file():
            hint = "; frames without labels are prepared with --unlabeled SPLIT" if folder == "label_2" else ""
            raise InvalidInput(
                f"frame {frame_id}: there is no file {path} (root {self.root}); check the root, the split and that {folder} is unpacked{hint}"
            )
        return path

    def calibration(self, frame_id: str) -> Calibration:
        """Read the calibration of a frame, with the z shift.

        Args:
            frame_id: Id of the frame.

        Returns:
            The calibration, with `scan.image_size`, else the size of the frame's picture. Where there is no picture either,
            `DEFAULT_IMAGE_SIZE` is assumed if the principal point does not contradict it.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        base, name = self._base(frame_id), _name(frame_id)
        size = self.scan.image_size
        if size is None and (picture := find_picture(base / "image_2", name)) is not None:
            size = read_picture_size(picture)
        path = find_calibration(base / "calib", name)
        if not path.is_file():
            self.path("calib", frame_id, ".txt")  # it says which file is missing
        return shift_calibration(read_calibration(path, image_size=size), self.z_shift)

    def _base(self, frame_id: str) -> Path:
        return Path(self.root) / ("testing" if frame_id.startswith(TESTING) else "training")

    def _points(self, frame_id: str, calibration: Calibration) -> tuple[PointCloud, Ledger]:
        name = self.points_folder
        if name == "auto":
            reduced = self._base(frame_id) / "velodyne_reduced" / f"{_name(frame_id)}.bin"
            name = "velodyne_reduced" if self.crop_to_camera and reduced.is_file() else "velodyne"
        path = self.path(name, frame_id, ".bin")
        points, reading = read_scan(path, self.scan, rig=self.rig)
        if self.crop_to_camera and name == "velodyne":  # the reduced scans were cropped with the true size of the picture
            whole = len(points)
            points = crop_to_camera(points, calibration)
            reading = reading + Ledger(points_outside_camera=whole - len(points))
            if not len(points):
                width, height = calibration.image_size
                raise InvalidInput(
                    f"frame {frame_id}: none of the {whole} points of {path} lies in the camera's view of {width} x {height} pixels; the size "
                    "(--image-size WIDTH HEIGHT) or the calibration does not belong to this scan"
                )
        return points, reading


def _name(frame_id: str) -> str:
    return frame_id.removeprefix(TESTING)


def scan_settings(scan: ScanOptions) -> dict[str, object]:
    """The options of scan files that shape a dataset, for `DatasetOrigin`.

    Args:
        scan: How scans are read.

    Returns:
        Values by name; the z shift is left out, because every reader states it itself.
    """
    return {
        "columns": scan.columns,
        "dtype": scan.dtype,
        "intensity_scale": scan.rig().intensity_scale,
        "axes": scan.axes,
        "image_size": scan.image_size or (),
        "drop_non_finite": scan.drop_non_finite,
    }


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
