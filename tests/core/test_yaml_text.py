"""YAML of configurations: what is written comes back, words stay words, and nothing but plain values is made."""

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.yaml_text import read_yaml, yaml_text

VALUE = {
    "preset": {"kind": "A", "lr": 1e-05, "clip": "inf", "amp": "off", "empty": [], "none": None},
    "classes": ["Car", "no", "1e-3", "1.5", "null", "true", "2020-01-01", "é"],
    "steps": 10,
    "flag": True,
}


def test_what_is_written_comes_back(tmp_path):
    pytest.importorskip("yaml", reason="needs the extra [yaml]")
    path = tmp_path / "a.yaml"
    path.write_text(yaml_text(VALUE), encoding="utf-8")
    assert read_yaml(path) == VALUE


def test_without_pyyaml_json_is_written_and_yaml_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    path = tmp_path / "a.json"
    path.write_text(yaml_text(VALUE))
    assert read_yaml(path) == VALUE
    (tmp_path / "a.yaml").write_text("a: 1")
    with pytest.raises(InvalidInput, match=r"pip install pyyaml, or give a .json file"):
        read_yaml(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("amp: off", "off"),
        ("amp: no", "no"),
        ("amp: Yes", "Yes"),
        ("amp: true", True),
        ("lr: 1e-3", 0.001),
        ("lr: 1E5", 100000.0),
        ("lr: -.5", -0.5),
        ("lr: 3", 3),
        ("lr: .inf", float("inf")),
        ("day: 2020-01-01", "2020-01-01"),
        ("version: 1.2.3", "1.2.3"),
        ("name: e5", "e5"),
        ("seed: -30", -30),
        ("seed: 0", 0),
        ("seed: 010", "010"),
        ("seed: 1:30", "1:30"),
        ("seed: 0x10", "0x10"),
        ("seed: 1_000", "1_000"),
    ],
)
def test_words_are_words_and_numbers_are_numbers(tmp_path, text, value):
    pytest.importorskip("yaml", reason="needs the extra [yaml]")
    path = tmp_path / "a.yaml"
    path.write_text(text)
    (found,) = read_yaml(path).values()
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"a: 1\na: 2\n", "the key 'a' is given twice"),
        (b"a: {b: 1, b: 2}\n", "the key 'b' is given twice"),
        (b"1: 2\n", "a key must be a word"),
        (b'!!python/object/apply:os.system ["id"]\n', "could not determine a constructor"),
        (b"a: [1\n", "not valid YAML"),
        (b"\x80\x81", "not valid YAML"),
        (b"[" * 5000, "not valid YAML"),
        (b" " * (1 << 21), "bytes"),
    ],
)
def test_files_that_are_not_plain_yaml_are_sentences(tmp_path, data, words):
    pytest.importorskip("yaml", reason="needs the extra [yaml]")
    path = tmp_path / "a.yaml"
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=words):
        read_yaml(path)
