"""Writing a simulated dataset in Lyft Level 5's own layout: the tables and the sweeps, as `datasets/nuscenes.py` reads them.

    root/simulation.json                    what was simulated: domain, seed, view; a resumed run must agree
    root/v1.01-train/*.json                 the tables, with Lyft's names and units
    root/lidar/simulated_lidar1_<n>.bin     float32 x y z intensity ring, in the sensor's own frame; intensity counts to 255
    root/ImageSets/<split>.txt              scene names
    root/simulated_rows/<n>.json            the rows of frame n, from which the tables are made anew at the end of each run

The worlds are those of `layout_kitti`, frame by frame. A frame is a street of its own, so it is also a scene and a log of its own, and no sweep has
one before it. Every frame has another pose in the world (any heading, on a slope) and another calibration (the LiDAR turned by about half a turn and
leaning, as on Lyft's cars), so a reader that forgets one of them reads other boxes. Unlike Lyft's, these boxes stand upright on the vehicle's ground
instead of the world's, and intensities and rings are the simulated ones.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.strict_json import read_json
from ..drive_tables import Pose, quaternion_matrix
from .places import Domain
from .simulate import SimulatedFrame, View, simulate_frame
from .writing import claim_folder, run_jobs, split_members

VERSION = "v1.01-train"
CATEGORIES: Mapping[str, str] = {
    "Car": "car", "Pedestrian": "pedestrian", "Cyclist": "bicycle", "Van": "other_vehicle", "Truck": "truck",
}  # fmt: skip
# Of an `OpenPlace`. Lyft itself has no trams and trailers; a table names these only where the dataset holds them.
OPEN_CATEGORIES: Mapping[str, str] = {"Tram": "tram", "Animal": "animal", "Trailer": "trailer"}
TABLES = (
    "attribute", "calibrated_sensor", "category", "ego_pose", "instance", "log", "map", "sample", "sample_annotation", "sample_data",
    "scene", "sensor", "visibility",
)  # fmt: skip
_FIRST_TIME, _INTERVAL = 1_500_000_000_000_000.0, 200_000.0  # microseconds, made up: no drive took place
_LIDAR_FORWARD = 1.2  # m, the LiDAR in front of the ego frame's origin, as on Lyft's cars
_INTENSITY_MAX = 255.0

Row = dict[str, Any]


def token(*names: object) -> str:
    """Make a token like Lyft's.

    Args:
        names: What the token names.

    Returns:
        64 hexadecimal digits that follow from the names.
    """
    return hashlib.sha256(" ".join(map(str, names)).encode()).hexdigest()


def frame_poses(height: float, *, seed: int, index: int) -> tuple[Pose, Pose, list[float], list[float]]:
    """Decide how the LiDAR sits in the vehicle and where the vehicle is. The LiDAR leans by up to 2 degrees, slopes have up to 5.

    Args:
        height: Height in m of the LiDAR above the ego frame's origin on the road.
        seed: Seed of the dataset.
        index: Number of the frame.

    Returns:
        The sensor's pose in the vehicle, the vehicle's pose in the world, and the quaternions of both for the tables.
    """
    rng = np.random.default_rng([seed, index, 0x1F7])
    lean, slope = np.deg2rad(rng.uniform(-2, 2, 2)), np.deg2rad(rng.uniform(-5, 5, 2))
    sensor = _quaternion(math.pi + rng.uniform(-0.05, 0.05), *lean)
    vehicle = _quaternion(rng.uniform(-math.pi, math.pi), *slope)
    place = rng.uniform([0, 0, -30], [3000, 3000, 30])
    return (
        Pose(rotation=quaternion_matrix(torch.tensor(sensor, dtype=torch.float64)),
             translation=torch.tensor([_LIDAR_FORWARD, 0.0, height], dtype=torch.float64)),
        Pose(rotation=quaternion_matrix(torch.tensor(vehicle, dtype=torch.float64)), translation=torch.from_numpy(place)),
        sensor,
        vehicle,
    )  # fmt: skip


def frame_rows(made: SimulatedFrame, height: float, *, seed: int, index: int) -> tuple[bytes, dict[str, list[Row]]]:
    """Make the files of one frame.

    Args:
        made: The simulated frame.
        height: Height in m of the LiDAR above the road.
        seed: Seed of the dataset.
        index: Number of the frame.

    Returns:
        The bytes of the sweep, and the frame's rows by table.
    """
    sensor, vehicle, sensor_quaternion, vehicle_quaternion = frame_poses(height, seed=seed, index=index)
    points = made.frame.points
    xyz = points.xyz.double() @ sensor.rotation  # from the vehicle's axes back to the sensor's
    sweep = torch.cat([xyz.float(), points.features[:, :1] * _INTENSITY_MAX, made.beams[:, None].float()], 1)

    name, time = f"{index:06d}", _FIRST_TIME + index * _INTERVAL
    keys = {
        table: token(table, seed, index) for table in ("log", "scene", "sample", "sample_data", "ego_pose", "calibrated_sensor")
    }
    rows: dict[str, list[Row]] = {
        "log": [{"token": keys["log"], "logfile": "", "vehicle": "simulated", "date_captured": "", "location": "simulated"}],
        "scene": [
            {
                "token": keys["scene"], "log_token": keys["log"], "nbr_samples": 1, "first_sample_token": keys["sample"],
                "last_sample_token": keys["sample"], "name": scene_name(index), "description": "",
            }
        ],
        "sample": [{"token": keys["sample"], "timestamp": time, "prev": "", "next": "", "scene_token": keys["scene"]}],
        "sample_data": [
            {
                "token": keys["sample_data"], "sample_token": keys["sample"], "ego_pose_token": keys["ego_pose"],
                "calibrated_sensor_token": keys["calibrated_sensor"], "timestamp": time, "fileformat": "bin", "is_key_frame": True,
                "filename": f"lidar/simulated_lidar1_{name}.bin", "prev": "", "next": "",
            }
        ],
        "ego_pose": [
            {"token": keys["ego_pose"], "timestamp": time, "rotation": vehicle_quaternion, "translation": vehicle.translation.tolist()}
        ],
        "calibrated_sensor": [
            {
                "token": keys["calibrated_sensor"], "sensor_token": token("sensor"), "rotation": sensor_quaternion,
                "translation": sensor.translation.tolist(), "camera_intrinsic": [],
            }
        ],
        "instance": [],
        "sample_annotation": [],
    }  # fmt: skip
    labels = made.frame.labels
    assert labels is not None  # a simulated frame always knows its objects
    boxes = labels.boxes.data.double()
    centers = vehicle.to_outer(boxes[:, :3] + sensor.translation)
    categories = {**CATEGORIES, **OPEN_CATEGORIES}
    for k, (box, center, kind) in enumerate(zip(boxes.tolist(), centers.tolist(), labels.classes.tolist())):
        instance, annotation = token("instance", seed, index, k), token("sample_annotation", seed, index, k)
        rows["instance"].append(
            {
                "token": instance, "category_token": token("category", categories[made.class_names[kind]]), "nbr_annotations": 1,
                "first_annotation_token": annotation, "last_annotation_token": annotation,
            }
        )  # fmt: skip
        rows["sample_annotation"].append(
            {
                "token": annotation, "sample_token": keys["sample"], "instance_token": instance, "visibility_token": "",
                "attribute_tokens": [], "translation": center, "size": [box[4], box[3], box[5]],
                "rotation": _product(vehicle_quaternion, _quaternion(box[6], 0, 0)), "prev": "", "next": "", "num_lidar_pts": -1,
                "num_radar_pts": 0,
            }
        )  # fmt: skip
    return sweep.numpy().astype("<f4").tobytes(), rows


def scene_name(index: int) -> str:
    """Name of a frame's scene, which splits use.

    Args:
        index: Number of the frame.

    Returns:
        The name.
    """
    return f"simulated-{index:06d}"


def write_lyft_layout(
    root: Path | str,
    domain: Domain,
    *,
    num_frames: int,
    seed: int,
    workers: int = 2,
    view: View = "full",
    splits: Mapping[str, int | Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Simulate frames 0 to `num_frames - 1` in Lyft's layout. Vans are `other_vehicle`, and all objects of the view are labeled.

    Complete frames are kept, so an interrupted run continues.

    Args:
        root: Folder to write.
        domain: Sensor and place.
        num_frames: Number of frames, from 0.
        seed: Everything follows from it.
        workers: Processes. The bytes do not depend on their number.
        view: `camera`: what a front camera sees; `full`: the whole turn.
        splits: Name of a split to its frame numbers or to a count, as for `write_kitti_layout`.
        progress: Called with (frames done, all frames) after each frame.

    Returns:
        How many frames were made in this run.

    Raises:
        InvalidInput: The folder holds another simulation, or a split asks for frames that are not made.
        UpcycleError: A worker died.
    """
    root = Path(root)
    if num_frames < 1 or workers < 1:
        raise InvalidInput(f"need num_frames >= 1 and workers >= 1, found {num_frames} and {workers}")
    members = split_members(num_frames, splits if splits is not None else {"train": num_frames})
    claim_folder(root, domain, seed, view, layout="lyft")
    jobs = [(root, domain, seed, i, view) for i in range(num_frames) if not _rows_file(root, i).is_file()]
    done = num_frames - len(jobs)
    if progress is not None and done:
        progress(done, num_frames)

    for _ in run_jobs(_work, jobs, workers):
        done += 1
        if progress is not None:
            progress(done, num_frames)
    _write_tables(root, num_frames)
    for name, indices in members.items():
        write_atomically(root / "ImageSets" / f"{name}.txt", "".join(f"{scene_name(i)}\n" for i in indices).encode())
    return len(jobs)


