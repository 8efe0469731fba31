"""The tables of nuScenes, which Lyft Level 5 shares: read once, row by row, and only what a LiDAR detector needs is kept.

    log --< scene --< sample --< sample_annotation >-- instance >-- category     a keyframe and its boxes, in the global frame
                        '------< sample_data >-- ego_pose                        a sensor's file; where the vehicle was just then
                                      '--------- calibrated_sensor >-- sensor    how that sensor sits in the vehicle

``A --< B``: rows of B name one of A by its token. A table is one JSON array; nuScenes' largest holds 2.6 million rows in over a
gigabyte, so it is never in memory as Python objects. A table that lacks a field is an error when it is read. What is wrong with one
frame (a token that leads nowhere, a quaternion that is none, a box without size) is an error when that frame is asked for, so
the other frames stay good.
Source: the schema in nuscenes-devkit ``docs/schema_nuscenes.md``; Lyft's tables differ in names and versions only.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path, PurePosixPath

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..core.errors import InvalidInput
from .json_table import JsonTable

_UNIT_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Pose:
    """Where one frame stands in another: ``x_outer = rotation @ x_inner + translation``. (3, 3) and (3,), float64, m."""

    rotation: Tensor
    translation: Tensor

    def to_outer(self, xyz: Tensor) -> Tensor:
        """Points (N, 3) of the inner frame, in the outer one."""
        return xyz @ self.rotation.T + self.translation

    def to_inner(self, xyz: Tensor) -> Tensor:
        """Points (N, 3) of the outer frame, in the inner one."""
        return (xyz - self.translation) @ self.rotation


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """One turn of the LiDAR. timestamp: microseconds. previous: the token of the turn before it, "" for a scene's first."""

    token: str
    path: Path
    timestamp: float
    sensor: Pose  # in the vehicle
    vehicle: Pose  # in the global frame
    previous: str


@dataclass(frozen=True, kw_only=True)
class Annotations:
    """The boxes of a keyframe as the table has them, global frame, float64.

    centre: (N, 3) m. size: (N, 3) width, length, height m. rotation: (N, 3, 3), the box's x axis is its heading.
    categories: N names. num_points: (N,) int64 LiDAR points inside, -1 where the table does not know.
    """

    center: Tensor
    size: Tensor
    rotation: Tensor
    categories: tuple[str, ...]
    num_points: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class _SweepRow:
    token: str
    filename: str
    timestamp: float
    sensor_token: str
    pose_token: str
    previous: str


@dataclass(frozen=True, kw_only=True)
class DriveTables:
    """Scenes, keyframes, LiDAR sweeps and boxes of one dataset folder; made by ``read_tables``.

    scenes: name -> its sample tokens in order of time. logs: scene name -> token of its log (one drive; scenes may share it).
    categories: all names. The other fields are its own.
    """

    root: Path
    version: str
    channel: str
    scenes: Mapping[str, tuple[str, ...]]
    logs: Mapping[str, str]
    categories: tuple[str, ...]
    sample_order: Mapping[str, int]
    keyframes: Mapping[str, str]  # sample token -> token of its sweep
    sweeps: Mapping[str, _SweepRow]
    sensors: Mapping[str, tuple[float, ...]]  # calibrated sensor token -> translation, quaternion
    poses: Mapping[str, int]  # ego pose token -> row of pose_values
    pose_values: NDArray[np.float64]  # (M, 7) translation, quaternion
    box_starts: NDArray[np.int64]  # (samples + 1,): the rows of sample i are box_starts[i] to box_starts[i + 1]
    box_values: NDArray[np.float64]  # (B, 10) translation, size, quaternion
    box_counts: NDArray[np.int64]  # (B, 2) index of the category or -1, LiDAR points or -1
    lost: Mapping[str, str]  # sample token -> what is wrong with its rows

    @property
    def samples(self) -> tuple[str, ...]:
        """All keyframes' tokens: scene by scene as in the table, in order of time."""
        return tuple(token for tokens in self.scenes.values() for token in tokens)

    def keyframe(self, sample: str) -> Sweep:
        """The sweep of a keyframe. Raises InvalidInput if the sample or what its rows point to does not exist."""
        self._index(sample)
        if sample not in self.keyframes:
            raise InvalidInput(
                f"sample {sample}: no keyframe of {self.channel} in {self.version}/sample_data.json names it; "
                "leave the frame out, or unpack the tables again"
            )
        return self.sweep(self.keyframes[sample])

    def sweep(self, token: str) -> Sweep:
        """A sweep by its own token. Raises InvalidInput if it, its pose or its calibration does not exist or is broken."""
        if token not in self.sweeps:
            raise InvalidInput(
                f"{self.version}/sample_data.json: no row {token} of {self.channel} with that token; were the tables cut, or read with keyframes_only?"
            )
        row = self.sweeps[token]
        where = f"{self.version}/sample_data.json, row {token}"
        if row.pose_token not in self.poses:
            raise InvalidInput(f"{where}: ego_pose_token {row.pose_token} is not in ego_pose.json; unpack the tables again")
        path = PurePosixPath(row.filename)
        if path.is_absolute() or ".." in path.parts or not path.parts:
            raise InvalidInput(f"{where}: filename {row.filename!r} leads out of the dataset's folder; such tables are not read")
        return Sweep(
            token=token,
            path=self.root / path,
            timestamp=row.timestamp,
            sensor=_pose(self.sensors[row.sensor_token], f"{self.version}/calibrated_sensor.json, row {row.sensor_token}"),
            vehicle=_pose(self.pose_values[self.poses[row.pose_token]], f"{self.version}/ego_pose.json, row {row.pose_token}"),
            previous=row.previous,
        )

    def annotations(self, sample: str) -> Annotations:
        """The boxes of a keyframe. Raises InvalidInput naming sample and box if one is broken."""
        i = self._index(sample)
        rows = slice(self.box_starts[i], self.box_starts[i + 1])
        values, counts = self.box_values[rows], self.box_counts[rows]
        for k, (value, count) in enumerate(zip(values, counts)):
            where = f"sample {sample}, its box {k} in {self.version}/sample_annotation.json (centre {value[:3].tolist()})"
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
            raise InvalidInput(f"{self.root}: no sample {sample} in {self.version}/sample.json; ids are sample tokens")
        if sample in self.lost:
            raise InvalidInput(f"sample {sample}: {self.lost[sample]}")
        return self.sample_order[sample]


