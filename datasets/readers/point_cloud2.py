"""ROS messages of the type PointCloud2 as rows of numbers.

Facts from `sensor_msgs/msg/PointCloud2.msg` and `PointField.msg` of github.com/ros2/common_interfaces: a point is `point_step` bytes; each
field has an offset in it and one of eight number types; a row is `row_step` bytes, perhaps with padding; `is_dense` says that no point is
invalid. ROS 1 has the same message. Every size is compared with the bytes that are there before it is used.

Read next: `bag.py`, which finds the messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InvalidInput
from ...core.field_names import find_fields
from ...core.foreign_text import shown
from ...core.point_files import MOST_SCAN_BYTES

_NUMBERS = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 8: "f8"}


class _Field(Protocol):
    name: str
    offset: int
    datatype: int
    count: int


class PointCloud2(Protocol):
    """The fields of the message, as ROS libraries name them."""

    height: int
    width: int
    fields: Sequence[_Field]
    is_bigendian: bool
    point_step: int
    row_step: int
    data: NDArray[np.uint8]
    is_dense: bool


def rows_of_cloud(message: PointCloud2, columns: Sequence[str], where: str) -> tuple[tuple[str, ...], NDArray[np.float64]]:
    """Read the wanted fields of a message.

    Args:
        message: The message.
        columns: Names of fields; empty for x, y, z, and intensity where the message has it. See `find_fields`.
        where: File and message, for error messages.

    Returns:
        The names of the columns, and their values (N, C).

    Raises:
        InvalidInput: The sizes of the message do not fit its bytes, it is too large, or a field is missing.
    """
    data = np.asarray(message.data, np.uint8)
    points, step, row = message.height * message.width, message.point_step, message.row_step
    fits = step > 0 and message.width * step <= row and message.height * row <= len(data)
    if (points and not fits) or len(data) > MOST_SCAN_BYTES:
        raise InvalidInput(
            f"{where}: {message.height} rows of {message.width} points with {step} bytes each and {row} bytes per row do not fit into "
            f"{len(data):,} bytes (at most {MOST_SCAN_BYTES:,} are read); the message is damaged"
        )
    try:
        names, wanted = find_fields([field.name for field in message.fields], columns)
    except InvalidInput as error:
        raise InvalidInput(f"{where}: {error}") from error
    order = ">" if message.is_bigendian else "<"
    kinds: list[tuple[str, int]] = []
    for number in wanted:
        field = message.fields[number]
        kind = _NUMBERS.get(field.datatype)
        if kind is None or field.offset + int(kind[1]) > step:
            raise InvalidInput(
                f"{where}: the field {shown(field.name, most=60)} has the number type {field.datatype} at byte {field.offset} of {step}; the message is "
                "damaged"
            )
        kinds.append((order + kind, field.offset))
    if not points:
        return names, np.empty((0, len(names)))
    table = data[: message.height * row].reshape(message.height, row)[:, : message.width * step]
    point = np.dtype({"names": list(names), "formats": [k for k, _ in kinds], "offsets": [o for _, o in kinds], "itemsize": step})
    values: NDArray[Any] = np.ascontiguousarray(table).reshape(-1).view(point)
    return names, np.stack([values[name].astype(np.float64) for name in names], 1)
