"""`view` on scans with detections, on stores, and beside an upcycling run: what is drawn, and which options do not fit together."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny
from upcycle3d.core.point_files import write_bin
from upcycle3d.perception.recipes.training_view import TrainingView
from upcycle3d.perception.recipes.upcycling_job import upcycle_preset
from upcycle3d.perception.training.detector_files import save_detector, save_run_detector
from upcycle3d.perception.viewers import open3d_view
from upcycle3d.tools import view
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")
BOX = {"class": "Car", "score": 0.5, "x": 6.3, "y": 1.1, "z": 0.8, "dx": 4.2, "dy": 1.9, "dz": 1.6, "yaw": 0.4}


def run(*words: object, code: int = 0) -> None:
    assert run_command(view.command, [str(word) for word in words]) == code


def page(path: Path) -> Any:
    text = path.read_text().partition('<script type="application/json" id="frames">')[2].partition("</script>")[0]
    return json.loads(text)


@pytest.fixture
def scans(tmp_path: Path) -> Path:
    """Two scans and the detections of the first."""
    for number, name in enumerate(("one", "two")):
        write_bin(tmp_path / "scans" / f"{name}.bin", tiny.scan_with_car(number))
    (tmp_path / "boxes").mkdir()
    (tmp_path / "boxes" / "one.json").write_text(json.dumps([BOX, BOX | {"score": 0.1}]))
    return tmp_path


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, one_thread: None) -> Path:
    """A source model, a store of two scenes, and a run of `upcycle` of two steps."""
    folder = tmp_path_factory.mktemp("fleet")
    detector = tiny.source_model().eval()
    save_run_detector(folder / "source", detector)
    tiny.store(folder, detector, [tiny.scan_with_car(seed) for seed in (0, 1)])
    data = tiny.prepared(folder / "data")
    preset = tiny.preset(steps=2)
    upcycle_preset(
        preset,
        data,
        folder / "source",
        folder / "run",
        store=folder / "store",
        steps=2,
        progress=False,
        on_start=lambda start: None,
    )
    return folder


def test_a_scan_is_drawn_with_the_detections_of_predict(scans, capsys):
    run(
        "--scans",
        scans / "scans/one.bin",
        "--detections",
        scans / "boxes/one.json",
        "--html",
        scans / "a.html",
        "--out",
        scans / "pictures",
    )
    (frame,) = page(scans / "a.html")["frames"]
    assert (frame["id"], frame["points"]["count"]) == ("one", 550)
    (layer,) = frame["layers"]
    assert (layer["name"], layer["classes"], layer["scores"]) == ("detections", ["Car"], [0.5])  # the other one has a low score
    assert (scans / "pictures/one.png").is_file()
    run("--scans", scans / "scans", "--detections", scans / "boxes", "--html", scans / "a.html", "--min-score", 0)
    first, second = page(scans / "a.html")["frames"]
    assert ([len(layer["boxes"]) for layer in first["layers"]], second["layers"]) == ([2], [])
    assert "1 of 2 scans have no file of detections" in " ".join(capsys.readouterr().err.split())


def test_every_writer_writes_what_json_lists(scans):
    words = ["--ply", scans / "ply", "--gltf", scans / "a.glb", "--html", scans / "a.html", "--json", scans / "a.json"]
    run("--scans", scans / "scans", *words)
    value = json.loads((scans / "a.json").read_text())
    assert [each["what"] for each in value["files"]] == ["page", "PLY", "glTF"]
    assert all(Path(each["file"]).exists() for each in value["files"])
    assert sorted(path.name for path in (scans / "ply").iterdir()) == ["one.points.ply", "two.points.ply"]
    assert value["ledger"]["points"] == 1100


def test_frames_beyond_the_limit_are_counted(scans, capsys):
    words = ["--scans", scans / "scans", "--html", scans / "a.html", "--json", scans / "a.json"]
    run(*words)
    assert "frames are drawn" not in capsys.readouterr().out
    run(*words, "--limit", 1)
    assert "1 of 2 frames are drawn, the first ones; --limit N draws more" in capsys.readouterr().out
    assert json.loads((scans / "a.json").read_text())["frames_found"] == 2


def test_one_point_far_away_which_makes_the_page_coarse_is_warned_of(scans, capsys):
    words = ["--scans", scans / "scans/one.bin", "--html", scans / "a.html", "--json", scans / "a.json"]
    run(*words)
    assert "the page rounds coordinates" not in capsys.readouterr().err
    rows = np.fromfile(scans / "scans/one.bin", np.float32).reshape(-1, 4)
    rows[5, 0] = 1e6
    rows.tofile(scans / "scans/one.bin")
    run(*words)
    assert "the page rounds coordinates by up to 7.63 m, because points of a frame lie 1e+06 m apart" in " ".join(
        capsys.readouterr().err.split()
    )
    assert len(json.loads((scans / "a.json").read_text())["warnings"]) == 1


def test_a_viewer_that_fails_leaves_the_other_files(scans, monkeypatch, capsys):
    monkeypatch.setattr(open3d_view.importlib.util, "find_spec", lambda name: None)
    run("--scans", scans / "scans/one.bin", "--html", scans / "a.html", "--open3d-picture", scans / "a.png", code=2)
    assert (scans / "a.html").is_file()
    assert "Open3D, which is not installed" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "view draws one kind of data: give one of --data"),
        (("--scans", "s", "--store", "t", "--html", "a"), "found 2 of them"),
        (("--scans", "s"), "say where to draw: --out, --html"),
        (("--scans", "s", "--html", "a", "--detector", "d"), "run `upcycle3d predict` first"),
        (("--store", "s", "--html", "a", "--detections", "d"), "--detections belongs to --scans"),
        (("--store", "s", "--html", "a", "--z-shift", "1.7"), "belong to --scans"),
        (("--scans", "s", "--html", "a", "--html-points", "0"), "--html-points must be at least 1"),
        (("--scans", "s", "--html", "."), "--html takes the name of a file"),
        (("--scans", "s", "--ply", __file__), "--ply takes the name of a folder"),
        (("--scans", "s", "--out", __file__), "--out takes the name of a folder"),
        (("--scans", "s", "--html", "a"), "there is no file or folder s"),
        (("--store", "s", "--html", "a"), "holds no catalogue.parquet"),
        (("--store", "s", "--html", "a", "--teacher", "t"), "is not a run folder"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, monkeypatch, capsys, words, message):
    monkeypatch.chdir(tmp_path)
    run(*words, code=2)
    assert message in " ".join(capsys.readouterr().err.split())
    assert list(tmp_path.iterdir()) == []


def test_detections_that_belong_to_no_scan_are_refused(scans, capsys):
    (scans / "boxes/one.json").rename(scans / "boxes/three.json")
    run("--scans", scans / "scans", "--detections", scans / "boxes", "--html", scans / "a.html", code=2)
    assert "holds no detections for one.bin" in " ".join(capsys.readouterr().err.split())
    run("--scans", scans / "scans", "--detections", scans / "boxes/three.json", "--html", scans / "a.html", code=2)
    assert "2 scans need a folder of detections" in " ".join(capsys.readouterr().err.split())


def test_smashed_scenes_are_drawn_as_cells_with_what_the_run_makes_of_them(fleet, tmp_path, capsys):
    words = ["--detector", fleet / "source", "--teacher", fleet / "run", "--min-score", 0, "--out", tmp_path / "pictures"]
    run("--store", fleet / "store", *words, "--html", tmp_path / "a.html")
    frames = page(tmp_path / "a.html")["frames"]
    assert [frame["id"][:7] for frame in frames] == ["000000_", "000001_"]
    assert all(frame["points"] is None and frame["cells"]["count"] > 0 for frame in frames)
    assert [layer["name"] for layer in frames[0]["layers"]] == ["detections", "teacher", "pasted"]
    assert all(layer["classes"] == ["Car"] * len(layer["boxes"]) for frame in frames for layer in frame["layers"])
    assert len(list((tmp_path / "pictures").glob("*.png"))) == 2
    assert "was made by another encoder" not in " ".join(capsys.readouterr().err.split())


def test_a_store_of_another_encoder_is_warned_of(fleet, tmp_path, capsys):
    other = tiny.source_model()
    with torch.no_grad():
        next(other.encoder.parameters()).mul_(1.5)
    save_detector(tmp_path / "other.safetensors", other)
    run("--store", fleet / "store", "--detector", tmp_path / "other.safetensors", "--html", tmp_path / "a.html")
    assert "was made by another encoder, or on another kind of rig, than the one that --detector" in " ".join(
        capsys.readouterr().err.split()
    )


def test_frames_of_a_dataset_get_features_and_what_the_run_makes_of_them(fleet, tmp_path):
    run("--data", f"{fleet / 'data'}:val", "--teacher", fleet / "run", "--html", tmp_path / "a.html")
    for frame in page(tmp_path / "a.html")["frames"]:
        assert (frame["points"]["count"], frame["cells"]["count"] > 0) == (250, True)
        assert [layer["name"] for layer in frame["layers"]] == ["truth", "teacher", "pasted"]


def test_the_view_of_a_run_pastes_objects_where_their_cells_are(fleet):
    """Unsure teachers label nothing, so there is room; the pasted boxes are objects of the labeled frames, and their cells are in the scene."""
    seen = TrainingView.open(fleet / "run")
    seen = replace(seen, config=replace(seen.config, thresholds=tiny.NOTHING))
    detector = tiny.source_model().eval()
    features = detector.upload([tiny.cloud(torch.rand(40, 3) * torch.tensor([1.0, 1.0, 0.05]) + torch.tensor([11.0, -6.0, 0.0]))])
    scene = seen.look(features)
    assert len(scene.teacher) == 0
    assert 1 <= len(scene.pasted) <= 2
    assert seen.objects is not None
    known = seen.objects.boxes
    assert all(bool((known == box).all(1).any()) for box in scene.pasted.boxes.data)
    assert scene.features.voxels.features.shape[0] > features.voxels.features.shape[0]
    again = seen.look(features)
    assert torch.equal(again.pasted.boxes.data, scene.pasted.boxes.data)  # the same scene is drawn the same way
    assert torch.equal(again.features.voxels.features, scene.features.voxels.features)


def test_a_run_of_train_has_no_teacher(fleet, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.json").write_text(json.dumps({"preset": {}}))
    run("--store", fleet / "store", "--teacher", tmp_path / "run", "--html", tmp_path / "a.html", code=2)
    assert "is a run of `train`, which has no teacher" in " ".join(capsys.readouterr().err.split())


def test_points_that_are_not_finite_are_counted_not_drawn(tmp_path, capsys):
    rows = np.array([[1.0, 2, 0, 0.5], [3.0, 1, 0, 0.5], [np.nan, 0, 0, 0]], np.float32)
    (tmp_path / "a.bin").write_bytes(rows.tobytes())
    run("--scans", tmp_path / "a.bin", "--html", tmp_path / "a.html", code=2)
    assert "--drop-non-finite" in capsys.readouterr().err
    run("--scans", tmp_path / "a.bin", "--html", tmp_path / "a.html", "--drop-non-finite", "--json", tmp_path / "a.json")
    assert page(tmp_path / "a.html")["frames"][0]["points"]["count"] == 2
    assert json.loads((tmp_path / "a.json").read_text())["ledger"]["points_non_finite"] == 1
