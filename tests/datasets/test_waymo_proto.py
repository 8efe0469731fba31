"""The v1 message: against Google's own protobuf library, against real records, and against damage."""

import struct
import tracemalloc
import zlib
from contextlib import suppress
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.waymo import WaymoDataset, labels_from_waymo
from upcycle3d.datasets.waymo_geometry import frame_points
from upcycle3d.datasets.waymo_places import find_waymo_frames
from upcycle3d.datasets.waymo_proto import parse_frame, read_frame, read_identity
from upcycle3d.datasets.waymo_records import RecordPlace, find_records, masked_crc32c

# message -> (number, name, type, repeated); a capitalised type is a message. From dataset.proto and label.proto.
MESSAGES = {
    "MatrixShape": [(1, "dims", "int32", True)],
    "MatrixFloat": [(1, "data", "float packed", True), (2, "shape", "MatrixShape", False)],
    "Transform": [(1, "transform", "double", True)],
    "LaserCalibration": [
        (1, "name", "int32", False),
        (2, "beam_inclinations", "double", True),
        (3, "beam_inclination_min", "double", False),
        (4, "beam_inclination_max", "double", False),
        (5, "extrinsic", "Transform", False),
    ],
    "Context": [(1, "name", "string", False), (3, "laser_calibrations", "LaserCalibration", True)],
    "RangeImage": [
        (2, "range_image_compressed", "bytes", False),
        (3, "camera_projection_compressed", "bytes", False),
        (4, "range_image_pose_compressed", "bytes", False),
    ],
    "Laser": [(1, "name", "int32", False), (2, "ri_return1", "RangeImage", False), (3, "ri_return2", "RangeImage", False)],
    "CameraImage": [(1, "name", "int32", False), (2, "image", "bytes", False)],
    "Box": [
        (1, "center_x", "double", False),
        (2, "center_y", "double", False),
        (3, "center_z", "double", False),
        (5, "length", "double", False),
        (4, "width", "double", False),
        (6, "height", "double", False),
        (7, "heading", "double", False),
    ],
    "Label": [
        (1, "box", "Box", False),
        (3, "type", "int32", False),
        (4, "id", "string", False),
        (5, "detection_difficulty_level", "int32", False),
        (7, "num_lidar_points_in_box", "int32", False),
    ],
    "Frame": [
        (1, "context", "Context", False),
        (2, "timestamp_micros", "int64", False),
        (3, "pose", "Transform", False),
        (4, "images", "CameraImage", True),
        (5, "lasers", "Laser", True),
        (6, "laser_labels", "Label", True),
    ],
}


@cache
def message_classes():
    descriptor_pb2 = pytest.importorskip("google.protobuf.descriptor_pb2")
    from google.protobuf import descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="waymo_test.proto", package="waymo_test", syntax="proto2")
    kinds = {"double": 1, "float": 2, "int64": 3, "int32": 5, "string": 9, "bytes": 12}
    for message, fields in MESSAGES.items():
        added = file.message_type.add(name=message)
        for number, name, kind, repeated in fields:
            field = added.field.add(name=name, number=number, label=3 if repeated else 1)
            kind, _, packed = kind.partition(" ")
            if kind in kinds:
                field.type = kinds[kind]
            else:
                field.type, field.type_name = 11, f".waymo_test.{kind}"
            if packed:
                field.options.packed = True
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"waymo_test.{name}")) for name in MESSAGES}


def compressed(values: np.ndarray) -> bytes:
    matrix = message_classes()["MatrixFloat"](data=values.reshape(-1).tolist())
    matrix.shape.dims.extend(values.shape)
    return zlib.compress(matrix.SerializeToString())


RNG = np.random.default_rng(0)
FIRST, SECOND = RNG.random((4, 6, 4), np.float32), RNG.random((4, 6, 4), np.float32)
POSES, SIDE = RNG.random((4, 6, 6), np.float32), RNG.random((3, 5, 4), np.float32)
EXTRINSIC = RNG.random((4, 4))
BOX = (1.5, -2.5, 0.75, 4.2, 1.9, 1.6, -3.0)


