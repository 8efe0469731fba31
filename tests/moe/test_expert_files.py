"""Experts on disk come back bit by bit, damaged files are refused before memory is taken, and what is resident is really in memory."""

import gc
import json
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from moe_carvings import random_ffn

from moe_served import carved_lm
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.mapped_tensors import map_tensors
from upcycle3d.core.safetensors_bytes import FILE_DIGEST_KEY
from upcycle3d.core.tensor_file import CorruptFile, read_tensors, write_tensors
from upcycle3d.perception.moe.serving.expert_files import EXPERTS_FILE, PieceForm, open_experts, piece_name, write_experts
from upcycle3d.perception.moe.serving.expert_store import MappedExpertStore
from upcycle3d.perception.moe.serving.served_models import BACKBONE_FILE, BACKBONE_NAME, EXPERTS_NAME, open_served


def experts_of(gated: bool, bias: bool, widths=((4, 7, 1), (3, 3, 5))):
    """Two layers of three experts."""
    return [
        [
            replace(random_ffn(hidden=width, gated=gated, bias=bias, seed=10 * layer + e), down_bias=None)
            for e, width in enumerate(row)
        ]
        for layer, row in enumerate(widths)
    ]


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize(("gated", "bias"), [(True, False), (True, True), (False, True), (False, False)])
def test_pieces_compute_what_their_ffns_compute(gated, bias, whole, tmp_path):
    experts = experts_of(gated, bias)
    form = write_experts(tmp_path / "e.safetensors", experts, model="m")
    store = MappedExpertStore(open_experts(tmp_path / "e.safetensors"), whole=whole)
    assert store.form == form
    x = torch.randn(5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for piece in range(store.layout.pieces):
        store.load(piece)
    assert store.resident_bytes == sum(form.expert_bytes)
    for layer, row in enumerate(experts):
        for number, ffn in enumerate(row):
            part = store.part(expert=number, layer=layer)
            torch.testing.assert_close(part.apply(x), ffn.apply(x), rtol=1e-12, atol=1e-12)
            assert part.apply(x[:0]).shape == (0, 5)
    if whole:
        assert [store.bytes_of(e) for e in range(3)] == list(form.expert_bytes)
    with pytest.raises(InvalidInput, match="is in memory already"):
        store.load(0)
    store.close()


def test_one_of_two_biases_and_experts_without_units_are_stored(tmp_path):
    """A missing bias becomes 0. An expert without own units is one unit of zeros, because memory counts no empty pieces."""
    ffn = replace(random_ffn(hidden=4, gated=True, seed=1), gate_bias=None, down_bias=None)
    empty = replace(ffn, up=ffn.up[:0], gate=ffn.gate[:0], down=ffn.down[:, :0], up_bias=ffn.up_bias[:0])
    write_experts(tmp_path / "e.safetensors", [[ffn, empty]], model="m")
    store = MappedExpertStore(open_experts(tmp_path / "e.safetensors"), whole=True)
    store.load(0)
    store.load(1)
    x = torch.randn(3, 6, dtype=torch.float64)
    torch.testing.assert_close(store.part(expert=0, layer=0).apply(x), ffn.apply(x), rtol=1e-12, atol=1e-12)
    assert torch.equal(store.part(expert=1, layer=0).apply(x), torch.zeros(3, 5, dtype=torch.float64))


def test_memory_comes_with_a_load_and_goes_with_a_drop(tmp_path):
    write_experts(tmp_path / "e.safetensors", experts_of(True, False), model="m")
    for cached in (True, False):
        store = MappedExpertStore(open_experts(tmp_path / "e.safetensors"), whole=False, keep_cached=cached)
        assert store.resident_bytes == 0
        store.load(4)
        buffer = weakref.ref(store._resident[4][0])
        assert store.resident_bytes == store.bytes_of(4) == buffer().nbytes
        before = store.part(expert=1, layer=1).first.clone()
        store.drop(4)
        gc.collect()
        assert buffer() is None
        assert store.resident_bytes == 0
        with pytest.raises(InvalidInput, match="expert 1 of layer 1 is not in memory"):
            store.part(expert=1, layer=1)
        with pytest.raises(InvalidInput, match="is not in memory"):
            store.drop(4)
        store.load(4)  # it comes back as it was
        assert torch.equal(store.part(expert=1, layer=1).first, before)
        for wrong in (-1, 6):
            with pytest.raises(InvalidInput, match="there is no piece"):
                store.load(wrong)
        store.close()


def test_pieces_of_an_expert_lie_in_a_row(tmp_path):
    """So a whole expert is one read."""
    form = write_experts(tmp_path / "e.safetensors", experts_of(True, True), model="m")
    spans = map_tensors(tmp_path / "e.safetensors", EXPERTS_FILE).spans
    for expert in range(3):
        one, two = (spans[piece_name(expert, layer)] for layer in range(2))
        assert two.start == one.start + one.size
        assert one.size + two.size == form.expert_bytes[expert]


def test_what_makes_no_file_is_refused(tmp_path):
    good = experts_of(True, False)
    nan = replace(good[0][0], up=good[0][0].up * torch.nan)
    for experts, message in (
        ([], "at least one layer"),
        ([good[0], good[1][:2]], "the units of the same experts"),
        ([[random_ffn(gated=False)]], "a bias of the outputs"),
        ([[good[0][0], experts_of(False, False)[0][0]]], "must have one form"),
        ([[nan]], "hold NaN"),
        ([[good[0][0], replace(good[0][1], **{n: t.float() for n, t in good[0][1].tensors().items()})]], "of one type"),
    ):
        with pytest.raises(InvalidInput, match=message):
            write_experts(tmp_path / "e.safetensors", experts, model="m")
    assert not (tmp_path / "e.safetensors").exists()
    with pytest.raises(InvalidInput, match="a piece of 2 units has"):
        PieceForm.of(good[0]).piece(torch.zeros(3), 2)


def test_damaged_files_are_refused_before_anything_is_allocated(tmp_path):
    path, bad = tmp_path / "e.safetensors", tmp_path / "bad.safetensors"
    write_experts(path, experts_of(True, False), model="m")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])

    def with_header(change) -> bytes:
        told = json.loads(json.dumps(header))
        change(told)
        text = json.dumps(told).encode()
        return len(text).to_bytes(8, "little") + text + data[8 + length :]

    name = piece_name(0, 0)
    huge = {"dtype": "F64", "shape": [2**40], "data_offsets": [0, 2**43]}
    cases = [
        (data[:-1] + bytes([data[-1] ^ 1]), "SHA-256"),
        (data[:-8], "does not fit|describes"),
        (data + b"\0" * 8, "describes"),
        (b"", "no valid header"),
        ((2**50).to_bytes(8, "little") + data[8:], "no valid header"),
        (with_header(lambda h: h.update({name: huge})), "does not fit"),
        (with_header(lambda h: h[name].update(shape=[-1])), "does not fit"),
        (with_header(lambda h: h[name].update(dtype="F7")), "does not fit"),
        (with_header(lambda h: h[name].pop("data_offsets")), "does not fit"),
        (with_header(lambda h: h["__metadata__"].update(format="other 1")), "is not a file of experts"),
        (with_header(lambda h: h["__metadata__"].pop(FILE_DIGEST_KEY)), "SHA-256"),
        (with_header(lambda h: h.update(__metadata__=[1])), "no table of tensors"),
    ]
    for content, message in cases:
        bad.write_bytes(content)
        with pytest.raises(InvalidInput, match=message):
            open_experts(bad)
    with pytest.raises(InvalidInput, match="there is no file of experts"):
        open_experts(tmp_path / "none.safetensors")


