"""`import openpcdet`: a checkpoint becomes a run folder, nothing in it is executed, and what the user must know is said."""

import json
import pathlib
import subprocess
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from upcycle3d.perception.models import openpcdet_file
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.openpcdet import openpcdet_state
from upcycle3d.perception.models.openpcdet_file import read_openpcdet
from upcycle3d.perception.recipes.architectures import SMALL_PV_RCNN_DETECTOR, SMALL_SECOND_IOU_DETECTOR
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.perception.wire.encoder_file import load_encoder
from upcycle3d.tools import import_weights
from upcycle3d.tools.console import run_command


def run(*arguments: object) -> int:
    return run_command(import_weights.command, ["openpcdet", *map(str, arguments)])


@pytest.fixture(scope="module")
def published() -> Detector:
    torch.manual_seed(5)
    return SMALL_SECOND_IOU_DETECTOR.build()


@pytest.fixture
def file(published: Detector, tmp_path: Path) -> Path:
    """A checkpoint with everything that OpenPCDet's train_utils.py writes."""
    optimizer = torch.optim.Adam(published.parameters())
    content = {"epoch": 80, "it": 7, "model_state": OrderedDict(openpcdet_state(published))}
    torch.save(content | {"optimizer_state": optimizer.state_dict(), "version": "pcdet+0.6.0"}, tmp_path / "second_iou.pth")
    return tmp_path / "second_iou.pth"


def test_a_checkpoint_becomes_a_detector_and_an_encoder_for_the_fleet(published, file, tmp_path, capsys):
    out, report = tmp_path / "run", tmp_path / "report.json"
    assert run(file, "small", "--out", out, "--json", report) == 0
    detector = load_detector(out)
    assert detector.config == SMALL_SECOND_IOU_DETECTOR
    for name, value in published.state_dict().items():
        assert torch.equal(detector.state_dict()[name], value), name
    for name, value in load_encoder(out / "encoder.safetensors").state_dict().items():
        assert torch.equal(published.encoder.state_dict()[name], value), name
    found = json.loads(report.read_text())
    assert sum(p["tensors"] for p in found["parts"]) == len(published.state_dict())
    assert sum(p["parameters"] for p in found["parts"]) == sum(p.numel() for p in published.parameters())
    assert json.loads((out / "config.json").read_text())["sha256"] == found["file_sha256"]
    printed = capsys.readouterr().out
    assert f"next: upcycle3d evaluate run --detector {out} --data DIR:val" in printed
    assert "they are the preset's (Car, in this order)" in " ".join(printed.split())
    assert "warning" not in printed
    assert "spconv 1" not in printed


def test_the_program_has_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "upcycle3d.tools.main", "import", "openpcdet", "/nowhere.pth", "small", "--out", "/nowhere"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert "error: there is no file /nowhere.pth" in done.stderr


def test_a_state_dict_alone_and_safetensors_are_read_too(published, tmp_path):
    state = openpcdet_state(published)
    torch.save(state, tmp_path / "alone.pth")
    torch.save(state, tmp_path / "old.pth", _use_new_zipfile_serialization=False)  # before torch 1.6
    save_file(state, tmp_path / "plain.safetensors")
    for name in ("alone.pth", "old.pth", "plain.safetensors"):
        read = read_openpcdet(tmp_path / name)
        assert read.keys() == state.keys()
        assert all(torch.equal(read[n], t) for n, t in state.items())


