"""Checkpoints come back bit for bit, or not at all."""

import json

import pytest
import torch
from torch import nn

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.training import checkpoint
from upcycle3d.perception.training.checkpoint import (
    CorruptCheckpoint,
    _index_digest,
    latest_checkpoint,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from upcycle3d.perception.training.optim import OneCycle, make_optimizer

CONFIG = OneCycle(lr=0.1, total_steps=10)


def _network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def _trained(seed: int = 0):
    network = _network(seed)
    optimizer = make_optimizer(network.parameters(), CONFIG)
    network(torch.randn(5, 3)).square().sum().backward()
    optimizer.step()
    return network, optimizer


def _equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def _flip_a_bit(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)


def test_weights_and_optimiser_state_come_back_bit_for_bit(tmp_path):
    network, optimizer = _trained()
    path = save_checkpoint(tmp_path, step=7, modules={"student": network}, optimizer=optimizer, meta={"note": (1, 2)})
    other = _network(1)
    other_optimizer = make_optimizer(other.parameters(), CONFIG)
    assert load_checkpoint(path, {"student": other}, other_optimizer) == (7, {"note": [1, 2]})
    assert _equal(network, other)
    for p, q in zip(network.parameters(), other.parameters()):
        assert optimizer.state[p].keys() == other_optimizer.state[q].keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(v, other_optimizer.state[q][k]) for k, v in optimizer.state[p].items())
    assert not list(tmp_path.rglob("*.pt"))
    assert sorted(f.name for f in path.iterdir()) == ["checkpoint.json", "optimizer.safetensors", "student.safetensors"]


def test_a_checkpoint_of_other_modules_is_refused(tmp_path):
    network, optimizer = _trained()
    path = save_checkpoint(tmp_path, step=1, modules={"student": network}, optimizer=optimizer, meta={})
    with pytest.raises(
        InvalidInput, match=r"holds \['optimizer.safetensors', 'student.safetensors'\], not .*'teacher.safetensors'"
    ):
        load_checkpoint(path, {"student": network, "teacher": _network(3)}, optimizer)


@pytest.mark.parametrize("name", ["student.safetensors", "optimizer.safetensors", "checkpoint.json"])
@pytest.mark.parametrize("position", [0, 9, 150, -3])
def test_one_flipped_bit_is_an_error_that_names_the_good_checkpoint(tmp_path, name, position):
    network, optimizer = _trained()
    for step in (1, 2):
        path = save_checkpoint(tmp_path, step=step, modules={"student": network}, optimizer=optimizer, meta={})
    _flip_a_bit(path / name, position)
    other = _network(1)
    with pytest.raises(CorruptCheckpoint, match=f"newest good checkpoint, {tmp_path}/step_00000001"):
        load_checkpoint(path, {"student": other}, make_optimizer(other.parameters(), CONFIG))
    assert _equal(other, _network(1)), "a damaged checkpoint must not be half loaded"


def test_an_altered_step_is_found_although_the_index_is_still_json(tmp_path):
    network, optimizer = _trained()
    path = save_checkpoint(tmp_path, step=2, modules={"student": network}, optimizer=optimizer, meta={})
    index = path / "checkpoint.json"
    index.write_text(index.read_text().replace('"step": 2', '"step": 3'))
    with pytest.raises(CorruptCheckpoint, match="was altered"):
        load_checkpoint(path, {"student": network}, optimizer)


def test_a_cut_or_missing_file_is_an_error(tmp_path):
    network, optimizer = _trained()
    path = save_checkpoint(tmp_path, step=1, modules={"student": network}, optimizer=optimizer, meta={})
    file = path / "student.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(CorruptCheckpoint, match=f"should have {len(whole)} bytes, found {len(whole) - 1}"):
        load_checkpoint(path, {"student": network}, optimizer)
    file.unlink()
    with pytest.raises(CorruptCheckpoint, match="no other good checkpoint"):
        load_checkpoint(path, {"student": network}, optimizer)