def quaternion_matrix(quaternion: Tensor) -> Tensor:
    """Rotation matrices (..., 3, 3) of quaternions (..., 4) in the order w x y z; their length is taken out."""
    w, x, y, z = (quaternion / quaternion.norm(dim=-1, keepdim=True)).unbind(-1)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def read_tables(
    root: Path | str, version: str, *, channel: str = "LIDAR_TOP", keyframes_only: bool = True, annotations: bool = True
) -> DriveTables:
    """Read the tables ``root/version/*.json``.

    version: "v1.01-train" (Lyft), "v1.0-trainval", "v1.0-mini"; also Lyft's "data", as its archive names it. channel: the LiDAR.
    keyframes_only: False keeps the sweeps between keyframes too. annotations: False never opens the boxes' three tables.
    Raises InvalidInput: no such folder or table, no JSON array of objects, a row that lacks a field or has another type in it, a
    sample twice, a box of a sample that does not exist, no LiDAR of that name.
    """
    root = Path(root)
    folder = root / version
    if not folder.is_dir():
        found = sorted(p.parent.name for p in root.glob("*/sample.json"))
        raise InvalidInput(f"no folder {folder} with tables; {root} holds {', '.join(found) or 'none'}: name it as version")
    logs = {token for (token,) in JsonTable(folder / "log.json").rows("token")}
    scene_names, scene_logs = _scenes(folder, logs)
    order, scenes = _samples(folder, scene_names)
    sensors, other = _sensors(folder, channel)
    sweeps, keyframes, lost = _sweeps(folder, sensors, other, keyframes_only)
    wanted = {row.pose_token for row in sweeps.values()}
    poses: dict[str, int] = {}
    pose_values = array("d")
    table = JsonTable(folder / "ego_pose.json")
    for token, translation, rotation in table.rows("token", "translation", "rotation"):
        if token in wanted:
            poses[token] = len(poses)
            pose_values.extend(table.numbers(translation, 3, token, "translation"))
            pose_values.extend(table.numbers(rotation, 4, token, "rotation"))
    categories, starts, values, counts = _boxes(folder, order) if annotations else _no_boxes(len(order))
    return DriveTables(
        root=root, version=version, channel=channel, scenes=scenes, logs=scene_logs, categories=categories, sample_order=order,
        keyframes=keyframes, sweeps=sweeps, sensors=sensors, poses=poses, pose_values=np.array(pose_values).reshape(-1, 7),
        box_starts=starts, box_values=values, box_counts=counts, lost=lost,
    )  # fmt: skip


def _scenes(folder: Path, logs: set[str]) -> tuple[dict[str, str], dict[str, str]]:
    names: dict[str, str] = {}
    scene_logs: dict[str, str] = {}
    for token, name, log in JsonTable(folder / "scene.json").rows("token", "name", "log_token"):
        if log not in logs:
            raise InvalidInput(
                f"{folder / 'scene.json'}, row {token}: log_token {log} is not in log.json; unpack the tables again"
            )
        if name in scene_logs:
            raise InvalidInput(f"{folder / 'scene.json'}: two scenes are called {name!r}; splits name scenes, so rename one")
        names[token], scene_logs[name] = name, log
    return names, scene_logs


def _samples(folder: Path, scene_names: Mapping[str, str]) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    order: dict[str, int] = {}
    members: dict[str, list[tuple[float, str]]] = {name: [] for name in scene_names.values()}
    table = JsonTable(folder / "sample.json")
    for token, scene, time in table.rows("token", "scene_token", "timestamp"):
        if scene not in scene_names:
            raise InvalidInput(f"{folder / 'sample.json'}, row {token}: scene_token {scene} is not in scene.json")
        if token in order or not token.isascii() or not token.isalnum():
            raise InvalidInput(f"{folder / 'sample.json'}: {token!r} stands there twice, or is no token of letters and digits")
        order[token] = len(order)
        members[scene_names[scene]].append((*table.numbers([time], 1, token, "timestamp"), token))
    if not order:
        raise InvalidInput(f"{folder / 'sample.json'} holds no sample: there is no frame to read")
    return order, {name: tuple(token for _, token in sorted(pairs)) for name, pairs in members.items() if pairs}


