"""labelCloud: the folder of the annotation tool as it is, with labels in any of its formats.

    root/pointclouds/<frame>.pcd|bin|npy
    root/labels/<frame>.json or .txt
    root/labels/_classes.json              names the format, which label files of the kind centroid do not
    root/calib/<frame>.txt                 only for the format kitti
    root/ImageSets/<split>.txt             yours: one frame per line

Facts from `labelCloud/io/labels/*.py` and `labelCloud/model/bbox.py` of github.com/ch-sa/labelCloud. All formats are in the frame of the
point cloud unless something else is said; the heading is the box's own x axis, and a rotation about z is 0 along +x and grows
counterclockwise in BEV.

| format | file | boxes |
|---|---|---|
| centroid_abs | JSON | center; length, width, height; rotations x y z in degrees (0..360), R = Rz Ry Rx |
| centroid_rel | JSON | the same in radians (-pi..pi) |
| vertices | JSON | eight corners: 0 rear right bottom, 1 rear left, 2 front left, 3 front right, then the same at the top |
| kitti_untransformed | text | KITTI's columns; center of the box; height, width, length; the last column is the yaw in radians |
| kitti | text | KITTI's columns in the frame of a camera; the bottom's center; rotation_y = pi/2 - yaw, a half turn away from KITTI's own |

Left out: segmentations, and `.ply`, `.xyz` and other scans that are no .pcd, .bin or .npy (counted).
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor

from ...core.boxes import kitti_camera_to_lidar
from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.scan_options import ScanOptions
from ...core.strict_json import read_json
from ..class_names import is_dont_care
from ..frame_source import Layout
from ..kitti_calibration import DEFAULT_IMAGE_SIZE, read_calibration
from ..kitti_text import read_objects
from ..raw import RawDataset
from .boxed import FrameFiles, TypedBoxes, euler_matrices, typed_boxes, yaw_matrices
from .json_objects import LABEL_REMEDY, AnnotatedScans, read_objects_of, texts, vectors
from .opening import BoxedOptions, FoundFrames, open_boxed, scans_in

LabelCloudFormat = Literal["centroid_abs", "centroid_rel", "vertices", "kitti", "kitti_untransformed"]
"""How labelCloud wrote the labels."""


@dataclass(frozen=True, kw_only=True)
class LabelCloud(AnnotatedScans):
    """How the tool's files are read."""

    form: LabelCloudFormat
    """How the labels were written."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        return "labelcloud"

    def options(self) -> Mapping[str, object]:
        """Say how labels and scans are read.

        Returns:
            Options that shape the dataset, by name.
        """
        return {"form": self.form, **super().options()}

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
        if self.form.startswith("kitti"):
            return self._kitti_boxes(frame.labels)
        where, items = str(frame.labels), read_objects_of(frame.labels, "objects")
        names = texts(where, items, "name")
        if self.form == "vertices":
            return typed_boxes(where, names, *_of_vertices(where, items))
        angles = vectors(where, items, ("rotations",))
        if self.form == "centroid_abs":
            angles = angles.deg2rad()
        elif bool((angles.abs() > 2 * math.pi + 0.01).any()):
            raise InvalidInput(f"{where}: an angle lies beyond two pi, so the labels are in degrees: give --form centroid_abs")
        sizes = vectors(where, items, ("dimensions",), ("length", "width", "height"))
        return typed_boxes(where, names, vectors(where, items, ("centroid",)), sizes, euler_matrices(angles, "zyx"))

    def _kitti_boxes(self, path: Path) -> TypedBoxes:
        found = read_objects(path)
        found = found.select(torch.tensor([not is_dont_care(kind) for kind in found.types], dtype=torch.bool))
        size = found.dimensions[:, [2, 1, 0]]
        if self.form == "kitti_untransformed":
            return typed_boxes(str(path), found.types, found.location, size, yaw_matrices(found.rotation_y))
        calibration = read_calibration(path.parent.parent / "calib" / path.name, image_size=DEFAULT_IMAGE_SIZE)
        boxes = kitti_camera_to_lidar(found.location, found.dimensions, found.rotation_y, calibration.lidar_to_camera).double()
        return typed_boxes(str(path), found.types, boxes[:, :3], size, yaw_matrices(boxes[:, 6] + math.pi))

    def types(self, labels: Path) -> Counter[str]:
        """Count the objects of a label file by name.

        Args:
            labels: The file.

        Returns:
            Number of objects by name.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        if self.form.startswith("kitti"):
            return Counter(kind for kind in read_objects(labels).types if not is_dont_care(kind))
        return Counter(texts(str(labels), read_objects_of(labels, "objects"), "name"))


