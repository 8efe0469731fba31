"""`prepare` warns of labels whose sizes and heights are usual and whose boxes still miss their objects."""

import math

import numpy as np
import pytest

from upcycle3d.core.ledger import Ledger
from upcycle3d.core.ledger_rules import judge
from upcycle3d.datasets.box_poses import POSES, count_poses, joined, judge_poses
from upcycle3d.tests import tiny_layouts
from upcycle3d.tests.tiny_layouts import BOXES, kitti_line, prepare


def write(box: np.ndarray) -> str:
    return "Car " + " ".join(f"{v:.5f}" for v in box)


def lifted(box: np.ndarray) -> list[float]:
    return [*box[:2], box[2] + box[5] / 2, *box[3:]]


def test_centers_in_kitti_labels_are_warned_about(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw", label=lambda i: "".join(kitti_line(np.array(lifted(b))) + "\n" for b in BOXES))
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, "add half of the height to y" in said) == (0, True)
    assert said.count("half of the height") == 1
    folder = tiny_layouts.folder(tmp_path / "folder", line=lambda box: write(lifted(box)))
    assert "leave --origin bottom out" in prepare(capsys, "folder", folder, tmp_path / "other")[1]


@pytest.mark.parametrize("quarters", [1, -1])
def test_a_heading_that_is_off_by_90_degrees_is_warned_about(tmp_path, capsys, quarters):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write([*box[:6], box[6] + quarters * math.pi / 2]))
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (code, "turned by 90 degrees" in said, "--yaw degrees" in said) == (0, True, True)


def test_mirrored_labels_are_warned_about_and_so_is_a_database_without_objects(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write([box[0], -box[1], *box[2:6], -box[6]]))
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (code, "the sign of their y and yaw changes" in said) == (0, True)
    assert "the split train has 0 objects to paste although 9 are labeled" in said


def boxes(seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    found = np.tile(BOXES[:1], (8, 1))
    found[:, :2] = [[12 + 6 * (i // 2), 5 * (-1) ** i] for i in range(8)]
    found[:, 6] = random.uniform(0.3, 1.2, 8)
    return found


@pytest.mark.parametrize("pose", [None, *(pose.name for pose in POSES)])
def test_the_pose_that_undoes_a_mistake_is_found_and_good_labels_have_none(pose):
    wrong = {
        "quarter turn": lambda b: b + np.array([0, 0, 0, 0, 0, 0, math.pi / 2]),
        "mirrored heading": lambda b: b * [1, 1, 1, 1, 1, 1, -1],
        "lowered": lambda b: b + np.array([0, 0, 0.8, 0, 0, 0, 0]),
        "y mirrored": lambda b: b * [1, -1, 1, 1, 1, 1, -1],
        "x mirrored": lambda b: b * [-1, 1, 1, 1, 1, 1, -1],
        "half turn": lambda b: b * [-1, -1, 1, 1, 1, 1, 1],
        "turn left": lambda b: np.c_[b[:, 1], -b[:, 0], b[:, 2:6], b[:, 6] - math.pi / 2],
        "turn right": lambda b: np.c_[-b[:, 1], b[:, 0], b[:, 2:6], b[:, 6] + math.pi / 2],
        "swapped": lambda b: np.c_[b[:, 1], b[:, 0], b[:, 2:6], math.pi / 2 - b[:, 6]],
        None: lambda b: b,
    }[pose]
    parts = []
    for seed in range(2):
        scan = tiny_layouts.scan(seed, boxes(seed))
        parts.append(count_poses(scan[:, :3].astype(np.float64), wrong(boxes(seed)), 8))
    found = judge_poses(joined(parts))
    assert (None if found is None else found[0].name) == pose


def test_boxes_of_other_scans_near_the_sensor_hold_hardly_a_point(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write([0.6 * box[0], *box[1:]]))
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (code, "half of the 12 labeled boxes near the sensor hold fewer than 5 points" in said) == (0, True)


def test_scans_of_two_mounting_heights_are_not_taken_for_boxes_at_the_bottom(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw")
    for path in sorted((root / "points").iterdir())[::2]:
        rows = np.fromfile(path, np.float32).reshape(-1, 4)
        path.write_bytes((rows + np.float32([0, 0, 1.73, 0])).tobytes())
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (code, "the road lies at about -1.75 m in 2 of 4 scans" in said) == (0, True)
    assert "these are all boxes of 2 scans" in said
    assert "--origin bottom" not in said


def test_half_of_the_boxes_without_a_point_is_a_warning():
    (finding,) = judge(Ledger(boxes={"Car": 8}, boxes_empty={"Car": 4}))
    assert "4 of 8 boxes hold no point; likely causes are scans or labels that are not in meters" in finding.text
    assert not finding.stops
