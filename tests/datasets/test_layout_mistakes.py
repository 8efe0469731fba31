"""What people get wrong with KITTI's layout and their own folders: `prepare` says it, and nothing is lost in silence."""

import json
import math
import shutil
from dataclasses import replace
from itertools import permutations, product
from pathlib import Path

import numpy as np
import pytest
import tiny_layouts
import torch
from tiny_layouts import BOXES, IDS, MOUNTING, PROJECTION, calibration, kitti_line, prepare, row

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.datasets.gt_database import GtDatabase
from upcycle3d.datasets.layouts import open_folder, open_kitti
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.raw import prepare_raw
from upcycle3d.datasets.simulation import places
from upcycle3d.datasets.simulation.layout_lyft import write_lyft_layout
from upcycle3d.perception.evaluation.score import score_detector
from upcycle3d.tools import prepare as prepare_tool
from upcycle3d.tools.console import run_command

SMALL_LYFT = replace(places.domain("lyft"), sensor=replace(places.domain("lyft").sensor, azimuths=240))


def boxes(out: Path) -> int:
    frames = PreparedDataset(out)
    return sum(len(frames.labels(i) or ()) for i in range(len(frames)))


# ---- class names


@pytest.mark.parametrize("name", ["Cars", "Vehicle", '"Car"', "Car,"])
def test_labels_of_which_no_class_wants_any_are_an_error_that_names_their_types(tmp_path, capsys, name):
    code, said = prepare(capsys, "kitti", tiny_layouts.kitti(tmp_path / "raw", name=name), tmp_path / "out")
    assert code == 2
    assert f"the labels hold {name} 12" in said
    assert "--class-map" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["car", "CAR", "Car"])
def test_case_does_not_matter(tmp_path, capsys, name):
    root = tiny_layouts.kitti(tmp_path / "raw", name=name)
    assert prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")[0] == 0
    assert boxes(tmp_path / "out") == 12
    assert prepare(capsys, "kitti", root, tmp_path / "own", "--classes", "caR")[0] == 0
    assert PreparedDataset(tmp_path / "own").classes == ("caR",)


