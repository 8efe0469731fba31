"""PandaSet, from Feather files that its user makes of the dataset's pickles.

    root/<sequence>/lidar/<frame>.feather                    x y z (world, meters), i (0..255), d (0 Pandar64, 1 PandarGT)
    root/<sequence>/lidar/poses.json                         one pose per frame: position x y z, heading w x y z
    root/<sequence>/annotations/cuboids/<frame>.feather      label, yaw, position.x .. dimensions.z, cuboids.sensor_id
    root/ImageSets/<split>.txt                               yours: one sequence per line

**The download holds pickled pandas tables (`00.pkl.gz`), and a pickle is a program.** This toolkit never runs one. docs/own_data.md shows
the five lines of pandas that write the Feather files beside them, in an environment that you trust with the download.

Facts from the page of github.com/scaleapi/pandaset-devkit and from `pcdet/datasets/pandaset/pandaset_dataset.py` of OpenPCDet: points and
cuboids are in the world's frame; a pose leads from the vehicle's frame (x to the right, y forward, z up) to the world. A cuboid has its
center, its width as `dimensions.x`, its length as `dimensions.y`, and a yaw about z that is 0 where its length lies along the world's y
axis. So the heading of a cuboid is (-sin yaw, cos yaw). Everything is brought to the vehicle's frame, then to x forward, y left.

One LiDAR is read. A cuboid with `cuboids.sensor_id` of the other LiDAR stands for what only that one sees, or twice for one object, and
is counted. Left out: the other LiDAR, semantic segmentation, cameras, times.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from ...core.ledger import Ledger
from ...core.point_files import scan_of_rows
from ...core.strict_json import read_json
from ...core.structures import PointCloud
from ..drive_tables import Pose, quaternion_matrix
from ..feather import numbers, read_feather
from ..frame_source import Layout
from ..raw import RawDataset
from .boxed import FrameFiles, TypedBoxes, typed_boxes
from .opening import BoxedOptions, FoundFrames, open_boxed

PANDASET_MAP = {"Car": "Car", "Pedestrian": "Pedestrian", "Pedestrian with Object": "Pedestrian", "Bicycle": "Cyclist"}
"""Label -> class, by default."""
PandasetLidar = Literal["pandar64", "pandar_gt"]
"""The turning LiDAR on the roof, or the one that looks ahead."""
_NUMBER: Mapping[PandasetLidar, int] = {"pandar64": 0, "pandar_gt": 1}
_POSITION = ("position.x", "position.y", "position.z")
_SIZE = ("dimensions.y", "dimensions.x", "dimensions.z")  # length, width, height
_SENSOR = "cuboids.sensor_id"
_REMEDY = "write the Feather file again from the dataset's pickle (docs/own_data.md)"


@dataclass(frozen=True, kw_only=True)
class Pandaset:
    """How PandaSet's files are read."""

    lidar: PandasetLidar = "pandar64"
    """Which LiDAR is read."""

    @property
    def layout(self) -> Layout:
        """Name of the layout."""
        return "pandaset"

    def options(self) -> Mapping[str, object]:
        """Which LiDAR is read."""
        return {"lidar": self.lidar}

    def scan(self, frame: FrameFiles) -> tuple[PointCloud, Ledger]:
        """Read the points of one LiDAR.

        Args:
            frame: The frame.

        Returns:
            The points with x forward, y left from the origin of the pose, intensity in 0..255; and their counts.

        Raises:
            InvalidInput: The file or the pose is missing or broken, or holds no point of this LiDAR.
        """
        columns = ("x", "y", "z", "i", "d")
        table = read_feather(frame.scan, columns, what="scan", remedy=_REMEDY)
        rows = numbers(frame.scan, table, columns)
        rows = rows[rows[:, 4] == _NUMBER[self.lidar]]
        xyz = _forward_left(_pose(frame).to_inner(torch.from_numpy(rows[:, :3].copy())))
        table_of_points = np.concatenate([xyz.numpy(), rows[:, 3:4]], 1)
        return scan_of_rows(table_of_points, ("x", "y", "z", "intensity"), f"{frame.scan}, {self.lidar}")

    def objects(self, frame: FrameFiles) -> TypedBoxes:
        """Read the cuboids of a frame.

        Args:
            frame: A labeled frame.

        Returns:
            The boxes in the order of the file.

        Raises:
            InvalidInput: The file or the pose is missing or broken, or a cuboid is.
        """
        assert frame.labels is not None
        columns = ("label", "yaw", _SENSOR, *_POSITION, *_SIZE)
        table = read_feather(frame.labels, columns, what="table of cuboids", remedy=_REMEDY)
        other = table[_SENSOR] == 1 - _NUMBER[self.lidar]
        dropped = Counter(f"{kind} (other LiDAR)" for kind in table["label"][other].tolist())
        table = {name: values[~other] for name, values in table.items()}
        center, size, yaw = (torch.from_numpy(numbers(frame.labels, table, names)) for names in (_POSITION, _SIZE, ("yaw",)))
        pose = _pose(frame)
        zero, one = torch.zeros_like(yaw), torch.ones_like(yaw)
        heading, up = torch.cat([-yaw.sin(), yaw.cos(), zero], 1), torch.cat([zero, zero, one], 1)
        axes = [_forward_left(axis @ pose.rotation) for axis in (heading, up.cross(heading, dim=1), up)]
        return typed_boxes(
            str(frame.labels), table["label"].tolist(), _forward_left(pose.to_inner(center)), size, torch.stack(axes, 2), dropped
        )

    def types(self, labels: Path) -> Counter[str]:
        """Count the cuboids of a file by label, those of the other LiDAR left out.

        Args:
            labels: The file.

        Returns:
            Number of cuboids by label.

        Raises:
            InvalidInput: The file is missing or broken.
        """
        table = read_feather(labels, ("label", _SENSOR), what="table of cuboids", remedy=_REMEDY)
        return Counter(map(str, table["label"][table[_SENSOR] != 1 - _NUMBER[self.lidar]].tolist()))


