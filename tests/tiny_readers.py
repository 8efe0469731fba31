"""One small scene with known points in oblique boxes, written in the files of other people's layouts. `import tiny_readers` and call, for example:

root = tiny_readers.argoverse2(tmp_path)             # two frames of one log
tiny_readers.check(open_argoverse2(root).source[0])  # boxes and the points in them are those of the scene
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.feather

from upcycle3d.core.frame import Frame

BOXES = np.array(
    [[12.0, 3.0, 0.8, 4.2, 1.8, 1.6, 0.5], [20.0, -6.0, 0.9, 0.8, 0.6, 1.8, -1.1], [9.0, -4.0, 0.7, 1.9, 0.7, 1.7, 2.8]]
)
"""x y z length width height yaw, x forward, y left, z up, of a Car, a Pedestrian and a Cyclist."""
TYPES = ("Car", "Pedestrian", "Cyclist")
_INSIDE, _GUARDS, _ROAD = 150, 90, 400


def scan() -> np.ndarray:
    """(N, 4) x y z intensity: for each box points inside it and points just outside its faces, then a road without points in boxes."""
    random, parts = np.random.default_rng(0), []
    for box in BOXES:
        for count, reach in ((_INSIDE, 0.47), (_GUARDS, 0.53)):
            point = random.uniform(-0.47, 0.47, (count, 3))
            axis = random.integers(0, 3, count)
            point[np.arange(count), axis] = reach * np.where(random.uniform(size=count) < 0.5, -1, 1)
            point = point * box[3:6]
            cos, sin = math.cos(box[6]), math.sin(box[6])
            turned = np.stack([cos * point[:, 0] - sin * point[:, 1], sin * point[:, 0] + cos * point[:, 1], point[:, 2]], 1)
            parts.append(turned + box[:3])
    parts.append(np.stack([random.uniform(-30, 30, _ROAD), random.uniform(-30, 30, _ROAD), np.full(_ROAD, -0.2)], 1))
    xyz = np.concatenate(parts)
    return np.concatenate([xyz, random.integers(1, 250, (len(xyz), 1)) / 255], 1)


def inside(frame: Frame) -> list[list[int]]:
    """Rows of the points in each labeled box, computed here with a rotation of our own."""
    found = []
    for x, y, z, length, width, height, yaw in frame.labels.boxes.data.double().numpy():
        away = frame.points.xyz.double().numpy() - [x, y, z]
        along = away[:, 0] * math.cos(yaw) + away[:, 1] * math.sin(yaw)
        across = away[:, 1] * math.cos(yaw) - away[:, 0] * math.sin(yaw)
        held = (abs(along) < length / 2) & (abs(across) < width / 2) & (abs(away[:, 2]) < height / 2)
        found.append(np.flatnonzero(held).tolist())
    return found


def check(frame: Frame, z_shift: float = 0.0, tolerance: float = 2e-3, order: Sequence[int] = (0, 1, 2)) -> None:
    """The frame's boxes are those of the scene, and each holds exactly the points that were put into it."""
    expected = BOXES[list(order)] + [0, 0, z_shift, 0, 0, 0, 0]
    assert frame.labels.classes.tolist() == list(order)
    difference = frame.labels.boxes.data.double().numpy() - expected
    difference[:, 6] = (difference[:, 6] + math.pi) % (2 * math.pi) - math.pi
    assert abs(difference).max() < tolerance
    step = _INSIDE + _GUARDS
    assert inside(frame) == [list(range(i * step, i * step + _INSIDE)) for i in order]
    assert frame.labels.num_points.tolist() == [_INSIDE] * len(order)
    assert abs(frame.points.features[:, 0].double().numpy() - scan()[:, 3]).max() < 2e-3
    assert frame.reading.points == len(scan())


def write_scan(path: Path, rows: np.ndarray) -> Path:
    """A `.bin` file of rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(rows.astype("<f4").tobytes())
    return path


def write_json(path: Path, value: Any) -> Path:
    """A JSON file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return path


