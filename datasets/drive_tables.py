"""Scenes, keyframes, sweeps and boxes of nuScenes or Lyft Level 5 in memory, as `nuscenes_tables.py` reads them.

What is wrong with one frame (a token that leads nowhere, a quaternion without unit length, a box without a size) is an error when that
frame is asked for, so the other frames stay good.

Read next: `nuscenes.py`, which makes frames of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.foreign_text import shown

_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where an inner frame stands in an outer frame: `x_outer = rotation @ x_inner + translation`."""

    rotation: Tensor
    """(3, 3) float64."""
    translation: Tensor
    """(3,) float64 in m."""

    def to_outer(self, xyz: Tensor) -> Tensor:
        """Bring points to the outer frame.

        Args:
            xyz: (N, 3) points in the inner frame, in m.

        Returns:
            (N, 3) points in the outer frame.
        """
        return xyz @ self.rotation.T + self.translation

    def to_inner(self, xyz: Tensor) -> Tensor:
        """Bring points to the inner frame.

        Args:
            xyz: (N, 3) points in the outer frame, in m.

        Returns:
            (N, 3) points in the inner frame.
        """
        return (xyz - self.translation) @ self.rotation


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One turn of the LiDAR."""

    token: str
    """Its token in sample_data."""
    path: Path
    """File of the points."""
    timestamp: float
    """Time in microseconds."""
    sensor: Pose
    """The sensor in the vehicle."""
    vehicle: Pose
    """The vehicle in the global frame."""
    previous: str
    """Token of the turn before it; "" for the first turn of a scene."""


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The boxes of a keyframe as the table gives them, in the global frame."""

    center: Tensor
    """(N, 3) float64 in m."""
    size: Tensor
    """(N, 3) float64 width, length, height in m."""
    rotation: Tensor
    """(N, 3, 3) float64; the x axis of a box is its heading."""
    categories: tuple[str, ...]
    """N names."""
    num_points: Tensor
    """(N,) int64 LiDAR points inside, -1 where the table does not know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SweepRow:
    """A row of sample_data. There are millions of them, so `DriveTables.sweep` makes a `Sweep` only of those that are asked for."""

    token: str
    """Token of the row."""
    filename: str
    """File of the points, relative to the dataset's folder."""
    timestamp: float
    """Time in microseconds."""
    sensor_token: str
    """Token of its calibrated sensor."""
    pose_token: str
    """Token of its ego pose."""
    previous: str
    """Token of the turn before it."""


