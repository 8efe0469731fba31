"""Text files of users are read with and without a byte order mark; everything else is a sentence."""

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.text_files import read_text


@pytest.mark.parametrize("data", [b"Car 1\r\n", b"\xef\xbb\xbfCar 1\r\n", "Fußgänger".encode()])
def test_utf_8_is_read_without_its_mark(tmp_path, data):
    (tmp_path / "a.txt").write_bytes(data)
    assert read_text(tmp_path / "a.txt", "label file") == data.decode("utf-8-sig")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ("Car".encode("utf-16"), "the label file .*a.txt is UTF-16; save it as text in UTF-8"),
        (b"\x89PNG\0\0", "is no text"),
        (b"Car\nFu\xdfg\n", "line 2: byte 0xdf is not UTF-8, perhaps a letter in Latin-1"),
    ],
)
def test_other_bytes_are_a_sentence(tmp_path, data, message):
    (tmp_path / "a.txt").write_bytes(data)
    with pytest.raises(InvalidInput, match=message):
        read_text(tmp_path / "a.txt", "label file")
    with pytest.raises(InvalidInput, match=r"cannot read the label file .*No such file"):
        read_text(tmp_path / "none.txt", "label file")