def make_frame():
    frame = message_classes()["Frame"](timestamp_micros=1_553_735_853_462_203)
    frame.context.name = "a_segment"
    frame.pose.transform.extend(np.arange(16.0).tolist())
    frame.images.add(name=1, image=b"\xff\xd8" + bytes(1000))
    for name, inclinations in ((1, [-0.3, -0.1, 0.0, 0.1]), (2, [])):
        calibration = frame.context.laser_calibrations.add(name=name, beam_inclination_min=-0.4, beam_inclination_max=0.2)
        calibration.beam_inclinations.extend(inclinations)
        calibration.extrinsic.transform.extend(EXTRINSIC.reshape(-1).tolist())
    top = frame.lasers.add(name=1)
    top.ri_return1.range_image_compressed = compressed(FIRST)
    top.ri_return1.range_image_pose_compressed = compressed(POSES)
    top.ri_return1.camera_projection_compressed = b"skipped"
    top.ri_return2.range_image_compressed = compressed(SECOND)
    frame.lasers.add(name=2).ri_return1.range_image_compressed = compressed(SIDE)
    frame.lasers.add(name=3).ri_return1.SetInParent()  # as in the real records: no image at all
    for kind, count in ((1, 7), (4, 0), (3, None)):
        label = frame.laser_labels.add(type=kind, id=f"object {kind}", num_lidar_points_in_box=count)
        for (_, name, *_), value in zip(MESSAGES["Box"], BOX):
            setattr(label.box, name, value)
    frame.laser_labels[0].detection_difficulty_level = 2
    return frame


def test_a_message_of_the_protobuf_library_is_read_whole():
    found = parse_frame(make_frame().SerializeToString())
    assert (found.segment, found.timestamp) == ("a_segment", 1_553_735_853_462_203)
    np.testing.assert_array_equal(found.pose, np.arange(16.0).reshape(4, 4))
    top, front = found.lasers
    assert (top.name, front.name) == (1, 2)
    for image, expected in zip((*top.returns, top.pixel_poses, *front.returns), (FIRST, SECOND, POSES, SIDE), strict=True):
        np.testing.assert_array_equal(image, expected)
    assert front.pixel_poses is None
    assert front.inclinations is None
    assert front.inclination_range == (-0.4, 0.2)
    np.testing.assert_array_equal(top.inclinations, [-0.3, -0.1, 0.0, 0.1])
    np.testing.assert_array_equal(top.extrinsic, EXTRINSIC)
    np.testing.assert_array_equal(found.objects.boxes, [BOX] * 3)  # length before width, though their numbers are turned
    assert found.objects.types.tolist() == [1, 4, 3]
    assert found.objects.num_points.tolist() == [7, 0, -1]
    assert found.objects.levels.tolist() == [2, 0, 0]
    assert found.objects.names == ("object 1", "object 4", "object 3")


def test_negative_numbers_and_packed_lists_are_read():
    frame = make_frame()
    frame.timestamp_micros = -5
    assert parse_frame(frame.SerializeToString()).timestamp == -5
    packed = b"\x1a\x83\x01\x0a\x80\x01" + np.arange(16.0).tobytes()  # field 3, a Transform whose numbers are packed
    np.testing.assert_array_equal(parse_frame(frame.SerializeToString() + packed).pose, np.arange(16.0).reshape(4, 4))


def place_of(tmp_path: Path, data: bytes) -> RecordPlace:
    """A record's place, for what does not look at checksums."""
    path = tmp_path / "x.tfrecord"
    path.write_bytes(bytes(12) + data + bytes(4))
    return RecordPlace(path=path, index=0, offset=0, length=len(data))


