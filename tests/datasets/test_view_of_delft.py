"""View-of-Delft is KITTI's layout with a rotation about the LiDAR's axis, 16 columns, and radar beside it: its labels are read exactly."""

import math
import shutil

import numpy as np
import pytest
import tiny_layouts
import tiny_readers

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.kitti import KittiDataset
from upcycle3d.datasets.layouts import open_kitti

TILT = 0.15
"""Radians by which the camera looks down: a rotation about the camera's axis would be another one than about the LiDAR's."""


def lidar_to_camera() -> np.ndarray:
    turn = np.array([[1, 0, 0], [0, math.cos(TILT), -math.sin(TILT)], [0, math.sin(TILT), math.cos(TILT)]])
    return np.concatenate([turn @ np.array([[0, -1, 0], [0, 0, -1], [1, 0, 0]]), [[0.05], [0.3], [-1.1]]], 1)


def write(root):
    """A frame whose labels are written as `vod/visualization/helpers.py` of the development kit reads them: the bottom's center in the
    camera's frame, and rotation = -(yaw in the LiDAR's frame) - pi/2."""
    base = root / "lidar" / "training"
    tiny_readers.write_scan(base / "velodyne" / "00549.bin", tiny_readers.scan())
    lines = []
    for kind, (x, y, z, length, width, height, yaw) in zip(tiny_readers.TYPES, tiny_readers.BOXES):
        place = lidar_to_camera() @ [x, y, z - height / 2, 1]
        columns = [0, 0, 0, 500, 150, 600, 250, height, width, length, *place, -yaw - math.pi / 2, 1]
        lines.append(f"{kind} " + " ".join(map(str, columns)) + "\n")
    for folder in ("label_2", "calib", "image_2"):
        (base / folder).mkdir(parents=True)
    (base / "label_2" / "00549.txt").write_text("".join(lines) + lines[0].replace("Car", "bicycle_rack"))
    text = tiny_layouts.calibration(np.array([[300.0, 0, 960, 0], [0, 300, 608, 0], [0, 0, 1, 0]]), mounting=lidar_to_camera())
    (base / "calib" / "00549.txt").write_text(text)
    (base / "image_2" / "00549.jpg").write_bytes(tiny_layouts.jpeg(1936, 1216))
    (root / "lidar" / "ImageSets").mkdir()
    (root / "lidar" / "ImageSets" / "train.txt").write_text("00549\n")
    return root


def test_boxes_hold_exactly_their_points(tmp_path):
    frames = KittiDataset(write(tmp_path) / "lidar", ["00549"], crop_to_camera=False)
    tiny_readers.check(frames[0])
    assert frames[0].reading.types_dropped == {"bicycle_rack": 1}


def test_the_root_of_the_download_leads_to_its_lidar_folder(tmp_path):
    with pytest.raises(InvalidInput, match=r"give .*lidar"):
        open_kitti(write(tmp_path))


def test_radar_scans_are_not_taken_for_lidar_scans(tmp_path):
    root = write(tmp_path)
    shutil.copytree(root / "lidar", root / "radar")
    random = np.random.default_rng(0)
    points = np.concatenate([random.uniform(1, 40, (300, 3)), random.normal(-10, 9, (300, 1)), random.normal(0, 3, (300, 3))], 1)
    tiny_readers.write_scan(root / "radar" / "training" / "velodyne" / "00549.bin", points)
    with pytest.raises(InvalidInput, match="7 values per point"):
        _ = open_kitti(root / "radar", crop_to_camera=False).source[0]
