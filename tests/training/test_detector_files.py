"""A detector comes back from its file with its configuration; whatever is wrong with a file is a sentence with its name."""

import contextlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.tensor_file import CorruptFile, read_tensors, write_tensors
from upcycle3d.perception.training.detector_files import load_detector, save_detector, save_run_detector
from upcycle3d.perception.wire.encoder_file import load_encoder


@pytest.fixture
def path(tmp_path):
    save_detector(tmp_path / "detector.safetensors", tiny.second_iou())
    return tmp_path / "detector.safetensors"


@pytest.mark.parametrize("detector", [tiny.second_iou, tiny.pv_rcnn], ids=["second_iou", "pv_rcnn"])
def test_a_run_folder_gives_the_detector_and_its_encoder_back_bit_for_bit(tmp_path, detector):
    model = detector(seed=3)
    save_run_detector(str(tmp_path), model)
    for place in (tmp_path, str(tmp_path), tmp_path / "detector.safetensors"):
        loaded = load_detector(place)
        assert not loaded.training
        assert (loaded.config, loaded.label, loaded.class_names) == (model.config, model.label, model.class_names)
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.state_dict().items())
    encoder = load_encoder(tmp_path)
    assert all(torch.equal(t, encoder.state_dict()[name]) for name, t in model.encoder.state_dict().items())


def test_a_missing_damaged_or_foreign_file_is_named_with_what_to_do(path, tmp_path):
    with pytest.raises(InvalidInput, match=r"there is no detector of this program at .*/nowhere; give a run folder of `train`"):
        load_detector(tmp_path / "nowhere")
    save_run_detector(tmp_path / "run", tiny.second_iou())
    with pytest.raises(InvalidInput, match=r"is not a detector of this program: expected format 'upcycle3d detector 3'"):
        load_detector(tmp_path / "run" / "encoder.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptFile, match=r"detector.safetensors does not have the SHA-256 that it records"):
        load_detector(path)


def test_a_changed_configuration_is_noticed_and_equal_detectors_have_equal_files(path, tmp_path):
    good = path.read_bytes()
    save_detector(tmp_path / "again.safetensors", load_detector(path))
    assert (tmp_path / "again.safetensors").read_bytes() == good
    assert good.count(b"4.0, 2.0, 1.6") == 1
    path.write_bytes(good.replace(b"4.0, 2.0, 1.6", b"5.0, 2.0, 1.6"))
    with pytest.raises(CorruptFile, match=r"detector.safetensors does not have the SHA-256 that it records"):
        load_detector(path)


def test_weights_and_configuration_that_do_not_fit_are_named(path):
    file = read_tensors(path)
    meta = {name: file.meta[name] for name in ("format", "config")}
    first, *rest = sorted(file.tensors)
    write_tensors(path, {name: file.tensors[name] for name in rest}, meta)
    with pytest.raises(InvalidInput, match=rf"the weights of .*detector.safetensors do not fit Detector[\s\S]*missing {first} "):
        load_detector(path)
    write_tensors(path, file.tensors, meta | {"config": '{"detector": {"kind": "Unknown"}}'})
    with pytest.raises(InvalidInput, match=r"the configuration in .*detector.safetensors cannot be used: .*Unknown"):
        load_detector(path)


@pytest.mark.parametrize("load", [load_detector, load_encoder])
def test_what_is_no_path_is_refused(load):
    with pytest.raises(InvalidInput, match="found NoneType; give its path"):
        load(None)


# ---- forged files


def forge(path, changes: dict[str, Any]) -> None:
    """Change values in the configuration of a file; a key is the way to the value, with dots."""
    file = read_tensors(path)
    config = json.loads(file.meta["config"])
    for way, value in changes.items():
        *folders, last = way.split(".")
        inner = config
        for name in folders:
            inner = inner[name]
        assert last in inner
        inner[last] = value
    write_tensors(path, file.tensors, {"format": file.meta["format"], "config": json.dumps(config)})


BAD = {
    "detector.decoder.bev.layers": [[10**6, 1], [-1, 1]],
    "detector.decoder.bev.channels": [[65_536, 65_536], [3000, 3000], [1200, 1200], [0, 4], [10**30, 4]],
    "detector.decoder.bev.up_channels": [[0, 4]],
    "detector.encoder.channels": [[100_000] * 5, [65_536] * 5, [-1] * 5, [0] * 5, [10**30] * 5],
    "detector.decoder.head_channels": [10**7, 65_536, 0, -1, 10**30],
    "detector.decoder.pool_size": [10**5, 0, -1],
    "detector.decoder.dropout": [2.0, "nan"],
    "detector.decoder.anchors": [[], [asdict(tiny.CAR_ANCHOR) | {"name": f"Car {i}"} for i in range(1000)]],
    "detector.encoder.max_voxels": [0, 10**30],
    "detector.encoder.grid.range": [
        [0.0, -5e6, -1.0, 5e6, 5e6, 3.0],
        [0.0, -51_200.0, -1.0, 102_400.0, 51_200.0, 3.0],
        [0.0, 0.0, 0.0, "inf", "inf", "inf"],
        ["-inf", 0.0, 0.0, 1.0, 1.0, 1.0],
        [-1e308, -1e308, -1e308, 1e308, 1e308, 1e308],
        [0.0, 0.0, 0.0, 0.1, 0.1, 0.1],
    ],
    "detector.encoder.grid.voxel_size": [["nan", 0.1, 0.1], [1e-300, 0.1, 0.1], [0.0, 0.1, 0.1]],
}


def memory(*, reset: bool = False) -> int:
    """The largest memory of this process in KiB, since the last reset; where the system refuses a reset, since its start."""
    if reset:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
    return int(Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0])