def _forward_left(xyz: Tensor) -> Tensor:
    """(N, 3) x right, y forward, z up -> x forward, y left, z up."""
    return torch.stack([xyz[:, 1], -xyz[:, 0], xyz[:, 2]], 1)


def _pose(frame: FrameFiles) -> Pose:
    """The pose of the vehicle in the world at the time of a frame."""
    path, number = frame.scan.parent / "poses.json", int(frame.key)
    poses: list[Any] = read_json(path, "poses of the LiDAR", remedy="unpack the sequence again", kind=list)
    try:
        position, heading = poses[number]["position"], poses[number]["heading"]
        translation = torch.tensor([float(position[axis]) for axis in "xyz"], dtype=torch.float64)
        turn = torch.tensor([float(heading[axis]) for axis in "wxyz"], dtype=torch.float64)
    except (LookupError, TypeError, ValueError) as error:
        raise InvalidInput(
            f"{path}: frame {number} must have position x y z and heading w x y z ({shown(error, most=80)}); unpack the sequence again"
        ) from error
    if not bool(translation.isfinite().all()) or not abs(float(turn.norm()) - 1) < 1e-3:
        raise InvalidInput(
            f"{path}: the heading of frame {number} is no unit quaternion w x y z, found {json.dumps(turn.tolist())}"
        )
    return Pose(rotation=quaternion_matrix(turn), translation=translation)


def open_pandaset(root: Path | str, options: BoxedOptions | None = None, lidar: PandasetLidar = "pandar64") -> RawDataset:
    """Open PandaSet.

    Args:
        root: Folder of sequences (`001`, `002`, ...), whose tables were converted to Feather.
        options: Splits, classes, rig.
        lidar: Which LiDAR is read.

    Returns:
        The dataset. Intensity is divided by 255 unless the options say something else.

    Raises:
        InvalidInput: There is no sequence, its tables are pickles only, or a split or its labels are missing.

    Example:
        raw = open_pandaset("pandaset", BoxedOptions(classes=("Car",)))
    """
    root = Path(root)
    sequences = sorted(p for p in root.iterdir() if (p / "lidar").is_dir()) if root.is_dir() else []
    frames: list[FrameFiles] = []
    pickles = misnamed = 0
    for sequence in sequences:
        files = sorted((sequence / "lidar").iterdir())
        named = {path.name.partition(".")[0] for path in files if path.suffix == ".feather"}
        pickles += sum(path.name.endswith(".pkl.gz") and path.name.partition(".")[0] not in named for path in files)
        for path in files:
            if path.suffix == ".feather" and path.stem.isdecimal():
                labels = sequence / "annotations" / "cuboids" / path.name
                frames.append(
                    FrameFiles(
                        id=f"{sequence.name}_{path.stem}", drive=sequence.name, scan=path, key=path.stem,
                        labels=labels if labels.is_file() else None,
                    )
                )  # fmt: skip
            else:
                misnamed += path.suffix == ".feather"
    if not frames:
        found = (
            f"its {pickles} scans are pickles (.pkl.gz), which are programs and are never run here"
            if pickles
            else "there is no sequence"
        )
        raise InvalidInput(
            f"{root}: {found}; PandaSet is read from SEQUENCE/lidar/00.feather and SEQUENCE/annotations/cuboids/00.feather. Write them with "
            "pandas, in an environment that you trust with the download: pandas.read_pickle('00.pkl.gz').reset_index(drop=True)"
            ".to_feather('00.feather'); docs/own_data.md has the loop"
        )
    skipped = +Counter({"scan that is a pickle only": pickles, "file whose name is no frame number": misnamed})
    found_frames = FoundFrames(frames=tuple(frames), skipped=skipped)
    return open_boxed(
        root, found_frames, Pandaset(lidar=lidar), options or BoxedOptions(), usual_map=PANDASET_MAP, usual_scale=1 / 255
    )
