"""Tensor files come back bit for bit with their metadata, or are refused with a message that names the file."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from upcycle3d.core import tensor_file
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.tensor_file import CorruptFile, TensorFileKind, content_digest, fill_module, read_tensors, write_tensors

KIND = TensorFileKind(name="table of numbers", format="numbers 1", advice="count again")


def _network(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def write(path, module, meta=None) -> None:
    write_tensors(path, module.state_dict(), meta)


def load_weights(path, module) -> dict[str, str]:
    file = read_tensors(path)
    fill_module(module, file.tensors, path)
    return dict(file.meta)


def _equal(a: nn.Module, b: nn.Module) -> bool:
    return all(torch.equal(t, b.state_dict()[name]) for name, t in a.state_dict().items())


def _flip_a_bit(path, position: int) -> None:
    data = bytearray(path.read_bytes())
    data[position % len(data)] ^= 1
    path.write_bytes(data)


def test_weights_report_every_missing_unexpected_and_misshapen_name_and_change_nothing(tmp_path):
    write(tmp_path / "w.safetensors", nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(3, 1), "c": nn.Linear(1, 1)}))
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(4, 1), "d": nn.Linear(1, 1)})
    before = {name: t.clone() for name, t in module.state_dict().items()}
    with pytest.raises(InvalidInput) as error:
        load_weights(tmp_path / "w.safetensors", module)
    message = str(error.value)
    for part in ("missing d.weight (1, 1)", "missing d.bias (1,)", "unexpected c.weight (1, 1)", "unexpected c.bias (1,)"):
        assert part in message
    assert "shape of b.weight: the module has (1, 4), the file (1, 3)" in message
    assert all(torch.equal(t, before[name]) for name, t in module.state_dict().items())


def test_weights_round_trip_with_metadata_and_tied_tensors(tmp_path):
    module = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    module[2].weight = module[0].weight
    write(tmp_path / "deep" / "w.safetensors", module, {"detector": "second_iou"})
    other = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3))
    assert load_weights(tmp_path / "deep" / "w.safetensors", other)["detector"] == "second_iou"
    assert _equal(module, other)
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["w.safetensors"]


def test_whole_numbers_are_not_taken_for_floats_and_floats_may_be_shorter():
    module = nn.BatchNorm1d(2)
    good = {name: t.clone() for name, t in module.state_dict().items()}
    for name, wrong in (("weight", torch.tensor([3, 4])), ("num_batches_tracked", torch.tensor(0.5))):
        with pytest.raises(InvalidInput, match=rf"type of {name}: the module has torch.\w+, the file {wrong.dtype}"):
            fill_module(module, good | {name: wrong}, "w.safetensors")
        assert all(torch.equal(t, good[n]) for n, t in module.state_dict().items())
    fill_module(module, good | {"weight": torch.tensor([3.0, 4.0], dtype=torch.float16)}, "w.safetensors")
    assert module.weight.tolist() == [3.0, 4.0]


def test_a_flipped_bit_in_a_weight_file_is_found(tmp_path):
    write(tmp_path / "w.safetensors", _network(0))
    _flip_a_bit(tmp_path / "w.safetensors", -5)
    with pytest.raises(CorruptFile, match="does not have the SHA-256 that it records"):
        load_weights(tmp_path / "w.safetensors", _network(1))
    (tmp_path / "x.safetensors").write_bytes(b"not a tensor file")
    with pytest.raises(CorruptFile, match="not a readable safetensors file"):
        load_weights(tmp_path / "x.safetensors", _network(1))
    with pytest.raises(InvalidInput, match="there is no file"):
        load_weights(tmp_path / "y.safetensors", _network(1))


def test_a_plain_safetensors_file_of_others_is_accepted(tmp_path):
    save_file(_network(2).state_dict(), str(tmp_path / "theirs.safetensors"))
    network = _network(1)
    assert load_weights(tmp_path / "theirs.safetensors", network) == {}
    assert _equal(network, _network(2))


def test_a_file_of_one_kind_holds_its_format_and_is_refused_as_another(tmp_path):
    path = tmp_path / "n.safetensors"
    write_tensors(path, {"a": torch.arange(3)}, {"note": json.dumps({"of": [1, 2]})}, KIND)
    file = read_tensors(str(path), KIND)
    assert file.described("note") == {"of": [1, 2]}
    assert torch.equal(file.named("a")[0], torch.arange(3))
    with pytest.raises(
        InvalidInput, match=r"n.safetensors is not a song: expected format 'song 1', found 'numbers 1'; sing again"
    ):
        read_tensors(path, TensorFileKind(name="song", format="song 1", advice="sing again"))
    with pytest.raises(InvalidInput, match=r"there is no table of numbers at .*m.safetensors; count again"):
        read_tensors(tmp_path / "m.safetensors", KIND)
    with pytest.raises(InvalidInput, match=r"cannot read .*: Is a directory"):
        read_tensors(tmp_path, KIND)


def test_what_is_missing_in_a_file_is_named(tmp_path):
    path = tmp_path / "n.safetensors"
    write_tensors(path, {"a": torch.arange(3)}, {"broken": "{"}, KIND)
    file = read_tensors(path, KIND)
    with pytest.raises(CorruptFile, match=r"n.safetensors is incomplete: it has no tensor b, c"):
        file.named("a", "b", "c")
    with pytest.raises(CorruptFile, match=r"n.safetensors has no 'note' in its metadata"):
        file.described("note")
    with pytest.raises(CorruptFile, match=r"'broken' in the metadata of .* is not valid JSON"):
        file.described("broken")


def test_a_file_that_is_too_large_or_declares_a_huge_header_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "n.safetensors"
    write_tensors(path, {"a": torch.arange(300)}, None, KIND)
    with pytest.raises(InvalidInput, match="and at most 1000 are read; count again"):
        read_tensors(path, TensorFileKind(name=KIND.name, format=KIND.format, advice=KIND.advice, max_bytes=1000))
    path.write_bytes((1 << 40).to_bytes(8, "little") + path.read_bytes()[8:])
    with pytest.raises(CorruptFile, match="no valid header"):
        read_tensors(path, KIND)


def test_a_file_larger_than_the_memory_is_refused_before_it_is_read(tmp_path, monkeypatch):
    path = tmp_path / "n.safetensors"
    write_tensors(path, {"a": torch.arange(300)}, None, KIND)
    size = path.stat().st_size
    monkeypatch.setattr(tensor_file, "_memory_bytes", lambda: size - 1)
    with pytest.raises(
        InvalidInput, match=rf"n.safetensors has {size} bytes, more than the memory of this machine .*; count again"
    ):
        read_tensors(path, KIND)
    monkeypatch.setattr(tensor_file, "_memory_bytes", lambda: size)
    assert len(read_tensors(path, KIND).tensors["a"]) == 300

    def full(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(tensor_file, "_tensors", full)
    with pytest.raises(InvalidInput, match="do not fit into the free memory; end other programs, or count again"):
        read_tensors(path, KIND)


def test_a_module_may_make_a_little_more_than_its_file_holds(monkeypatch):
    tensors = nn.Linear(10, 10).state_dict()
    monkeypatch.setattr(tensor_file, "SPARE_NUMBERS", 0)
    made = tensor_file.build_module(lambda: nn.Linear(10, 10), tensors, "w.safetensors")
    assert torch.equal(made.weight, tensors["weight"])
    with pytest.raises(InvalidInput, match=r"the configuration in w.safetensors cannot be used: .* more than 110 numbers"):
        tensor_file.build_module(lambda: nn.Linear(10, 11), tensors, "w.safetensors")
    ones = [torch.ones(10)] * 12
    with pytest.raises(InvalidInput, match="more than 110 numbers"):  # a number of copies in a file fills the memory as well
        tensor_file.build_module(lambda: nn.ParameterList([nn.Parameter(torch.stack(ones))]), tensors, "w.safetensors")


def test_files_of_earlier_formats_are_read_and_their_hash_is_compared_where_they_have_one(tmp_path):
    path, tensors = tmp_path / "n.safetensors", {"a": torch.arange(3)}
    strict = TensorFileKind(name=KIND.name, format="numbers 2", advice=KIND.advice, earlier=("numbers 1", None))
    lenient = replace(strict, earlier_hashed=False)
    for meta in ({"format": "numbers 1"}, {"other": "x"}):
        save_file(tensors, str(path), metadata=meta)
        assert torch.equal(read_tensors(path, lenient).tensors["a"], torch.arange(3))
        with pytest.raises(CorruptFile, match="no recorded SHA-256"):
            read_tensors(path, strict)
        save_file(tensors, str(path), metadata=meta | {"content_sha256": content_digest(tensors)})
        assert torch.equal(read_tensors(path, strict).tensors["a"], torch.arange(3))
        save_file({"a": torch.arange(1, 4)}, str(path), metadata=meta | {"content_sha256": content_digest(tensors)})
        with pytest.raises(CorruptFile, match="do not have the recorded SHA-256"):
            read_tensors(path, lenient)
    save_file(tensors, str(path), metadata={"format": "numbers 2", "content_sha256": content_digest(tensors)})
    with pytest.raises(CorruptFile, match="no recorded SHA-256"):
        read_tensors(path, lenient)


def test_equal_content_gives_equal_bytes_in_another_process(tmp_path):
    code = (
        "import sys, torch; from upcycle3d.core.tensor_file import write_tensors\n"
        "names = list({'b', 'a', 'c', 'd', 'e'})\n"
        "tensors = {n: torch.arange(3, dtype=torch.int8 if n == 'a' else torch.float32) for n in names}\n"
        "write_tensors(sys.argv[1], tensors, {n: n * 2 for n in names})\n"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "theirs")], check=True, env=environment)
    names = "edcba"
    tensors = {n: torch.arange(3, dtype=torch.int8 if n == "a" else torch.float32) for n in names}
    write_tensors(tmp_path / "ours", tensors, {n: n * 2 for n in names})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_library_reads_our_files_and_we_read_its(tmp_path):
    kinds = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8)
    tensors = {f"t.{i}": torch.arange(5).to(kind) for i, kind in enumerate((*kinds, torch.uint8, torch.bool))}
    tensors |= {"empty": torch.zeros(0, 3), "one": torch.tensor(2.5), "turned": torch.arange(6.0).view(2, 3).t()}
    path = tmp_path / "n.safetensors"
    write_tensors(path, tensors, {"words": 'a "quoted" text\n', "z": "ä"}, KIND)
    with safe_open(str(path), "pt") as file:
        assert set(file.keys()) == set(tensors)
        assert {name: file.metadata()[name] for name in ("words", "z", "format")} == {
            "words": 'a "quoted" text\n',
            "z": "ä",
            "format": "numbers 1",
        }
    found, ours = load_file(path), read_tensors(path, KIND).tensors
    for name, tensor in tensors.items():
        for other in (found[name], ours[name]):
            assert (other.dtype, other.shape) == (tensor.dtype, tensor.shape)
            assert torch.equal(other, tensor)
    header = int.from_bytes(path.read_bytes()[:8], "little")
    assert header % 8 == 0


def test_a_flipped_bit_anywhere_in_a_file_is_noticed(tmp_path):
    path = tmp_path / "n.safetensors"
    kind = replace(KIND, format="numbers 2", earlier=("numbers 1", "numbers 0"), earlier_hashed=False)
    write_tensors(path, {"a": torch.arange(3), "b": torch.ones(2)}, {"note": json.dumps({"length": 4.2})}, kind)
    good = path.read_bytes()
    for at in range(8 * len(good)):
        data = bytearray(good)
        data[at // 8] ^= 1 << at % 8
        path.write_bytes(data)
        with pytest.raises(InvalidInput, match=r"n\.safetensors"):
            read_tensors(path, kind)
    path.write_bytes(good.replace(b"4.2", b"5.2"))
    with pytest.raises(CorruptFile, match="does not have the SHA-256 that it records"):
        read_tensors(path, kind)


def test_a_file_that_was_cut_off_is_told_by_its_size(tmp_path):
    path = tmp_path / "n.safetensors"
    write_tensors(path, {"a": torch.arange(300)}, None, KIND)
    size = path.stat().st_size
    for data in (path.read_bytes()[:-1], path.read_bytes() + b"x"):
        path.write_bytes(data)
        with pytest.raises(CorruptFile, match=f"its header describes {size} bytes, and it has {len(data)}; count again"):
            read_tensors(path, KIND)


def test_what_a_file_cannot_hold_is_refused_when_it_is_written(tmp_path):
    for tensors in ({"a": torch.zeros(2, dtype=torch.complex64)}, {"__metadata__": torch.zeros(2)}):
        with pytest.raises(InvalidInput, match="a file cannot hold the tensor"):
            write_tensors(tmp_path / "n.safetensors", tensors)


def test_the_names_that_a_file_keeps_for_itself_cannot_be_metadata(tmp_path):
    for name, kind in (("content_sha256", None), ("file_sha256", None), ("format", KIND)):
        with pytest.raises(InvalidInput, match=f"{name}.*choose another"):
            write_tensors(tmp_path / "n.safetensors", {}, {name: "x"}, kind)
    write_tensors(tmp_path / "n.safetensors", {}, {"format": "mine"})
    assert read_tensors(tmp_path / "n.safetensors").meta["format"] == "mine"
