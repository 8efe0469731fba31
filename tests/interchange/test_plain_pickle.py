"""Pickles are read as data: what plain programs write comes back equal, and everything else is refused before anything runs."""

import collections
import fractions
import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.interchange import plain_pickle as reader
from upcycle3d.perception.interchange.plain_pickle import plain_content, read_plain_pickle
from upcycle3d.perception.interchange.plain_pickle_writing import plain_pickle, write_torch_file

PLAIN = {
    "float32": np.arange(6, dtype=np.float32).reshape(2, 3),
    "names": np.array(["Car", "DontCare"]),
    "empty": np.zeros((0, 7)),
    "none": np.array([]),
    "int64": np.int64(4),
    "flags": np.array([True, False]),
    "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
    "tuple": (1, -2.5, "é\n'", b"\x00\xff", None, True),
    "large": [2**70, -(2**40), 255, 70000],
    "nested": {"a": [{"b": ()}], 3: "key"},
}


def same(a: object, b: object) -> bool:
    if isinstance(a, np.ndarray):
        return isinstance(b, np.ndarray) and a.dtype == b.dtype and np.array_equal(a, b)
    if isinstance(a, dict):
        return isinstance(b, dict) and list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and a == b


@pytest.mark.parametrize("protocol", range(6))
def test_what_python_pickles_of_plain_data_comes_back_equal(protocol):
    shared = np.arange(3)
    content = [PLAIN, shared, shared, collections.OrderedDict(x=1), {1, 2}]
    *read, ordered, members = plain_content(pickle.dumps(content, protocol))
    assert same(content[:3], read)
    assert (ordered, members) == ({"x": 1}, {1, 2})


def test_big_endian_arrays_and_arrays_of_objects_are_read():
    big, objects = plain_content(pickle.dumps([np.arange(3, dtype=">f8"), np.array([["a", 1], [None, 2.5]], object)]))
    assert big.tolist() == [0, 1, 2]
    assert objects == [["a", 1], [None, 2.5]]


def test_what_is_written_is_read_by_python_and_by_us_and_is_always_the_same():
    written = plain_pickle(PLAIN)
    expected = {**PLAIN, "int64": 4, "fortran": np.ascontiguousarray(PLAIN["fortran"])}  # numpy's numbers become Python's
    assert same(expected, pickle.loads(written))
    assert same(expected, plain_content(written))
    assert written == plain_pickle(PLAIN)


class Runs:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o700)


@pytest.mark.parametrize("protocol", range(6))
@pytest.mark.parametrize("place", [lambda x: x, lambda x: [{"a": x}], lambda x: {"name": np.array([x], object)}])
def test_nothing_that_a_file_asks_for_is_run(tmp_path, protocol, place):
    (tmp_path / "infos.pkl").write_bytes(pickle.dumps(place(Runs(tmp_path / "ran")), protocol))
    with pytest.raises(InvalidInput, match=r"infos.pkl was not read, and nothing in it was run: it asks for (posix|nt).mkdir"):
        read_plain_pickle(tmp_path / "infos.pkl")
    assert not (tmp_path / "ran").exists()
    assert not list(tmp_path.glob("ran*"))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (fractions.Fraction(1, 2), "fractions.Fraction"),
        (Path("a"), "pathlib"),
        (torch.zeros(2), "torch"),
        (np.zeros(2, dtype=[("a", "f4")]), "numbers and texts are read"),
        (np.datetime64("2020-01-01"), "numbers and texts are read"),
        (print, "print"),
        (1 + 2j, "complex"),
    ],
)
def test_other_objects_are_named_and_refused(value, message):
    with pytest.raises(InvalidInput, match=message):
        plain_content(pickle.dumps([value]))


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"x",
        b"text, not a pickle",
        b".",
        b"]",
        b"(.",
        b"N.N"[:1],
        b"g1\n.",
        b"K\x01K\x02a.",  # an entry of a number
        b"]N}s.",
        b"}]K\x01s.",  # a list as a key
        b"cnumpy.core.multiarray\n_reconstruct\n.",  # a function itself
        b"cnumpy.core.multiarray\n_reconstruct\ncnumpy\nndarray\n(K\x00tU\x01b\x87R.",  # an array without content
        b"Pxyz\n.",  # an object of another file
        b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\x7f.",
        b"B\xff\xff\xff\x7fabc.",
    ],
)
def test_damaged_files_are_refused_with_a_sentence(data):
    with pytest.raises(InvalidInput):
        plain_content(data)


def test_every_cut_of_a_file_is_refused():
    whole = pickle.dumps(PLAIN)
    for length in range(len(whole)):
        with pytest.raises(InvalidInput):
            plain_content(whole[:length])


