"""ONCE (One Million Scenes): scans of the roof LiDAR and the JSON file of each sequence.

    root/data/<sequence>/lidar_roof/<milliseconds>.bin      float32 x y z intensity (0..1)
    root/data/<sequence>/<sequence>.json                    frames[].annos: names, boxes_3d
    root/ImageSets/train|val|test|raw_*.txt                 one sequence per line, part of the download

Facts from once-for-auto-driving.github.io/documentation.html and from `once.py` of the development kit (a copy is in
github.com/haley-dev-1/once_devkit) and `pcdet/datasets/once/once_dataset.py` of OpenPCDet: x of the LiDAR points to the left, y to the
back, z up. A box is center x y z, length, width, height, yaw, all in that frame; the length lies along the yaw, which is 0 along the
file's x axis and grows counterclockwise. Scans and boxes are turned to x forward, y left: (x, y) becomes (-y, x), and a quarter turn is
added to the yaw. Intensity lies in 0..1 (github.com/once-for-auto-driving/once_devkit/issues/36).

Frames without `annos` are not labeled: they are left out of labeled splits and counted. Left out: cameras, 2D boxes, poses.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...core.point_files import read_scan
from ...core.scan_options import ScanOptions
from ...core.strict_json import read_json
from ...core.structures import PointCloud
from ..frame_source import Layout
from ..raw import RawDataset
from .boxed import FrameFiles, TypedBoxes, typed_boxes, yaw_matrices
from .opening import BoxedOptions, FoundFrames, open_boxed, scans_in

_SCAN = ScanOptions(axes=("-y", "x", "z"))
_REMEDY = "unpack the sequence again, or leave it out of ImageSets/NAME.txt"


@dataclass(frozen=True, kw_only=True)
class Once:
    """How ONCE's files are read."""

    annotations: Mapping[str, Mapping[str, Any] | str]
    """Sequence -> annotations by frame key, or what is wrong with its file."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        return "once"

    def options(self) -> Mapping[str, object]:
        """The axes, which commands that read the scan files themselves must use too."""
        return {"axes": _SCAN.axes}

    def scan(self, frame: FrameFiles) -> tuple[PointCloud, Ledger]:
        """Read a scan and turn it to x forward, y left.

        Args:
            frame: The frame.

        Returns:
            The scan, and its counts.

        Raises:
            InvalidInput: As for `read_scan`.
        """
        return read_scan(frame.scan, _SCAN)

    def objects(self, frame: FrameFiles) -> TypedBoxes:
        """Read the boxes of a frame.

        Args:
            frame: A labeled frame.

        Returns:
            The boxes in the order of the file, turned to x forward, y left.

        Raises:
            InvalidInput: The sequence's file is broken, or a box is.
        """
        found = self.annotations[frame.drive]
        if isinstance(found, str):
            raise InvalidInput(found)
        where, annos = f"{frame.labels}, frame {frame.key}", found[frame.key]
        names, rows = annos.get("names"), annos.get("boxes_3d")
        try:
            boxes = torch.tensor(rows, dtype=torch.float64).reshape(-1, 7)
        except (TypeError, ValueError, RuntimeError) as error:
            raise InvalidInput(
                f"{where}: boxes_3d must hold seven numbers per box ({shown(error, most=80)}); {_REMEDY}"
            ) from error
        if not isinstance(names, list) or len(names) != len(boxes):
            raise InvalidInput(
                f"{where}: there must be as many names as boxes_3d ({len(boxes)}), found {shown(repr(names), most=80)}; {_REMEDY}"
            )
        center = torch.stack([-boxes[:, 1], boxes[:, 0], boxes[:, 2]], 1)
        return typed_boxes(where, names, center, boxes[:, 3:6], yaw_matrices(boxes[:, 6] + math.pi / 2))

    def types(self, labels: Path) -> Counter[str]:
        """Count the boxes of a sequence by name.

        Args:
            labels: Its JSON file.

        Returns:
            Number of boxes by name.

        Raises:
            InvalidInput: The file is broken.
        """
        found = self.annotations[labels.stem]
        if isinstance(found, str):
            raise InvalidInput(found)
        names = [annos.get("names") for annos in found.values()]
        return Counter(str(name) for part in names if isinstance(part, list) for name in part)


def open_once(root: Path | str, options: BoxedOptions | None = None) -> RawDataset:
    """Open the ONCE dataset.

    Args:
        root: Folder with `data` and `ImageSets`.
        options: Splits, classes, rig.

    Returns:
        The dataset. Splits whose names begin with `raw` or `test` have no labels where nobody labeled them.

    Raises:
        InvalidInput: There is no sequence, or a split or its labels are missing.

    Example:
        raw = open_once("ONCE", BoxedOptions(splits=("train", "val")))
    """
    root = Path(root)
    data = root / "data"
    sequences = sorted(p for p in data.iterdir() if (p / "lidar_roof").is_dir()) if data.is_dir() else []
    annotations: dict[str, Mapping[str, Any] | str] = {}
    frames: list[FrameFiles] = []
    skipped: Counter[str] = Counter()
    for sequence in sequences:
        labels = sequence / f"{sequence.name}.json"
        annotations[sequence.name] = found = _annotations(labels) if labels.is_file() else {}
        files, others = scans_in(sequence / "lidar_roof")
        skipped += others
        if isinstance(found, Mapping):
            skipped["annotated frame without its scan"] += len(found.keys() - files.keys())
        for key, path in files.items():
            labeled = isinstance(found, str) or key in found  # a broken file costs its frames, with the reason
            frames.append(
                FrameFiles(
                    id=f"{sequence.name}_{key}", drive=sequence.name, scan=path, labels=labels if labeled else None, key=key
                )
            )
    if not frames:
        raise InvalidInput(f"there is no scan in {data}: expected SEQUENCE/lidar_roof/MILLISECONDS.bin; check the root")
    found_frames = FoundFrames(frames=tuple(frames), skipped=+skipped)
    return open_boxed(root, found_frames, Once(annotations=annotations), options or BoxedOptions())


def _annotations(path: Path) -> Mapping[str, Any] | str:
    """Annotations by frame of a sequence's file, those without dropped; or what is wrong with the file."""
    try:
        frames = read_json(path, "sequence of ONCE", remedy=_REMEDY).get("frames")
    except InvalidInput as error:
        return str(error)
    if not isinstance(frames, list) or not all(isinstance(frame, dict) for frame in frames):
        return f"{path} has no list of frames; {_REMEDY}"
    return {
        str(frame.get("frame_id")): {name: frame["annos"].get(name) for name in ("names", "boxes_3d")}
        for frame in frames
        if isinstance(frame.get("annos"), dict)
    }
