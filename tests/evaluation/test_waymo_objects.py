"""The file for Waymo's own programs: read back with a small decoder of protobuf's wire format, written apart from the encoder."""

import struct
from pathlib import Path

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Boxes3D, Predictions
from upcycle3d.perception.evaluation.waymo_objects import WaymoDetections, encode_waymo_objects, write_waymo_objects

CLASSES = ("Vehicle", "Pedestrian", "Cyclist")
TIME = 1550083467346370  # needs eight bytes as a varint


def _decode(data: bytes) -> list[tuple[int, object]]:
    """(field, value) in order: int for a varint, float for 4 or 8 bytes, bytes for the rest."""
    at, fields = 0, []

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value += (byte % 128) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        value: object
        if key % 8 == 0:
            value = varint()
        elif key % 8 == 1:
            value, at = struct.unpack_from("<d", data, at)[0], at + 8
        elif key % 8 == 5:
            value, at = struct.unpack_from("<f", data, at)[0], at + 4
        else:
            assert key % 8 == 2
            length = varint()
            value, at = data[at : at + length], at + length
            assert len(value) == length  # type: ignore[arg-type]
        fields.append((key // 8, value))
    return fields


def _frame(boxes: list[list[float]], classes: list[int], scores: list[float], **options: object) -> WaymoDetections:
    values = torch.tensor(scores)
    found = Predictions(
        boxes=Boxes3D(data=torch.tensor(boxes).reshape(-1, 7)),
        classes=torch.tensor(classes).long(),
        scores=values,
        class_scores=values,
        iou_scores=values,
    )
    return WaymoDetections(context_name="1024-é", timestamp_micros=TIME, predictions=found, **options)  # type: ignore[arg-type]


def test_every_field_is_where_the_proto_puts_it() -> None:
    boxes = [[1.0, -2.0, 3.0, 4.5, 2.25, 1.5, -0.5], [10.0, 20.0, 0.0, 1.0, 0.5, 2.0, 3.0]]
    messages = _decode(encode_waymo_objects([_frame(boxes, [0, 2], [0.75, 0.25])], classes=CLASSES))
    assert [field for field, _ in messages] == [1, 1]  # Objects.objects
    first, second = (dict(_decode(m)) for _, m in messages)  # type: ignore[arg-type]
    assert first.keys() == {1, 2, 4, 5}
    assert (first[2], first[4], first[5]) == (0.75, "1024-é".encode(), TIME)  # score, context_name, frame_timestamp_micros
    label = dict(_decode(first[1]))
    assert label[3] == 1  # TYPE_VEHICLE
    assert dict(_decode(second[1]))[3] == 4  # TYPE_CYCLIST
    # center_x 1, center_y 2, center_z 3, width 4, length 5, height 6, heading 7
    assert dict(_decode(label[1])) == {1: 1.0, 2: -2.0, 3: 3.0, 4: 2.25, 5: 4.5, 6: 1.5, 7: -0.5}


def test_zones_are_written_if_known() -> None:
    box = [1.0, 2.0, 3.0, 4.0, 2.0, 1.5, 0.0]
    frame = _frame([box, box], [0, 1], [0.5, 0.5], in_zone=torch.tensor([True, False]))
    messages = _decode(encode_waymo_objects([frame], classes=CLASSES))
    assert [dict(_decode(m))[3] for _, m in messages] == [1, 0]  # type: ignore[arg-type]


def test_a_file_holds_all_frames_and_empty_ones_nothing(tmp_path: Path) -> None:
    frames = [_frame([[0.0, 0, 0, 4, 2, 1.5, 0]], [0], [0.5]), _frame([], [], [])] * 3
    write_waymo_objects(tmp_path / "found.bin", frames, classes=CLASSES)
    data = (tmp_path / "found.bin").read_bytes()
    assert data == encode_waymo_objects(frames, classes=CLASSES)
    assert len(_decode(data)) == 3
    assert encode_waymo_objects([], classes=CLASSES) == b""


def test_what_the_message_cannot_say_is_refused(tmp_path: Path) -> None:
    frame = _frame([[0.0, 0, 0, 4, 2, 1.5, 0]], [0], [0.5])
    with pytest.raises(InvalidInput, match=r"Waymo has no class \['Car'\]"):
        write_waymo_objects(tmp_path / "found.bin", [frame], classes=("Car",))
    early = WaymoDetections(context_name="c", timestamp_micros=-1, predictions=frame.predictions)
    with pytest.raises(InvalidInput, match="must not be negative"):
        write_waymo_objects(tmp_path / "found.bin", [early], classes=CLASSES)
    assert list(tmp_path.iterdir()) == []