def test_a_misspelt_class_is_refused_and_the_next_try_may_use_the_same_folder(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Cra")
    assert (code, "the nearest is Car" in said) == (2, True)
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car", "Pedestrian")
    assert (code, "the class Pedestrian occurs in no label" in said) == (2, True)
    assert prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car", "Pedestrian", "--allow-absent-classes")[0] == 0


def test_absent_default_classes_are_a_warning(tmp_path, capsys):
    code, said = prepare(capsys, "kitti", tiny_layouts.kitti(tmp_path / "raw"), tmp_path / "out")
    assert code == 0
    assert "warning: the classes Pedestrian and Cyclist occur in no label of these frames: the labels hold Car 12" in said


@pytest.mark.parametrize("names", [["DontCare"], ["Car", "Car"], ["Car", "car"], ['"Car"'], [" Car"], [""], []])
def test_names_that_no_class_can_have_are_refused(tmp_path, capsys, names):
    root = tiny_layouts.kitti(tmp_path / "raw")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", *names)
    assert code == 2
    assert "error: " in said


def test_mixed_spellings_are_all_kept_and_dropped_types_are_counted(tmp_path, capsys):
    def label(index: int) -> str:
        return "".join(kitti_line(box, name) for box, name in zip(BOXES, ("Car", "car", "Cars")))

    root = tiny_layouts.kitti(tmp_path / "raw", label=label)
    report = tmp_path / "report.json"
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car", "--json", str(report))
    assert (code, boxes(tmp_path / "out")) == (0, 8)
    assert "the labels spell the class Car in 2 ways (Car 4, car 4)" in said
    assert "4 objects of the type Cars are dropped, which looks like the class Car; --class-map Cars Car keeps them" in said
    assert "objects of type Cars, dropped" in said
    ledger = json.loads(report.read_text())["ledger"]
    assert (ledger["types_dropped"], ledger["boxes"]) == ({"Cars": 4}, {"Car": 8})
    options = ("--classes", "Car", "--class-map", "Cars", "Car")
    assert prepare(capsys, "kitti", root, tmp_path / "mapped", *options)[0] == 0
    assert boxes(tmp_path / "mapped") == 12


def test_a_class_map_that_leads_nowhere_is_refused(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--class-map", "Vehicel", "Car")
    assert (code, "the class map names the type Vehicel" in said) == (2, True)
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car", "--class-map", "Car", "Auto")
    assert (code, "none of the classes Car" in said) == (2, True)
    code, said = prepare(capsys, "lyft", root, tmp_path / "out", "--categories", "car", "Car")
    assert (code, "write --class-map" in said) == (2, True)


def test_all_unknown_types_of_a_folder_are_named_at_once_before_a_scan_is_read(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw")
    (root / "labels" / "000000.txt").write_text("Tree 1 2 3 1 1 1 0\nBush 1 2 3 1 1 1 0\nCar 15 2 -0.93 4.2 1.8 1.6 0.1\n")
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert code == 2
    assert "Bush 1, Tree 1" in said
    assert "--other-classes Bush Tree" in said
    assert prepare(capsys, "folder", root, tmp_path / "out", "--other-classes", "any")[0] == 0


# ---- pictures


@pytest.mark.parametrize(
    "picture",
    [
        (".png", tiny_layouts.png(1920, 1200)),
        (".PNG", tiny_layouts.png(1920, 1200)),
        (".jpg", tiny_layouts.jpeg(1920, 1200)),
        (".JPG", tiny_layouts.jpeg(1920, 1200, marker=0xC2)),
        (".jpeg", tiny_layouts.jpeg(1920, 1200)),
    ],
)
def test_the_size_of_the_view_comes_from_the_picture(tmp_path, capsys, picture):
    projection = np.array([[1200.0, 0, 960, 0], [0, 1200, 600, 0], [0, 0, 1, 0]])
    root = tiny_layouts.kitti(tmp_path / "raw", calib=calibration(projection), picture=picture)
    assert prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")[0] == 0
    frame = PreparedDataset(tmp_path / "out")[0]
    assert frame.calibration.image_size == (1920, 1200)
    assert frame.labels.num_points.min() > 100


def test_an_assumed_size_that_contradicts_the_camera_is_refused(tmp_path, capsys):
    projection = np.array([[1200.0, 0, 960, 0], [0, 1200, 600, 0], [0, 0, 1, 0]])
    root = tiny_layouts.kitti(tmp_path / "raw", calib=calibration(projection))
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, "--image-size WIDTH HEIGHT, perhaps 1920 1200" in said) == (2, True)
    options = ("--classes", "Car", "--image-size", "1920", "1200")
    assert prepare(capsys, "kitti", root, tmp_path / "again", *options)[0] == 0
    assert PreparedDataset(tmp_path / "again")[0].labels.num_points.min() > 100


def test_a_crop_that_leaves_no_point_is_an_error_that_names_the_size(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car", "--image-size", "2", "2")
    assert code == 2
    assert "lies in the camera's view of 2 x 2 pixels" in said


@pytest.mark.parametrize("data", [b"GIF89a", b"\xff\xd8\xff\xe0 no real picture", tiny_layouts.png(1 << 31, 5), b"\xff\xd8"])
def test_a_picture_without_a_size_is_told(tmp_path, capsys, data):
    root = tiny_layouts.kitti(tmp_path / "raw", picture=(".jpg", data))
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, "--image-size WIDTH HEIGHT" in said) == (2, True)


# ---- calibrations


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (calibration(PROJECTION * np.nan), "row P2 holds NaN or inf"),
        (calibration(mounting=np.eye(4)[:3]), "row Tr_velo_to_cam is the identity"),
        (calibration(mounting=np.linalg.inv(np.vstack([MOUNTING, [0, 0, 0, 1]]))[:3]), "may be inverted"),
        (calibration(mounting=MOUNTING * [1, 1, 1, 1000]), "perhaps in millimeters"),
        (calibration(mounting=MOUNTING * 0), "row Tr_velo_to_cam is singular"),
        (calibration(rectify=2 * np.eye(3)), "row R0_rect is no rotation"),
        (calibration(PROJECTION * [[-1], [1], [1]]), "row P2 has the focal lengths -700 and 700"),
        (calibration(PROJECTION * [[1], [1], [0]]), "row P2 is no camera matrix"),
    ],
)
def test_matrices_that_are_no_calibration_are_refused_with_file_and_row(tmp_path, capsys, text, message):
    code, said = prepare(capsys, "kitti", tiny_layouts.kitti(tmp_path / "raw", calib=text), tmp_path / "out", "--classes", "Car")
    assert code == 2
    assert "training/calib/000000.txt: " in said
    assert message in said


TRACKING = row("P2:", PROJECTION) + row("R_rect", np.eye(3)) + row("Tr_velo_cam", MOUNTING)
ODOMETRY = row("P2:", PROJECTION) + row("Tr:", MOUNTING)
CAMERAS = row("S_rect_02:", np.array([1242.0, 375])) + row("R_rect_00:", np.eye(3)) + row("P_rect_02:", PROJECTION)
VELODYNE = "calib_time: 15-Mar-2012 11:37:16\n" + row("R:", MOUNTING[:, :3]) + row("T:", MOUNTING[:, 3])