def write_feather(path: Path, columns: dict[str, Any]) -> Path:
    """A Feather file of columns."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.feather.write_feather(pa.table(columns), str(path), compression="lz4")
    return path


def argoverse2(root: Path, *, split: str = "train", labeled: bool = True) -> Path:
    """Two sweeps of a log. Their coordinates are 32-bit numbers; the dataset's have 16 bits, which a test of its own covers."""
    log, rows = root / split / "0a1b", scan()
    times = (315966080359713000, 315966080459713000)
    for time in times:
        columns = {name: rows[:, i].astype(np.float32) for i, name in enumerate("xyz")}
        columns |= {"intensity": np.rint(rows[:, 3] * 255).astype(np.uint8), "laser_number": np.zeros(len(rows), np.uint8)}
        write_feather(log / "sensors" / "lidar" / f"{time}.feather", columns)
    if labeled:
        categories = ["REGULAR_VEHICLE", "PEDESTRIAN", "BICYCLIST", "BOLLARD"]
        boxes = np.concatenate([BOXES, BOXES[:1]])
        columns = {"timestamp_ns": np.repeat(np.array(times), 4), "category": categories * 2}
        names = ("tx_m", "ty_m", "tz_m", "length_m", "width_m", "height_m")
        columns |= {name: np.tile(boxes[:, i], 2) for i, name in enumerate(names)}
        columns |= {"qw": np.tile(np.cos(boxes[:, 6] / 2), 2), "qx": np.zeros(8), "qy": np.zeros(8)}
        write_feather(log / "annotations.feather", columns | {"qz": np.tile(np.sin(boxes[:, 6] / 2), 2)})
    return root


def once(root: Path) -> Path:
    """A sequence with an annotated and an empty frame: x of the files points left, y to the back."""
    base, rows = root / "data" / "000076", scan()
    turned = np.stack([rows[:, 1], -rows[:, 0], rows[:, 2], rows[:, 3]], 1)
    boxes = np.stack([BOXES[:, 1], -BOXES[:, 0], *BOXES[:, 2:6].T, BOXES[:, 6] - math.pi / 2], 1)
    frames = [
        {"frame_id": "1616343527000", "annos": {"names": list(TYPES), "boxes_3d": boxes.tolist(), "boxes_2d": {}}},
        {"frame_id": "1616343527500"},
    ]
    for frame in frames:
        write_scan(base / "lidar_roof" / f"{frame['frame_id']}.bin", turned)
    write_json(base / "000076.json", {"meta_info": {}, "calib": {}, "frames": frames})
    (root / "ImageSets").mkdir(exist_ok=True)
    (root / "ImageSets" / "train.txt").write_text("000076\n")
    return root


def pandaset(root: Path) -> Path:
    """One frame of a vehicle that stands far from the origin of the world, turned and pitched."""
    base, rows = root / "001", scan()
    quaternion = np.array([0.62, 0.012, -0.01, 0.78])
    w, x, y, z = quaternion / np.linalg.norm(quaternion)
    turn = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    place = np.array([512.0, -218.0, 3.5])

    def world(forward_left: np.ndarray) -> np.ndarray:
        right_forward = np.stack([-forward_left[:, 1], forward_left[:, 0], forward_left[:, 2]], 1)
        return right_forward @ turn.T + place

    xyz, centers = world(rows[:, :3]), world(BOXES[:, :3])
    heading = world(np.stack([np.cos(BOXES[:, 6]), np.sin(BOXES[:, 6]), 0 * BOXES[:, 6]], 1)) - place
    yaw = np.arctan2(-heading[:, 0], heading[:, 1])
    points = {name: np.append(xyz[:, i], 0.0) for i, name in enumerate("xyz")}
    points |= {"i": np.append(rows[:, 3] * 255, 9.0), "t": np.zeros(len(xyz) + 1), "d": np.append(np.zeros(len(xyz)), 1.0)}
    write_feather(base / "lidar" / "00.feather", points)
    pose = {"position": dict(zip("xyz", place)), "heading": dict(zip("wxyz", (w, x, y, z)))}
    write_json(base / "lidar" / "poses.json", [pose])
    last = [*range(3), 0]  # the last cuboid is the car again, as the other LiDAR sees it
    cuboids: dict[str, Any] = {"label": ["Car", "Pedestrian", "Bicycle", "Car"], "yaw": yaw[last]}
    cuboids |= {"cuboids.sensor_id": [-1, 0, -1, 1]}
    cuboids |= {f"position.{name}": centers[last, i] for i, name in enumerate("xyz")}
    cuboids |= {"dimensions.x": BOXES[last, 4], "dimensions.y": BOXES[last, 3], "dimensions.z": BOXES[last, 5]}
    write_feather(base / "annotations" / "cuboids" / "00.feather", cuboids)
    return root


def vector(values: Sequence[float], names: Sequence[str] = ("x", "y", "z")) -> dict[str, float]:
    """Numbers by name."""
    return dict(zip(names, map(float, values)))


