"""The footer of a Parquet file is read as Arrow reads it, and a damaged one is an error, never the end of the process."""

from __future__ import annotations

import contextlib
import random
import subprocess
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from upcycle3d.datasets.parquet_footer import declared_values

TABLE = pa.table(
    {
        "name": ["a", "b", "c", "d"],
        "number": pa.array([1, 2, None, 4], pa.int64()),
        "box": [[1.0, 2.0], [], None, [3.0]],
        "flag": [True, False, True, None],
        "pair": [{"x": 1, "y": 2.0}] * 4,
    }
)


def written(**options) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(TABLE.replace_schema_metadata({b"key": b"value"}), sink, **options)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"row_group_size": 3},
        {"compression": "zstd"},
        {"version": "1.0"},
        {"use_dictionary": False},
        {"write_page_index": True},
    ],
)
def test_the_numbers_are_those_of_arrow(options, tmp_path):
    data = written(**options)
    (tmp_path / "a.parquet").write_bytes(data)
    metadata = pq.ParquetFile(pa.BufferReader(data)).metadata
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    columns = [[group.column(c) for c in range(group.num_columns)] for group in groups]
    expected = tuple({column.path_in_schema: column.num_values for column in group} for group in columns)
    assert declared_values(data) == declared_values(tmp_path / "a.parquet") == expected
    assert "box.list.element" in expected[0]


def test_a_damaged_footer_is_an_error_of_arrow_or_gives_numbers():
    data = written()
    for seed in range(2000):
        rng = random.Random(seed)
        at = rng.randrange(len(data) // 2, len(data))
        damaged = data[:at] + bytes([rng.randrange(256)]) + data[at + 1 :]
        with contextlib.suppress(pa.ArrowInvalid):
            assert all(isinstance(n, int) for group in declared_values(damaged) for n in group.values())
    for cut in (0, 4, 8, 12, len(data) - 1):
        with pytest.raises(pa.ArrowInvalid):
            declared_values(data[:cut])


def test_a_damaged_column_does_not_end_the_process(tmp_path):
    """Damage the numbers in a footer one by one in another process: Arrow ended it at some of them when it was asked directly."""
    (tmp_path / "a.parquet").write_bytes(written(write_page_checksum=True))
    code = """
import sys
from pathlib import Path
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.parquet import read_parquet
path = Path(sys.argv[1])
data = path.read_bytes()
footer = int.from_bytes(data[-8:-4], "little")
for at in range(len(data) - 8 - footer, len(data) - 8):
    for flip in (1, 2, 16):
        path.write_bytes(data[:at] + bytes([data[at] ^ flip]) + data[at + 1 :])
        try:
            read_parquet(path, None, remedy="make it again")
        except InvalidInput:
            pass
print("done")
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "a.parquet"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "done"), done.stderr[-500:]
