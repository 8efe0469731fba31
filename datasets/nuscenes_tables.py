"""Reading the tables of nuScenes, which Lyft Level 5 shares: row by row, keeping only what a LiDAR detector needs.

    log --< scene --< sample --< sample_annotation >-- instance >-- category     a keyframe and its boxes, in the global frame
                        '------< sample_data >-- ego_pose                        a sensor's file; where the vehicle was just then
                                      '--------- calibrated_sensor >-- sensor    how that sensor sits in the vehicle

`A --< B`: rows of B name one row of A by its token. A table is one JSON array. nuScenes' largest has 2.6 million rows in over a
gigabyte, so no table is ever in memory as Python objects. A table that lacks a field is an error when it is read.
Source: the schema in nuscenes-devkit `docs/schema_nuscenes.md`; Lyft's tables differ in names and versions only.

Read next: `drive_tables.py` for the result, `json_table.py` for the reading of one table.
"""

from __future__ import annotations

from array import array
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InvalidInput
from ..core.foreign_text import check_name
from .drive_tables import DriveTables, SweepRow
from .json_table import JsonTable


def read_tables(
    root: Path | str, version: str, *, channel: str = "LIDAR_TOP", keyframes_only: bool = True, annotations: bool = True
) -> DriveTables:
    """Read the tables `root/version/*.json`.

    Args:
        root: Folder of the dataset.
        version: Folder of the tables: "v1.01-train" (Lyft; "data" in its archive), "v1.0-trainval", "v1.0-mini".
        channel: Name of the LiDAR.
        keyframes_only: False keeps the sweeps between keyframes too.
        annotations: False never opens the three tables of the boxes.

    Returns:
        The tables.

    Raises:
        InvalidInput: A folder or table is missing or is not a JSON array of objects; a row lacks a field or has another type in it; a
            sample occurs twice; a box belongs to no sample; or there is no LiDAR of that name.
    """
    root = Path(root)
    folder = root / version
    if not folder.is_dir():
        found = sorted(p.parent.name for p in root.glob("*/sample.json"))
        raise InvalidInput(
            f"there is no folder {folder} with tables; {root} holds {', '.join(found) or 'none'}; name it as version (--version), or check the folder"
        )
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
        names[token], scene_logs[name] = check_name(name, f"name of a scene in {folder / 'scene.json'}"), log
    return names, scene_logs


def _samples(folder: Path, scene_names: Mapping[str, str]) -> tuple[dict[str, int], dict[str, tuple[str, ...]]]:
    order: dict[str, int] = {}
    members: dict[str, list[tuple[float, str]]] = {name: [] for name in scene_names.values()}
    table = JsonTable(folder / "sample.json")
    for token, scene, time in table.rows("token", "scene_token", "timestamp"):
        if scene not in scene_names:
            raise InvalidInput(f"{folder / 'sample.json'}, row {token}: scene_token {scene} is not in scene.json")
        if token in order or not token.isascii() or not token.isalnum():
            raise InvalidInput(f"{folder / 'sample.json'}: {token!r} occurs twice, or is not a token of letters and digits")
        order[token] = len(order)
        members[scene_names[scene]].append((*table.numbers([time], 1, token, "timestamp"), token))
    if not order:
        raise InvalidInput(f"{folder / 'sample.json'} holds no sample, so there is no frame to read")
    return order, {name: tuple(token for _, token in sorted(pairs)) for name, pairs in members.items() if pairs}


def _sensors(folder: Path, channel: str) -> tuple[dict[str, tuple[float, ...]], set[str]]:
    """Calibrations of the LiDAR (translation, quaternion), and the tokens of the other sensors' calibrations."""
    channels = {token: name for token, name in JsonTable(folder / "sensor.json").rows("token", "channel")}
    if channel not in channels.values():
        near = get_close_matches(channel, channels.values(), 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise InvalidInput(
            f"{folder / 'sensor.json'}: there is no sensor {channel!r} among {', '.join(sorted(channels.values()))}{hint}"
        )
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
) -> tuple[dict[str, SweepRow], dict[str, str], dict[str, str]]:
    sweeps: dict[str, SweepRow] = {}
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
        sweeps[token] = SweepRow(
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
        counts.append(points if isinstance(points, int) and 0 <= points < 1 << 31 else -1)
    of_sample = np.array(samples, np.int64)
    sorting = np.argsort(of_sample, kind="stable")
    starts = np.searchsorted(of_sample[sorting], np.arange(len(order) + 1)).astype(np.int64)
    boxes = np.array(values, np.float64).reshape(-1, 10)[sorting]
    return tuple(names), starts, boxes, np.array(counts, np.int64).reshape(-1, 2)[sorting]


def _no_boxes(samples: int) -> tuple[tuple[str, ...], NDArray[np.int64], NDArray[np.float64], NDArray[np.int64]]:
    return (), np.zeros(samples + 1, np.int64), np.zeros((0, 10)), np.zeros((0, 2), np.int64)
