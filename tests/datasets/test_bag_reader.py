"""ROS bags and MCAP files: every message of the LiDAR's topic is a frame with exactly its points, and damage costs what it hit."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_layouts
import tiny_readers

pytest.importorskip("rosbags", reason="the extra [inputs] is not installed")
pytest.importorskip("mcap", reason="the extra [inputs] is not installed")
from mcap.writer import CompressionType, Writer
from rosbags import rosbag1, rosbag2
from rosbags.typesys import Stores, get_typestore

from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.scan_options import ScanOptions
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.readers.bag import open_bag
from upcycle3d.datasets.readers.opening import BoxedOptions
from upcycle3d.datasets.readers.point_cloud2 import rows_of_cloud

TIMES = (1_700_000_000_000_000_000, 1_700_000_000_100_000_000, 1_700_000_000_200_000_000)
CODES = {"f4": 7, "f8": 8, "u1": 2, "u2": 4}
BAGS = ("mcap", "rosbag2 of sqlite3", "rosbag2 of mcap", "rosbag1")


def message(store: Any, *, ros1: bool = False, nan: int = 0, dense: bool = True, big: bool = False, rows: int = 1) -> Any:
    """A point cloud with the layout of a driver: padding in a point, a ring, 16-bit intensity, and `nan` points without a return."""
    points = tiny_readers.scan()
    order = ">" if big else "<"
    kinds = {"x": "f4", "y": "f4", "z": "f4", "intensity": "u2", "ring": "u1"}
    offsets = {"x": 0, "y": 4, "z": 8, "intensity": 16, "ring": 18}
    point = np.dtype(
        {"names": list(kinds), "formats": [order + k for k in kinds.values()], "offsets": list(offsets.values()), "itemsize": 24}
    )
    table = np.zeros(len(points) + nan, point)
    for i, name in enumerate("xyz"):
        table[name] = np.append(points[:, i], np.full(nan, np.nan))
    table["intensity"] = np.append(np.rint(points[:, 3] * 255), np.zeros(nan)).astype(np.uint16)
    width = len(table) // rows
    row = width * 24 + (8 if rows > 1 else 0)
    data = np.zeros((rows, row), np.uint8)
    data[:, : width * 24] = np.frombuffer(table[: width * rows].tobytes(), np.uint8).reshape(rows, -1)
    header_type, time_type = store.types["std_msgs/msg/Header"], store.types["builtin_interfaces/msg/Time"]
    header = {"stamp": time_type(sec=0, nanosec=0), "frame_id": "lidar_top"} | ({"seq": 0} if ros1 else {})
    field_type = store.types["sensor_msgs/msg/PointField"]
    fields = [field_type(name=n, offset=offsets[n], datatype=CODES[k], count=1) for n, k in kinds.items()]
    return store.types["sensor_msgs/msg/PointCloud2"](
        header=header_type(**header), height=rows, width=width, fields=fields, is_bigendian=big, point_step=24,
        row_step=row, data=data.reshape(-1), is_dense=dense,
    )  # fmt: skip


def write_bag(folder: Path, kind: str, *, topics: tuple[str, ...] = ("/points",), **changes: Any) -> Path:
    """A bag with three messages of each topic, and one text."""
    ros1 = kind == "rosbag1"
    store = get_typestore(Stores.ROS1_NOETIC if ros1 else Stores.ROS2_HUMBLE)
    cloud, text = message(store, ros1=ros1, **changes), store.types["std_msgs/msg/String"](data="hello")
    pack = store.serialize_ros1 if ros1 else store.serialize_cdr
    if ros1:
        writer: Any = rosbag1.Writer(folder / "drive.bag")
    else:
        plugin = rosbag2.StoragePlugin.SQLITE3 if "sqlite3" in kind else rosbag2.StoragePlugin.MCAP
        writer = rosbag2.Writer(folder / "drive", version=9, storage_plugin=plugin)
    folder.mkdir(parents=True, exist_ok=True)
    with writer:
        for topic in topics:
            place = writer.add_connection(topic, cloud.__msgtype__, typestore=store)
            for time in TIMES:
                writer.write(place, time, pack(cloud, cloud.__msgtype__))
        place = writer.add_connection("/text", text.__msgtype__, typestore=store)
        writer.write(place, TIMES[0], pack(text, text.__msgtype__))
    if kind == "mcap":
        (inner,) = (folder / "drive").glob("*.mcap")
        return Path(inner.rename(folder / "drive.mcap"))
    return folder / ("drive.bag" if ros1 else "drive")


@pytest.mark.parametrize("kind", BAGS)
def test_each_message_is_a_frame_with_its_points(kind, tmp_path):
    raw = open_bag(write_bag(tmp_path, kind), BoxedOptions(z_shift=1.5, intensity_scale=1 / 255))
    assert raw.ids == tuple(f"drive_{time}" for time in TIMES)
    assert raw.unlabeled == ("all",)
    assert raw.found.files_skipped == {"message of another topic": 1}
    frame = raw.source[1]
    assert frame.labels is None
    assert frame.points.feature_names == ("intensity",)
    expected = tiny_readers.scan() + np.array([0, 0, 1.5, 0])
    assert abs(frame.points.xyz.double().numpy() - expected[:, :3]).max() < 1e-5
    assert abs(frame.points.features[:, 0].double().numpy() - expected[:, 3]).max() < 1e-6


@pytest.mark.parametrize("changes", [{"big": True}, {"rows": 4}])
def test_byte_order_and_padded_rows_of_organized_clouds(changes, tmp_path):
    frame = open_bag(write_bag(tmp_path, "mcap", **changes), BoxedOptions(intensity_scale=1 / 255)).source[0]
    expected = tiny_readers.scan()[: len(frame.points), :3]
    assert len(frame.points) == len(tiny_readers.scan()) // 4 * 4
    assert abs(frame.points.xyz.double().numpy() - expected).max() < 1e-5


def test_missing_returns_are_dropped_and_counted_only_where_the_message_says_so(tmp_path):
    frame = open_bag(write_bag(tmp_path / "a", "mcap", nan=7, dense=False)).source[0]
    assert frame.reading.points_non_finite == 7
    assert len(frame.points) == len(tiny_readers.scan())
    path = write_bag(tmp_path / "b", "mcap", nan=7, dense=True)
    with pytest.raises(InvalidInput, match="7 of 1127 points hold NaN"):
        _ = open_bag(path).source[0]
    assert open_bag(path, read=ScanOptions(drop_non_finite=True)).source[0].reading.points_non_finite == 7


@pytest.mark.parametrize("kind", BAGS)
def test_a_topic_of_another_type_is_refused_and_named(kind, tmp_path):
    with pytest.raises(InvalidInput, match=r"the topic /text of .* holds messages of the type std_msgs/msg/String"):
        open_bag(write_bag(tmp_path, kind), topic="/text")


def test_one_of_several_bags_without_the_topic_is_told(tmp_path):
    write_bag(tmp_path / "a", "mcap").rename(tmp_path / "first.mcap")
    write_bag(tmp_path / "b", "mcap", topics=("/other",)).rename(tmp_path / "second.mcap")
    (tmp_path / "bags").mkdir()
    for name in ("first.mcap", "second.mcap"):
        (tmp_path / name).rename(tmp_path / "bags" / name)
    raw = open_bag(tmp_path / "bags")
    assert [name.partition("_")[0] for name in raw.ids] == ["first"] * 3
    (told,) = raw.warnings
    assert "second.mcap has no message of the topic /points; its topics are /other of" in told


def test_a_bag_that_names_more_messages_than_it_has_is_told(tmp_path):
    path = write_bag(tmp_path, "rosbag2 of sqlite3")
    note = path / "metadata.yaml"
    text = note.read_text()
    assert text.count("message_count: 3") == 1
    note.write_text(text.replace("message_count: 3", "message_count: 5"))
    raw = open_bag(path)
    assert len(raw.ids) == 3
    assert "names 5 messages of the topic /points, and holds 3" in raw.warnings[0]


def test_columns_and_axes(tmp_path):
    path = write_bag(tmp_path, "mcap")
    read = ScanOptions(columns=("x", "y", "z", "intensity", "ring"), axes=("y", "-x", "z"))
    frame = open_bag(path, read=read).source[0]
    assert frame.points.feature_names == ("intensity", "ring")
    assert abs(frame.points.xyz[:, 0].double().numpy() - tiny_readers.scan()[:, 1]).max() < 1e-5
    with pytest.raises(InvalidInput, match="there is no field reflectance"):
        _ = open_bag(path, read=ScanOptions(columns=("x", "y", "z", "reflectance"))).source[0]


def test_one_of_several_lidars_must_be_named(tmp_path):
    path = write_bag(tmp_path, "mcap", topics=("/front/points", "/rear/points"))
    with pytest.raises(InvalidInput, match=r"2 topics.*--topic: /front/points \(3\), /rear/points \(3\)"):
        open_bag(path)
    raw = open_bag(path, topic="/rear/points")
    assert len(raw.ids) == 3
    assert raw.found.files_skipped == {"message of another topic": 4}
    with pytest.raises(InvalidInput, match="no message of the topic /raer"):
        open_bag(path, topic="/raer")


def write_chunks(path: Path) -> Path:
    """An MCAP file with checksums and one chunk per message, not compressed, as a recorder writes it."""
    store = get_typestore(Stores.ROS2_HUMBLE)
    cloud = message(store)
    data = bytes(store.serialize_cdr(cloud, cloud.__msgtype__))
    with path.open("wb") as file:
        writer = Writer(file, chunk_size=1000, compression=CompressionType.NONE)
        writer.start()
        schema = writer.register_schema("sensor_msgs/msg/PointCloud2", "ros2msg", b"")
        channel = writer.register_channel("/points", "cdr", schema)
        for time in TIMES:
            writer.add_message(channel, time, data, time)
        writer.finish()
    return path


def test_a_flipped_bit_of_an_mcap_file_costs_its_frame_only(tmp_path):
    path = write_chunks(tmp_path / "drive.mcap")
    whole = open_bag(path)
    data = bytearray(path.read_bytes())
    data[data.find(b"lidar_top") + 2000] ^= 4  # in the points of the first message
    path.write_bytes(data)
    with pytest.raises(InvalidInput, match=r"message of /points at 1700000000000000000 cannot be read.*mcap recover"):
        _ = whole.source[0]
    assert abs(whole.source[1].points.xyz[:, 0].double().numpy() - tiny_readers.scan()[:, 0]).max() < 1e-5


def test_an_mcap_file_that_is_cut_off_gives_the_frames_before_the_damage(tmp_path):
    path = write_chunks(tmp_path / "drive.mcap")
    data = path.read_bytes()
    path.write_bytes(data[: data.rfind(b"lidar_top")])
    raw = open_bag(path)
    assert len(raw.ids) == 2
    assert "2 messages before the damage are read" in raw.warnings[0]
    assert len(raw.source[1].points) == len(tiny_readers.scan())


@pytest.mark.parametrize("content", [b"", b"\x89MCAP0\r\n", b"#ROSBAG V2.0\n", bytes(500)])
@pytest.mark.parametrize("suffix", [".mcap", ".bag"])
def test_what_is_no_bag_is_named(content, suffix, tmp_path):
    path = tmp_path / f"drive{suffix}"
    path.write_bytes(content)
    with pytest.raises(InvalidInput, match=f"drive{suffix}"):
        open_bag(path)


def test_a_message_whose_sizes_lie_is_refused():
    store = get_typestore(Stores.ROS2_HUMBLE)
    cloud = message(store)
    for name, value in (("point_step", 0), ("width", 1 << 31), ("row_step", 24), ("height", 2)):
        changed = store.types["sensor_msgs/msg/PointCloud2"](**(vars(cloud) | {name: value}))
        with pytest.raises(InvalidInput, match="the message is damaged"):
            rows_of_cloud(changed, (), "m")
    cloud.fields[0].datatype = 77
    with pytest.raises(InvalidInput, match="number type 77"):
        rows_of_cloud(cloud, (), "m")


def test_an_empty_cloud_has_columns_and_no_rows():
    store = get_typestore(Stores.ROS2_HUMBLE)
    cloud = message(store)
    empty = store.types["sensor_msgs/msg/PointCloud2"](
        **(vars(cloud) | {"width": 0, "height": 0, "row_step": 0, "data": np.zeros(0, np.uint8)})
    )
    names, rows = rows_of_cloud(empty, (), "m")
    assert names == ("x", "y", "z", "intensity")
    assert rows.shape == (0, 4)


def test_the_command_prepares_a_bag_for_the_fleet(tmp_path, capsys):
    path = write_bag(tmp_path, "rosbag2 of mcap")
    code, said = tiny_layouts.prepare(capsys, "bag", path, tmp_path / "out", "--z-shift", "1.5", "--intensity-scale", "1/255")
    assert code == 0, said
    assert len(PreparedDataset(tmp_path / "out")) == 3
