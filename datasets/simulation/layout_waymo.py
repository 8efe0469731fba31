"""Writing simulated frames as Waymo's v2 Parquet tables, so that the Waymo reader and other tools can read them.

    root/simulation.json                     what was simulated; a resumed run must agree
    root/<component>/<segment>.parquet       lidar, lidar_pose, lidar_calibration, vehicle_pose, lidar_box
    root/ImageSets/<split>.txt               one segment per line

A point goes to the pixel of its beam and azimuth column with its exact range. Its direction becomes the pixel's, which loses the sensor's jitter
(0.01 degrees, 1 cm at 75 m) and nothing else. Waymo's columns look half a step next to the simulator's, so the pixel poses are turned by half
a step against the frame's pose: a reader that ignores them is wrong, as it would be with real data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from ...core.errors import InvalidInput
from ...core.files import atomic_file, write_atomically
from ...ops.points_in_boxes import count_points_in_boxes
from ..waymo_geometry import TOP, LaserScan, Matrix, WaymoFrame, WaymoObjects, frame_points
from ..waymo_parquet import (
    BOX_COLUMNS,
    BOX_POINTS,
    EXTRINSIC,
    INCLINATION,
    LASER,
    LEVEL,
    OBJECT,
    PIXEL_POSE,
    RETURNS,
    SEGMENT,
    TIME,
    TYPE,
    VEHICLE_POSE,
)
from .places import Domain
from .sensors import Sensor
from .simulate import SimulatedFrame, View, simulate_frame
from .writing import claim_folder, run_jobs

FRAMES_PER_SEGMENT = 5
# Label.Type: vehicle 1, pedestrian 2, cyclist 4; 0 is unknown, as Waymo labels no animals.
_TYPE_OF = {"Car": 1, "Van": 1, "Truck": 1, "Tram": 1, "Trailer": 1, "Pedestrian": 2, "Cyclist": 4, "Animal": 0}
_FIRST_TIME, _PERIOD = 1_500_000_000_000_000, 100_000  # us
_MOST_INTENSITY = 0.999999  # whose inverse tanh is 7.3; that of 1 is infinite


def waymo_frame(made: SimulatedFrame, sensor: Sensor, *, segment: str, index: int) -> WaymoFrame:
    """Record a simulated frame like Waymo's TOP laser, straight above the vehicle's origin.

    Intensity is stored so that tanh gives it back. Points in boxes are counted after the round trip. Where two points fall into one pixel, the nearer
    one stays.

    Args:
        made: The simulated frame.
        sensor: The sensor that made it.
        segment: Name of the segment.
        index: Number of the frame.

    Returns:
        The frame as the Waymo reader would read it.
    """
    cloud = made.frame.points
    xyz = cloud.xyz.double().numpy()
    shape = len(sensor.elevations), sensor.azimuths
    turn = np.rint((np.arctan2(xyz[:, 1], xyz[:, 0]) + np.pi) / (2 * np.pi) * shape[1]).astype(np.int64)
    row, column = made.beams.numpy(), (shape[1] - turn) % shape[1]
    distance = np.linalg.norm(xyz, axis=1)
    farthest_first = np.argsort(-distance, kind="stable")
    row, column = row[farthest_first], column[farthest_first]
    image = np.full((*shape, 4), -1, np.float32)
    image[row, column, 0] = distance[farthest_first]
    intensity = cloud.features[:, cloud.feature_names.index("intensity")].numpy()
    image[row, column, 1] = np.arctanh(np.minimum(intensity, _MOST_INTENSITY))[farthest_first]
    image[row, column, 2] = 0

    heading = 0.1 * index
    pose = np.eye(4)
    pose[:2, :2] = [[math.cos(heading), -math.sin(heading)], [math.sin(heading), math.cos(heading)]]
    pose[:3, 3] = (100 + index % 100, -50, 3)
    pixel_poses = np.empty((*shape, 6), np.float32)
    pixel_poses[:] = (0, 0, math.remainder(heading + math.pi / shape[1], 2 * math.pi), *pose[:3, 3])
    extrinsic = np.eye(4)
    extrinsic[2, 3] = sensor.height
    inclinations = np.deg2rad(np.array(sensor.elevations[::-1]))
    scan = LaserScan(
        name=TOP,
        returns=(image,),
        pixel_poses=pixel_poses,
        extrinsic=extrinsic,
        inclinations=inclinations,
        inclination_range=(float(inclinations[0]), float(inclinations[-1])),
    )
    time = _FIRST_TIME + _PERIOD * index
    frame = WaymoFrame(segment=segment, timestamp=time, pose=pose, lasers=(scan,), objects=None)

    labels = made.frame.labels
    assert labels is not None  # every simulated frame has labels
    boxes = labels.boxes.data.double().numpy().copy()
    boxes[:, 2] += sensor.height
    counts = count_points_in_boxes(frame_points(frame).xyz, torch.from_numpy(boxes).float()).numpy()
    objects = WaymoObjects(
        boxes=boxes,
        types=np.array([_TYPE_OF[made.class_names[c]] for c in labels.classes.tolist()], np.int64),
        num_points=counts.astype(np.int64),
        levels=np.zeros(len(boxes), np.int64),
        names=tuple(f"{index:06d}-{i:03d}" for i in range(len(boxes))),
    )
    return WaymoFrame(segment=segment, timestamp=time, pose=pose, lasers=(scan,), objects=objects)


def write_segment(root: Path, segment: str, frames: Iterable[WaymoFrame]) -> None:
    """Write the five tables of one segment, each under its name only when it is complete, `lidar_box` last.

    A row group of range images holds one frame. The calibrations are those of the first frame.

    Args:
        root: Root of the dataset.
        segment: Name of the segment.
        frames: Its frames.

    Raises:
        InvalidInput: There is no frame.
    """
    frames = tuple(frames)
    if not frames:
        raise InvalidInput(f"segment {segment}: no frame to write")
    tables: dict[str, list[pa.Table]] = {name: [] for name in ("lidar", "lidar_pose", "vehicle_pose", "lidar_box")}
    for frame in frames:
        for name, table in _frame_tables(frame).items():
            tables[name].append(table)
    everything = {"lidar_calibration": [_calibration(frames[0])], **tables}
    for name, parts in everything.items():
        with (
            atomic_file(root / name / f"{segment}.parquet") as file,
            pq.ParquetWriter(file, parts[0].schema, write_page_checksum=True) as writer,
        ):
            for part in parts:
                writer.write_table(part)


def write_waymo_layout(
    root: Path | str,
    domain: Domain,
    *,
    num_frames: int,
    seed: int,
    workers: int = 2,
    view: View = "full",
    splits: Mapping[str, int] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Simulate frames 0 to `num_frames - 1` in Waymo's layout, in segments of five.

    The frames of a segment are unrelated: only the layout has sequences. No segment lies in two splits. Complete segments are kept, so an
    interrupted run continues.

    Args:
        root: Folder to write.
        domain: Sensor and place.
        num_frames: Number of frames, from 0.
        seed: Everything follows from it.
        workers: Processes. The bytes do not depend on their number.
        view: `camera`: what a front camera sees; `full`: the whole turn.
        splits: Name of a split to its number of frames, taken in order. By default all frames are `train`.
        progress: Called with (frames done, all frames) after each segment.

    Returns:
        How many frames were made in this run.

    Raises:
        InvalidInput: The folder holds another simulation, or the splits ask for more frames than there are.
        UpcycleError: A worker died.
    """
    root, splits = Path(root), splits if splits is not None else {"train": num_frames}
    if num_frames < 1 or workers < 1 or min(splits.values(), default=0) < 1 or sum(splits.values()) > num_frames:
        raise InvalidInput(
            f"need num_frames and workers of at least 1 and splits within them, found {num_frames}, {workers}, {dict(splits)}"
        )
    claim_folder(root, domain, seed, view, layout="waymo")
    members: dict[str, list[str]] = {}
    segments: dict[str, range] = {}
    start = 0
    for split, size in splits.items():
        ranges = [range(i, min(i + FRAMES_PER_SEGMENT, start + size)) for i in range(start, start + size, FRAMES_PER_SEGMENT)]
        named = {f"simulated_{r.start:06d}_{r.stop:06d}": r for r in ranges}
        members[split], start = list(named), start + size
        segments |= named
    missing = {name: r for name, r in segments.items() if not (root / "lidar_box" / f"{name}.parquet").is_file()}
    made, done = sum(map(len, missing.values())), start - sum(map(len, missing.values()))
    jobs = [(root, domain, seed, view, name, r) for name, r in missing.items()]
    for frames in run_jobs(_work, jobs, workers, chunk=1):
        done += frames
        if progress is not None:
            progress(done, start)
    for split, names in members.items():
        write_atomically(root / "ImageSets" / f"{split}.txt", "".join(f"{name}\n" for name in names).encode())
    return made


