"""`import openpcdet`: a checkpoint becomes a run folder, nothing in it is executed, and what the user must know is said."""

import json
import pathlib
import pickle
import subprocess
import sys
import zipfile
from collections import OrderedDict
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from upcycle3d.core.rig import RigSpec
from upcycle3d.perception.models import openpcdet_file
from upcycle3d.perception.models.detector import Detector
from upcycle3d.perception.models.openpcdet import openpcdet_state
from upcycle3d.perception.models.openpcdet_file import read_openpcdet
from upcycle3d.perception.recipes.architectures import (
    KITTI_PV_RCNN_PUBLISHED_DETECTOR,
    SMALL_PV_RCNN_PUBLISHED_DETECTOR,
    SMALL_SECOND_IOU_DETECTOR,
)
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


def test_the_rig_that_a_user_declares_goes_into_the_files(file, tmp_path, capsys):
    assert run(file, "small", "--out", tmp_path / "run", "--z-shift", 1.73, "--intensity-scale", "1/255") == 0
    for known in (load_detector(tmp_path / "run").trained_on, load_encoder(tmp_path / "run").trained_on):
        assert known is not None
        assert (known.rig, known.classes, known.scans) == (RigSpec(z_shift=1.73, intensity_scale=1 / 255), ("Car",), None)
    assert "declare them with --z-shift" not in " ".join(capsys.readouterr().out.split())
    assert run(file, "small", "--out", tmp_path / "other") == 0
    assert "declare them with --z-shift" in " ".join(capsys.readouterr().out.split())
    assert load_detector(tmp_path / "other").trained_on is None


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
    torch.save({"model_state": openpcdet_state(KITTI_PV_RCNN_PUBLISHED_DETECTOR.build())}, tmp_path / "pv_rcnn.pth")
    assert run(tmp_path / "pv_rcnn.pth", "kitti_pv_rcnn_published", "--out", tmp_path / "ours") == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "AP may differ" in printed
    assert "--preset.detector.encoder.keypoint-source raw_points" in printed
    option = ("--preset.detector.encoder.keypoint-source", "raw_points")
    assert run(tmp_path / "pv_rcnn.pth", "kitti_pv_rcnn_published", "--out", tmp_path / "reference", *option) == 0
    assert "AP may differ" not in capsys.readouterr().out
    assert load_detector(tmp_path / "ours").config == KITTI_PV_RCNN_PUBLISHED_DETECTOR
    assert load_detector(tmp_path / "reference").spec.keypoints.source == "raw_points"


def test_pv_rcnn_as_published_given_to_a_preset_with_coarse_keypoints_names_the_right_preset(tmp_path, capsys):
    torch.save({"model_state": openpcdet_state(SMALL_PV_RCNN_PUBLISHED_DETECTOR.build())}, tmp_path / "pv_rcnn.pth")
    assert run(tmp_path / "pv_rcnn.pth", "kitti_pv_rcnn", "--out", tmp_path / "run") == 2
    assert "kitti_pv_rcnn_published" in capsys.readouterr().err


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


@pytest.mark.parametrize("protocol", [0, 4])
def test_a_plain_pickle_is_refused_without_the_words_of_torch(tmp_path, capsys, protocol):
    trace = tmp_path / "executed"
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"model_state": Touch(trace)}, protocol=protocol))
    assert run(tmp_path / "plain.pth", "small", "--out", tmp_path / "run") == 2
    said = " ".join(capsys.readouterr().err.split())
    assert said.startswith("error: ")
    assert "file an issue" not in said
    assert not trace.exists()


def test_a_file_that_needs_pickle_is_refused_unread_and_the_way_to_convert_it_works(published, tmp_path, capsys):
    trace = tmp_path / "executed"
    for name, value in (("hostile.pth", Touch(trace)), ("fraction.pth", Fraction(1, 2))):
        torch.save({"model_state": openpcdet_state(published), "optimizer_state": value}, tmp_path / name)
        assert run(tmp_path / name, "small", "--out", tmp_path / "run") == 2
        message = capsys.readouterr().err
        assert "a pickle may run any code" in message
        assert "weights_only" not in message
        assert "safe_globals" not in message
        assert not trace.exists()
    code = [line.strip() for line in message.splitlines() if line.startswith("  ")]
    assert len(code) == 3
    theirs = SimpleNamespace(state_dict=lambda: openpcdet_state(published))
    exec("\n".join(code).replace("'plain.pth'", repr(str(tmp_path / "plain.pth"))), {"detector": theirs})
    assert run(tmp_path / "plain.pth", "small", "--out", tmp_path / "run") == 0


