"""Text files of users are read with and without a byte order mark; everything else is a sentence."""

import os

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.point_files import MOST_SCAN_BYTES, read_scan
from upcycle3d.core.tensor_file import read_tensors
from upcycle3d.core.text_files import MOST_TEXT_BYTES, read_text
from upcycle3d.datasets.picture_size import read_picture_size
from upcycle3d.perception.adapt.glc.feature_file import read_target_features


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


def test_what_never_ends_and_what_is_too_large_is_refused_before_it_is_read(tmp_path):
    """A pipe without a writer and /dev/zero would hold a command for ever, or take all memory."""
    os.mkfifo(tmp_path / "pipe.txt")
    (tmp_path / "zero.txt").symlink_to("/dev/zero")
    for name in ("pipe.txt", "zero.txt"):
        with pytest.raises(InvalidInput, match=r"the label file .* is not a regular file but a pipe"):
            read_text(tmp_path / name, "label file")
    with open(tmp_path / "large.txt", "wb") as file:
        file.truncate(MOST_TEXT_BYTES + 1)
    with pytest.raises(InvalidInput, match=r"has 16,777,217 bytes, more than the 16,777,216 that are read"):
        read_text(tmp_path / "large.txt", "label file")
    (tmp_path / "long.txt").write_bytes(b"\n" * 400_001)
    with pytest.raises(InvalidInput, match=r"has 400,001 lines"):
        read_text(tmp_path / "long.txt", "label file")


def test_every_reader_refuses_pipes_and_large_scans(tmp_path):
    readers = {
        "a.bin": read_scan,
        "a.safetensors": read_tensors,
        "a.png": read_picture_size,
        "a.npz": read_target_features,
    }
    for name, read in readers.items():
        os.mkfifo(tmp_path / name)
        with pytest.raises(InvalidInput, match="not a regular file"):
            read(tmp_path / name)
        (tmp_path / name).unlink()
    for name in ("b.bin", "b.npy", "b.pcd"):
        with open(tmp_path / name, "wb") as file:
            file.truncate(MOST_SCAN_BYTES + 16)
        with pytest.raises(InvalidInput, match=r"the scan .* has 125,829,136 bytes, more than the 125,829,120 that are read"):
            read_scan(tmp_path / name)
