"""Options of `upcycle3d prepare` for the layouts of `datasets/readers`: drives with boxes, annotation tools, and bags.

Read next: `prepare.py`, which runs them; `datasets/readers/opening.py`.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from ..core.scan_options import ScanOptions
from ..datasets.raw import RawDataset
from ..datasets.readers.argoverse2 import open_argoverse2
from ..datasets.readers.bag import open_bag
from ..datasets.readers.cvat import open_cvat
from ..datasets.readers.labelcloud import LabelCloudFormat, open_labelcloud
from ..datasets.readers.once import open_once
from ..datasets.readers.opening import BoxedOptions
from ..datasets.readers.pandaset import PandasetLidar, open_pandaset
from ..datasets.readers.sustechpoints import open_sustechpoints
from .prepare_layouts import PrepareOptions
from .scan_option import ScanOption


@dataclass(frozen=True, kw_only=True)
class _PrepareBoxed(PrepareOptions):
    """What these layouts share. Splits are ImageSets/NAME.txt with one drive (or frame) per line."""

    unlabeled: tuple[str, ...] = ()
    """Splits whose labels are not read."""

    def _options(self, z_shift: float | None, intensity_scale: float | None) -> BoxedOptions:
        return BoxedOptions(
            splits=self.splits,
            classes=self.classes,
            class_map=self.map_of_classes(),
            allow_absent_classes=self.allow_absent_classes,
            unlabeled=self.unlabeled,
            z_shift=z_shift or 0.0,
            intensity_scale=intensity_scale,
        )


@dataclass(frozen=True, kw_only=True)
class _PrepareDrives(_PrepareBoxed):
    """What datasets with files of their own share."""

    z_shift: float = 0.0
    """Meters added to z so that the road lies near 0; docs/own_data.md has the usual number of each dataset."""
    intensity_scale: float | None = None
    """Factor that brings intensity to 0..1. By default that of the dataset."""

    def options(self) -> BoxedOptions:
        """What every reader takes."""
        return self._options(self.z_shift, self.intensity_scale)


@dataclass(frozen=True, kw_only=True)
class _PrepareTool(_PrepareBoxed):
    """What the folders of annotation tools share. A scan without a label file is left out and counted."""

    scan: ScanOption = field(default_factory=ScanOptions)
    """How the scan files are read. The axes cannot be turned, because the labels belong to those of the files."""

    def options(self) -> BoxedOptions:
        """What every reader takes."""
        return self._options(self.scan.z_shift, self.scan.intensity_scale)


@dataclass(frozen=True, kw_only=True)
class PrepareArgoverse2(_PrepareDrives):
    """Argoverse 2, sensor dataset: train|val|test/LOG/sensors/lidar/*.feather and annotations.feather. `--z-shift 0.33` is usual."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_argoverse2(self.root, self.options())


@dataclass(frozen=True, kw_only=True)
class PrepareOnce(_PrepareDrives):
    """ONCE: data/SEQUENCE/lidar_roof/*.bin and SEQUENCE.json, ImageSets/*.txt. Scans and boxes are turned to x forward, y left."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_once(self.root, self.options())


@dataclass(frozen=True, kw_only=True)
class PreparePandaset(_PrepareDrives):
    """PandaSet: SEQUENCE/lidar/*.feather, made of the download's pickles as docs/own_data.md shows; pickles are never read."""

    lidar: PandasetLidar = "pandar64"
    """The turning LiDAR on the roof, or the one that looks ahead. Cuboids of the other one alone are dropped and counted."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_pandaset(self.root, self.options(), self.lidar)


@dataclass(frozen=True, kw_only=True)
class PrepareLabelCloud(_PrepareTool):
    """labelCloud: pointclouds/* and labels/*, with labels/_classes.json."""

    form: LabelCloudFormat | None = None
    """How labelCloud wrote the labels. By default what labels/_classes.json says."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_labelcloud(self.root, self.options(), self.scan, self.form)


@dataclass(frozen=True, kw_only=True)
class PrepareSustechPoints(_PrepareTool):
    """SUSTechPOINTS: SCENE/lidar/* and SCENE/label/*.json."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_sustechpoints(self.root, self.options(), self.scan)


@dataclass(frozen=True, kw_only=True)
class PrepareCvat(_PrepareTool):
    """CVAT's export "Sly Point Cloud Format 1.0", and projects of Supervisely: ds0/pointcloud/*.pcd and ds0/ann/*.pcd.json."""

    def open(self) -> RawDataset:
        """Find the frames."""
        return open_cvat(self.root, self.options(), self.scan)


@dataclass(frozen=True, kw_only=True)
class PrepareBag(PrepareOptions):
    """ROS bags and MCAP files: one topic of PointCloud2 messages, as frames without labels. Needs `pip install 'upcycle3d[inputs]'`."""

    topic: str | None = None
    """Topic of the LiDAR. By default the only one with point clouds."""
    scan: ScanOption = field(default_factory=ScanOptions)
    """How messages are read: columns name fields of the message; the number type is that of the message."""

    def open(self) -> RawDataset:
        """Find the frames."""
        self.scan.refuse_image_size("bags have no camera to crop to; leave it out")
        options = BoxedOptions(
            splits=self.splits,
            classes=self.classes,
            class_map=self.map_of_classes(),
            z_shift=self.scan.z_shift or 0.0,
            intensity_scale=self.scan.intensity_scale,
        )
        return open_bag(self.root, options, self.scan, self.topic)
