"""Detections as Waymo's own programs read them: a file with one `Objects` message (waymo-open-dataset, `protos/metrics.proto`).

`compute_detection_metrics_main DETECTIONS GROUND_TRUTHS` scores such a file, and `create_submission` packs it for the leaderboard. The message is
small, so its bytes are written here without protobuf: a field is its number and wire type (0 varint, 1 eight bytes, 2 length and bytes, 5
four bytes), then its value (protobuf.dev, "Encoding").
"""

from __future__ import annotations

import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.structures import Predictions

LABEL_TYPES = {"Vehicle": 1, "Pedestrian": 2, "Sign": 3, "Cyclist": 4}  # label.proto, Label.Type
_BOX_COLUMNS = (0, 1, 2, 4, 3, 5, 6)  # fields 1..7 of Label.Box: center, then width before length, height, heading


@dataclass(frozen=True, kw_only=True)
class WaymoDetections:
    """The detections of one frame, boxes in the vehicle frame."""

    context_name: str
    """Waymo's name of the segment."""
    timestamp_micros: int
    """Waymo's time of the frame."""
    predictions: Predictions
    """The detections."""
    in_zone: Tensor | None = None
    """(N,) bool, those in a no-label zone; None leaves it to the leaderboard, which finds them itself."""


def write_waymo_objects(path: Path | str, frames: Sequence[WaymoDetections], *, classes: tuple[str, ...]) -> None:
    """Write detections for Waymo's programs, atomically, one frame at a time.

    Args:
        path: File to write.
        frames: Detections per frame.
        classes: Names of the class numbers.

    Raises:
        InvalidInput: Waymo has no such class, or a time is negative.
    """
    _check_classes(classes)
    write_atomically(Path(path), (encode_waymo_objects([f], classes=classes) for f in frames))


def encode_waymo_objects(frames: Sequence[WaymoDetections], *, classes: tuple[str, ...]) -> bytes:
    """Encode detections as an `Objects` message. Messages with repeated fields may be joined end to end.

    Args:
        frames: Detections per frame.
        classes: Names of the class numbers.

    Returns:
        Bytes of the message.

    Raises:
        InvalidInput: Waymo has no such class, or a time is negative.
    """
    _check_classes(classes)
    return b"".join(_bytes(1, message) for frame in frames for message in _objects(frame, classes))


def _check_classes(classes: tuple[str, ...]) -> None:
    unknown = [c for c in classes if c not in LABEL_TYPES]
    if unknown:
        raise InvalidInput(f"Waymo has no class {unknown}; it has {', '.join(LABEL_TYPES)}; rename the detector's classes")


def _objects(frame: WaymoDetections, classes: tuple[str, ...]) -> Iterator[bytes]:
    """One `Object` message a detection."""
    if frame.timestamp_micros < 0:
        raise InvalidInput(f"the frame of {frame.context_name!r} has the time {frame.timestamp_micros}; it must not be negative")
    found = frame.predictions
    zones = [None] * len(found) if frame.in_zone is None else frame.in_zone.tolist()
    where = _bytes(4, frame.context_name.encode()) + _key(5, 0) + _varint(frame.timestamp_micros)
    rows = zip(found.boxes.data.double().tolist(), found.classes.tolist(), found.scores.tolist(), zones, strict=True)
    for values, kind, score, zone in rows:
        box = b"".join(
            _key(field, 1) + struct.pack("<d", v) for field, v in enumerate((values[c] for c in _BOX_COLUMNS), start=1)
        )
        label = _bytes(1, box) + _key(3, 0) + _varint(LABEL_TYPES[classes[kind]])
        overlap = b"" if zone is None else _key(3, 0) + _varint(int(zone))
        yield _bytes(1, label) + _key(2, 5) + struct.pack("<f", score) + overlap + where


def _key(field: int, wire_type: int) -> bytes:
    return _varint(field << 3 | wire_type)


def _bytes(field: int, data: bytes) -> bytes:
    return _key(field, 2) + _varint(len(data)) + data


def _varint(value: int) -> bytes:
    """Seven bits a byte, lowest first, the eighth bit set on all but the last."""
    return bytes(_septets(value))


def _septets(value: int) -> Iterator[int]:
    while value >= 128:
        yield value & 127 | 128
        value >>= 7
    yield value