def sustechpoints(root: Path, *, wrapped: bool = False) -> Path:
    """A scene with a labeled scan and one without a label file."""
    for name in ("000950", "000965"):
        write_scan(root / "town" / "lidar" / f"{name}.bin", scan())
    objects = [
        {
            "obj_type": kind,
            "obj_id": str(i),
            "psr": {"position": vector(box[:3]), "scale": vector(box[3:6]), "rotation": vector((0, 0, box[6]))},
        }
        for i, (kind, box) in enumerate(zip(TYPES, BOXES))
    ]
    write_json(root / "town" / "label" / "000950.json", {"objs": objects} if wrapped else objects)
    return root


def cvat(root: Path) -> Path:
    """An export with three cuboids and a figure that is none."""
    write_scan(root / "ds0" / "pointcloud" / "0001.bin", scan())
    objects = [{"key": f"k{i}", "classTitle": kind} for i, kind in enumerate((*TYPES, "Tree"))]
    figures: list[dict[str, Any]] = [
        {
            "objectKey": f"k{i}",
            "geometryType": "cuboid_3d",
            "geometry": {"position": vector(box[:3]), "rotation": vector((0, 0, box[6])), "dimensions": vector(box[3:6])},
        }
        for i, box in enumerate(BOXES)
    ]
    figures.append({"objectKey": "k3", "geometryType": "point_cloud", "geometry": {"indices": [1, 2]}})
    write_json(root / "ds0" / "ann" / "0001.bin.json", {"objects": objects, "figures": figures, "tags": []})
    return root


def labelcloud(root: Path, form: str) -> Path:
    """A labeled scan in one of labelCloud's formats, and a `.ply` file."""
    write_scan(root / "pointclouds" / "scan_1.bin", scan())
    (root / "pointclouds" / "other.ply").write_bytes(b"ply")
    write_json(root / "labels" / "_classes.json", {"classes": [], "default": 0, "type": "object_detection", "format": form})
    if form.startswith("kitti"):
        lines = [_kitti_line(kind, box, form) for kind, box in zip(TYPES, BOXES)]
        (root / "labels" / "scan_1.txt").write_text("".join(lines))
        if form == "kitti":
            (root / "calib").mkdir()
            (root / "calib" / "scan_1.txt").write_text(
                "P2: 700 0 600 0 0 700 180 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\nTr_velo_to_cam: 0 -1 0 0.1 0 0 -1 -0.08 1 0 0 -0.27\n"
            )
        return root
    objects: list[dict[str, Any]] = []
    for kind, box in zip(TYPES, BOXES):
        item: dict[str, Any] = {"name": kind}
        if form == "vertices":
            item["vertices"] = _vertices(box).tolist()
        else:
            angle = math.degrees(box[6]) % 360 if form == "centroid_abs" else box[6]
            item |= {"centroid": vector(box[:3]), "rotations": vector((0, 0, angle))}
            item["dimensions"] = vector(box[3:6], ("length", "width", "height"))
        objects.append(item)
    write_json(root / "labels" / "scan_1.json", {"folder": "pointclouds", "filename": "scan_1.bin", "objects": objects})
    return root


def _vertices(box: np.ndarray) -> np.ndarray:
    signs = np.array([[-1, -1], [-1, 1], [1, 1], [1, -1]] * 2)
    flat = signs * box[3:5] / 2
    cos, sin = math.cos(box[6]), math.sin(box[6])
    x, y = flat[:, 0] * cos - flat[:, 1] * sin, flat[:, 0] * sin + flat[:, 1] * cos
    return np.stack([x, y, np.repeat([-1, 1], 4) * box[5] / 2], 1) + box[:3]


def _kitti_line(kind: str, box: np.ndarray, form: str) -> str:
    x, y, z, length, width, height, yaw = box
    place, turn = (x, y, z), yaw
    if form == "kitti":  # the camera of `labelcloud`, at the middle of the box's bottom
        place, turn = (-y + 0.1, -(z - height / 2) - 0.08, x - 0.27), math.pi / 2 - yaw
    return f"{kind} 0 0 0 0 0 0 0 {height} {width} {length} {place[0]} {place[1]} {place[2]} {turn}\n"


def check_prepared(frame: Frame) -> None:
    """A prepared frame holds the scene's boxes, each with its points."""
    assert frame.labels.num_points.tolist() == [_INSIDE] * 3
    assert abs(frame.labels.boxes.data.double().numpy()[:, :6] - BOXES[:, :6]).max() < 5e-3