def test_importing_again_changes_nothing_and_another_run_is_not_overwritten(published, file, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(file, "small", "--out", out) == 0
    assert run(file, "small", "--out", out) == 0
    again = load_detector(out).state_dict()
    assert all(torch.equal(again[n], t) for n, t in published.state_dict().items())
    before = (out / "detector.safetensors").read_bytes()
    state = openpcdet_state(published)
    torch.save({n: t + 1 for n, t in state.items()}, tmp_path / "other.pth")
    assert run(tmp_path / "other.pth", "small", "--out", out) == 2
    assert "holds a run with another configuration" in capsys.readouterr().err
    assert (out / "detector.safetensors").read_bytes() == before


def test_weights_of_spconv_1_are_announced(published, tmp_path, capsys):
    state = {n: t.permute(1, 2, 3, 4, 0).contiguous() if t.dim() == 5 else t for n, t in openpcdet_state(published).items()}
    torch.save({"model_state": state}, tmp_path / "old.pth")
    assert run(tmp_path / "old.pth", "small", "--out", tmp_path / "run") == 0
    assert "saved by spconv 1" in capsys.readouterr().out
    detector = load_detector(tmp_path / "run")
    assert all(torch.equal(detector.state_dict()[n], t) for n, t in published.state_dict().items())


def test_second_needs_the_flag_and_says_that_scores_mean_nothing_yet(published, tmp_path, capsys):
    state = {n: t for n, t in openpcdet_state(published).items() if not n.startswith("roi_head.")}
    torch.save({"model_state": state}, tmp_path / "second.pth")
    assert run(tmp_path / "second.pth", "small", "--out", tmp_path / "run") == 2
    assert "With --without-iou-head everything else is imported" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert run(tmp_path / "second.pth", "small", "--out", tmp_path / "run", "--without-iou-head") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "not in the file: untrained" in printed
    assert "warning: the IoU head is UNTRAINED" in printed
    assert "--method source_continued --detector" in printed
    detector = load_detector(tmp_path / "run")
    assert torch.equal(detector.decoder.anchor_head.conv_box.weight, published.decoder.anchor_head.conv_box.weight)


def test_pv_rcnn_says_where_its_keypoints_lie_and_can_have_the_references(tmp_path, capsys):
    torch.save({"model_state": openpcdet_state(SMALL_PV_RCNN_DETECTOR.build())}, tmp_path / "pv_rcnn.pth")
    assert run(tmp_path / "pv_rcnn.pth", "small_pv_rcnn", "--out", tmp_path / "ours") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "AP may differ" in printed
    assert "--preset.detector.encoder.keypoint-source raw_points" in printed
    option = ("--preset.detector.encoder.keypoint-source", "raw_points")
    assert run(tmp_path / "pv_rcnn.pth", "small_pv_rcnn", "--out", tmp_path / "reference", *option) == 0
    assert "AP may differ" not in capsys.readouterr().out
    assert load_detector(tmp_path / "ours").config == SMALL_PV_RCNN_DETECTOR
    assert load_detector(tmp_path / "reference").spec.keypoints.source == "raw_points"


def test_weights_that_do_not_fit_the_preset_leave_no_folder(file, tmp_path, capsys):
    assert run(file, "kitti_small_pv_rcnn", "--out", tmp_path / "run") == 2
    assert "choose a preset of the detector that was trained" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


class Touch:
    """A pickle that makes a file when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[Path, ...]]:
        return pathlib.Path.touch, (self.path,)


def test_a_file_that_needs_pickle_is_refused_unread_and_the_way_to_convert_it_works(published, tmp_path, capsys):
    trace = tmp_path / "executed"
    for name, value in (("hostile.pth", Touch(trace)), ("scalar.pth", np.float64(0.1))):
        torch.save({"model_state": openpcdet_state(published), "optimizer_state": value}, tmp_path / name)
        assert run(tmp_path / name, "small", "--out", tmp_path / "run") == 2
        message = capsys.readouterr().err
        assert "a pickle may run any code" in message
        assert not trace.exists()
    code = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert len(code) == 3
    snippet = "\n".join(code).replace("map_location='cpu'", "map_location='cpu', weights_only=False")
    exec(snippet.replace("'plain.pth'", repr(str(tmp_path / "plain.pth"))), {})
    assert run(tmp_path / "plain.pth", "small", "--out", tmp_path / "run") == 0


@pytest.mark.parametrize("keep", [0, 40, 5000])
def test_a_damaged_file_is_refused(file, tmp_path, capsys, keep):
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:keep])
    assert run(tmp_path / "cut.pth", "small", "--out", tmp_path / "run") == 2
    assert "cut.pth is damaged" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"state_dict": {}, "epoch": 3}, "has no model_state and is not a state dict: state_dict, epoch"),
        ({"model_state": {"a": 3}}, "a are not tensors"),
        ({"model_state": {}}, "holds no named weights"),
        ([torch.zeros(1)], "holds no named weights but a list"),
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, capsys, content, message):
    torch.save(content, tmp_path / "x.pth")
    assert run(tmp_path / "x.pth", "small", "--out", tmp_path / "run") == 2
    assert message in capsys.readouterr().err


def test_size_is_judged_before_reading_also_of_what_a_zip_unpacks_to(file, tmp_path, capsys, monkeypatch):
    limit = 2_000_000
    monkeypatch.setattr(openpcdet_file, "LARGEST_FILE", limit)
    with zipfile.ZipFile(tmp_path / "bomb.pth", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(limit + 1))
    assert (tmp_path / "bomb.pth").stat().st_size < 10_000
    for path in (tmp_path / "bomb.pth", file):
        assert run(path, "small", "--out", tmp_path / "run") == 2
        assert "more than the 2,000,000 that are read" in capsys.readouterr().err