def test_a_file_must_hold_the_pieces_that_it_describes(tmp_path):
    path, bad = tmp_path / "e.safetensors", tmp_path / "bad.safetensors"
    write_experts(path, experts_of(True, False), model="m")
    file = read_tensors(path, EXPERTS_FILE)
    told = file.described("description")
    name = piece_name(1, 1)

    def changed(change, description=None):
        tensors = dict(file.tensors)
        change(tensors)
        write_tensors(bad, tensors, {"description": json.dumps(description or told)}, EXPERTS_FILE)
        return bad

    wide = told | {"units": [[4, 7, 2**30], [3, 3, 5]]}
    for made, message in (
        (lambda: changed(lambda t: t.update({name: t[name][:-1]})), "must have 51 numbers"),
        (lambda: changed(lambda t: t.update({name: t[name].float()})), "must have 51 numbers"),
        (lambda: changed(lambda t: t.pop(name)), "describes 6 pieces and holds 5"),
        (lambda: changed(lambda t: None, wide), "must be in 1..16777216"),
        (lambda: changed(lambda t: None, told | {"numbers": "int8"}), "cannot be used"),
    ):
        with pytest.raises(InvalidInput, match=message):
            open_experts(made())


def test_a_file_that_is_shortened_while_in_use_gives_an_error_and_no_crash(tmp_path):
    path = tmp_path / "e.safetensors"
    write_experts(path, experts_of(True, False), model="m")
    store = MappedExpertStore(open_experts(path), whole=False)
    store.load(0)
    with path.open("r+b") as stream:
        stream.truncate(16)
    with pytest.raises(CorruptFile, match="was shortened to 16 bytes"):
        store.load(1)
    assert store.part(expert=0, layer=0).first.isfinite().all()  # what is in memory stays
    store.close()
    with pytest.raises(InvalidInput, match="is closed"):
        store.load(1)