def test_segment_and_time_come_from_the_head_of_a_record(tmp_path):
    data = make_frame().SerializeToString()
    assert read_identity(place_of(tmp_path, data)) == ("a_segment", 1_553_735_853_462_203)
    assert read_identity(place_of(tmp_path, data + b"\x22\x80\x80\x40" + bytes(1 << 20))) == ("a_segment", 1_553_735_853_462_203)
    with pytest.raises(InvalidInput, match=r"x\.tfrecord, record 0 at byte 0: .*no context name"):
        read_identity(place_of(tmp_path, b"\x10\x05"))


def test_bytes_that_are_no_frame_are_refused():
    data = make_frame().SerializeToString()
    rng = np.random.default_rng(1)
    for bad in (data[:-3], b"\xff" * 30, b"\x0b", b"", rng.bytes(300)):
        with pytest.raises(InvalidInput):
            parse_frame(bad)
    for _ in range(200):  # any single damaged byte: another value or a refusal, never another error
        damaged = bytearray(data)
        damaged[rng.integers(len(data))] = rng.integers(256)
        with suppress(InvalidInput):
            parse_frame(bytes(damaged))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: setattr(f.lasers[0].ri_return1, "range_image_compressed", b"nonsense"), "not zlib data"),
        (lambda f: setattr(f.lasers[0].ri_return1, "range_image_compressed", compressed(FIRST)[:-9]), "cut off or larger"),
        (
            lambda f: setattr(f.lasers[0].ri_return1, "range_image_compressed", compressed(POSES)),
            r"shape \[4, 6, 6\] .* columns, 4",
        ),
        (lambda f: f.context.laser_calibrations.pop(), "laser 2 has a range image but no calibration"),
        (lambda f: f.pose.transform.pop(), "a transform holds 15 numbers"),
        (lambda f: f.laser_labels[1].box.ClearField("heading"), r"lacks the fields \[7\]"),
    ],
)
def test_a_damaged_part_is_named(change, message):
    frame = make_frame()
    change(frame)
    with pytest.raises(InvalidInput, match=message):
        parse_frame(frame.SerializeToString())


def test_an_image_that_unpacks_without_end_is_refused():
    frame = make_frame()
    frame.lasers[0].ri_return1.range_image_compressed = zlib.compress(bytes(80 << 20))
    with pytest.raises(InvalidInput, match="larger than"):
        parse_frame(frame.SerializeToString())


def framed(data: bytes) -> bytes:
    head = struct.pack("<Q", len(data))
    return b"".join(part + struct.pack("<I", masked_crc32c(part)) for part in (head, data))


def test_a_damaged_file_gives_its_good_frames_and_a_reason_for_each_other(tmp_path):
    def record(time: int) -> bytes:
        frame = make_frame()
        frame.timestamp_micros = time
        for matrix in (frame.pose, *(c.extrinsic for c in frame.context.laser_calibrations)):
            matrix.transform[:] = np.eye(4).reshape(-1).tolist()
        return framed(frame.SerializeToString())

    flipped = bytearray(record(2))
    flipped[-20] ^= 1
    path = tmp_path / "segment-a_segment_with_camera_labels.tfrecord"
    path.write_bytes(record(1) + flipped + framed(b"no message") + record(3) + record(1) + record(4)[:-7])
    found = find_waymo_frames(tmp_path, [path.name])["a_segment"]
    last = "a_segment_record00000"
    assert [p.id for p in found] == ["a_segment_1", "a_segment_2", f"{last}2", "a_segment_3", f"{last}4", f"{last}5"]
    data = WaymoDataset(found, drop_no_label_zones=False)
    for i in (0, 3):
        frame = data[i]
        assert len(frame.points) == 2 * FIRST[..., 0].size + SIDE[..., 0].size
        assert frame.labels.classes.tolist() == [0, 2]
        assert frame.labels.weight.tolist() == [1, 0]  # the second holds no point
    with pytest.raises(InvalidInput, match=r"frame a_segment_2: .*tfrecord, record 1 at byte \d+: the checksum of its \d+ bytes"):
        data[1]
    with pytest.raises(InvalidInput, match=r"frame a_segment_record000002: .*record 2 at byte"):
        data[2]
    with pytest.raises(InvalidInput, match=r"record 5 at byte \d+: .* it was cut off"):
        data[5]
    sampled = find_waymo_frames(tmp_path, every=3)["a_segment"]
    assert [p.id for p in sampled] == ["a_segment_1", "a_segment_3", f"{last}5"]  # what is lost is never sampled away


