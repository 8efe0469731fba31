"""Reading small Parquet files (an index, a catalog) with nothing taken on trust. `read_parquet` is the one way to do it.

A cut, flipped or foreign file gives the project's error with path and remedy; a small file that unpacks into gigabytes is refused
before the memory is taken. Tables of images are streamed instead: `waymo_parquet.py`.
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from ..core.errors import InvalidInput, UpcycleError
from .parquet_footer import declared_values

MOST_BYTES = 4 << 30
"""Bytes of the largest file, and of the largest table in memory."""
MOST_ROWS = 50_000_000
"""Rows of the largest table."""
_BATCH_ROWS = 4096  # rows that are unpacked before their bytes are counted

PARQUET_FAULTS = (pa.ArrowException, OSError, ValueError, OverflowError, MemoryError)
"""What pyarrow raises for a damaged file."""


def read_parquet(
    path: Path | str,
    schema: pa.Schema | None,
    *,
    remedy: str,
    checksum: int | None = None,
    max_bytes: int = MOST_BYTES,
    max_rows: int = MOST_ROWS,
    error: type[UpcycleError] = InvalidInput,
) -> pa.Table:
    """Read a whole Parquet file and check all of it.

    Args:
        path: The file.
        schema: The columns that it must have; None takes any.
        remedy: What to do when it cannot be read: "prepare the dataset again".
        checksum: CRC-32 of the whole file, where it is known; see `checksum_in_name`.
        max_bytes: Bytes of the largest file that is read, and of the largest table that is made of it.
        max_rows: Rows of the largest table.
        error: Class of the error to raise.

    Returns:
        The table.

    Raises:
        UpcycleError: The file is missing, damaged, too large or has other columns. The class is `error`, and the message names path,
            reason and remedy.
    """
    path = Path(path)
    try:
        if not path.is_file():
            raise error(f"{path} is missing; {remedy}")
        size = path.stat().st_size
        if size > max_bytes:
            raise error(f"{path} has {size:,} bytes, more than the {max_bytes:,} that are read; {remedy}")
        data = path.read_bytes()
        if checksum is not None and zlib.crc32(data) != checksum:
            raise error(f"{path} is damaged: its bytes have another checksum than the one recorded for them; {remedy}")
        groups = declared_values(data)
        file = pq.ParquetFile(pa.BufferReader(data), page_checksum_verification=True)
        if schema is not None and not file.schema_arrow.equals(schema):
            raise error(f"{path} has other columns than expected; {remedy}")
        rows = file.metadata.num_rows
        if rows > max_rows:
            raise error(f"{path} declares {rows:,} rows, more than the {max_rows:,} that are read; {remedy}")
        table = read_within(file, groups, None, max_bytes=max_bytes)
        if table is None:
            raise error(f"{path} unpacks into more than {max_bytes:,} bytes; {remedy}")
    except PARQUET_FAULTS as fault:
        if isinstance(fault, UpcycleError):
            raise
        raise error(f"{path} is damaged ({str(fault)[:200]}); {remedy}") from fault
    return table


def read_within(
    file: pq.ParquetFile, groups: Sequence[Mapping[str, int]], columns: Sequence[str] | None, *, max_bytes: int
) -> pa.Table | None:
    """Read columns of an open file, unless they take too much memory. A run of equal values needs few bytes in a file.

    Args:
        file: The file.
        groups: What its columns declare, from `declared_values`.
        columns: Names of columns; None takes all.
        max_bytes: Bytes of the largest table.

    Returns:
        The table, checked, or None where it would be larger.

    Raises:
        ArrowException: The file is damaged; see `PARQUET_FAULTS`.
    """
    if sum_values(groups, columns) * 4 > max_bytes:
        return None
    batches, taken = [], 0
    for batch in file.iter_batches(_BATCH_ROWS, columns=None if columns is None else list(columns), use_threads=False):
        batches.append(batch)
        taken += batch.nbytes
        if taken > max_bytes:
            return None
    whole = file.schema_arrow
    table = pa.Table.from_batches(batches, whole if columns is None else pa.schema([whole.field(name) for name in columns]))
    table.validate(full=True)
    if len(table) != file.metadata.num_rows:
        raise pa.ArrowInvalid(f"it declares {file.metadata.num_rows} rows and holds {len(table)}")
    return table


def sum_values(
    groups: Sequence[Mapping[str, int]], columns: Sequence[str] | None = None, chosen: Sequence[int] | None = None
) -> int:
    """Add up the values that columns declare.

    Args:
        groups: From `declared_values`.
        columns: Names of columns; None takes all.
        chosen: Numbers of row groups; None takes all.

    Returns:
        The number of values of these columns, those inside lists counted one by one.
    """
    return sum(
        count
        for group in (groups if chosen is None else [groups[i] for i in chosen])
        for path, count in group.items()
        if columns is None or any(path == name or path.startswith(f"{name}.list.") for name in columns)
    )


def checksum_in_name(path: Path | str) -> int | None:
    """Take the checksum out of a name such as `index-0123abcd.parquet`.

    Args:
        path: The file.

    Returns:
        The CRC-32 that the name holds, or None where it holds none.
    """
    found = re.fullmatch(r".*-([0-9a-f]{8})\.\w+", Path(path).name)
    return int(found[1], 16) if found else None
