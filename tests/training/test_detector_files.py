"""A detector comes back from its file with its configuration; whatever is wrong with a file is a sentence with its name."""

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
    with pytest.raises(InvalidInput, match=r"is not a detector of this program: expected format 'upcycle3d detector 2'"):
        load_detector(tmp_path / "run" / "encoder.safetensors")
    good = path.read_bytes()
    path.write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    with pytest.raises(CorruptFile, match=r"detector.safetensors do not have the recorded SHA-256"):
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