def test_only_the_newest_are_kept_and_rubbish_of_a_killed_writer_is_swept(tmp_path):
    network, optimizer = _trained()
    (tmp_path / ".tmp-step_00000009").mkdir()
    (tmp_path / "step_00000099").mkdir()  # without an index: never complete
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step=step, modules={"student": network}, optimizer=optimizer, meta={}, keep_last=2)
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000010"]
    assert latest_checkpoint(tmp_path) == tmp_path / "step_00000010"
    assert not list(tmp_path.glob(".tmp-*"))
    assert latest_checkpoint(tmp_path / "nowhere") is None


def test_saving_a_step_again_deletes_nothing(tmp_path):
    network, optimizer = _trained()
    for step in (1, 2, 2):
        save_checkpoint(tmp_path, step=step, modules={"student": network}, optimizer=optimizer, meta={})
    assert (tmp_path / "step_00000002.set-aside-1").is_dir()
    assert [p.name for p in list_checkpoints(tmp_path)] == ["step_00000001", "step_00000002"]


def test_an_optimised_parameter_outside_the_modules_is_refused(tmp_path):
    network, optimizer = _trained()
    with pytest.raises(InvalidInput, match="belong to no checkpointed module"):
        save_checkpoint(tmp_path, step=1, modules={"student": network[0]}, optimizer=optimizer, meta={})


def test_an_index_of_a_newer_program_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("upcycle3d.perception.training.checkpoint.CHECKPOINT_VERSION", 2)
    network, optimizer = _trained()
    path = save_checkpoint(tmp_path, step=1, modules={"student": network}, optimizer=optimizer, meta={})
    monkeypatch.undo()
    assert json.loads((path / "checkpoint.json").read_text())["schema_version"] == 2
    with pytest.raises(InvalidInput, match="schema version 2, this program reads 1"):
        load_checkpoint(path, {"student": network}, optimizer)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"[]",
        b"{}",
        b"nul",
        b"[" * 100_000,
        b"\xff\xfe",
        b'{"sha256": 1}',
        b'{"sha256": "x", "files": 3}',
        b'"checkpoint"',
        b'{"a": NaN}',
    ],
)
def test_a_damaged_index_is_a_sentence_and_no_traceback(tmp_path, content):
    network, optimizer = _trained()
    path = save_checkpoint(tmp_path, step=1, modules={"student": network}, optimizer=optimizer, meta={})
    (path / "checkpoint.json").write_bytes(content)
    with pytest.raises(CorruptCheckpoint, match=r"checkpoint\.json"):
        load_checkpoint(path, {"student": network}, optimizer)


def test_an_index_of_another_form_is_refused_although_its_hash_is_right(tmp_path):
    network, optimizer = _trained()
    path = save_checkpoint(tmp_path, step=1, modules={"student": network}, optimizer=optimizer, meta={})
    good = json.loads((path / "checkpoint.json").read_text())
    for change in (
        {"files": {"../student.safetensors": {"bytes": 1, "sha256": ""}}},
        {"files": {"a.safetensors": 3}},
        {"meta": 1},
        {"step": "1"},
    ):
        index = {k: v for k, v in (good | change).items() if k != "sha256"}
        (path / "checkpoint.json").write_text(json.dumps(index | {"sha256": _index_digest(index)}))
        with pytest.raises(CorruptCheckpoint, match="is not a checkpoint index"):
            load_checkpoint(path, {"student": network}, optimizer)


def test_a_checkpoint_that_the_disk_has_no_room_for_leaves_nothing_behind(tmp_path, monkeypatch):
    network, optimizer = _trained()
    save_checkpoint(tmp_path, step=1, modules={"student": network}, optimizer=optimizer, meta={})

    def full(path, data):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(checkpoint, "_write_and_sync", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, step=2, modules={"student": network}, optimizer=optimizer, meta={})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000001"]
