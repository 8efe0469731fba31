"""KITTI's layout becomes frames: text both ways, calibration, cropping, height shift, difficulty, neighbours, messages."""

import math
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.boxes import kitti_camera_to_lidar
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.frame import Calibration
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.core.structures import Boxes3D, PointCloud, Predictions
from upcycle3d.datasets.id_lists import read_ids
from upcycle3d.datasets.kitti import KittiDataset, crop_to_camera, project_points
from upcycle3d.datasets.kitti_calibration import read_calibration, shift_calibration
from upcycle3d.datasets.kitti_text import (
    format_objects,
    labels_from_kitti,
    parse_objects,
    predictions_to_kitti,
    read_objects,
    write_objects,
)
from upcycle3d.datasets.picture_size import read_picture_size

P2 = [[700.0, 0, 600, 45], [0, 700, 180, -0.3], [0, 0, 1, 0.005]]
R0 = [[0.9999, 0.01, -0.0085], [-0.0101, 0.99994, -0.004], [0.0085, 0.0041, 0.99996]]
TR = [[0.007, -0.99997, -0.0027, -0.024], [-0.0012, 0.0027, -0.99999, -0.061], [0.99998, 0.0069, -0.0011, -0.332]]
LABEL = "Car 0.00 0 1.85 387.63 181.54 423.81 203.12 1.67 1.87 3.69 -16.53 2.39 58.49 1.57\n"


def _row(name: str, matrix: list[list[float]]) -> str:
    return f"{name}: " + " ".join(str(v) for row in matrix for v in row) + "\n"