def _work(job: tuple[Path, Domain, int, int, View]) -> int:
    root, domain, seed, index, view = job
    made = simulate_frame(domain, seed=seed, index=index, view=view)
    sweep, rows = frame_rows(made, domain.sensor.height, seed=seed, index=index)
    write_atomically(root / "lidar" / f"simulated_lidar1_{index:06d}.bin", sweep)
    write_atomically(_rows_file(root, index), json.dumps(rows).encode())  # last: a frame that has its rows is complete
    return index


def _rows_file(root: Path, index: int) -> Path:
    return root / "simulated_rows" / f"{index:06d}.json"


def _write_tables(root: Path, num_frames: int) -> None:
    """All tables from the rows of the frames; the sensor and the categories belong to no frame."""
    tables: dict[str, list[Row]] = {name: [] for name in TABLES}
    tables["sensor"] = [{"token": token("sensor"), "channel": "LIDAR_TOP", "modality": "lidar"}]
    for index in range(num_frames):
        for name, rows in read_json(
            _rows_file(root, index), "the rows of a frame", remedy="delete it and simulate again"
        ).items():
            tables[name] += rows
    used = {instance["category_token"] for instance in tables["instance"]}
    names = [*CATEGORIES.values(), *(name for name in OPEN_CATEGORIES.values() if token("category", name) in used)]
    tables["category"] = [{"token": token("category", name), "name": name, "description": ""} for name in names]
    for name, rows in tables.items():
        write_atomically(root / VERSION / f"{name}.json", json.dumps(rows).encode())


def _quaternion(yaw: float, pitch: float, roll: float) -> list[float]:
    """w x y z of turning by roll about x, then pitch about y, then yaw about z; rad."""
    about = [
        [math.cos(a / 2), *(math.sin(a / 2) * float(axis == i) for i in range(3))] for axis, a in enumerate((roll, pitch, yaw))
    ]
    return _product(about[2], _product(about[1], about[0]))


def _product(a: Sequence[float], b: Sequence[float]) -> list[float]:
    """The quaternion of turning by `b` first, then by `a`."""
    (w, x, y, z), (v, p, q, r) = a, b
    return [
        w * v - x * p - y * q - z * r,
        w * p + x * v + y * r - z * q,
        w * q - x * r + y * v + z * p,
        w * r + x * q - y * p + z * v,
    ]
