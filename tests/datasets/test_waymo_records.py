"""TFRecord framing: the checksums, and what a damaged file still gives."""

import struct
from pathlib import Path

import numpy as np
import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.waymo_records import find_records, masked_crc32c, read_head, read_record


def crc32c(data: bytes) -> int:
    """Bit by bit, from the definition: the polynomial 0x1EDC6F41 reversed, all ones before and after."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0x82F63B78 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def masked(data: bytes) -> bytes:
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def framed(data: bytes) -> bytes:
    head = struct.pack("<Q", len(data))
    return head + masked(head) + data + masked(data)


RECORDS = [b"first", b"", bytes(range(256)), b"last one"]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "some.tfrecord"
    path.write_bytes(b"".join(map(framed, RECORDS)))
    return path


def test_the_checksum_is_crc32c_of_the_rfc_and_of_the_definition():
    assert crc32c(b"\0" * 32) == 0x8A9136AA  # RFC 3720, B.4
    assert crc32c(b"\xff" * 32) == 0x62A8AB43
    for size in (*range(20), 1001):
        data = np.random.default_rng(size).bytes(size)
        assert struct.pack("<I", masked_crc32c(data)) == masked(data)


def test_records_come_back_in_order_and_one_by_one(file):
    places, problem = find_records(file)
    assert problem is None
    assert [p.length for p in places] == [5, 0, 256, 8]
    assert [read_record(p) for p in places[::-1]] == RECORDS[::-1]
    assert read_head(places[2], 4) == b"\0\1\2\3"
    assert read_head(places[0], 100) == b"first"


def test_an_empty_file_has_no_record(tmp_path):
    (tmp_path / "a.tfrecord").write_bytes(b"")
    assert find_records(tmp_path / "a.tfrecord") == ((), None)


def test_wrong_data_costs_one_record_and_names_it(file):
    data = bytearray(file.read_bytes())
    data[21 + 16 + 12 + 100] ^= 1  # inside the third record
    file.write_bytes(data)
    places, problem = find_records(file)
    assert problem is None
    assert [read_record(places[i]) for i in (0, 1, 3)] == [RECORDS[i] for i in (0, 1, 3)]
    with pytest.raises(
        InvalidInput, match=r"some\.tfrecord, record 2 at byte 37: the checksum of its 256 bytes of data is wrong"
    ):
        read_record(places[2])


def test_a_wrong_length_loses_the_rest_and_says_so(file):
    data = bytearray(file.read_bytes())
    data[37] ^= 1
    file.write_bytes(data)
    places, problem = find_records(file)
    assert len(places) == 2
    assert (
        problem == f"{file}, record 2 at byte 37: the checksum of the length is wrong; is it a TFRecord file? Else copy it again"
    )


@pytest.mark.parametrize(
    ("size", "message"),
    [
        (37 + 5, "record 2 at byte 37: the file ends inside the length field"),
        (37 + 12 + 200, "record 2 at byte 37: 256 bytes of data are declared, 200 are left; it was cut off"),
        (37 + 12 + 256 + 2, "record 2 at byte 37: 256 bytes of data are declared, 258 are left"),
    ],
)
def test_a_file_that_is_cut_off_gives_what_is_before(file, size, message):
    places, _ = find_records(file)
    file.write_bytes(file.read_bytes()[:size])
    good, problem = find_records(file)
    assert good == places[:2]
    assert message in problem
    assert [read_record(p) for p in good] == RECORDS[:2]
    with pytest.raises(InvalidInput, match="record 2 at byte 37: the file ends inside the data"):
        read_record(places[2])  # found before the file became shorter


def test_a_declared_length_beyond_the_file_takes_no_memory(tmp_path):
    head = struct.pack("<Q", 1 << 60)
    (tmp_path / "a.tfrecord").write_bytes(head + masked(head) + b"x")
    places, problem = find_records(tmp_path / "a.tfrecord")
    assert places == ()
    assert "1152921504606846976 bytes of data are declared" in problem
    with pytest.raises(InvalidInput, match="no TFRecord file"):
        find_records(tmp_path / "b.tfrecord")