def _root(tmp_path: Path, label: str = LABEL, *, frame: str = "000007") -> Path:
    base = tmp_path / "training"
    for folder in ("velodyne", "label_2", "calib", "image_2"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    points = rng.uniform([-80, -60, -3, 0], [80, 60, 2, 1], (4000, 4)).astype(np.float32)
    points[:50, :3] = rng.normal([58.8, 16.7, -1.1], 0.3, (50, 3))  # inside the labelled car
    (base / "velodyne" / f"{frame}.bin").write_bytes(points.tobytes())
    (base / "label_2" / f"{frame}.txt").write_text(label)
    (base / "calib" / f"{frame}.txt").write_text(_row("P2", P2) + _row("R0_rect", R0) + _row("Tr_velo_to_cam", TR) + "\n")
    (tmp_path / "ImageSets").mkdir(exist_ok=True)
    (tmp_path / "ImageSets" / "train.txt").write_text(f"{frame}\n")
    return tmp_path


def _calibration(tmp_path: Path) -> Calibration:
    return read_calibration(_root(tmp_path) / "training" / "calib" / "000007.txt")


def test_text_round_trip_keeps_order_types_and_values(tmp_path: Path) -> None:
    text = LABEL + "DontCare -1 -1 -10 503.89 169.71 590.61 190.13 -1 -1 -1 -1000 -1000 -1000 -10\n"
    objects = parse_objects(text, "x")
    assert objects.types == ("Car", "DontCare")
    assert objects.scores is None
    assert objects.dimensions[0].tolist() == [1.67, 1.87, 3.69]
    assert objects.location[0].tolist() == [-16.53, 2.39, 58.49]
    assert format_objects(objects).splitlines()[1] == text.splitlines()[1]
    write_objects(tmp_path / "deep" / "a.txt", objects)
    again = read_objects(tmp_path / "deep" / "a.txt")
    assert again.types == objects.types
    for name in ("truncated", "occluded", "alpha", "bbox", "dimensions", "location", "rotation_y"):
        assert torch.equal(getattr(again, name), getattr(objects, name))


def test_detections_carry_scores_and_an_empty_file_holds_none() -> None:
    objects = parse_objects(LABEL.strip() + " 0.875\n", "x")
    assert objects.scores is not None
    assert objects.scores.tolist() == [0.875]
    assert parse_objects(format_objects(objects), "y").scores is not None
    assert len(parse_objects("\n", "x")) == 0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("Car 0 0 1 2 3\n", r"f\.txt, line 1: expected 15 \(label\) or 16 \(detection"),
        (LABEL + LABEL.strip() + " 0.5\n", r"f\.txt, line 2: expected 15 like the lines before columns, found 16"),
        (LABEL.replace("1.67", "abc"), r"f\.txt, line 1: all columns after the type must be numbers"),
        (LABEL.replace("58.49", "nan"), r"f\.txt, line 1: found NaN or inf"),
        (LABEL + LABEL.replace("1.67", "0.00"), r"f\.txt, line 2: height, width, length of Car must be positive, found \[0\.0"),
        (LABEL.replace("3.69", "-3.69"), r"f\.txt, line 1: height, width, length"),
    ],
)
def test_broken_lines_are_refused_with_file_and_line(text: str, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        parse_objects(text, "f.txt")


def test_difficulty_follows_the_official_limits() -> None:
    def line(height: float, occluded: int, truncated: float) -> str:
        return f"Car {truncated} {occluded} 0 100 100 200 {100 + height} 1.5 1.6 4 0 1.5 20 0\n"

    cases = [
        (41, 0, 0.15, 0),
        (40, 0, 0, 1),
        (41, 1, 0.3, 1),
        (26, 0, 0, 1),
        (25, 0, 0, -1),
        (41, 2, 0.5, 2),
        (41, 0, 0.51, -1),
        (41, 3, 0, -1),
    ]
    objects = parse_objects("".join(line(h, o, t) for h, o, t, _ in cases), "x")
    assert objects.difficulty().tolist() == [d for *_, d in cases]


def test_neighboring_classes_get_weight_zero_and_the_rest_is_dropped(tmp_path: Path) -> None:
    text = "".join(
        LABEL.replace("Car", t) for t in ("Car", "Van", "Truck", "Pedestrian", "Person_sitting", "Cyclist", "DontCare")
    )
    labels = labels_from_kitti(parse_objects(text, "x"), _calibration(tmp_path), ("Car", "Pedestrian", "Cyclist"))
    assert labels.classes.tolist() == [0, 0, 1, 1, 2]
    assert labels.weight.tolist() == [1, 0, 1, 0, 1]
    with_van = labels_from_kitti(parse_objects(text, "x"), _calibration(tmp_path), ("Car", "Van"))
    assert with_van.classes.tolist() == [0, 1]
    assert with_van.weight.tolist() == [1, 1]
    assert len(labels_from_kitti(parse_objects("", "x"), _calibration(tmp_path), ("Car",))) == 0


def test_labels_and_predictions_are_each_others_inverse(tmp_path: Path) -> None:
    calibration = _calibration(tmp_path)
    objects = parse_objects(LABEL, "x")
    labels = labels_from_kitti(objects, calibration, ("Car",))
    back = predictions_to_kitti(_predictions(labels.boxes.data), ("Car",), calibration)
    torch.testing.assert_close(back.location, objects.location, atol=1e-5, rtol=0)
    torch.testing.assert_close(back.dimensions, objects.dimensions, atol=1e-6, rtol=0)
    torch.testing.assert_close(back.rotation_y, objects.rotation_y, atol=1e-6, rtol=0)
    bearing = math.atan2(-16.53, 58.49)
    assert back.alpha.item() == pytest.approx(1.57 - bearing, abs=1e-5)
    assert back.types == ("Car",)
    assert parse_objects(format_objects(back), "x").scores is not None


def _predictions(boxes: torch.Tensor) -> Predictions:
    ones = torch.ones(len(boxes))
    return Predictions(
        boxes=Boxes3D(data=boxes),
        classes=torch.zeros(len(boxes), dtype=torch.int64),
        scores=ones,
        class_scores=ones,
        iou_scores=ones,
    )


def test_2d_boxes_enclose_what_is_in_front_and_end_at_the_picture() -> None:
    straight = torch.tensor([[0.0, -1, 0, 0], [0, 0, -1, 0], [1, 0, 0, 0], [0, 0, 0, 1]], dtype=torch.float64)
    projection = torch.tensor([[700.0, 0, 600, 0], [0, 700, 180, 0], [0, 0, 1, 0]], dtype=torch.float64)
    calibration = Calibration(lidar_to_camera=straight, projection=projection, image_size=(1200, 360))
    boxes = torch.tensor(
        [
            [20.0, 0, 0, 4, 2, 2, 0],  # ahead: near face at 18 m
            [-20.0, 0, 0, 4, 2, 2, 0],  # behind
            [20.0, 40, 0, 4, 2, 2, 0],  # left of the picture
            [0.0, -2, 0, 6, 2, 2, 0],  # beside the camera, half of it behind
        ]
    )
    found = predictions_to_kitti(_predictions(boxes), ("Car",), calibration)
    assert len(found) == 2
    half = 700 / 18
    torch.testing.assert_close(found.bbox[0], torch.tensor([600 - half, 180 - half, 600 + half, 180 + half], dtype=torch.float64))
    assert found.bbox[1].tolist() == pytest.approx([600 + 700 / 3, 0, 1199, 359])
    assert len(predictions_to_kitti(Predictions.empty(), ("Car",), calibration)) == 0


def test_missing_calibration_rows_are_named(tmp_path: Path) -> None:
    path = tmp_path / "c.txt"
    path.write_text(_row("P2", P2) + _row("Tr_velo_to_cam", TR))
    with pytest.raises(InvalidInput, match=r"no row R0_rect.*found P2, Tr_velo_to_cam"):
        read_calibration(path)
    path.write_text(_row("P2", P2) + _row("R0_rect", R0[:2]) + _row("Tr_velo_to_cam", TR))
    with pytest.raises(InvalidInput, match="row R0_rect must hold 9 numbers"):
        read_calibration(path)


def test_calibration_is_rectification_after_the_mounting(tmp_path: Path) -> None:
    calibration = _calibration(tmp_path)
    expected = np.array(R0) @ (np.array(TR)[:, :3] @ [10.0, 2, -1] + np.array(TR)[:, 3])
    pixels, depth = project_points(torch.tensor([[10.0, 2, -1]]), calibration)
    assert depth.item() == pytest.approx(expected[2], abs=1e-9)
    u, v, w = np.array(P2) @ [*expected, 1]
    assert pixels[0].tolist() == pytest.approx([u / w, v / w], abs=1e-9)


def test_frame_is_cropped_to_what_the_camera_sees(tmp_path: Path) -> None:
    root = _root(tmp_path)
    everything = KittiDataset(root, ["000007"], crop_to_camera=False)[0].points
    seen = KittiDataset(root, read_ids(root / "ImageSets" / "train.txt"))[0]
    assert seen.calibration is not None
    assert seen.labels is not None
    assert 100 < len(seen.points) < len(everything) / 2
    pixels, depth = project_points(everything.xyz, seen.calibration)
    inside = (depth > 0) & (pixels >= 0).all(1) & (pixels[:, 0] < 1242) & (pixels[:, 1] < 375)
    assert torch.equal(seen.points.xyz, everything.xyz[inside])
    assert seen.labels.num_points.item() >= 30


def test_reduced_scans_are_preferred_and_taken_as_they_are(tmp_path: Path) -> None:
    root = _root(tmp_path)
    (root / "training" / "velodyne_reduced").mkdir()
    behind = np.array([[-5, 0, 0, 0.5]], dtype=np.float32)
    (root / "training" / "velodyne_reduced" / "000007.bin").write_bytes(behind.tobytes())
    assert len(KittiDataset(root, ["000007"])[0].points) == 1
    assert len(KittiDataset(root, ["000007"], points_folder="velodyne")[0].points) > 100


def test_height_shift_moves_points_and_boxes_and_the_calibration_takes_it_back(tmp_path: Path) -> None:
    root = _root(tmp_path)
    plain, shifted = (KittiDataset(root, ["000007"], z_shift=s)[0] for s in (0.0, 1.6))
    assert plain.labels is not None
    assert shifted.labels is not None
    assert shifted.calibration is not None
    offset = torch.tensor([0, 0, 1.6])
    torch.testing.assert_close(shifted.points.xyz, plain.points.xyz + offset)
    torch.testing.assert_close(shifted.labels.boxes.data[:, :3], plain.labels.boxes.data[:, :3] + offset)
    assert torch.equal(shifted.labels.num_points, plain.labels.num_points)
    back = predictions_to_kitti(_predictions(shifted.labels.boxes.data), ("Car",), shifted.calibration)
    torch.testing.assert_close(back.location[0], torch.tensor([-16.53, 2.39, 58.49], dtype=torch.float64), atol=1e-5, rtol=0)
    assert plain.calibration is not None
    twice = shift_calibration(shift_calibration(plain.calibration, 1.6), -1.6)
    torch.testing.assert_close(twice.lidar_to_camera, plain.calibration.lidar_to_camera)


def test_picture_size_comes_from_the_png_header(tmp_path: Path) -> None:
    root = _root(tmp_path)
    png = root / "training" / "image_2" / "000007.png"
    png.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", 1224, 370))
    assert read_picture_size(png) == (1224, 370)
    calibration = KittiDataset(root, ["000007"])[0].calibration
    assert calibration is not None
    assert calibration.image_size == (1224, 370)
    png.write_bytes(b"GIF89a")
    with pytest.raises(InvalidInput, match="not a PNG or JPEG"):
        KittiDataset(root, ["000007"])[0]


@pytest.mark.parametrize("folder", ["velodyne", "label_2", "calib"])
def test_missing_files_name_frame_path_and_root(tmp_path: Path, folder: str) -> None:
    root = _root(tmp_path)
    for file in (root / "training" / folder).iterdir():
        file.unlink()
    with pytest.raises(InvalidInput, match=f"frame 000007: there is no file .*{folder}/000007.*root {root}"):
        KittiDataset(root, ["000007"])[0]


def test_without_labels_the_label_folder_is_never_opened(tmp_path: Path) -> None:
    root = _root(tmp_path, label="broken")
    dataset = KittiDataset(root, ["000007"], with_labels=False)
    assert [f.labels for f in dataset] == [None]
    assert len(dataset) == 1


def test_wrong_root_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="no folder"):
        KittiDataset(tmp_path / "nowhere", [])
    with pytest.raises(InvalidInput, match="points_folder must be"):
        KittiDataset(_root(tmp_path), [], points_folder="lidar")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "message"), [("\n\n", "names no frame"), ("1\n2\n1\n", "'1' occurs twice"), ("../1\n", "cannot be a file name")]
)
def test_split_files_are_checked(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "train.txt").write_text(text)
    with pytest.raises(InvalidInput, match=message):
        read_ids(tmp_path / "train.txt")
    with pytest.raises(InvalidInput, match=r"no split file .*; the folder holds train"):
        read_ids(tmp_path / "val.txt")


