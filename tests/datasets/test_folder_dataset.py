"""Your own folder of scans and labels: what is read, and what is refused with which words."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.datasets.folder import FolderDataset, folder_ids, read_labels

LABELS = """# two objects
Car 10 2 -0.5  4 2 1.5 3.5   # turned
Pedestrian 5 -1 0 0.8 0.6 1.8 0

"""


def _root(tmp_path: Path) -> Path:
    (tmp_path / "points").mkdir()
    (tmp_path / "labels").mkdir()
    rows = np.array([[10, 2, -0.5, 0.5], [5, -1, 0.5, 0.1], [5, -1, 0.6, 0.1], [30, 30, 0, 0.2]], dtype=np.float32)
    (tmp_path / "points" / "a.bin").write_bytes(rows.tobytes())
    np.save(tmp_path / "points" / "b.npy", rows[:1])
    (tmp_path / "labels" / "a.txt").write_text(LABELS)
    (tmp_path / "labels" / "b.txt").write_text("")
    return tmp_path


def test_frames_carry_points_boxes_classes_and_counts(tmp_path: Path) -> None:
    root = _root(tmp_path)
    dataset = FolderDataset(root, folder_ids(root), ("Pedestrian", "Car"))
    assert dataset.ids == ("a", "b")
    first, second = list(dataset)
    assert first.labels is not None
    assert first.labels.classes.tolist() == [1, 0]
    assert first.labels.num_points.tolist() == [1, 2]
    assert first.labels.boxes.data[0].tolist() == pytest.approx([10, 2, -0.5, 4, 2, 1.5, 3.5 - 2 * math.pi])
    assert second.labels is not None
    assert len(second.labels) == 0
    assert len(second.points) == 1


def test_splits_are_files_of_ids(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (root / "splits").mkdir()
    (root / "splits" / "train.txt").write_text("b\n")
    assert folder_ids(root, "train") == ("b",)
    with pytest.raises(InvalidInput, match="no split file"):
        folder_ids(root, "val")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("Cra 1 2 3 4 2 1 0", r"l\.txt, line 2: unknown class 'Cra'; known are Car, Pedestrian, Sign; did you mean 'Car'\?"),
        ("Zeppelin 1 2 3 4 2 1 0", r"unknown class 'Zeppelin'; known are Car, Pedestrian, Sign"),
        ("Car 1 2 3 4 0 1 0", r"l\.txt, line 2: dx, dy, dz must be positive, found \[4\.0, 0\.0, 1\.0\]"),
        ("Car 1 2 3 4 2 1", r"l\.txt, line 2: expected `class x y z dx dy dz yaw`, found 7 columns"),
        ("Car 1 2 3 4 2 1 east", r"l\.txt, line 2: the box must be seven numbers"),
        ("Car 1 2 3 4 2 inf 0", r"l\.txt, line 2: found NaN or inf"),
    ],
)
def test_broken_label_lines_are_refused_with_file_and_line(tmp_path: Path, line: str, message: str) -> None:
    path = tmp_path / "l.txt"
    path.write_text(f"# comment\n{line}\n")
    with pytest.raises(InvalidInput, match=message):
        read_labels(path, ("Car", "Pedestrian"), other_classes=("Sign",))


def test_declared_other_classes_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "l.txt"
    path.write_text("Sign 1 2 3 1 1 1 0\nCar 1 2 3 4 2 1 0\n")
    assert read_labels(path, ("Car",), other_classes=("Sign",)).classes.tolist() == [0]


def test_missing_labels_and_scans_name_frame_and_root(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (root / "labels" / "b.txt").unlink()
    dataset = FolderDataset(root, ("b", "c"), ("Car",))
    with pytest.raises(InvalidInput, match=f"frame b: no labels .*root {root}.*write an empty file"):
        dataset[0]
    with pytest.raises(InvalidInput, match="frame c: no scan"):
        dataset[1]
    assert FolderDataset(root, ("b",), ("Car",), with_labels=False)[0].labels is None
    with pytest.raises(InvalidInput, match="no folder"):
        FolderDataset(root / "labels", (), ("Car",))


def test_two_scans_of_one_frame_are_refused(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (root / "points" / "b.bin").write_bytes(np.zeros((1, 4), np.float32).tobytes())
    with pytest.raises(InvalidInput, match="several scans"):
        FolderDataset(root, ("b",), ("Car",))[0]


@pytest.mark.parametrize(
    "beside", [{"z_shift": 1.8}, {"columns": ("x", "y", "z")}, {"intensity_scale": 0.5}, {"drop_non_finite": True}]
)
def test_an_option_beside_scan_is_refused_and_not_lost(tmp_path, beside):
    (tmp_path / "points").mkdir()
    with pytest.raises(InvalidInput, match="beside scan"):
        FolderDataset(tmp_path, (), ("Car",), scan=ScanOptions(), **beside)
    same = FolderDataset(tmp_path, (), ("Car",), z_shift=1.8, scan=ScanOptions(z_shift=1.8))
    assert replace(same, ids=()).rig.z_shift == 1.8


def test_an_image_size_for_a_folder_without_a_camera_is_refused(tmp_path):
    (tmp_path / "points").mkdir()
    with pytest.raises(InvalidInput, match="no camera"):
        FolderDataset(tmp_path, (), ("Car",), scan=ScanOptions(image_size=(1920, 1080)))