@pytest.mark.parametrize(
    "files",
    [
        {f"{i}.txt": TRACKING for i in IDS},
        {f"{i}.txt": ODOMETRY for i in IDS},
        {"calib.txt": ODOMETRY},
        {"calib_cam_to_cam.txt": CAMERAS, "calib_velo_to_cam.txt": VELODYNE},
    ],
)
def test_calibrations_of_tracking_odometry_and_raw_recordings_are_read(tmp_path, files):
    root = tiny_layouts.kitti(tmp_path / "raw")
    expected = open_kitti(root, classes=("Car",)).source[0]
    for path in (root / "training" / "calib").iterdir():
        path.unlink()
    for name, text in files.items():
        (root / "training" / "calib" / name).write_text(text)
    found = open_kitti(root, classes=("Car",)).source[0]
    torch.testing.assert_close(found.calibration.lidar_to_camera, expected.calibration.lidar_to_camera)
    assert torch.equal(found.points.xyz, expected.points.xyz)


def test_half_of_a_raw_calibration_names_the_other_half(tmp_path):
    root = tiny_layouts.kitti(tmp_path / "raw", calib=VELODYNE)
    with pytest.raises(
        InvalidInput, match=r"000000.txt: there is no row P2 .*calib_velo_to_cam.txt: put calib_cam_to_cam.txt beside"
    ):
        open_kitti(root, classes=("Car",)).source[0]


# ---- text files


def test_a_byte_order_mark_loses_nothing(tmp_path, capsys):
    bom = "\ufeff"
    root = tiny_layouts.kitti(tmp_path / "raw", label=lambda i: bom + "".join(map(kitti_line, BOXES)), calib=bom + calibration())
    (root / "ImageSets" / "train.txt").write_text(bom + "\r\n".join(IDS[:3]))
    assert prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")[0] == 0
    assert (boxes(tmp_path / "out"), PreparedDataset(tmp_path / "out").splits) == (12, {"train": 3, "val": 1})
    own = tiny_layouts.folder(tmp_path / "own")
    for path in (own / "labels").iterdir():
        path.write_text(bom + path.read_text())
    assert prepare(capsys, "folder", own, tmp_path / "mine")[0] == 0
    assert boxes(tmp_path / "mine") == 12


def test_labels_in_latin_1_are_a_sentence(tmp_path, capsys):
    def label(index: int) -> bytes:
        return (kitti_line(BOXES[0]) + kitti_line(BOXES[1], "Fußgänger")).encode("latin-1")

    root = tiny_layouts.kitti(tmp_path / "raw", label=label)
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, "line 2: byte 0xdf is not UTF-8, perhaps a letter in Latin-1" in said) == (2, True)


def test_a_line_of_eight_megabytes_reaches_neither_terminal_nor_header(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    (root / "training" / "label_2" / "000000.txt").write_text("Car " + "7" * 8_000_000 + "\n")
    (root / "training" / "label_2" / "000001.txt").write_text("X" * 8_000_000 + " 0" * 14 + "\n")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert code == 0
    assert "letters is no label, the file is damaged" in said
    assert "2 of 4 scans were left out because of errors" in said
    assert max(len(said), (tmp_path / "out" / "dataset.json").stat().st_size) < 20_000


# ---- lists


@pytest.mark.parametrize(
    "text",
    [
        "000000\n000001\n",
        "\ufeff000000\r\n\r\n000001",
        "# mine\n 000000 \n\t000001 # the second\n",
        "000000.bin\n000001.png\n",
        "training/velodyne/000000.bin\n/data/kitti/velodyne/000001.bin\n",
        "0\n1\n",
        '"000000"\n"000001"\n',
    ],
)
def test_forms_of_a_list_are_understood(tmp_path, text):
    root = tiny_layouts.kitti(tmp_path / "raw")
    (root / "ImageSets" / "train.txt").write_text(text)
    assert open_kitti(root).splits["train"] == ("000000", "000001")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"000000 1\n000001 -1\n", r"2 of the 2 frames of train.txt \(000000 1, 000001 -1\) .* one id per line"),
        (b"000000,000001\n", "one id per line"),
        ("000000\n".encode("utf-16"), "is UTF-16"),
        (b"000000\n0\n", "twice"),
        (b"../../x\n", "cannot be a file name"),
        (b"a\x1b[2Jb\n", r"'a\\+x1b\[2Jb'"),
        (b"a\0b\n", "is no text"),
        (b"..\n", "cannot be a file name"),
        (b"000000\n000098\n000099\n", r"2 of the 3 frames of train.txt \(000098, 000099\) are not in .*--splits val"),
    ],
)
def test_other_forms_are_refused_before_anything_is_read(tmp_path, data, message):
    root = tiny_layouts.kitti(tmp_path / "raw")
    (root / "ImageSets" / "train.txt").write_bytes(data)
    with pytest.raises(InvalidInput, match=message) as raised:
        open_kitti(root)
    assert "\x1b" not in str(raised.value)


