"""Waymo's v1 `Frame` message, read directly from its bytes.

A message is a row of fields, each a key (number << 3 | wire type) and a value: 0 varint, 1 eight bytes, 2 a length and bytes, 5 four
bytes (protobuf.dev, "Encoding"). Sixty lines read that, and only what is needed: the camera pictures, nine tenths of a record, are
skipped, and the numbers of a range image are one view of the bytes. The protobuf library would decode everything and return floats
one by one. Field numbers: waymo-open-dataset, `dataset.proto` and `label.proto`.

Read next: `waymo_geometry.py` for what a frame holds, `waymo_records.py` for the file around the messages.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..core.errors import InvalidInput
from .waymo_geometry import LASERS, Image, LaserScan, Matrix, WaymoFrame, WaymoObjects
from .waymo_records import RecordPlace, read_head, read_record

# Frame: 1 context, 2 timestamp_micros, 3 pose, 5 lasers, 6 laser_labels (4 images and the rest are skipped).
# Context: 1 name, 3 laser_calibrations. LaserCalibration: 1 name, 2 inclinations, 3 min, 4 max, 5 extrinsic. Transform: 1 numbers.
# Laser: 1 name, 2 ri_return1, 3 ri_return2. RangeImage: 2 image, 4 poses, both zlib-compressed MatrixFloat: 1 data, 2 shape (1 dims).
# Label: 1 box, 3 type, 4 id, 5 detection_difficulty_level, 7 num_lidar_points_in_box.
_BOX_FIELDS = (1, 2, 3, 5, 4, 6, 7)  # x, y, z, length, width, height, heading: width comes before length in Label.Box
_MOST_IMAGE_BYTES = 8 << 20  # the largest real one, poses of 64 x 2650 pixels, has 4 MB
_MOST_FRAME_BYTES = 64 << 20  # of all images; a real frame has 25 MB
# A field costs up to 300 bytes here and two in the file. A real frame has hundreds of fields, a label thirty.
_MOST_FIELDS = 20_000
_MOST_LABEL_FIELDS = 500
_MOST_LABELS = 5_000
_HEAD_BYTES = 1 << 16

_FieldValue = int | memoryview
_Fields = dict[int, list[_FieldValue]]


def read_frame(place: RecordPlace) -> WaymoFrame:
    """Read the frame in a record.

    Args:
        place: The record.

    Returns:
        The frame, labels included.

    Raises:
        InvalidInput: With the record: its checksum is wrong, its bytes are not a `Frame`, or an image is damaged.
    """
    try:
        return parse_frame(read_record(place))
    except InvalidInput as error:
        raise InvalidInput(f"{error}" if str(place) in str(error) else f"{place}: {error}") from error


def read_identity(place: RecordPlace) -> tuple[str, int]:
    """Read which frame a record holds, from its first bytes: the data is neither read as a whole nor verified.

    Args:
        place: The record.

    Returns:
        Context name of the segment, and the time in microseconds.

    Raises:
        InvalidInput: The bytes are not a `Frame`.
    """
    found: _Fields = {}
    head = memoryview(read_head(place, _HEAD_BYTES))
    try:
        for field, value in _walk(head):
            found.setdefault(field, []).append(value)
            if 1 in found and 2 in found:
                break
        return _identity(found)
    except InvalidInput as error:
        if place.length > len(head):  # the two fields are not the first ones
            return _identity(_fields(memoryview(read_record(place))))
        raise InvalidInput(f"{place}: {error}") from error


def parse_frame(data: bytes) -> WaymoFrame:
    """Read a serialized `Frame` message. Fields that are not needed are skipped.

    Args:
        data: The message.

    Returns:
        The frame, labels included.

    Raises:
        InvalidInput: The bytes are not a `Frame`, or an image is damaged.
    """
    message = _fields(memoryview(data))
    segment, timestamp = _identity(message)
    calibrations = {_int(f, 1): f for f in map(_fields, _messages(_fields(_message(message, 1)), 3))}
    scans = _messages(message, 5)
    if len(scans) > len(LASERS):
        raise InvalidInput(f"the frame has {len(scans)} laser scans; a Waymo vehicle has {len(LASERS)} lasers")
    budget = _Budget()
    lasers = tuple(_laser(_fields(m), calibrations, budget) for m in scans)
    found = _messages(message, 6)
    if len(found) > _MOST_LABELS:
        raise InvalidInput(f"the frame has {len(found)} laser labels, more than the {_MOST_LABELS} that are read")
    labels = [_fields(m, _MOST_LABEL_FIELDS) for m in found]
    return WaymoFrame(
        segment=segment,
        timestamp=timestamp,
        pose=_transform(_message(message, 3)) if 3 in message else None,
        lasers=tuple(laser for laser in lasers if laser.returns),
        objects=WaymoObjects(
            boxes=np.array([_box(_fields(_message(f, 1))) for f in labels], np.float64).reshape(-1, 7),
            types=np.array([_int(f, 3) for f in labels], np.int64),
            num_points=np.array([_int(f, 7, -1) for f in labels], np.int64),
            levels=np.array([_int(f, 5) for f in labels], np.int64),
            names=tuple(_text(f, 4) for f in labels),
        ),
    )


def _identity(message: _Fields) -> tuple[str, int]:
    segment = _text(_fields(_message(message, 1)), 1)
    if not segment or 2 not in message:
        raise InvalidInput("the message has no context name or no timestamp; is it a Frame of the Perception dataset?")
    return segment, _int(message, 2)


@dataclass
class _Budget:
    """Bytes that the images of a frame may still take."""

    left: int = _MOST_FRAME_BYTES


def _laser(laser: _Fields, calibrations: dict[int, _Fields], budget: _Budget) -> LaserScan:
    name = _int(laser, 1)
    first = _fields(_message(laser, 2))
    images = [_image(_message(_fields(_message(laser, field)), 2), 4, budget) for field in (2, 3)]
    returns = tuple(image for image in images if image is not None)
    if returns and name not in calibrations:
        raise InvalidInput(f"laser {name} has a range image but no calibration; its points cannot be placed")
    calibration = calibrations.get(name, {})
    return LaserScan(
        name=name,
        returns=returns,
        pixel_poses=_image(_message(first, 4), 6, budget) if returns else None,
        extrinsic=_transform(_message(calibration, 5)) if returns else np.eye(4),
        inclinations=_numbers(calibration.get(2, []), "<f8") if calibration.get(2) else None,
        inclination_range=(_double(calibration, 3), _double(calibration, 4)),
    )


def _image(compressed: memoryview, channels: int, budget: _Budget) -> Image | None:
    """(H, W, channels) of a zlib-compressed MatrixFloat; None for no bytes, which means that the image was left out."""
    if not compressed:
        return None
    decoder = zlib.decompressobj()
    try:
        data = decoder.decompress(compressed, min(_MOST_IMAGE_BYTES, max(budget.left, 1)))
    except zlib.error as error:
        raise InvalidInput(f"a range image is not zlib data ({error}); the file is damaged") from error
    if not decoder.eof:
        raise InvalidInput(
            f"a range image is cut off or larger than {_MOST_IMAGE_BYTES} bytes, or all of them than {_MOST_FRAME_BYTES}; the file is damaged"
        )
    budget.left -= len(data)
    matrix = _fields(memoryview(data))
    shape = [v for m in _messages(matrix, 2) for v in _integers(_fields(m).get(1, []))]
    values = _numbers(matrix.get(1, []), "<f4")
    if len(shape) != 3 or shape[2] != channels or shape[0] * shape[1] * shape[2] != len(values):
        raise InvalidInput(
            f"a range image declares the shape {shape} and holds {len(values)} numbers; expected (rows, columns, {channels})"
        )
    return values.reshape(shape)


def _box(box: _Fields) -> list[float]:
    missing = [field for field in _BOX_FIELDS if field not in box]
    if missing:
        raise InvalidInput(
            f"a laser label's box lacks the fields {missing} of Label.Box; a 3D box needs center, size and heading"
        )
    return [_double(box, field) for field in _BOX_FIELDS]


def _transform(message: memoryview) -> Matrix:
    numbers = _numbers(_fields(message).get(1, []), "<f8")
    if len(numbers) != 16:
        raise InvalidInput(f"a transform holds {len(numbers)} numbers, expected 16 (4 x 4)")
    return numbers.reshape(4, 4)


# ---- the wire format


def _walk(data: memoryview) -> Iterator[tuple[int, _FieldValue]]:
    """Yield (field number, value) in order. Raises InvalidInput where the bytes are not a message."""
    position = 0
    while position < len(data):
        key, position = _varint(data, position)
        field, kind = key >> 3, key & 7
        value: _FieldValue
        if kind == 0:
            value, position = _varint(data, position)
        else:
            if kind == 2:
                size, position = _varint(data, position)
            elif kind in (1, 5):
                size = 8 if kind == 1 else 4
            else:
                raise InvalidInput(f"byte {position} of a message has the wire type {kind}; this is not a protobuf message")
            if position + size > len(data):
                raise InvalidInput(f"field {field} of a message declares {size} bytes, {len(data) - position} are left")
            value = data[position : position + size]
            position += size
        yield field, value


def _varint(data: memoryview, position: int) -> tuple[int, int]:
    """(value, next position). A byte has seven bits, lowest first; the eighth bit is set on all but the last byte."""
    value = 0
    for i, byte in enumerate(data[position : position + 10]):
        value |= (byte & 127) << 7 * i
        if byte < 128:
            return value & (1 << 64) - 1, position + i + 1
    raise InvalidInput(f"a number at byte {position} of a message does not end; this is not a protobuf message")


def _fields(data: memoryview, most: int = _MOST_FIELDS) -> _Fields:
    found: _Fields = {}
    for count, (field, value) in enumerate(_walk(data)):
        if count == most:
            raise InvalidInput(f"a message has more than {most} fields; this is not the expected message, or the file is damaged")
        found.setdefault(field, []).append(value)
    return found


def _messages(fields: _Fields, number: int) -> list[memoryview]:
    values = fields.get(number, [])
    good = [v for v in values if isinstance(v, memoryview)]
    if len(good) != len(values):
        raise InvalidInput(f"field {number} should hold a message and holds a number; this is not the expected message")
    return good


def _message(fields: _Fields, number: int) -> memoryview:
    """The bytes of a field; empty if the message lacks it."""
    return (_messages(fields, number) or [memoryview(b"")])[-1]


def _text(fields: _Fields, number: int) -> str:
    try:
        return bytes(_message(fields, number)).decode()
    except UnicodeDecodeError as error:
        raise InvalidInput(f"field {number} should hold text: {error}") from error


def _int(fields: _Fields, number: int, default: int = 0) -> int:
    return (_integers(fields.get(number, [])) or [default])[-1]


def _double(fields: _Fields, number: int) -> float:
    return float(_numbers(fields[number], "<f8")[-1]) if number in fields else 0.0


def _integers(values: list[_FieldValue]) -> list[int]:
    """Varints, one by one or packed; ours are int32 and int64, negative ones as 64-bit complement."""
    found: list[int] = []
    for value in values:
        if isinstance(value, int):
            found.append(value)
            continue
        position = 0
        while position < len(value):
            number, position = _varint(value, position)
            found.append(number)
    return [n - (1 << 64) if n >= 1 << 63 else n for n in found]


def _numbers(values: list[_FieldValue], dtype: str) -> NDArray:
    """Floats of one width, one by one or packed."""
    width = np.dtype(dtype).itemsize
    if any(isinstance(v, int) or len(v) % width for v in values):
        raise InvalidInput(f"a list of {width}-byte numbers has another length or type; this is not the expected message")
    parts = [np.frombuffer(v, dtype) for v in values if not isinstance(v, int)]
    return parts[0] if len(parts) == 1 else np.concatenate(parts) if parts else np.zeros(0, dtype)