_SIGNS = torch.tensor([[i, j, k] for k in (-1, 1) for i, j in ((-1, -1), (-1, 1), (1, 1), (1, -1))], dtype=torch.float64)
"""Where each corner lies along the box's axes, in labelCloud's order."""


def _of_vertices(where: str, items: list[object]) -> tuple[Tensor, Tensor, Tensor]:
    """Centers, sizes and rotations of boxes that are given by their corners."""
    rows = [item.get("vertices") if isinstance(item, dict) else None for item in items]
    try:
        corners = torch.tensor(rows, dtype=torch.float64).reshape(-1, 8, 3)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidInput(
            f"{where}: every object must have `vertices`, eight corners of three numbers; {LABEL_REMEDY}"
        ) from error
    origin = corners[:, 0]
    sides = torch.stack([corners[:, 3] - origin, corners[:, 1] - origin, corners[:, 4] - origin], 2)  # columns: the box's axes
    size, center = sides.norm(dim=1), corners.mean(1)
    turn = sides / size[:, None].clamp_min(1e-9)
    expected = center[:, None] + (_SIGNS * size[:, None] / 2) @ turn.mT
    most = 0.03 + 0.01 * size.amax(1)  # m; labelCloud rounds corners to as few as two decimals
    off = (corners - expected).abs().amax((1, 2)) > most
    shorter = torch.minimum(size[:, :, None], size[:, None])
    skew = ((turn.mT @ turn - torch.eye(3, dtype=torch.float64)) * shorter).abs().amax((1, 2)) > most
    wrong = off | skew | (torch.linalg.det(turn) < 0)
    if bool(wrong.any()):
        raise InvalidInput(
            f"{where}, object {int(wrong.nonzero()[0])}: the vertices are no box in labelCloud's order (0 rear right bottom, 1 rear left, 2 front left, "
            f"3 front right, then the same at the top); {LABEL_REMEDY}"
        )
    return center, size, turn


def _written_form(labels: Path, form: LabelCloudFormat | None) -> LabelCloudFormat:
    """The format that the user names, or the one that labelCloud noted."""
    if form is not None:
        return form
    note = labels / "_classes.json"
    known = get_args(LabelCloudFormat)
    if not note.is_file():
        raise InvalidInput(f"there is no {note}, which names the format of the labels; give --form, one of {', '.join(known)}")
    named = read_json(note, "classes of labelCloud", remedy=f"give --form, one of {', '.join(known)}").get("format")
    if named not in known:
        raise InvalidInput(f"{note} names the format {shown(repr(named), most=60)}; give --form, one of {', '.join(known)}")
    return named


def open_labelcloud(
    root: Path | str,
    options: BoxedOptions | None = None,
    read: ScanOptions | None = None,
    form: LabelCloudFormat | None = None,
) -> RawDataset:
    """Open the folder of labelCloud.

    Args:
        root: Folder with `pointclouds` and `labels`.
        options: Splits, classes, rig.
        read: How the scan files are read.
        form: How the labels were written; None takes what `labels/_classes.json` says.

    Returns:
        The dataset. Scans without a label file are left out and counted.

    Raises:
        InvalidInput: There is no scan, nothing says how the labels were written, or a split or its labels are missing.

    Example:
        raw = open_labelcloud("labelCloud", BoxedOptions(classes=("cart",)), form="centroid_abs")
    """
    root = Path(root)
    files, skipped = scans_in(root / "pointclouds")
    if not files:
        raise InvalidInput(
            f"there is no scan in {root / 'pointclouds'} (.pcd, .bin or .npy; skipped: {sum(skipped.values())} other files); check the root, or "
            "convert .ply and text files to .pcd"
        )
    named = _written_form(root / "labels", form)
    suffix = ".txt" if named.startswith("kitti") else ".json"
    labels = {name: root / "labels" / (name + suffix) for name in files}
    frames = (
        FrameFiles(id=name, drive=name, scan=path, labels=labels[name] if labels[name].is_file() else None)
        for name, path in files.items()
    )
    found = FoundFrames(frames=tuple(frames), skipped=skipped)
    return open_boxed(root, found, LabelCloud(form=named, read=read or ScanOptions()), options or BoxedOptions())