def test_an_array_that_claims_more_than_it_holds_allocates_nothing():
    small = pickle.dumps(np.zeros(1), 2)
    assert b"K\x01\x85" in small  # the shape (1,)
    hostile = small.replace(b"K\x01\x85", b"\x8a\x07" + (10**15).to_bytes(7, "little") + b"\x85")
    with pytest.raises(InvalidInput, match=r"an array \(1000000000000000,\) of float64 has 8 bytes"):
        plain_content(hostile)


def doubled(levels: int) -> bytes:
    """Steps for a tuple of a tuple twice, and so on: few bytes that stand for 2 ** levels values."""
    steps = [b"0h%ch%c\x86q%c" % (i, i, i + 1) for i in range(levels)]
    return b"\x80\x03N\x85q\x00" + b"".join(steps)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (doubled(60) + b".", "stands for more than"),
        (doubled(60) + b"0}h\x3cNs.", "a tuple as a key"),
        (doubled(60) + b"0\x8fh\x3c\x85(h\x3c\x90.", "damaged|a tuple as a key"),
        (doubled(60) + b"0cnumpy\ndtype\nh\x3c\x85R.", "an array of tuple"),
        (b"\x80\x02]q\x00h\x00a.", "recursion"),
        (pickle.dumps([1]) + pickle.dumps([2]), "goes on for 17 bytes after its end"),
        (pickle.dumps(np.zeros(1), 2).replace(b"f8", b"U0"), "array of U0"),
    ],
)
def test_a_small_file_cannot_stand_for_endless_work(data, message):
    with pytest.raises(InvalidInput, match=message):
        plain_content(data)


def test_bytes_that_a_file_names_again_and_again_are_not_copied_without_end():
    content = bytes(400_000)
    block = b"B" + len(content).to_bytes(4, "little") + content
    array = pickle.dumps(np.frombuffer(content, np.uint8).copy(), 3)[2:-1]
    assert block in array
    steps = array.replace(block, b"h\xc8")  # the same array, with its bytes taken from the memo
    times = {n: b"\x80\x03" + block + b"q\xc80](" + steps * n + b"e." for n in (2, 40)}
    assert [part.tobytes() == content for part in plain_content(times[2])] == [True, True]
    with pytest.raises(InvalidInput, match="bytes out of its own parts"):
        plain_content(times[40])


def test_size_and_steps_are_limited(tmp_path, monkeypatch):
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(list(range(100))))
    monkeypatch.setattr(reader, "MOST_STEPS", 50)
    with pytest.raises(InvalidInput, match="more than 50 steps"):
        read_plain_pickle(tmp_path / "x.pkl")
    monkeypatch.setattr(reader, "LARGEST_PICKLE", 20)
    with pytest.raises(InvalidInput, match="info file"):
        read_plain_pickle(tmp_path / "x.pkl")
    with pytest.raises(InvalidInput, match="there is no file"):
        read_plain_pickle(tmp_path / "y.pkl")


def test_a_torch_file_holds_its_tensors_bit_by_bit_and_nothing_else(tmp_path):
    whole = torch.randn(100, 100)
    content = {
        "meta": {"classes": ["Car"]},
        "state_dict": {
            "part": whole[:2].T,
            "scalar": torch.tensor(3),
            "half": torch.ones(3, dtype=torch.bfloat16),
            "nan": torch.tensor([float("nan"), -0.0]),
            "empty": torch.zeros(0, 4),
        },
    }
    write_torch_file(tmp_path / "a.pth", content)
    read = torch.load(tmp_path / "a.pth", weights_only=True)
    assert read["meta"] == content["meta"]
    for name, value in content["state_dict"].items():
        found = read["state_dict"][name]
        assert found.dtype == value.dtype
        assert found.reshape(-1).view(torch.uint8).tolist() == value.contiguous().reshape(-1).view(torch.uint8).tolist()
    assert (tmp_path / "a.pth").stat().st_size < 4000  # not the 40,000 bytes that the part was cut from
    write_torch_file(tmp_path / "b.pth", content)
    assert (tmp_path / "a.pth").read_bytes() == (tmp_path / "b.pth").read_bytes()
    with pytest.raises(InvalidInput, match=r"torch\.complex64"):
        write_torch_file(tmp_path / "c.pth", {"x": torch.zeros(1, dtype=torch.complex64)})
    assert not (tmp_path / "c.pth").exists()
    with pytest.raises(InvalidInput, match="is no plain data"):
        plain_pickle({"x": io.BytesIO()})