def test_mapped_tensors_are_those_of_the_file(tmp_path):
    tensors = {"a": torch.arange(6.0).view(2, 3), "b": torch.tensor([], dtype=torch.int64), "c": torch.tensor([True, False])}
    write_tensors(tmp_path / "t.safetensors", tensors, kind=EXPERTS_FILE)
    file = map_tensors(tmp_path / "t.safetensors", EXPERTS_FILE)
    for name, tensor in tensors.items():
        assert torch.equal(file.copy(name), tensor)
    with pytest.raises(CorruptFile, match="no tensor d"):
        file.copy("d")
    with pytest.raises(CorruptFile, match="has no 'description'"):
        file.described("description")
    with pytest.raises(InvalidInput, match="were asked for"):
        file.copy_bytes(10**6, np.empty(1, dtype=np.uint8))
    file.close()


def test_files_of_two_models_are_not_mixed_up(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    made = carved_lm(one, dtype=torch.float32)
    carved_lm(other, ratio=0.6, dtype=torch.float32)
    served = open_served(one)
    assert served.description.domains == ("d0", "d1", "d2")
    assert "3 experts" in str(served.description)
    assert served.experts.form.expert_bytes == tuple(4 * count for count in made.carving.expert_parameters)
    shared = sum(int(units.shared.sum()) for units in made.carving.units)
    assert sum(served.description.shared_units) == shared
    (one / EXPERTS_NAME).write_bytes((other / EXPERTS_NAME).read_bytes())
    with pytest.raises(InvalidInput, match="belongs to another model"):
        open_served(one)
    file = read_tensors(other / BACKBONE_NAME, BACKBONE_FILE)
    description = {"description": file.meta["description"]}
    for change, message in (
        (lambda t: t.pop("norm"), "no tensor norm"),
        (lambda t: t.update(embed=t["embed"][:-1]), "the embedding must have the shape"),
        (lambda t: t.update({"layer.0.qkv": t["layer.0.qkv"] * torch.nan}), "hold NaN"),
        (lambda t: t.update({"shared.0.up": t["shared.0.up"][:-1]}), "DenseFfn.down must have the shape"),
        (lambda t: t.update({"shared.0.odd": t["norm"]}), "the shared units of layer 0 are"),
        (lambda t: t.pop("pre_gate.norm.weight"), "missing norm.weight"),
    ):
        tensors = dict(file.tensors)
        change(tensors)
        write_tensors(other / BACKBONE_NAME, tensors, description, BACKBONE_FILE)
        with pytest.raises(InvalidInput, match=message):
            open_served(other)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the pinned buffer and the stream need one")
def test_pieces_reach_a_cuda_device(tmp_path):
    experts = experts_of(True, True)
    write_experts(tmp_path / "e.safetensors", experts, model="m")
    store = MappedExpertStore(open_experts(tmp_path / "e.safetensors"), whole=False, device="cuda")
    x = torch.randn(5, 6, dtype=torch.float64)
    for piece in range(store.layout.pieces):
        store.load(piece)
        layer, expert = divmod(piece, 3)
        part = store.part(expert=expert, layer=layer)
        torch.testing.assert_close(part.apply(x.to("cuda")).cpu(), experts[layer][expert].apply(x), rtol=1e-10, atol=1e-10)
        store.drop(piece)
    assert store.resident_bytes == 0
