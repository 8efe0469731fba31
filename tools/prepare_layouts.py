"""Options of `upcycle3d prepare` for the layouts of `datasets/layouts.py`: one class per subcommand.

Read next: `prepare.py`, which runs them; `prepare_readers.py` for the other layouts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import tyro

from ..core.errors import InvalidInput
from ..core.foreign_text import shown
from ..core.scan_options import ScanOptions
from ..datasets.folder import BoxOrigin, LabelForm, SizeLetter, YawUnit
from ..datasets.kitti import PointsFolder
from ..datasets.layouts import open_folder, open_kitti, open_nuscenes, open_waymo
from ..datasets.nuscenes import LYFT_DIALECT, NUSCENES_DIALECT, Dialect
from ..datasets.raw import RawDataset
from .scan_option import ScanOption


@dataclass(frozen=True, kw_only=True)
class PrepareOptions:
    """What preparing any dataset needs."""

    root: tyro.conf.Positional[Path]
    """Folder of the dataset."""
    out: Path
    """Folder to write. `train` and `upcycle` take it as `--data DIR[:SPLIT]`. Splits that it holds already stay."""
    splits: tuple[str, ...] = ()
    """Splits to take, by file name. By default all."""
    replace: bool = False
    """Drop the splits that `--out` holds already, instead of adding to them."""
    classes: tuple[str, ...] | None = None
    """Classes to learn, in label order; case does not matter. A class that occurs in no label is an error. By default Car, Pedestrian and
    Cyclist (Waymo: Vehicle, Pedestrian and Cyclist; a folder: Car): one that occurs in no label then stays, with 0 boxes and a warning.
    `train` needs the classes of its preset (docs/presets.md): `kitti_small` wants `--classes Car` here."""
    class_map: tuple[tuple[str, str], ...] = ()
    """Type of the labels and the class it becomes, for example `Vehicle Car Van Car`. For Lyft and nuScenes it replaces the whole list
    of docs/data_format.md."""
    allow_absent_classes: bool = False
    """Go on although a class of `--classes` or a type of `--class-map` occurs in no label."""
    labeled: tuple[str, ...] = ()
    """Splits whose labels may be learned from: each gets its own database of objects. By default `train` with the labeled splits of
    --label-shares, or every labeled split if there is no `train`."""
    label_shares: tuple[float, ...] = ()
    """Also split `train` into train-SHARE-DRAW and train-SHARE-DRAW-rest, draws 0 1 2, for example `0.01 0.02 0.05 0.2`. Whole
    segments or scenes are drawn where the dataset has them, else frames."""
    workers: int = 2
    """Number of processes; 0 or 1 reads in this process."""
    json: Path | None = None
    """Also write the result to this JSON file."""

    def map_of_classes(self) -> dict[str, str]:
        """`--class-map` as a dictionary."""
        found: dict[str, str] = {}
        for kind, name in self.class_map:
            if found.setdefault(kind, name) != name:
                raise InvalidInput(
                    f"--class-map gives the type {shown(kind)} two classes, {shown(found[kind])} and {shown(name)}"
                )
        return found


@dataclass(frozen=True, kw_only=True)
class PrepareKitti(PrepareOptions):
    """KITTI's object layout: training/velodyne or velodyne_reduced, label_2, calib, ImageSets; the split `test` lies in testing."""

    points: PointsFolder = "auto"
    """Which scans to read. auto: velodyne_reduced where it exists, else velodyne."""
    crop_to_camera: bool = True
    """Keep only the points that the camera sees, because KITTI labels nothing else."""
    unlabeled: tuple[str, ...] = ()
    """Splits that nobody labeled: their label files are not opened. `test` is one in any case."""
    scan: ScanOption = field(default_factory=ScanOptions)
    """How the scan files are read."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_kitti(
            self.root,
            splits=self.splits,
            classes=self.classes,
            class_map=self.map_of_classes(),
            allow_absent_classes=self.allow_absent_classes,
            unlabeled=self.unlabeled,
            points_folder=self.points,
            z_shift=self.scan.z_shift or 0.0,
            crop_to_camera=self.crop_to_camera,
            scan=self.scan,
        )


@dataclass(frozen=True, kw_only=True)
class PrepareFolder(PrepareOptions):
    """Your own folder: points/ID.bin|npy|pcd, labels/ID.txt (class x y z dx dy dz yaw), splits/NAME.txt (docs/own_data.md)."""

    other_classes: tuple[str, ...] = ()
    """Types that may occur in the labels and are dropped; `any` drops and counts every type that is no class."""
    unlabeled: tuple[str, ...] = ()
    """Splits that nobody labeled: their label files are not opened."""
    yaw: YawUnit = "radians"
    """Unit of the yaw in the label files."""
    size_order: tuple[SizeLetter, SizeLetter, SizeLetter] = ("l", "w", "h")
    """Order of the three sizes in the label files: length along the heading, width, height."""
    origin: BoxOrigin = "center"
    """What x y z is in the label files: the center of the box, or the center of its bottom face."""
    scan: ScanOption = field(default_factory=ScanOptions)
    """How the scan files are read. `--axes` turns the labels as well."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_folder(
            self.root,
            splits=self.splits,
            classes=self.classes,
            other_classes=None if self.other_classes == ("any",) else self.other_classes,
            class_map=self.map_of_classes(),
            allow_absent_classes=self.allow_absent_classes,
            unlabeled=self.unlabeled,
            scan=self.scan,
            form=LabelForm(yaw=self.yaw, size_order=self.size_order, origin=self.origin),
        )


