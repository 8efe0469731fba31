"""`upcycle3d prepare`: a dataset on disk, checked, indexed and split, with its databases of objects to paste.

Read next: `datasets/raw.py`, which does the work.
"""

from __future__ import annotations

import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro

from ..datasets.kitti import KITTI_CLASSES, PointsFolder
from ..datasets.nuscenes import LYFT_DIALECT, NUSCENES_DIALECT, Dialect
from ..datasets.raw import RawDataset, RawReport, open_folder, open_kitti, open_nuscenes, open_waymo, prepare_raw
from ..datasets.waymo import WAYMO_CLASSES
from .console import console, print_table, progress_bar, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class _PrepareOptions:
    """What preparing any dataset needs."""

    root: tyro.conf.Positional[Path]
    """Folder of the dataset."""
    out: Path
    """Folder to write. `train` and `upcycle` take it as `--data DIR[:SPLIT]`."""
    splits: tuple[str, ...] = ()
    """Splits to take, by file name. By default all."""
    labeled: tuple[str, ...] = ()
    """Splits whose labels may be learned from: each gets its own database of objects. By default `train` with the labeled splits of
    --label-shares, or every split if there is no `train`."""
    label_shares: tuple[float, ...] = ()
    """Also split `train` into train-SHARE-DRAW and train-SHARE-DRAW-rest, draws 0 1 2, for example `0.01 0.02 0.05 0.2`. Whole
    segments or scenes are drawn where the dataset has them, else frames."""
    z_shift: float = 0.0
    """Mounting height of the sensor in meters. It is added to z so that the road lies near 0."""
    workers: int = 2
    """Number of processes."""
    json: Path | None = None
    """Also write the result to this JSON file."""


@dataclass(frozen=True, kw_only=True)
class PrepareKitti(_PrepareOptions):
    """KITTI's object layout: training/velodyne or velodyne_reduced, label_2, calib, ImageSets."""

    classes: tuple[str, ...] = KITTI_CLASSES
    """Classes to learn, in label order."""
    points: PointsFolder = "auto"
    """Which scans to read. auto: velodyne_reduced where it exists, else velodyne."""
    crop_to_camera: bool = True
    """Keep only the points that the camera sees, because KITTI labels nothing else."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_kitti(
            self.root,
            splits=self.splits,
            classes=self.classes,
            points_folder=self.points,
            z_shift=self.z_shift,
            crop_to_camera=self.crop_to_camera,
        )


@dataclass(frozen=True, kw_only=True)
class PrepareFolder(_PrepareOptions):
    """Your own folder: points/ID.bin|npy|pcd, labels/ID.txt (class x y z dx dy dz yaw), splits/NAME.txt (docs/data_format.md)."""

    classes: tuple[str, ...] = ("Car",)
    """Classes to learn, in label order."""
    other_classes: tuple[str, ...] = ()
    """Classes that may occur in the labels and are dropped."""
    columns: tuple[str, ...] = ()
    """Values of a scan's row in file order; `_` skips one. By default x y z intensity."""
    intensity_scale: float = 1.0
    """Factor that brings intensity to 0..1: 0.0039216 for a sensor that counts to 255."""
    drop_non_finite: bool = False
    """Leave out points with NaN or inf instead of refusing the frame."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_folder(
            self.root,
            splits=self.splits,
            classes=self.classes,
            other_classes=self.other_classes,
            columns=self.columns or None,
            intensity_scale=self.intensity_scale,
            drop_non_finite=self.drop_non_finite,
            z_shift=self.z_shift,
        )


@dataclass(frozen=True, kw_only=True)
class _PrepareTables(_PrepareOptions):
    """What Lyft Level 5 and nuScenes share. Splits are ImageSets/NAME.txt with one scene name per line; without one, `all`."""

    version: str
    """Folder of the tables, below ROOT."""
    classes: tuple[str, ...] = KITTI_CLASSES
    """Classes to learn, in label order."""
    categories: tuple[tuple[str, str], ...] = ()
    """Category of the tables and the class it becomes, for example `car Car truck Car`. docs/data_format.md lists the defaults."""
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
            class_map=dict(self.categories) or None,
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
class PrepareWaymo(_PrepareOptions):
    """Waymo Open Dataset, Perception: v2 tables (lidar, lidar_pose, lidar_calibration, vehicle_pose, lidar_box) or v1 *.tfrecord.

    Splits are ImageSets/NAME.txt with one segment per line, else the folders training, validation and testing, else `all`.
    """

    classes: tuple[str, ...] = WAYMO_CLASSES
    """Classes to learn, in label order."""
    class_map: tuple[tuple[str, str], ...] = ()
    """Waymo's type and your name for it, for example `Vehicle Car`."""
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
            class_map=dict(self.class_map),
            second_return=self.second_return,
            drop_no_label_zones=self.drop_no_label_zones,
            with_labels=self.with_labels,
            z_shift=self.z_shift,
        )


def command(
    dataset: Annotated[PrepareKitti, tyro.conf.subcommand("kitti")]
    | Annotated[PrepareFolder, tyro.conf.subcommand("folder")]
    | Annotated[PrepareLyft, tyro.conf.subcommand("lyft")]
    | Annotated[PrepareNuScenes, tyro.conf.subcommand("nuscenes")]
    | Annotated[PrepareWaymo, tyro.conf.subcommand("waymo")],
) -> None:
    """Read every frame of a dataset once, check it, and write it for fast use. Kill it and start it again: nothing is done twice."""
    raw = dataset.open()
    with progress_bar("prepare", len(raw.ids)) as advance:
        report = prepare_raw(
            raw,
            dataset.out,
            labeled=dataset.labeled,
            label_shares=dataset.label_shares,
            workers=dataset.workers,
            on_progress=advance,
        )
    _print(report)
    values = {**asdict(report.frames), "root": str(report.frames.root), "gt_objects": dict(report.gt_objects)}
    write_json(dataset.json, values)


def _print(report: RawReport) -> None:
    frames = report.frames
    rows = [(name, count, report.gt_objects.get(name, "-")) for name, count in frames.splits.items()]
    print_table("prepared dataset", ("split", "frames", "objects to paste"), rows)
    console.print(
        f"{frames.frames} frames ({frames.reused_frames} were already there), {frames.points:,} points, {frames.boxes} boxes, "
        f"{frames.empty_boxes} without a point"
    )
    if frames.failures:
        print_table("left out", ("frame", "why"), [(f.id, f.reason) for f in frames.failures])


if __name__ == "__main__":
    sys.exit(run_command(command))
