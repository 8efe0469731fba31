"""``prepare`` and ``simulate``: what their options do to the data, and which mistakes they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.tools import prepare, simulate
from upcycle3d.tools.console import run_command
from upcycle3d.tools.simulate import split_sizes


def run(module, *arguments: object) -> int:
    return run_command(module.command, [str(a) for a in arguments])


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two scans with five values a row, intensity in bytes and a missing return; labels of two classes."""
    root = tmp_path / "mine"
    (root / "points").mkdir(parents=True)
    (root / "labels").mkdir()
    for name in ("a", "b"):
        rows = np.array([[10, 2, -1 + 0.1 * i, 0, 255] for i in range(9)] + [[np.nan, 0, 0, 0, 0]], np.float32)
        (root / "points" / f"{name}.bin").write_bytes(rows.tobytes())
        (root / "labels" / f"{name}.txt").write_text("Car 10 2 -0.5 4 2 3 0\nTree 3 3 0 1 1 1 0\n")
    return root


OPTIONS = ("--columns", "x", "y", "z", "_", "intensity", "--intensity-scale", 1 / 255, "--drop-non-finite", "--workers", 1)
OPTIONS += ("--other-classes", "Tree")


def test_a_folder_without_splits_is_prepared_whole_with_its_gt_database(folder, tmp_path, recwarn):
    report, data = tmp_path / "report.json", tmp_path / "data"
    assert run(prepare, "folder", folder, "--out", data, *OPTIONS, "--json", report) == 0
    found = json.loads(report.read_text())
    assert (found["splits"], found["gt_objects"], found["failures"], found["points"]) == ({"all": 2}, {"all": 2}, [], 18)
    assert [w for w in recwarn if "intensity" in str(w.message)] == []


@pytest.mark.parametrize("other", [("--intensity-scale", 1), ("--other-classes", "Tree", "Sign")])
def test_a_second_start_with_other_options_is_refused(folder, tmp_path, capsys, other):
    assert run(prepare, "folder", folder, "--out", tmp_path / "data", *OPTIONS) == 0
    assert run(prepare, "folder", folder, "--out", tmp_path / "data", *OPTIONS) == 0
    assert run(prepare, "folder", folder, "--out", tmp_path / "data", *OPTIONS, *other) == 2
    assert "begun with other settings" in capsys.readouterr().err


def test_a_mistyped_labeled_split_is_refused_before_anything_is_read(folder, tmp_path, capsys):
    (folder / "splits").mkdir()
    (folder / "splits" / "train.txt").write_text("a\n")
    (folder / "splits" / "val.txt").write_text("b\n")
    data, report = tmp_path / "data", tmp_path / "report.json"
    assert run(prepare, "folder", folder, "--out", data, *OPTIONS, "--labeled", "trian") == 2
    assert "among train, val; did you mean 'train'?" in capsys.readouterr().err
    assert not data.exists()
    assert run(prepare, "folder", folder, "--out", data, *OPTIONS, "--json", report) == 0
    assert json.loads(report.read_text())["gt_objects"] == {"train": 1}


def test_a_kitti_layout_cropped_otherwise_is_another_preparation(tmp_path, capsys):
    raw, data = tmp_path / "raw", tmp_path / "data"
    assert run(simulate, "--domain", "waymo", "--out", raw, "--frames", 2, "--splits", "val", 1, "train", 0, "--workers", 1) == 0
    step = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: upcycle3d prepare "))
    arguments = [*step.removeprefix("next: upcycle3d prepare ").replace("PREPARED", str(data)).split(), "--workers", "1"]
    assert "--z-shift 2.15" in step
    assert run(prepare, *arguments) == 0
    assert run(prepare, *arguments, "--points", "velodyne_reduced") == 2
    assert run(prepare, *arguments, "--no-crop-to-camera") == 2


def test_one_split_takes_the_rest_wherever_it_stands():
    assert split_sizes((("train", 0),), 5) == {"train": 5}
    assert split_sizes((("train", 0), ("val", 2)), 5) == {"train": 3, "val": 2}
    assert split_sizes((("train", 1), ("fleet", 0), ("val", 2)), 5) == {"train": 1, "fleet": 2, "val": 2}
    assert split_sizes((("train", 1), ("val", 2)), 5) == {"train": 1, "val": 2}


@pytest.mark.parametrize(
    ("splits", "message"),
    [
        ((("train", 0), ("val", 0)), "only one size"),
        ((("train", 3), ("val", -1)), "no negative size"),
        ((("train", 1), ("train", 2)), "each name once"),
        ((("train", 4), ("val", 2)), "5 frames are not enough"),
        ((("train", 5), ("val", 0)), "5 frames are not enough"),
    ],
)
def test_splits_that_do_not_add_up_are_refused(splits, message):
    with pytest.raises(InvalidInput, match=message):
        split_sizes(splits, 5)