def test_real_full_scans_crop_to_the_reduced_ones() -> None:
    root = tiny.shared("data/kitti", "cropping real KITTI scans to the picture gives KITTI's own reduced scans")
    frame_ids = sorted(
        p.stem for p in (root / "training" / "velodyne").glob("*.bin") if (root / "training/image_2" / f"{p.stem}.png").is_file()
    )
    for frame_id in frame_ids:
        reduced = KittiDataset(root, [frame_id])[0]
        full = KittiDataset(root, [frame_id], points_folder="velodyne")[0]
        assert len(full.points) == len(reduced.points)
        assert full.labels is not None
        assert reduced.labels is not None
        assert torch.equal(full.labels.num_points, reduced.labels.num_points)


def test_real_labels_project_onto_their_2d_boxes() -> None:
    root = tiny.shared("data/kitti", "boxes of real KITTI labels project onto their 2D boxes")
    dataset = KittiDataset(root, read_ids(root / "ImageSets" / "val.txt"), with_labels=False)
    worst = []
    for i, frame_id in enumerate(dataset.ids):
        objects = dataset.kitti_objects(frame_id)
        whole = torch.tensor([t == "Car" for t in objects.types]) & (objects.truncated == 0) & (objects.location[:, 2] > 8)
        objects = objects.select(whole)
        calibration = dataset[i].calibration
        assert calibration is not None
        boxes = kitti_camera_to_lidar(objects.location, objects.dimensions, objects.rotation_y, calibration.lidar_to_camera)
        found = predictions_to_kitti(_predictions(boxes), ("Car",), calibration)
        assert len(found) == len(objects)
        worst += (found.bbox - objects.bbox).abs().amax(1).tolist()
    assert np.median(worst) < 2.5  # px; the 2D boxes were drawn by hand


def test_cropping_nothing_is_legal(tmp_path: Path) -> None:
    empty = PointCloud(xyz=torch.zeros(0, 3), features=torch.zeros(0, 1))
    assert len(crop_to_camera(empty, _calibration(tmp_path))) == 0


@pytest.mark.parametrize(("size", "odd"), [((1242, 375), 0), ((1920, 1200), 1)])
def test_a_picture_to_which_the_calibration_hardly_belongs_is_counted(tmp_path: Path, size: tuple[int, int], odd: int) -> None:
    root = _root(tmp_path)
    png = root / "training" / "image_2" / "000007.png"
    png.parent.mkdir(exist_ok=True)
    png.write_bytes(b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + b"IHDR" + struct.pack(">II", *size))
    assert KittiDataset(root, ["000007"])[0].reading.scans_off_center == odd


def test_two_z_shifts_that_differ_are_refused(tmp_path):
    root = _root(tmp_path)
    assert KittiDataset(root, ["000007"], z_shift=1.7, scan=ScanOptions(z_shift=1.7)).rig.z_shift == 1.7
    with pytest.raises(InvalidInput, match=r"z_shift is 0 and that of scan is 1\.7"):
        KittiDataset(root, ["000007"], scan=ScanOptions(z_shift=1.7))
