"""Parquet files are read with their checksum, columns and sizes, and every damage is a sentence."""

import zlib
from contextlib import suppress

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.parquet import checksum_in_name, read_parquet

REMEDY = "write it again"
TABLE = pa.table({"id": ["a", "b", "c"], "values": pa.array([[1.0, 2.0], None, []], pa.list_(pa.float32()))})


def stored(table: pa.Table = TABLE, **options: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink, **options)
    return sink.getvalue().to_pybytes()


def refused(path, words, **options):
    with pytest.raises(InvalidInput, match=words) as error:
        read_parquet(path, options.pop("schema", TABLE.schema), remedy=REMEDY, **options)
    assert str(path) in str(error.value)
    assert str(error.value).endswith(REMEDY)


def test_a_whole_file_is_read(tmp_path):
    data = stored()
    path = tmp_path / f"index-{zlib.crc32(data):08x}.parquet"
    path.write_bytes(data)
    assert read_parquet(path, TABLE.schema, remedy=REMEDY, checksum=checksum_in_name(path)).equals(TABLE)
    assert checksum_in_name("parts/0123456789abcdef.parquet") is None


def test_what_is_wrong_with_a_file_is_said(tmp_path):
    path = tmp_path / "a.parquet"
    refused(path, "is missing")
    path.write_bytes(b"")
    refused(path, "is damaged")
    path.write_bytes(stored())
    refused(path, "another checksum", checksum=1)
    refused(path, "other columns", schema=pa.schema({"id": pa.string()}))
    refused(path, "declares 3 rows, more than the 2", max_rows=2)
    refused(path, "more than the 100 that are read", max_bytes=100)
    refused(tmp_path, "is missing")
    path.write_bytes(stored(pa.table({"id": pa.array([b"\xff"], pa.binary()).cast(pa.string(), safe=False)})))
    refused(path, "is damaged .*UTF8", schema=None)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"a": pa.array(["b" * (1 << 16)] * 4096)}),  # a dictionary of one long text
        pa.table({"a": pa.array([[0] * 3_000_000])}),  # one run of equal numbers
    ],
    ids=["text", "list"],
)
def test_a_small_file_that_unpacks_into_much_memory_is_refused(tmp_path, table):
    path = tmp_path / "a.parquet"
    path.write_bytes(stored(table))
    assert path.stat().st_size < 1 << 20
    refused(path, "unpacks into more than", schema=None, max_bytes=4 << 20)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_no_damage_to_a_file_is_a_traceback(tmp_path_factory, data):
    path = tmp_path_factory.getbasetemp() / "mutated.parquet"
    content = bytearray(stored())
    for _ in range(data.draw(st.integers(1, 3))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(content[: data.draw(st.integers(0, len(content)))])
    with suppress(InvalidInput):
        read_parquet(path, TABLE.schema, remedy=REMEDY)