_Job = tuple[Path, Domain, int, View, str, range]


def _work(job: _Job) -> int:
    root, domain, seed, view, segment, indices = job
    made = ((i, simulate_frame(domain, seed=seed, index=i, view=view)) for i in indices)
    write_segment(root, segment, (waymo_frame(frame, domain.sensor, segment=segment, index=i) for i, frame in made))
    return len(indices)


# ---- tables


def _frame_tables(frame: WaymoFrame) -> dict[str, pa.Table]:
    objects = frame.objects
    if objects is None or frame.pose is None:
        raise InvalidInput(f"segment {frame.segment}, time {frame.timestamp}: a frame to write needs objects and a pose")
    posed = [scan for scan in frame.lasers if scan.pixel_poses is not None]
    lidar = _laser_keys(frame, frame.lasers)
    for i, name in enumerate(RETURNS):
        lidar |= _images(name, [scan.returns[i] if i < len(scan.returns) else None for scan in frame.lasers])
    boxes = dict(zip(BOX_COLUMNS, map(pa.array, objects.boxes.T.copy())))
    return {
        "lidar": pa.table(lidar),
        "lidar_pose": pa.table(_laser_keys(frame, posed) | _images(PIXEL_POSE, [scan.pixel_poses for scan in posed])),
        "vehicle_pose": pa.table(_frame_keys(frame, 1) | {VEHICLE_POSE: _matrices([frame.pose])}),
        "lidar_box": pa.table(
            _frame_keys(frame, len(objects.boxes))
            | {OBJECT: pa.array(objects.names, pa.string()), **boxes}
            | {TYPE: pa.array(objects.types, pa.int8()), BOX_POINTS: pa.array(objects.num_points)}
            | {LEVEL: pa.array(objects.levels, pa.int8())}
        ),
    }