@dataclass(frozen=True, kw_only=True)
class DriveTables:
    """Scenes, keyframes, LiDAR sweeps and boxes of one dataset folder; made by `read_tables`.

    `scenes`, `logs`, `categories` and the methods are for everybody; the other fields are compact tables for the methods.
    """

    root: Path
    """Folder of the dataset."""
    version: str
    """Folder of the tables, below `root`."""
    channel: str
    """Name of the LiDAR."""
    scenes: Mapping[str, tuple[str, ...]]
    """Name of a scene -> its sample tokens in order of time."""
    logs: Mapping[str, str]
    """Name of a scene -> token of its log. A log is one drive; several scenes may share it."""
    categories: tuple[str, ...]
    """Names of all categories; empty where the boxes were not read."""
    sample_order: Mapping[str, int]
    """Sample token -> number of the sample."""
    keyframes: Mapping[str, str]
    """Sample token -> token of its sweep."""
    sweeps: Mapping[str, SweepRow]
    """Token of a sweep -> its row."""
    sensors: Mapping[str, tuple[float, ...]]
    """Token of a calibrated sensor -> translation and quaternion."""
    poses: Mapping[str, int]
    """Token of an ego pose -> row of `pose_values`."""
    pose_values: NDArray[np.float64]
    """(M, 7) translations and quaternions."""
    box_starts: NDArray[np.int64]
    """(samples + 1,): the boxes of sample i are rows box_starts[i] to box_starts[i + 1]."""
    box_values: NDArray[np.float64]
    """(B, 10) translation, size and quaternion of each box."""
    box_counts: NDArray[np.int64]
    """(B, 2) number of the category or -1, and LiDAR points or -1."""
    lost: Mapping[str, str]
    """Sample token -> what is wrong with its rows."""

    @property
    def samples(self) -> tuple[str, ...]:
        """Tokens of all keyframes: scene by scene in the order of the table, each scene in order of time."""
        return tuple(token for tokens in self.scenes.values() for token in tokens)

    def keyframe(self, sample: str) -> Sweep:
        """Find the sweep of a keyframe.

        Args:
            sample: Token of the sample.

        Returns:
            The sweep.

        Raises:
            InvalidInput: The sample, or what its rows point to, does not exist.
        """
        self._index(sample)
        if sample not in self.keyframes:
            raise InvalidInput(
                f"sample {sample}: no keyframe of {self.channel} in {self.version}/sample_data.json names it; "
                "unpack the tables again, or leave its scene out: write the other scenes, one name per line, into ImageSets/NAME.txt"
            )
        return self.sweep(self.keyframes[sample])

    def sweep(self, token: str) -> Sweep:
        """Find a sweep by its own token.

        Args:
            token: Token of the sweep in sample_data.

        Returns:
            The sweep.

        Raises:
            InvalidInput: The sweep, its pose or its calibration does not exist or is broken.
        """
        if token not in self.sweeps:
            raise InvalidInput(
                f"{self.version}/sample_data.json: there is no row {token} of {self.channel}; were the tables cut, or read with "
                "keyframes_only?"
            )
        row = self.sweeps[token]
        where = f"{self.version}/sample_data.json, row {token}"
        if row.pose_token not in self.poses:
            raise InvalidInput(f"{where}: ego_pose_token {row.pose_token} is not in ego_pose.json; unpack the tables again")
        path = PurePosixPath(row.filename)
        odd = path.is_absolute() or ".." in path.parts or not path.parts or "\\" in row.filename
        if odd or shown(row.filename, most=1000) != row.filename:
            raise InvalidInput(
                f"{where}: filename {shown(row.filename)!r} leads out of the dataset's folder, or holds odd characters; such tables are not read"
            )
        return Sweep(
            token=token,
            path=self.root / path,
            timestamp=row.timestamp,
            sensor=_pose(self.sensors[row.sensor_token], f"{self.version}/calibrated_sensor.json, row {row.sensor_token}"),
            vehicle=_pose(self.pose_values[self.poses[row.pose_token]], f"{self.version}/ego_pose.json, row {row.pose_token}"),
            previous=row.previous,
        )

    def annotations(self, sample: str) -> Annotations:
        """Read the boxes of a keyframe.

        Args:
            sample: Token of the sample.

        Returns:
            The boxes in the order of the table.

        Raises:
            InvalidInput: With sample and box: a box is broken, or the sample does not exist.
        """
        i = self._index(sample)
        rows = slice(self.box_starts[i], self.box_starts[i + 1])
        values, counts = self.box_values[rows], self.box_counts[rows]
        for k, (value, count) in enumerate(zip(values, counts)):
            where = f"sample {sample}, its box {k} in {self.version}/sample_annotation.json (center {value[:3].tolist()})"
            if not np.isfinite(value).all() or value[3:6].min() <= 0:
                raise InvalidInput(
                    f"{where}: width, length, height must be positive and all numbers finite, found {value.tolist()}"
                )
            if count[0] < 0:
                raise InvalidInput(f"{where}: its instance, or that instance's category, is not in the tables; unpack them again")
            _check_unit(value[6:], where)
        return Annotations(
            center=torch.from_numpy(values[:, :3].copy()),
            size=torch.from_numpy(values[:, 3:6].copy()),
            rotation=quaternion_matrix(torch.from_numpy(values[:, 6:].copy())),
            categories=tuple(self.categories[c] for c in counts[:, 0].tolist()),
            num_points=torch.from_numpy(counts[:, 1].copy()),
        )

    def _index(self, sample: str) -> int:
        if sample not in self.sample_order:
            raise InvalidInput(f"{self.root}: there is no sample {sample} in {self.version}/sample.json; ids are sample tokens")
        if sample in self.lost:
            raise InvalidInput(f"sample {sample}: {self.lost[sample]}")
        return self.sample_order[sample]


def quaternion_matrix(quaternion: Tensor) -> Tensor:
    """Turn quaternions into rotation matrices.

    Args:
        quaternion: (..., 4) in the order w, x, y, z; they need not have unit length.

    Returns:
        (..., 3, 3) rotation matrices.
    """
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _pose(values: Sequence[float] | NDArray[np.float64], where: str) -> Pose:
    numbers = torch.tensor(np.asarray(values), dtype=torch.float64)
    if not bool(numbers.isfinite().all()):
        raise InvalidInput(f"{where}: translation and rotation must be finite, found {numbers.tolist()}")
    _check_unit(numbers[3:].numpy(), where)
    return Pose(rotation=quaternion_matrix(numbers[3:]), translation=numbers[:3])


def _check_unit(quaternion: NDArray[np.float64], where: str) -> None:
    length = float(np.linalg.norm(quaternion))
    if abs(length - 1) > _UNIT_TOLERANCE:
        raise InvalidInput(
            f"{where}: the rotation {quaternion.tolist()} is not a unit quaternion (w x y z), its length is {length:g}; repair the table"
        )
