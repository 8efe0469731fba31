"""The encoder file comes back bit for bit, and whatever is wrong with one is a sentence with its name and what to do."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.tensor_file import CorruptFile
from upcycle3d.perception.models.encoders.fingerprint import encoder_fingerprint
from upcycle3d.perception.vehicle.extractor import Extractor
from upcycle3d.perception.wire.encoder_file import load_encoder, save_encoder

ADVICE = "give the encoder.safetensors of a run folder; a whole detector is read by load_detector"


@pytest.fixture
def path(tmp_path):
    save_encoder(tmp_path / "encoder.safetensors", tiny.second_iou().encoder)
    return tmp_path / "encoder.safetensors"


def rewrite(path, *, drop: tuple[str, ...] = (), **meta: str) -> None:
    """Write the file again without hash, as version 0.1 did, with other metadata and without some tensors."""
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    old = {"config": header["__metadata__"].get("config", ""), "format": "upcycle3d encoder 2"} | meta
    tensors = {name: tensor for name, tensor in load_file(path).items() if name not in drop}
    save_file(tensors, path, metadata={name: value for name, value in old.items() if value})


@pytest.mark.parametrize("detector", [tiny.second_iou, tiny.pv_rcnn], ids=["second_iou", "pv_rcnn"])
def test_an_encoder_comes_back_bit_for_bit_from_its_file_or_its_run_folder(tmp_path, detector):
    model = detector(seed=3)
    save_encoder(tmp_path / "encoder.safetensors", model.encoder)
    for place in (tmp_path, str(tmp_path / "encoder.safetensors")):
        loaded = load_encoder(place)
        assert not loaded.training
        assert (type(loaded), loaded.config, loaded.spec) == (type(model.encoder), model.encoder.config, model.spec)
        assert all(torch.equal(t, loaded.state_dict()[name]) for name, t in model.encoder.state_dict().items())
    extractor = Extractor.from_file(tmp_path, rig=RigSpec(z_shift=1.5), codec="int8")
    assert extractor.fingerprint == encoder_fingerprint(model.encoder.eval(), RigSpec(z_shift=1.5))
    assert len(extractor.smash(tiny.scan_with_car())[0].coords) > 0


def test_a_file_of_version_0_1_without_hash_is_read(path):
    rewrite(path)
    assert all(torch.equal(t, load_encoder(path).state_dict()[n]) for n, t in tiny.second_iou().encoder.state_dict().items())


def test_a_missing_or_damaged_file_is_named_with_what_to_do(path):
    with pytest.raises(InvalidInput, match=f"there is no vehicle encoder at {path.parent}/other; {ADVICE}"):
        load_encoder(path.parent / "other")
    good = path.read_bytes()
    for data, words in (
        (good[:-1], "not a readable safetensors file"),
        (b"", "not a readable safetensors file"),
        (good[:-1] + bytes([good[-1] ^ 1]), "does not have the SHA-256 that it records"),
    ):
        path.write_bytes(data)
        with pytest.raises(CorruptFile, match=f"encoder.safetensors.*{words}.*{ADVICE}|{words}.*{ADVICE}"):
            load_encoder(path)


def test_a_foreign_or_incomplete_file_is_named_with_what_it_lacks(path):
    rewrite(path, format="upcycle3d detector 2")
    with pytest.raises(
        InvalidInput, match="is not a vehicle encoder: expected format 'upcycle3d encoder 3', found 'upcycle3d detector 2'"
    ):
        load_encoder(path)
    rewrite(path, config="")
    with pytest.raises(CorruptFile, match="has no 'config' in its metadata"):
        load_encoder(path)
    rewrite(path, config="{")
    with pytest.raises(CorruptFile, match=r"'config' in the metadata of .*encoder.safetensors is not valid JSON"):
        load_encoder(path)
    rewrite(path, config='{"encoder": {"kind": "Transformer"}}')
    with pytest.raises(InvalidInput, match=r"the configuration in .*encoder.safetensors cannot be used: .*Transformer"):
        load_encoder(path)


def test_every_missing_weight_is_named_in_one_error(path):
    names = sorted(tiny.second_iou().encoder.state_dict())
    rewrite(path, drop=(names[0], names[-1]))
    with pytest.raises(InvalidInput) as error:
        load_encoder(path)
    assert f"missing {names[0]} " in str(error.value)
    assert f"missing {names[-1]} " in str(error.value)
    assert "encoder.safetensors" in str(error.value)


def test_a_vehicle_that_is_told_the_fingerprint_refuses_another_encoder_or_rig(path):
    rig = RigSpec(z_shift=1.5)
    expected = encoder_fingerprint(load_encoder(path), rig)
    for told in (expected, expected[:12].upper(), f" {expected[:16]}… "):
        assert Extractor.from_file(path, rig=rig, codec="fp16", expected_fingerprint=told).fingerprint == expected
    with pytest.raises(InvalidInput, match=f"has the fingerprint [0-9a-f]{{64}}, and {expected} is expected"):
        Extractor.from_file(path, rig=RigSpec(), codec="fp16", expected_fingerprint=expected)
    save_encoder(path, tiny.second_iou(seed=1).encoder)
    with pytest.raises(InvalidInput, match="is expected"):
        Extractor.from_file(path, rig=rig, codec="fp16", expected_fingerprint=expected[:20])
    for wrong in ("", "abc", "x" * 64, expected + "0"):
        with pytest.raises(InvalidInput, match="an encoder fingerprint has 64 hexadecimal digits"):
            Extractor.from_file(path, rig=rig, codec="fp16", expected_fingerprint=wrong)