@dataclass(frozen=True, kw_only=True)
class _PrepareTables(PrepareOptions):
    """What Lyft Level 5 and nuScenes share. Splits are ImageSets/NAME.txt with one scene name per line; without one, `all`."""

    version: str
    """Folder of the tables, below ROOT."""
    z_shift: float = 0.0
    """Mounting height of the sensor in meters. It is added to z so that the road lies near 0."""
    neighbors: tuple[tuple[str, str], ...] = ()
    """Category and the class it looks like, for example `other_vehicle Car`: finding it is neither right nor wrong."""
    sweeps: int = 1
    """Turns of the LiDAR per frame. With more than 1 every point has its age as a feature."""
    max_length: float | None = None
    """Leave out boxes that are longer than this, in meters."""
    val_share: float = 0.0
    """Without ImageSets: share of the frames for a split `val`, drawn by whole drives. The rest is `train`."""

    def open_as(self, dialect: Dialect) -> RawDataset:
        """Find the frames of one of the two datasets."""
        return open_nuscenes(
            self.root,
            dialect,
            version=self.version,
            splits=self.splits,
            val_share=self.val_share,
            classes=self.classes,
            class_map=self.map_of_classes() or None,
            allow_absent_classes=self.allow_absent_classes,
            neighbors=dict(self.neighbors),
            sweeps=self.sweeps,
            max_length=self.max_length,
            z_shift=self.z_shift,
        )


@dataclass(frozen=True, kw_only=True)
class PrepareLyft(_PrepareTables):
    """Lyft Level 5: v1.01-train/*.json and lidar/*.bin. Splits are ImageSets/NAME.txt with one scene name per line."""

    version: str = LYFT_DIALECT.version
    """Folder of the tables, below ROOT."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return self.open_as(LYFT_DIALECT)


@dataclass(frozen=True, kw_only=True)
class PrepareNuScenes(_PrepareTables):
    """nuScenes: v1.0-*/*.json, samples and sweeps/LIDAR_TOP. Splits are ImageSets/NAME.txt with one scene name per line."""

    version: str = NUSCENES_DIALECT.version
    """Folder of the tables, below ROOT."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return self.open_as(NUSCENES_DIALECT)


@dataclass(frozen=True, kw_only=True)
class PrepareWaymo(PrepareOptions):
    """Waymo Open Dataset, Perception: v2 tables (lidar, lidar_pose, lidar_calibration, vehicle_pose, lidar_box) or v1 *.tfrecord.

    Splits are ImageSets/NAME.txt with one segment per line, else the folders training, validation and testing, else `all`.
    """

    z_shift: float = 0.0
    """Meters added to z. The road lies near 0 in Waymo's data already."""
    every: int = 1
    """Take each n-th frame of a segment; 5 is usual for training."""
    second_return: bool = True
    """Take both echoes of a pulse."""
    drop_no_label_zones: bool = True
    """Leave out points in zones where nobody labeled."""
    with_labels: bool = True
    """Read lidar_box. The testing set has none."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_waymo(
            self.root,
            splits=self.splits,
            every=self.every,
            classes=self.classes,
            class_map=self.map_of_classes(),
            allow_absent_classes=self.allow_absent_classes,
            second_return=self.second_return,
            drop_no_label_zones=self.drop_no_label_zones,
            with_labels=self.with_labels,
            z_shift=self.z_shift,
        )