REFUSED = r"the configuration in .*\.safetensors cannot be used: .*\w|the 'config' in the metadata of .* too large for 64 bits|do not fit Detector"


@pytest.mark.parametrize(("way", "value"), [(way, value) for way, values in BAD.items() for value in values])
def test_a_forged_configuration_is_refused_with_a_sentence_before_it_takes_memory(path, way, value):
    forge(path, {way: value})
    before = memory(reset=True)
    with pytest.raises(InvalidInput, match=REFUSED) as error:
        load_detector(path)
    assert len(str(error.value)) < 2500
    assert memory() - before < 450_000  # KiB


def test_a_forged_encoder_is_refused_with_a_sentence(tmp_path):
    save_run_detector(tmp_path, tiny.pv_rcnn())
    path = tmp_path / "encoder.safetensors"
    good = path.read_bytes()
    for way, value in (
        ("encoder.voxels.channels", [65_536] * 5),
        ("encoder.voxels.channels", [0] * 5),
        ("encoder.conv3.channels", [4, 10**30]),
        ("encoder.conv3.radii", [0.5] * 100),
        ("encoder.conv3.radii", [0.5, "inf"]),
        ("encoder.conv3.limits", [4, 0]),
        ("encoder.keypoints", -1),
        ("encoder.voxels.grid.range", [0.0, 0.0, 0.0, "inf", 1.0, 1.0]),
    ):
        path.write_bytes(good)
        forge(path, {way: value})
        with pytest.raises(InvalidInput, match=REFUSED):
            load_encoder(tmp_path)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_with_nan_or_inf_are_refused_and_named(tmp_path, value):
    detector = tiny.second_iou()
    name = next(iter(detector.encoder.state_dict()))
    with torch.no_grad():
        detector.encoder.state_dict()[name].view(-1)[1] = value
    save_run_detector(tmp_path, detector)
    with pytest.raises(InvalidInput, match=rf"weights of .*detector.safetensors hold NaN or inf in encoder.{name}; "):
        load_detector(tmp_path)
    with pytest.raises(InvalidInput, match=rf"weights of .*encoder.safetensors hold NaN or inf in {name}; "):
        load_encoder(tmp_path)


def test_loading_draws_as_many_random_numbers_as_building_does(path):
    config = load_detector(path).config
    torch.manual_seed(0)
    config.build()
    expected = torch.rand(3)
    torch.manual_seed(0)
    load_detector(path)
    assert torch.equal(torch.rand(3), expected)