@pytest.mark.parametrize("keep", [0, 40, 5000])
def test_a_damaged_file_is_refused(file, tmp_path, capsys, keep):
    (tmp_path / "cut.pth").write_bytes(file.read_bytes()[:keep])
    assert run(tmp_path / "cut.pth", "small", "--out", tmp_path / "run") == 2
    assert ("cut.pth is damaged" if keep else "cut.pth is empty") in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state, optimizer: {"state_dict": state, "optimizer": optimizer},
        lambda state, optimizer: {"model": {f"module.{n}": t for n, t in state.items()}, "epoch": 3, "best": np.float64(0.5)},
        lambda state, optimizer: {"net": state, "step": np.int64(7), "good": np.bool_(True), "lr": np.float32(0.1)},
        lambda state, optimizer: {f"module.{n}": t for n, t in state.items()},
        lambda state, optimizer: {"state_dict": {f"model.module.{n}": t for n, t in state.items()}, "hyper": {"lr": 0.1}},
        lambda state, optimizer: {"model_state": {f"_orig_mod.{n}": t for n, t in state.items()}, "optimizer_state": optimizer},
    ],
)
def test_usual_wrappings_of_a_state_dict_are_read(published, tmp_path, wrap):
    state = openpcdet_state(published)
    optimizer = torch.optim.Adam(torch.nn.Linear(1, 1).parameters()).state_dict()
    torch.save(wrap(state, optimizer), tmp_path / "x.pth")
    read = read_openpcdet(tmp_path / "x.pth")
    assert read.keys() == state.keys()
    assert all(torch.equal(read[n], t) for n, t in state.items())


def test_a_flipped_bit_in_a_checkpoint_is_noticed(published, file, tmp_path, capsys):
    data = bytearray(file.read_bytes())
    weight = next(t for n, t in openpcdet_state(published).items() if n.endswith("conv_cls.weight"))
    at = data.find(weight.numpy().tobytes())
    assert at > 0
    data[at + 3] ^= 0x40  # the exponent
    (tmp_path / "flipped.pth").write_bytes(data)
    assert run(tmp_path / "flipped.pth", "small", "--out", tmp_path / "run") == 2
    assert "Bad CRC-32" in capsys.readouterr().err
    torch.save(openpcdet_state(published), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    data = bytearray((tmp_path / "old.pth").read_bytes())
    data[data.find(weight.numpy().tobytes()) + 3] ^= 0x40
    (tmp_path / "old.pth").write_bytes(data)
    assert run(tmp_path / "old.pth", "small", "--out", tmp_path / "run") == 2
    assert "and weights stay within 1e+06" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n", "is a pointer of Git LFS"),
        (b"\n<!DOCTYPE html><html><body>Sign in</body></html>", "is a web page and not weights"),
        (b"<html>", "is a web page and not weights"),
        (b"just a text", "is damaged, or holds more than"),
        (b"PK\x03\x04" + bytes(100), "begins like a checkpoint of torch and its end is missing"),
    ],
)
@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
def test_what_is_there_instead_of_weights_is_named(tmp_path, capsys, name, data, message):
    (tmp_path / name).write_bytes(data)
    assert run(tmp_path / name, "small", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert (message in error) or (name == "x.safetensors" and "not a readable safetensors file" in error)


def test_of_many_names_that_do_not_fit_ten_are_listed(published, tmp_path, capsys):
    state = {f"other.{n}": t for n, t in openpcdet_state(published).items() if n != "global_step"}
    torch.save(state, tmp_path / "x.pth")
    assert run(tmp_path / "x.pth", "small", "--out", tmp_path / "run") == 2
    error = capsys.readouterr().err
    assert (error.count("missing "), error.count("left over ")) == (10, 10)
    assert f"and {len(state) - 10} more" in error


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"weights": {}, "epoch": 3}, "has no model_state and is not a state dict: weights, epoch"),
        ({"state_dict": {}, "epoch": 3}, "holds no named weights"),
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


def test_a_log_beside_the_weights_is_passed_over_and_getattr_stays_harmless(published, tmp_path, capsys):
    """mmengine pickles its log with references to methods (getattr). Something harmless stands for it, also in a hostile file."""
    trace = tmp_path / "executed"

    class Reaches:
        def __reduce__(self) -> tuple[object, tuple[object, str]]:
            return getattr, (Touch(trace), "path")

    for name, value, code in (("log.pth", np.arange(3), 0), ("getattr.pth", Reaches(), 2)):
        torch.save({"state_dict": openpcdet_state(published), "message_hub": value}, tmp_path / name)
        assert run(tmp_path / name, "small", "--out", tmp_path / name.partition(".")[0]) == code
        assert not trace.exists()
    assert "a pickle may run any code" in capsys.readouterr().err