def _calibration(frame: WaymoFrame) -> pa.Table:
    lasers = frame.lasers
    listed = [None if s.inclinations is None else s.inclinations.tolist() for s in lasers]
    return pa.table(
        {
            SEGMENT: pa.array([frame.segment] * len(lasers), pa.string()),
            LASER: pa.array([s.name for s in lasers], pa.int8()),
            EXTRINSIC: _matrices([s.extrinsic for s in lasers]),
            f"{INCLINATION}.min": pa.array([s.inclination_range[0] for s in lasers], pa.float64()),
            f"{INCLINATION}.max": pa.array([s.inclination_range[1] for s in lasers], pa.float64()),
            f"{INCLINATION}.values": pa.array(listed, pa.list_(pa.float64())),
        }
    )


def _frame_keys(frame: WaymoFrame, rows: int) -> dict[str, pa.Array]:
    return {SEGMENT: pa.array([frame.segment] * rows, pa.string()), TIME: pa.array([frame.timestamp] * rows, pa.int64())}


def _laser_keys(frame: WaymoFrame, scans: Iterable[LaserScan]) -> dict[str, pa.Array]:
    names = [scan.name for scan in scans]
    return _frame_keys(frame, len(names)) | {LASER: pa.array(names, pa.int8())}


def _images(column: str, images: list[np.ndarray | None]) -> dict[str, pa.Array]:
    flat = [np.zeros(0, np.float32) if image is None else image.reshape(-1) for image in images]
    offsets = np.cumsum([0, *map(len, flat)]).astype(np.int32)
    nothing = pa.array([image is None for image in images], pa.bool_())
    values = pa.ListArray.from_arrays(
        pa.array(offsets), pa.array(np.concatenate(flat or [np.zeros(0, np.float32)])), mask=nothing
    )
    shapes = [None if image is None else list(image.shape) for image in images]
    return {f"{column}.values": values, f"{column}.shape": pa.array(shapes, pa.list_(pa.int32(), 3))}


def _matrices(matrices: list[Matrix]) -> pa.Array:
    return pa.array([m.reshape(-1).tolist() for m in matrices], pa.list_(pa.float64(), 16))
