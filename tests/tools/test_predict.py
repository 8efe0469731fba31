"""`predict` on what the world brings: it goes on over bad scans, counts what it writes and drops, and never ends in silence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.point_files import write_bin
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.structures import PointCloud
from upcycle3d.core.trained_on import TrainedOn
from upcycle3d.perception.training.detector_files import save_detector
from upcycle3d.tools.console import run_command
from upcycle3d.tools.predict import command

pytestmark = pytest.mark.usefixtures("one_thread")


def saved(path: Path, rig: RigSpec | None = None, *, camera_view: bool = False) -> Path:
    detector = tiny.second_iou().eval()
    if rig is not None:
        detector.trained_on = TrainedOn(
            rig=rig, feature_names=("intensity",), classes=("Car",), point_range=tiny.GRID.range, camera_view=camera_view
        )
    save_detector(path, detector)
    return path


@pytest.fixture
def detector(tmp_path) -> Path:
    return saved(tmp_path / "detector.safetensors", RigSpec())


@pytest.fixture
def scans(tmp_path) -> Path:
    folder = tmp_path / "scans"
    for seed in range(3):
        write_bin(folder / f"{seed}.bin", tiny.scan_with_car(seed))
    return folder


def predict(detector: Path, scans: Path, *options: object, scores: float = 0.0) -> int:
    words = ["--detector", detector, "--scans", scans, "--out", detector.parent / "out", "--json", detector.parent / "out.json"]
    return run_command(command, [str(w) for w in (*words, "--min-score", scores, *options)])


def result(detector: Path) -> dict:
    return json.loads((detector.parent / "out.json").read_text())


def points_with(scan: PointCloud, *, intensity: float = 0.0, z: float = 0.0) -> PointCloud:
    return replace(scan, xyz=scan.xyz + torch.tensor([0.0, 0.0, z]), features=torch.full((len(scan), 1), intensity))


def test_bad_scans_are_reported_and_the_others_go_on(detector, scans, capsys):
    (scans / "3.bin").write_bytes(b"")
    (scans / "4.bin").write_bytes(np.full((20, 4), np.nan, np.float32).tobytes())
    (scans / "5.pcd").write_bytes(b"\xff\xfe no header")
    np.save(scans / "6.npy", np.zeros((4, 2)))
    (scans / "8.bin").symlink_to(scans / "missing.bin")
    (scans / "._0.bin").write_bytes(b"Mac OS X")
    (scans / ".DS_Store").write_bytes(b"")
    (scans / "7.bin").mkdir()
    assert predict(detector, scans) == 0
    found = result(detector)
    assert list(found["boxes"]) == ["0.bin", "1.bin", "2.bin"]
    assert sorted(found["failed"]) == ["3.bin", "4.bin", "5.pcd", "6.npy", "8.bin"]
    assert found["ledger"]["scans"] == 3
    assert found["ledger"]["scans_failed"] == 5
    assert found["ledger"]["files_skipped"] == {"hidden file": 2, "folder": 1}
    assert sorted(p.name for p in (detector.parent / "out").iterdir()) == ["0.json", "1.json", "2.json"]
    printed = capsys.readouterr()
    assert "scans that failed: 5" in printed.out
    assert "5 of 8 scans failed and have no detections" in printed.err


def test_where_every_scan_fails_the_command_fails_and_says_why(detector, tmp_path, capsys):
    rows = np.concatenate([tiny.scan_with_car().xyz.numpy(), np.zeros((550, 2))], 1).astype(np.float32)
    (tmp_path / "scans").mkdir()
    (tmp_path / "scans" / "a.bin").write_bytes(rows[:548].tobytes())
    assert predict(detector, tmp_path / "scans") == 2
    assert "none of 1 scans could be used" in (error := capsys.readouterr().err)
    assert "looks like 5 values per point: give --columns x y z intensity _" in error
    assert list(result(detector)["failed"]) == ["a.bin"]
    assert predict(detector, tmp_path / "scans", "--columns", "x", "y", "z", "intensity", "_") == 0


def test_scans_in_another_unit_end_with_an_error_after_everything_is_written(detector, tmp_path, capsys):
    write_bin(tmp_path / "scans" / "a.bin", replace(tiny.scan_with_car(), xyz=tiny.scan_with_car().xyz * 300))
    assert predict(detector, tmp_path / "scans") == 2
    printed = capsys.readouterr()
    assert "no point lies in the detector's range" in printed.err
    assert "units that are not meters" in printed.err
    assert result(detector)["ledger"]["scans_without_points"] == 1
    assert json.loads((tmp_path / "out" / "a.json").read_text()) == []


def test_intensity_needs_one_option_whose_value_is_proposed(detector, tmp_path, capsys):
    for name, intensity in (("a", 255.0), ("b", 100.0)):
        write_bin(tmp_path / "scans" / f"{name}.bin", points_with(tiny.scan_with_car(), intensity=intensity))
    assert predict(detector, tmp_path / "scans") == 2
    assert "give --intensity-scale 1/255" in capsys.readouterr().err
    for scale in ("1/255", "0.0039216", "0.00392"):
        assert predict(detector, tmp_path / "scans", "--intensity-scale", scale) == 0
        assert len(result(detector)["boxes"]) == 2


def test_the_rig_of_training_is_the_default_and_another_one_is_said(tmp_path, capsys):
    lifted = saved(tmp_path / "detector.safetensors", RigSpec(z_shift=1.7))
    write_bin(tmp_path / "scans" / "a.bin", points_with(tiny.scan_with_car(), z=-1.7))
    assert predict(lifted, tmp_path / "scans") == 0
    assert capsys.readouterr().err == ""
    low = (tmp_path / "out" / "a.json").read_text()
    assert predict(lifted, tmp_path / "scans", "--z-shift", 1.7) == 0
    assert (tmp_path / "out" / "a.json").read_text() == low
    capsys.readouterr()
    assert predict(lifted, tmp_path / "scans", "--z-shift", 1.6) == 0
    assert "z_shift 1.7" in capsys.readouterr().err
    assert predict(lifted, tmp_path / "scans", "--rig.z-shift", 1.6) == 2
    assert "no option --rig.z-shift any more; write --z-shift" in capsys.readouterr().err


def calibration(folder: Path, names: str, center: tuple[float, float] = (621.0, 187.5), turned: int = 1) -> Path:
    folder.mkdir(exist_ok=True)
    camera = f"P2: 700 0 {center[0]} 0 0 700 {center[1]} 0 0 0 1 0\nR0_rect: 1 0 0 0 1 0 0 0 1\n"
    for name in names:
        text = f"{camera}Tr_velo_to_cam: 0 {-turned} 0 0 0 0 -1 0 {turned} 0 0 0\n"
        (folder / f"{name}.txt").write_text(text)
    return folder


def test_kittis_format_counts_the_boxes_that_are_written(detector, scans, capsys):
    calib = calibration(detector.parent / "calib", "012")
    assert predict(detector, scans) == 0
    every = result(detector)["boxes"]
    assert predict(detector, scans, "--format", "kitti", "--calib", calib, "--image-size", 500, 375) == 0
    found = result(detector)
    for name, number in found["boxes"].items():
        lines = (detector.parent / "out" / name.replace(".bin", ".txt")).read_text().splitlines()
        assert len(lines) == number
        assert number + found["boxes_outside_picture"][name] == every[name]
    outside = sum(found["boxes_outside_picture"].values())
    assert 0 < outside < sum(every.values())
    assert f"{outside} of {sum(every.values())} boxes lie outside the picture" in capsys.readouterr().err
    assert predict(detector, scans, "--format", "kitti", "--calib", calib, "--image-size", 20, 20) == 0
    assert sum(result(detector)["boxes_outside_picture"].values()) > outside


def test_a_missing_calibration_is_the_fault_of_one_scan_and_an_unknown_picture_size_is_asked_for(detector, scans, capsys):
    calib = calibration(detector.parent / "calib", "01")
    assert predict(detector, scans, "--format", "kitti", "--calib", calib) == 0
    assert list(result(detector)["failed"]) == ["2.bin"]
    calibration(calib, "012", center=(960.0, 600.0))
    assert predict(detector, scans, "--format", "kitti", "--calib", calib) == 2
    assert "--image-size" in capsys.readouterr().err
    assert predict(detector, scans, "--format", "kitti", "--calib", calib, "--image-size", 1936, 1216) == 0


def test_a_detector_of_camera_views_sees_only_what_the_camera_sees(tmp_path, scans, capsys):
    camera = saved(tmp_path / "detector.safetensors", RigSpec(), camera_view=True)
    calib = calibration(tmp_path / "calib", "012")
    assert predict(camera, scans, "--calib", calib) == 0
    assert result(camera)["ledger"]["points_outside_camera"] > 0
    assert predict(camera, scans, "--calib", calib, "--image-size", 1, 1) == 2
    assert "the picture's size (--image-size)" in capsys.readouterr().err


def test_impossible_options_are_refused_before_anything_is_read(detector, scans, capsys):
    for options, words in (
        (("--min-score", "nan"), "--min-score must be in 0..1"),
        (("--format", "kitti"), "needs --calib"),
        (("--calib", scans / "nowhere"), "there is no folder"),
        (("--columns", "x", "y"), "x, y and z"),
        (("--axes", "x", "x", "z"), "axes must name x, y and z once each"),
        (("--image-size", "0", "5"), "the image size must be two numbers"),
        (("--intensity-scale", "-1"), "intensity scale must be a positive number"),
    ):
        assert predict(detector, scans, *options) == 2, words
        assert words in " ".join(capsys.readouterr().err.split())


def test_a_full_turn_for_a_detector_of_the_cameras_view_is_named_first_and_other_axes_too(tmp_path, capsys):
    detector = saved(tmp_path / "detector.safetensors", RigSpec(), camera_view=True)
    ahead = tiny.scan_with_car()
    write_bin(tmp_path / "ahead" / "a.bin", ahead)
    assert predict(detector, tmp_path / "ahead") == 0
    assert "warning" not in capsys.readouterr().err
    (tmp_path / "out" / "a.json").unlink()
    behind = replace(ahead, xyz=torch.cat([ahead.xyz, -ahead.xyz]), features=torch.zeros(2 * len(ahead), 1))
    write_bin(tmp_path / "turn" / "a.bin", behind)
    assert predict(detector, tmp_path / "turn") == 0
    first = capsys.readouterr().err.replace("\n", " ")
    assert first.startswith("warning: the detector was trained on what a camera ahead sees, and a.bin reaches behind the sensor")
    assert "--calib" in first.split("warning:")[1]


def test_axes_of_the_training_that_are_not_given_again_are_warned_of(tmp_path, scans, capsys):
    known = tiny.second_iou().eval()
    known.trained_on = TrainedOn(
        rig=RigSpec(), feature_names=("intensity",), classes=("Car",), point_range=tiny.GRID.range, axes=("y", "-x", "z")
    )
    save_detector(tmp_path / "turned.safetensors", known)
    assert predict(tmp_path / "turned.safetensors", scans) == 0
    assert "boxes and features are turned: give --axes y -x z" in capsys.readouterr().err.replace("\n", " ")
    assert predict(tmp_path / "turned.safetensors", scans, "--axes", "y", "-x", "z") == 0
    assert "are turned" not in capsys.readouterr().err.replace("\n", " ")


def test_an_image_size_without_a_calibration_is_refused_because_nothing_is_cropped(detector, scans, capsys):
    assert predict(detector, scans, "--image-size", 1920, 1080) == 2
    assert "give --calib FOLDER too" in " ".join(capsys.readouterr().err.split())


def test_files_of_an_earlier_run_are_counted_before_they_are_replaced(detector, scans, capsys):
    assert predict(detector, scans) == 0
    assert capsys.readouterr().err == "", "an empty folder needs no warning"
    out = detector.parent / "out"
    (out / "old.json").write_text("[]")
    (out / "picture.png").write_bytes(b"")
    (scans / "2.bin").write_bytes(b"")
    assert predict(detector, scans) == 0, "predict may be run twice into one folder"
    error = " ".join(capsys.readouterr().err.split())
    assert "held 4 .json files before this run; number replaced because a scan has the same name: 3, number that stay: 1" in error
    assert "the files of an earlier run with the names of scans that failed now were removed: 1" in error
    assert result(detector)["warnings"][0].startswith(f"{out} held 4 .json files")
    assert (out / "old.json").read_text() == "[]"


def test_two_scans_of_one_name_are_refused_before_anything_is_written(detector, scans, capsys):
    write_bin(scans.parent / "other" / "1.bin", tiny.scan_with_car(7))
    assert predict(detector, scans, "--scans", scans, scans.parent / "other") == 2
    assert "are both called '1'" in " ".join(capsys.readouterr().err.split())
    assert not (detector.parent / "out").exists()
