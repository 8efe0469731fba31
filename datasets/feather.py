"""Reading columns of a Feather file (Arrow's file format) with nothing taken on trust.

A cut or foreign file gives the project's error with path and remedy. A file that unpacks into gigabytes is refused batch by batch.

Read next: `readers/argoverse2.py`, whose scans and boxes are such files.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ..core.errors import InvalidInput
from ..core.files import check_input_file
from ..core.foreign_text import shown
from .parquet import PARQUET_FAULTS

_MOST_BYTES = 256 << 20  # of a file, and of its columns in memory


def read_feather(path: Path, columns: Sequence[str], *, what: str, remedy: str) -> dict[str, NDArray[Any]]:
    """Read columns of a Feather file.

    Args:
        path: The file.
        columns: Names of the columns. Others are not unpacked.
        what: What the file is, for messages: "scan".
        remedy: What to do when it cannot be read.

    Returns:
        One array per column; text becomes an array of Python strings.

    Raises:
        InvalidInput: The file is missing, damaged or too large, lacks a column, or a value is missing.
    """
    if not path.is_file():
        raise InvalidInput(f"there is no {what} {path}; {remedy}")
    check_input_file(path, what, most=_MOST_BYTES)
    try:
        with pa.OSFile(str(path)) as file:
            names = pa.ipc.open_file(file).schema.names
            missing = [name for name in columns if name not in names]
            if missing:
                raise InvalidInput(
                    f"{path}: there is no column {', '.join(missing)}; the {what} has {shown(', '.join(names))}; {remedy}"
                )
            fields = sorted(names.index(name) for name in columns)
            reader = pa.ipc.open_file(file, options=pa.ipc.IpcReadOptions(included_fields=fields))
            batches, size = [], 0
            for number in range(reader.num_record_batches):
                batches.append(reader.get_batch(number))
                size += batches[-1].nbytes
                if size > _MOST_BYTES:
                    raise InvalidInput(f"{path}: the {what} unpacks into more than {_MOST_BYTES:,} bytes; {remedy}")
            table = pa.Table.from_batches(batches, reader.schema)
            table.validate(full=True)
            empty = [name for name in columns if table[name].null_count]
            if empty:
                raise InvalidInput(f"{path}: the column {empty[0]} of the {what} has missing values; {remedy}")
            return {name: _array(table[name]) for name in columns}
    except InvalidInput:
        raise
    except PARQUET_FAULTS as error:
        raise InvalidInput(f"{path}: the {what} is not a readable Feather file ({shown(error, most=200)}); {remedy}") from error


def numbers(path: Path, table: dict[str, NDArray[Any]], columns: Sequence[str]) -> NDArray[np.float64]:
    """Join number columns of a table that was read.

    Args:
        path: The file, for the message.
        table: From `read_feather`.
        columns: Names of the columns.

    Returns:
        (N, C) float64.

    Raises:
        InvalidInput: A column holds something else than numbers.
    """
    for name in columns:
        if table[name].dtype.kind not in "fiu":
            raise InvalidInput(
                f"{path}: the column {name} must hold numbers, found {table[name].dtype}; put the original file back"
            )
    return np.stack([table[name].astype(np.float64) for name in columns], 1)


def _array(column: pa.ChunkedArray) -> NDArray[Any]:
    kind = column.type
    if pa.types.is_dictionary(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
        return np.array(column.to_pylist(), dtype=object)
    found: NDArray[Any] = column.to_numpy()
    return found