def test_real_records_give_their_labels_and_say_that_they_hold_no_point():
    root = tiny.shared("data/waymo/frames", "records of real Waymo segments are read")
    found = find_waymo_frames(root)
    places = tuple(place for part in found.values() for place in part)
    assert [p.id for p in places] == [
        "1071392229495085036_1844_790_1864_790_1507315488219118",
        "1024360143612057520_3580_000_3600_000_1553735853462203",
    ]
    data = WaymoDataset(places)
    frames = [read_frame(find_records(path)[0][0]) for path in sorted(root.glob("*.tfrecord"))]
    assert [len(f.objects.boxes) for f in frames] == [18, 75]
    assert [len(frame_points(f)) for f in frames] == [0, 0]
    town = data.labels(1)
    assert town.classes.bincount().tolist() == [37, 12, 1]
    assert set(town.difficulty.tolist()) == {1, 2}
    assert (town.weight == 0).sum() == (town.num_points == 0).sum()
    signs = labels_from_waymo(frames[1].objects, ("Sign",))
    assert len(signs) == 25
    # Vehicles stand on the road around the origin: the boxes are in the vehicle's frame, centres, length along the heading.
    cars = town.boxes.data[town.classes == 0]
    assert (cars[:, 3] > cars[:, 4]).all()
    assert abs(float((cars[:, 2] - cars[:, 5] / 2).median())) < 0.7
    with pytest.raises(InvalidInput, match=r"frame 1024360143612057520_.*: none of its 0 range images holds a point"):
        data[1]


# ---- what a hostile file may not do


@pytest.mark.parametrize("name", ["../x", "/tmp/x", "..", "a\0b", "a\x1b[2Jb", "x" * 300])
def test_a_context_name_that_leads_elsewhere_never_becomes_the_id_of_a_frame(tmp_path, name):
    frame = make_frame()
    frame.context.name = name
    (tmp_path / "segment-good.tfrecord").write_bytes(framed(frame.SerializeToString()))
    ((place,),) = find_waymo_frames(tmp_path).values()
    assert place.id == "good_record000000"
    with pytest.raises(InvalidInput, match=r"frame good_record000000: .*the frame id .* cannot be a file name"):
        WaymoDataset([place])[0]


def test_hidden_files_are_no_segments(tmp_path):
    (tmp_path / "segment-good.tfrecord").write_bytes(framed(make_frame().SerializeToString()))
    (tmp_path / "._segment-good.tfrecord").write_bytes(b"what macOS leaves")
    assert list(find_waymo_frames(tmp_path)) == ["good"]


def test_a_small_record_that_unpacks_into_much_memory_is_refused(tmp_path):
    image = zlib.compress(message_classes()["MatrixFloat"](data=[0.0] * (2 << 20)).SerializeToString())  # 8 MB
    many = make_frame()
    for number in range(1, 20):
        many.lasers.add(name=number).ri_return1.range_image_compressed = image
    labels = make_frame()
    for _ in range(20_000):
        labels.laser_labels.add()
    unpacked = make_frame()
    unpacked.lasers[0].ri_return1.range_image_compressed = zlib.compress(b"\x0d\x00\x00\x00\x00" * (1 << 18))  # floats one by one
    repeated = make_frame().SerializeToString() + b"\x30\x00" * (1 << 18)
    for data, words in [
        (many.SerializeToString(), "laser scans"),
        (labels.SerializeToString(), "laser labels|more than 20000 fields"),
        (unpacked.SerializeToString(), "more than 20000 fields"),
        (repeated, "more than 20000 fields"),
    ]:
        tracemalloc.start()
        with pytest.raises(InvalidInput, match=words):
            parse_frame(data)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert most < 60e6