def test_files_of_macos_are_skipped_and_counted(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    (root / "ImageSets" / "._train.txt").write_bytes(b"\0\5\x16\7")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, "files skipped: hidden file 1" in said) == (0, True)
    assert set(PreparedDataset(tmp_path / "out").splits) == {"train", "val"}


def test_the_split_test_is_read_from_testing_without_labels(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw", splits={"train": IDS[:3], "val": IDS[3:], "test": IDS[:2]})
    code, said = prepare(capsys, "kitti", root, tmp_path / "without", "--classes", "Car")
    assert (code, "the split test is left out" in said) == (0, True)
    code, said = prepare(capsys, "kitti", root, tmp_path / "named", "--classes", "Car", "--splits", "test")
    assert (code, "which does not exist; unpack it" in said) == (2, True)
    for name in ("velodyne", "calib"):
        shutil.copytree(root / "training" / name, root / "testing" / name)
    (root / "testing" / "velodyne" / "000000.bin").write_bytes(tiny_layouts.scan(77).tobytes())
    assert prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")[0] == 0
    test, train = PreparedDataset(tmp_path / "out", "test"), PreparedDataset(tmp_path / "out", "train")
    assert test.ids == ("testing-000000", "testing-000001")
    assert test[0].labels is None
    assert not torch.equal(test[0].points.xyz[:10], train[0].points.xyz[:10])


@pytest.mark.parametrize("name", ["Test", "testing", "TESTING"])
def test_other_spellings_of_test_are_read_from_testing_too(tmp_path, capsys, name):
    root = tiny_layouts.kitti(tmp_path / "raw", splits={"train": IDS[:3], name: IDS[:2]})
    code, said = prepare(capsys, "kitti", root, tmp_path / "without", "--classes", "Car")
    assert (code, f"the split {name} is left out" in said) == (0, True)
    for folder in ("velodyne", "calib"):
        shutil.copytree(root / "training" / folder, root / "testing" / folder)
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, "warning" in said) == (0, False)
    frames = PreparedDataset(tmp_path / "out", name)
    assert frames.ids == ("testing-000000", "testing-000001")
    assert frames[0].labels is None


@pytest.mark.parametrize("name", ["test_split", "Tests", "test-01"])
def test_a_list_whose_name_begins_with_test_and_that_is_read_from_training_is_warned_about(tmp_path, capsys, name):
    root = tiny_layouts.kitti(tmp_path / "raw", splits={"train": IDS[:3], name: IDS[3:]})
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, f"the list {name} is read from" in said, "call the list test" in said) == (0, True, True)


