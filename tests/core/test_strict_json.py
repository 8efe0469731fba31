"""JSON from outside is read strictly, and one value has one spelling."""

import os

import pytest

from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.core.strict_json import canonical_json, read_json, strict_json, write_json_file


class Refused(UpcycleError):
    """An error of the caller."""


def test_one_value_has_one_spelling():
    assert canonical_json({"b": [1, 2.5, None], "a": "é"}) == b'{"a":"\\u00e9","b":[1,2.5,null]}'
    assert canonical_json({"a": "é", "b": [1, 2.5, None]}) == canonical_json({"b": [1, 2.5, None], "a": "é"})
    assert strict_json(canonical_json({"a": 0.1 + 0.2}), "it") == {"a": 0.1 + 0.2}
    with pytest.raises(ValueError, match="not JSON compliant"):
        canonical_json(float("nan"))


@pytest.mark.parametrize(
    "data",
    [
        b'{"a": 1, "a": 2}',
        b"[NaN]",
        b"[1e999, Infinity]",
        b"{",
        b"",
        b"\xff",
        b"[" * 100_000,
        b"1" * 10_000,
        b"[1e999]",
        b"1" * 30,
        b"[" * 80 + b"]" * 80,
        b'["\\ud800"]',
        b'{"\\udfff": 1}',
    ],
    ids=[
        "key twice",
        "NaN",
        "infinity",
        "open",
        "empty",
        "no UTF-8",
        "deep",
        "long integer",
        "large number",
        "more than 64 bits",
        "80 levels",
        "half a pair",
        "half a pair in a key",
    ],
)
def test_what_python_reads_leniently_is_refused_with_the_callers_error(data):
    with pytest.raises(InvalidInput, match="the letter is not valid JSON"):
        strict_json(data, "the letter")
    with pytest.raises(Refused, match="the letter is not valid JSON"):
        strict_json(data, "the letter", Refused)


REMEDY = "write it again"


def test_a_file_is_read_with_and_without_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.json"
    write_json_file(path, {"b": [1, 2.5], "a": None})
    assert read_json(path, "the file", remedy=REMEDY) == {"b": [1, 2.5], "a": None}
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_json(path, "the file", remedy=REMEDY) == {"b": [1, 2.5], "a": None}


def test_whatever_is_wrong_with_a_file_is_said_with_its_path_and_the_remedy(tmp_path):
    path = tmp_path / "a.json"
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    cases = [
        (path, "there is no"),
        (path / "b.json", "there is no"),
        (tmp_path / "folder", "is not a file"),
        (tmp_path / "pipe", "is not a file"),
        (tmp_path / ("n" * 300), "cannot be read: File name too long"),
    ]
    for wrong, words in cases:
        with pytest.raises(Refused, match=words) as error:
            read_json(wrong, "the file", remedy=REMEDY, error=Refused)
        assert str(wrong) in str(error.value)
        assert str(error.value).endswith(REMEDY)
    for content, words in [("[1]", "must hold an object with named entries, found a list"), ("{", "is not valid JSON")]:
        path.write_text(content)
        with pytest.raises(InvalidInput, match=f"{words}.*; {REMEDY}"):
            read_json(path, "the file", remedy=REMEDY)
    path.write_text('"' + "a" * 100 + '"')
    with pytest.raises(InvalidInput, match="has 102 bytes, more than the 100 that are read"):
        read_json(path, "the file", remedy=REMEDY, max_bytes=100)
    assert read_json(path, "the file", remedy=REMEDY, kind=object) == "a" * 100


def test_numbers_that_are_not_finite_pass_only_where_the_caller_allows_them():
    assert str(strict_json(b"[NaN, Infinity]", "it", allow_nan=True)) == "[nan, inf]"


def test_bytes_with_a_byte_order_mark_are_read_too():
    assert strict_json(b"\xef\xbb\xbf" + b'{"a": 1}', "the manifest") == {"a": 1}
