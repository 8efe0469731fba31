"""CVAT's 3D tasks, exported as "Sly Point Cloud Format 1.0"; projects of Supervisely have the same files.

    root/ds0/pointcloud/<frame>.pcd        or root/<dataset>/pointcloud, or root/pointcloud
    root/ds0/ann/<frame>.pcd.json          objects: key -> class; figures: one cuboid each
    root/ImageSets/<split>.txt             yours: one dataset (ds0) or frame per line

Facts from `datumaro/plugins/sly_pointcloud_format/converter.py` of github.com/cvat-ai/datumaro and github.com/cvat-ai/cvat/issues/5825: the position is the
center of the cuboid in the frame of the point cloud; the dimensions x y z lie along the cuboid's own axes, x along its heading; the rotation
is in radians, Euler angles in the order XYZ of three.js, with z as the yaw, 0 along +x and counterclockwise in BEV.

Some importers of Supervisely (its KITTI, Lyft and nuScenes apps) write the width as x and the length as y, and other apps of it do not; the
files do not say which. Such boxes come out a quarter turn off; `prepare` warns that length and width are perhaps swapped.

This export was chosen because it is documented and has one file per scan. CVAT's other one for cuboids, "Kitti Raw Format 1.0", has
`tracklet_labels.xml`, in which versions of Datumaro swap height, width and length (github.com/open-edge-platform/datumaro/issues/1578).
Left out: figures that are no cuboids (counted), tags, related images.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...core.errors import InvalidInput
from ...core.scan_options import ScanOptions
from ..frame_source import Layout
from ..raw import RawDataset
from .boxed import FrameFiles, TypedBoxes, euler_matrices, typed_boxes
from .json_objects import LABEL_REMEDY, AnnotatedScans, read_objects_of, texts, vectors
from .opening import BoxedOptions, FoundFrames, open_boxed, scans_in


@dataclass(frozen=True, kw_only=True)
class Cvat(AnnotatedScans):
    """How the export's files are read."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        return "cvat"

    def objects(self, frame: FrameFiles) -> TypedBoxes:
        """Read the cuboids of a frame.

        Args:
            frame: A labeled frame.

        Returns:
            The boxes in the order of the figures.

        Raises:
            InvalidInput: The file is missing or broken, or a cuboid is.
        """
        assert frame.labels is not None
        where = str(frame.labels)
        figures = _figures(frame.labels)
        cuboids = [figure for _, figure in figures if figure.get("geometryType") == "cuboid_3d"]
        types = [kind for kind, figure in figures if figure.get("geometryType") == "cuboid_3d"]
        others = Counter(f"{kind} (no cuboid)" for kind, figure in figures if figure.get("geometryType") != "cuboid_3d")
        center, size, angles = (vectors(where, cuboids, ("geometry", name)) for name in ("position", "dimensions", "rotation"))
        return typed_boxes(where, types, center, size, euler_matrices(angles, "xyz"), others)

    def types(self, labels: Path) -> Counter[str]:
        """Count the cuboids of a label file by class.

        Args:
            labels: The file.

        Returns:
            Number of cuboids by class.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        return Counter(kind for kind, figure in _figures(labels) if figure.get("geometryType") == "cuboid_3d")


def _figures(path: Path) -> list[tuple[str, Mapping[str, Any]]]:
    """The figures of a file, each with the class of its object."""
    where, objects = str(path), read_objects_of(path, "objects")
    class_of = dict(zip(texts(where, objects, "key"), texts(where, objects, "classTitle")))
    figures = read_objects_of(path, "figures")
    for number, key in enumerate(texts(where, figures, "objectKey")):
        if key not in class_of:
            raise InvalidInput(f"{where}, figure {number}: its objectKey {key!r} is none of the file's objects; {LABEL_REMEDY}")
    return [(class_of[figure["objectKey"]], figure) for figure in figures]


def open_cvat(root: Path | str, options: BoxedOptions | None = None, read: ScanOptions | None = None) -> RawDataset:
    """Open an unpacked export of CVAT, or a project of Supervisely.

    Args:
        root: Folder with `ds0`, or with datasets, or one dataset.
        options: Splits, classes, rig.
        read: How the scan files are read.

    Returns:
        The dataset. Scans without an annotation file are left out and counted.

    Raises:
        InvalidInput: There is no scan, or a split or its labels are missing.

    Example:
        raw = open_cvat("task_3_export", BoxedOptions(classes=("Car",), z_shift=1.8))
    """
    root = Path(root)
    inner = sorted(p for p in root.iterdir() if (p / "pointcloud").is_dir()) if root.is_dir() else []
    frames: list[FrameFiles] = []
    skipped: Counter[str] = Counter()
    for folder in inner or [root]:
        files, others = scans_in(folder / "pointcloud")
        skipped += others
        for name, path in files.items():
            labels = folder / "ann" / f"{path.name}.json"
            frames.append(
                FrameFiles(
                    id=name if len(inner) < 2 else f"{folder.name}_{name}",
                    drive=folder.name,
                    scan=path,
                    labels=labels if labels.is_file() else None,
                )
            )
    if not frames:
        raise InvalidInput(
            f"there is no scan in {root}: expected ds0/pointcloud/FRAME.pcd. Export the task as Sly Point Cloud Format 1.0 with `Save images`, and "
            "unpack it; an export without the scans can be completed by putting them into ds0/pointcloud"
        )
    found = FoundFrames(frames=tuple(frames), skipped=skipped)
    return open_boxed(root, found, Cvat(read=read or ScanOptions()), options or BoxedOptions())