def _sensors(folder: Path, channel: str) -> tuple[dict[str, tuple[float, ...]], set[str]]:
    """Calibrations of the LiDAR (translation, quaternion), and the tokens of the other sensors' calibrations."""
    channels = {token: name for token, name in JsonTable(folder / "sensor.json").rows("token", "channel")}
    if channel not in channels.values():
        near = get_close_matches(channel, channels.values(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidInput(f"{folder / 'sensor.json'}: no sensor {channel!r} among {', '.join(sorted(channels.values()))}{hint}")
    sensors: dict[str, tuple[float, ...]] = {}
    other: set[str] = set()
    table = JsonTable(folder / "calibrated_sensor.json")
    for token, sensor, move, turn in table.rows("token", "sensor_token", "translation", "rotation"):
        if sensor not in channels:
            raise InvalidInput(f"{folder / 'calibrated_sensor.json'}, row {token}: sensor_token {sensor} is not in sensor.json")
        if channels[sensor] != channel:
            other.add(token)
            continue
        translation = table.numbers(move, 3, token, "translation")
        sensors[token] = (*translation, *table.numbers(turn, 4, token, "rotation"))
    return sensors, other


def _sweeps(
    folder: Path, sensors: Mapping[str, tuple[float, ...]], other: set[str], keyframes_only: bool
) -> tuple[dict[str, _SweepRow], dict[str, str], dict[str, str]]:
    sweeps: dict[str, _SweepRow] = {}
    keyframes: dict[str, str] = {}
    lost: dict[str, str] = {}
    table = JsonTable(folder / "sample_data.json")
    links = ("token", "sample_token", "calibrated_sensor_token", "ego_pose_token", "prev")
    for token, sample, sensor, pose, previous, time, is_key, filename in table.rows(
        *links, "timestamp", "is_key_frame", "filename"
    ):
        if sensor in other or (keyframes_only and not is_key):
            continue
        if sensor not in sensors:
            lost[sample] = f"its sample_data {token} names the calibrated_sensor {sensor}, which is not in calibrated_sensor.json"
            continue
        (microseconds,) = table.numbers([time], 1, token, "timestamp")
        sweeps[token] = _SweepRow(
            token=token, filename=filename, timestamp=microseconds, sensor_token=sensor, pose_token=pose, previous=previous
        )
        if is_key:
            if sample in keyframes:
                lost[sample] = f"sample_data holds two keyframes of it, {keyframes[sample]} and {token}; one frame is one sweep"
            keyframes[sample] = token
    return sweeps, keyframes, lost


def _boxes(
    folder: Path, order: Mapping[str, int]
) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    """Category names, and the boxes sorted by sample."""
    names: list[str] = []
    category_of: dict[str, int] = {}
    for token, name in JsonTable(folder / "category.json").rows("token", "name"):
        category_of[token] = len(names)
        names.append(name)
    instance_of = {t: category_of.get(c, -1) for t, c in JsonTable(folder / "instance.json").rows("token", "category_token")}
    table = JsonTable(folder / "sample_annotation.json")
    samples, values, counts = array("q"), array("d"), array("q")
    fields = ("token", "sample_token", "instance_token", "translation", "size", "rotation")
    for row in table.objects():
        token, sample, instance, translation, size, rotation = table.values(row, fields)
        if sample not in order:
            raise InvalidInput(
                f"{folder / 'sample_annotation.json'}, row {token}: sample_token {sample} is not in sample.json; its box would be lost"
            )
        samples.append(order[sample])
        values.extend(table.numbers(translation, 3, token, "translation"))
        values.extend(table.numbers(size, 3, token, "size"))
        values.extend(table.numbers(rotation, 4, token, "rotation"))
        points = row.get("num_lidar_pts")  # Lyft's tables hold -1 or nothing
        counts.append(instance_of.get(instance, -1))
        counts.append(points if isinstance(points, int) and points >= 0 else -1)
    of_sample = np.array(samples, np.int64)
    sorting = np.argsort(of_sample, kind="stable")
    starts = np.searchsorted(of_sample[sorting], np.arange(len(order) + 1)).astype(np.int64)
    boxes = np.array(values, np.float64).reshape(-1, 10)[sorting]
    return tuple(names), starts, boxes, np.array(counts, np.int64).reshape(-1, 2)[sorting]


def _no_boxes(samples: int) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    return (), np.zeros(samples + 1, np.int64), np.zeros((0, 10)), np.zeros((0, 2), np.int64)


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
            f"{where}: the rotation {quaternion.tolist()} is no unit quaternion (w x y z), its length is {length:g}; repair the table"
        )
