"""SUSTechPOINTS: the folder of the annotation tool as it is.

    root/<scene>/lidar/<frame>.pcd|bin|npy
    root/<scene>/label/<frame>.json        [{"obj_type": "Car", "psr": {"position": .., "scale": .., "rotation": ..}}, ..] or {"objs": [..]}
    root/ImageSets/<split>.txt             yours: one scene or frame per line

Facts from `doc/data-format.md`, `scene_reader.py` and `tools/trans_kitti_labels.py` of github.com/naurril/SUSTechPOINTS: the position is
the center of the box in the LiDAR's frame, whose z points up; the scale is length, width, height along the box's own axes; the rotation
is in radians, Euler angles in the order XYZ of three.js (R = Rx Ry Rz), and the yaw is 0 along +x and grows counterclockwise in BEV. That
is our convention, if x of the scans points forward.

Left out: label_fusion (2D boxes), calibrations, ego poses, radar and further LiDARs (folders `radar` and `aux_lidar` are counted).
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.scan_options import ScanOptions
from ..frame_source import Layout
from ..raw import RawDataset
from .boxed import FrameFiles, TypedBoxes, euler_matrices, typed_boxes
from .json_objects import AnnotatedScans, read_objects_of, texts, vectors
from .opening import BoxedOptions, FoundFrames, open_boxed, scans_in


@dataclass(frozen=True, kw_only=True)
class SustechPoints(AnnotatedScans):
    """How the tool's files are read."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        return "sustechpoints"

    def objects(self, frame: FrameFiles) -> TypedBoxes:
        """Read the boxes of a frame.

        Args:
            frame: A labeled frame.

        Returns:
            The boxes in the order of the file.

        Raises:
            InvalidInput: The file is missing or broken, or a box is.
        """
        assert frame.labels is not None
        where, items = str(frame.labels), read_objects_of(frame.labels, "objs")
        center, size, angles = (vectors(where, items, ("psr", name)) for name in ("position", "scale", "rotation"))
        return typed_boxes(where, texts(where, items, "obj_type"), center, size, euler_matrices(angles, "xyz"))

    def types(self, labels: Path) -> Counter[str]:
        """Count the objects of a label file by type.

        Args:
            labels: The file.

        Returns:
            Number of objects by type.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        return Counter(texts(str(labels), read_objects_of(labels, "objs"), "obj_type"))


def open_sustechpoints(root: Path | str, options: BoxedOptions | None = None, read: ScanOptions | None = None) -> RawDataset:
    """Open the data folder of SUSTechPOINTS.

    Args:
        root: Folder of scenes, or one scene.
        options: Splits, classes, rig.
        read: How the scan files are read.

    Returns:
        The dataset. Scans without a label file are left out and counted, because nobody labeled them.

    Raises:
        InvalidInput: There is no scan, or a split or its labels are missing.

    Example:
        raw = open_sustechpoints("SUSTechPOINTS/data", BoxedOptions(z_shift=1.8))
    """
    root = Path(root)
    inner = sorted(p for p in root.iterdir() if (p / "lidar").is_dir()) if root.is_dir() else []
    frames: list[FrameFiles] = []
    skipped: Counter[str] = Counter()
    for scene in inner or [root]:
        files, others = scans_in(scene / "lidar")
        skipped += others
        skipped["folder of radar or of another LiDAR"] += sum((scene / name).is_dir() for name in ("radar", "aux_lidar"))
        for name, path in files.items():
            labels = scene / "label" / f"{name}.json"
            frames.append(
                FrameFiles(id=f"{scene.name}_{name}", drive=scene.name, scan=path, labels=labels if labels.is_file() else None)
            )
    if not frames:
        raise InvalidInput(f"there is no scan in {root}: expected SCENE/lidar/FRAME.pcd, .bin or .npy; check the root")
    found = FoundFrames(frames=tuple(frames), skipped=+skipped)
    return open_boxed(root, found, SustechPoints(read=read or ScanOptions()), options or BoxedOptions())