def test_splits_that_share_frames_are_warned_about(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw", splits={"train": IDS[:3], "val": IDS[2:], "trainval": IDS})
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert code == 0
    assert said.count("share 1 frame (000002)") == 1


@pytest.mark.parametrize("layout", ["kitti", "folder"])
def test_frames_without_labels_are_prepared_when_they_are_named(tmp_path, capsys, layout):
    root = (tiny_layouts.kitti if layout == "kitti" else tiny_layouts.folder)(tmp_path / "raw")
    labels = root / ("training/label_2" if layout == "kitti" else "labels")
    (labels / "000003.txt").unlink()
    code, said = prepare(capsys, layout, root, tmp_path / "out", "--classes", "Car")
    assert (code, "give --unlabeled val" in said) == (2, True)
    assert prepare(capsys, layout, root, tmp_path / "out", "--classes", "Car", "--unlabeled", "val")[0] == 0
    assert PreparedDataset(tmp_path / "out", "val")[0].labels is None
    shutil.rmtree(labels)
    assert prepare(capsys, layout, root, tmp_path / "bare", "--unlabeled", "train", "val")[0] == 0


def test_a_second_preparation_adds_splits_and_keeps_databases(tmp_path, capsys):
    root, out = tiny_layouts.kitti(tmp_path / "raw"), tmp_path / "out"
    assert prepare(capsys, "kitti", root, out, "--classes", "Car", "--splits", "train")[0] == 0
    before = (out / "gt_database" / "train" / "database.json").read_bytes()
    first = PreparedDataset(out, "train")[1]
    code, said = prepare(capsys, "kitti", root, out, "--classes", "Car", "--splits", "val")
    assert (code, "kept" in said) == (0, True)
    train = PreparedDataset(out, "train")
    assert (PreparedDataset(out).splits, train.verify()) == ({"train": 3, "val": 1}, ())
    assert torch.equal(train[1].points.xyz, first.points.xyz)
    assert (out / "gt_database" / "train" / "database.json").read_bytes() == before
    GtDatabase.open(out / "gt_database" / "train", expected_fingerprint=train.split_fingerprint())
    code, said = prepare(capsys, "kitti", root, out, "--classes", "Car", "--splits", "val", "--z-shift", "1.73")
    assert (code, "was begun with other settings (z_shift: '0.0' -> '1.73')" in said) == (2, True)
    assert prepare(capsys, "kitti", root, out, "--classes", "Car", "--splits", "val", "--replace")[0] == 0
    assert (PreparedDataset(out).splits, [p.name for p in (out / "gt_database").iterdir()]) == ({"val": 1}, ["val"])
    assert len(list((out / "parts").glob("*.f32"))) == 1


# ---- the same command again, after something was changed


@pytest.mark.parametrize("layout", ["kitti", "folder"])
def test_labels_that_come_or_go_with_unlabeled_are_read_again(tmp_path, capsys, layout):
    root = (tiny_layouts.kitti if layout == "kitti" else tiny_layouts.folder)(tmp_path / "raw")
    options = ("--classes", "Car")
    for number, unlabeled in enumerate([True, False, True]):
        code, said = prepare(capsys, layout, root, tmp_path / "out", *options, *(("--unlabeled", "val") if unlabeled else ()))
        assert (code, "1 frames were read again" in said) == (0, number > 0)
        assert (PreparedDataset(tmp_path / "out", "val")[0].labels is None) == unlabeled
        assert all(frame.labels is not None for frame in PreparedDataset(tmp_path / "out", "train"))


@pytest.mark.parametrize("change", ["label", "label of the same size", "scan", "calibration"])
def test_a_file_that_was_changed_is_read_again_and_told(tmp_path, capsys, change):
    root, out = tiny_layouts.kitti(tmp_path / "raw"), tmp_path / "out"
    assert prepare(capsys, "kitti", root, out, "--classes", "Car")[0] == 0
    code, said = prepare(capsys, "kitti", root, out, "--classes", "Car")
    assert (code, "read again" in said) == (0, False)
    before = PreparedDataset(out, "train").split_fingerprint()
    if change == "scan":
        path = root / "training" / "velodyne" / f"{IDS[1]}.bin"
        path = path if path.exists() else root / "training" / "velodyne_reduced" / f"{IDS[1]}.bin"
        path.write_bytes(path.read_bytes()[:-160])
    else:
        path = root / "training" / ("calib" if change == "calibration" else "label_2") / f"{IDS[1]}.txt"
        text = path.read_text()
        changed = {
            "label": "\n".join(text.splitlines()[:2]) + "\n",
            "label of the same size": text.replace("24.7300", "25.7300"),
            "calibration": text + "\n",
        }
        path.write_text(changed[change])
    code, said = prepare(capsys, "kitti", root, out, "--classes", "Car")
    assert (code, "1 frames were read again, because their files were changed since they were prepared" in said) == (0, True)
    fresh = tmp_path / "fresh"
    assert prepare(capsys, "kitti", root, fresh, "--classes", "Car")[0] == 0
    now = PreparedDataset(out, "train").split_fingerprint()
    assert now == PreparedDataset(fresh, "train").split_fingerprint()
    assert (now != before) == (change != "calibration")
    GtDatabase.open(out / "gt_database" / "train", expected_fingerprint=now)
    assert prepare(capsys, "kitti", root, out, "--classes", "Car")[1].count("read again") == 0


# ---- angles, sizes, axes


def write(box: np.ndarray) -> str:
    return "Car " + " ".join(f"{v:.5f}" for v in box)


def test_angles_in_degrees_are_refused_and_an_option_reads_them(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write([*box[:6], math.degrees(box[6])]))
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (code, "beyond two pi; angles are in radians, or in degrees with --yaw degrees" in said) == (2, True)
    assert prepare(capsys, "folder", root, tmp_path / "out", "--yaw", "degrees")[0] == 0
    found = PreparedDataset(tmp_path / "out")[0].labels.boxes.data
    torch.testing.assert_close(found, torch.tensor(BOXES, dtype=torch.float32), atol=1e-4, rtol=0)
    turned = tiny_layouts.kitti(tmp_path / "kitti", label=lambda i: kitti_line(BOXES[0]).rsplit(" ", 1)[0] + " -88.5\n")
    code, said = prepare(capsys, "kitti", turned, tmp_path / "none", "--classes", "Car")
    assert (code, "rotation_y of Car is -88.5, which is beyond 2 pi" in said) == (2, True)


def test_radians_that_are_read_as_degrees_are_warned_about(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw")
    code, said = prepare(capsys, "folder", root, tmp_path / "out", "--yaw", "degrees")
    assert (code, "all 12 yaws that were read as degrees (--yaw degrees) lie within 3.14 of the axes" in said) == (0, True)
    assert "read as degrees" not in prepare(capsys, "folder", root, tmp_path / "right")[1]


def test_labels_that_are_written_twice_are_counted(tmp_path, capsys):
    root = tiny_layouts.kitti(
        tmp_path / "raw", label=lambda i: "".join(kitti_line(box) for box in (*BOXES, *BOXES[: 3 * (i == 1)]))
    )
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car")
    assert (code, "3 of 15 labeled boxes are written twice, with the same numbers and class, in 1 frames (000001)" in said) == (
        0,
        True,
    )
    assert "twice" not in prepare(capsys, "kitti", tiny_layouts.kitti(tmp_path / "k"), tmp_path / "once", "--classes", "Car")[1]


@pytest.mark.parametrize(
    ("factors", "message"),
    [([1, 1, 1, 1 / 255], "another mean intensity"), ([100, 100, 100, 1], "points ten times farther or nearer")],
)
def test_one_scan_that_is_unlike_the_others_is_named(tmp_path, capsys, factors, message):
    root = tiny_layouts.folder(tmp_path / "raw")
    path = root / "points" / "000002.bin"
    (np.fromfile(path, "<f4").reshape(-1, 4) * factors).astype("<f4").tofile(path)
    code, said = prepare(capsys, "folder", root, tmp_path / "out", "--unlabeled", "train", "val")
    assert (code, f"1 of 4 scans that were looked at (000002) have {message} compared with the others" in said) == (0, True)


def test_swapped_sizes_are_warned_about_and_an_option_reads_them(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write(box[[0, 1, 2, 4, 3, 5, 6]]))
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (code, "length and width are perhaps swapped (--size-order w l h" in said) == (0, True)
    code, said = prepare(capsys, "folder", root, tmp_path / "right", "--size-order", "w", "l", "h")
    assert (code, "warning" in said) == (0, False)
    upright = tiny_layouts.folder(tmp_path / "height", line=lambda box: write(box[[0, 1, 2, 5, 4, 3, 6]]))
    assert "--size-order h w l" in prepare(capsys, "folder", upright, tmp_path / "other")[1]


def test_centers_at_the_bottom_are_warned_about_and_an_option_reads_them(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write([*box[:2], box[2] - box[5] / 2, *box[3:]]))
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (code, "perhaps the center of the bottom (--origin bottom" in said) == (0, True)
    code, said = prepare(capsys, "folder", root, tmp_path / "right", "--origin", "bottom", "--z-shift", "1.73")
    assert (code, "warning" in said) == (0, False)
    found = PreparedDataset(tmp_path / "right")[0].labels.boxes.data[:, 2]
    torch.testing.assert_close(found, torch.full((3,), 0.8), atol=1e-4, rtol=0)


def test_axes_turn_scans_and_labels_together(tmp_path, capsys):
    """The file has x to the right and y forward."""
    turn = np.array([[0.0, -1, 0], [1, 0, 0], [0, 0, 1]])  # ours -> the file's

    def line(box: np.ndarray) -> str:
        return write([*(turn @ box[:3]), *box[3:6], box[6] + math.pi / 2])

    root = tiny_layouts.folder(tmp_path / "raw", line=line, points=turn)
    assert prepare(capsys, "folder", root, tmp_path / "out", "--axes", "y", "-x", "z")[0] == 0
    labels = PreparedDataset(tmp_path / "out")[0].labels
    torch.testing.assert_close(labels.boxes.data, torch.tensor(BOXES, dtype=torch.float32), atol=1e-4, rtol=0)
    assert labels.num_points.min() > 150
    code, said = prepare(capsys, "folder", root, tmp_path / "lying", "--axes", "x", "z", "y")
    assert (code, "must point up or down" in said) == (2, True)


def test_axes_that_mirror_the_scene_and_boxes_behind_the_sensor_are_told(tmp_path, capsys):
    """Scans and labels turn together, so the points in the boxes say nothing: the determinant and the place of the boxes do."""
    root = tiny_layouts.folder(tmp_path / "raw")
    for axes, mirrored in (("y x z", True), ("x -y z", True), ("-y x z", False), ("-x -y z", False)):
        code, said = prepare(capsys, "folder", root, tmp_path / axes.replace(" ", "_"), "--axes", *axes.split())
        assert (code, f"--axes {axes} mirrors the scene" in said) == (0, mirrored)
        assert ("12 of 12 labeled boxes lie behind the sensor" in said) == (axes == "-x -y z")


def test_the_folder_of_lists_that_is_missing_is_named(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    shutil.rmtree(root / "ImageSets")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out")
    assert (code, f"there is no folder {root / 'ImageSets'}; make it, with a file train.txt" in said) == (2, True)


def test_axes_mirror_where_their_determinant_is_negative():
    for letters in permutations("xyz"):
        for signs in product((1, -1), repeat=3):
            matrix = np.zeros((3, 3))
            for row_number, (letter, sign) in enumerate(zip(letters, signs)):
                matrix[row_number, "xyz".index(letter)] = sign
            axes = tuple(f"{'-' if sign < 0 else ''}{letter}" for letter, sign in zip(letters, signs))
            assert ScanOptions(axes=axes).mirrors == (np.linalg.det(matrix) < 0)


@pytest.mark.parametrize(
    ("factor", "code", "message"),
    [(100, 0, "perhaps in centimeters"), (1000, 2, "which no LiDAR reaches. Likely causes: numbers of another type")],
)
def test_other_units_are_noticed(tmp_path, capsys, factor, code, message):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write([*(factor * box[:6]), box[6]]), points=factor * np.eye(3))
    found, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert (found, message in said) == (code, True)


def test_boxes_without_any_point_stop_before_anything_is_published(tmp_path, capsys):
    root = tiny_layouts.folder(tmp_path / "raw", line=lambda box: write([-box[1], -box[2], box[0], *box[3:]]))
    code, said = prepare(capsys, "folder", root, tmp_path / "out")
    assert code == 2
    assert "12 of 12 boxes hold no point" in said
    assert not (tmp_path / "out" / "dataset.json").exists()
    assert prepare(capsys, "folder", tiny_layouts.folder(tmp_path / "good"), tmp_path / "out")[0] == 0


# ---- the rest


def test_a_negative_number_of_workers_is_a_sentence(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    code, said = prepare(capsys, "kitti", root, tmp_path / "out", "--classes", "Car", "--workers", "-1")
    assert (code, "--workers) must be 0 or more, found -1" in said) == (2, True)


def test_options_of_scans_reach_the_reader(tmp_path, capsys):
    root = tiny_layouts.kitti(tmp_path / "raw")
    for path in (root / "training" / "velodyne").iterdir():
        rows = np.fromfile(path, np.float32).reshape(-1, 4)
        wide = np.concatenate([rows[:, :3], 255 * rows[:, 3:], np.zeros((len(rows), 1))], 1)
        path.write_bytes(wide.astype("<f8").tobytes())
    options = [
        "--classes",
        "Car",
        "--columns",
        "x",
        "y",
        "z",
        "intensity",
        "_",
        "--dtype",
        "float64",
        "--intensity-scale",
        "1/255",
    ]
    assert prepare(capsys, "kitti", root, tmp_path / "out", *options, "--z-shift", "1.73")[0] == 0
    frames = PreparedDataset(tmp_path / "out")
    assert 0.9 < float(frames[0].points.features.max()) <= 1
    assert (frames.rig.z_shift, frames.rig.intensity_scale) == (1.73, 1 / 255)
    assert frames[0].labels.num_points.min() > 100


def test_usual_data_gives_no_warning(tmp_path):
    report = prepare_raw(open_folder(tiny_layouts.folder(tmp_path / "raw")), tmp_path / "out", workers=0)
    (car,) = report.objects
    assert report.warnings == ()
    assert (car.name, car.boxes) == ("Car", 12)
    assert car.size == pytest.approx((4.1667, 1.8, 1.6), abs=1e-3)
    assert abs(car.above_road) < 0.1
    assert report.frames.ledger.points == 4 * 4600


# ---- layouts with fixed types


def test_case_does_not_matter_for_waymo_and_dropped_types_are_counted(written, tmp_path, capsys):
    report = tmp_path / "report.json"
    names = ("--classes", "vehicle", "--splits", "train", "--json", str(report))
    code, said = prepare(capsys, "waymo", written, tmp_path / "out", *names)
    assert code == 0, said
    found = json.loads(report.read_text())
    assert (found["ledger"]["boxes"]["vehicle"] > 0, found["ledger"]["points"]) == (True, found["points"])
    assert set(found["ledger"]["types_dropped"]) <= {"Pedestrian", "Cyclist", "Sign"}
    mapped = ("--classes", "Car", "--class-map", "VEHICLE", "car", "--splits", "train")
    assert prepare(capsys, "waymo", written, tmp_path / "mapped", *mapped)[0] == 0
    assert boxes(tmp_path / "mapped") == found["ledger"]["boxes"]["vehicle"]
    code, said = prepare(capsys, "waymo", written, tmp_path / "none", "--classes", "Vehicel")
    assert (code, "Vehicel" in said) == (2, True)


def test_case_does_not_matter_for_lyft_and_absent_classes_are_told_before_a_sweep_is_read(tmp_path, capsys):
    root = tmp_path / "lyft"
    write_lyft_layout(root, SMALL_LYFT, num_frames=4, seed=3, workers=1)
    report = tmp_path / "report.json"
    code, said = prepare(capsys, "lyft", root, tmp_path / "out", "--classes", "car", "--json", str(report))
    assert code == 0, said
    ledger = json.loads(report.read_text())["ledger"]
    assert ledger["boxes"]["car"] > 0
    for path in (root / "lidar").iterdir():
        path.unlink()
    code, said = prepare(capsys, "lyft", root, tmp_path / "none", "--classes", "Animal")
    assert (code, "leads to Animal" in said) == (2, True)


def test_sizes_swapped_in_a_layout_without_an_option_for_it_are_told_in_other_words(tmp_path, capsys):
    raw = tiny_layouts.kitti(
        tmp_path / "raw", label=lambda i: "".join(kitti_line(b[[0, 1, 2, 4, 3, 5, 6]]) for b in tiny_layouts.BOXES)
    )
    code, said = prepare(capsys, "kitti", raw, tmp_path / "out", "--classes", "Car")
    assert (code, "length and width are perhaps swapped in these labels" in said) == (0, True)
    assert "no option swaps them" in said
    assert "--size-order" not in said


def test_two_letters_that_changed_places_look_like_the_class(tmp_path, capsys):
    lines = [tiny_layouts.kitti_line(box) for box in tiny_layouts.BOXES]
    raw = tiny_layouts.kitti(tmp_path / "raw", label=lambda i: lines[0] + lines[1] + lines[2].replace("Car", "Cra"))
    code, said = prepare(capsys, "kitti", raw, tmp_path / "out", "--classes", "Car")
    assert (code, "4 objects of the type Cra are dropped, which looks like the class Car" in said) == (0, True)


def test_pictures_of_another_camera_than_the_calibrations_are_warned_about(tmp_path, capsys):
    raw = tiny_layouts.kitti(tmp_path / "raw", picture=(".png", tiny_layouts.png(1920, 1200)))
    code, said = prepare(capsys, "kitti", raw, tmp_path / "out", "--classes", "Car")
    assert (code, "in 4 of 4 scans, the principal point of the camera (row P2) lies far from the center" in said) == (0, True)
    usual = tiny_layouts.kitti(tmp_path / "usual", picture=(".png", tiny_layouts.png(1242, 375)))
    assert "principal point" not in prepare(capsys, "kitti", usual, tmp_path / "good", "--classes", "Car")[1]


def test_the_help_says_what_the_options_of_prepare_do_without_a_detector(capsys):
    with pytest.raises(SystemExit):
        run_command(prepare_tool.command, ["kitti", "--help"])
    said = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "By default 0 where a dataset is prepared" in said
    assert "stays, with 0 boxes and a warning" in said
    assert "as far as they occur" not in said


# ---- a split that nobody labeled


def test_scoring_an_unlabeled_split_names_the_splits_with_labels_and_hides_no_label(tmp_path, capsys):
    splits = {"train": tiny_layouts.IDS[:2], "val": tiny_layouts.IDS[2:3], "fleet": tiny_layouts.IDS[3:]}
    raw = tiny_layouts.kitti(tmp_path / "raw", splits=splits)
    assert prepare(capsys, "kitti", raw, tmp_path / "out", "--classes", "Car", "--unlabeled", "fleet")[0] == 0
    fleet = PreparedDataset(tmp_path / "out", "fleet")
    with pytest.raises(InvalidInput, match=r"the split fleet of .* has no labels; choose another split: train, val"):
        fleet.check_labeled()
    with pytest.raises(InvalidInput, match="has no labels to score against; choose a labeled split"):
        fleet.kitti_objects(fleet.ids[0])
    for protocol in (None, "cross_dataset"):
        with pytest.raises(InvalidInput, match=r"the split fleet of .* has no labels"):
            score_detector(None, fleet, protocol)  # type: ignore[arg-type]  # it is refused before the detector is touched
    PreparedDataset(tmp_path / "out", "val").check_labeled()
    assert "--unlabeled fleet" in PreparedDataset(tmp_path / "out", "val")._kitti_command()
