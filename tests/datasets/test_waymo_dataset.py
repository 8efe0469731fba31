"""Waymo's v2 tables as frames: what is written comes back, splits keep sequences whole, and what is broken is named."""

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tiny_waymo import FRAMES, SEGMENTS, SENSOR, SMALL, places

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets import waymo_parquet
from upcycle3d.datasets.kitti import with_point_counts
from upcycle3d.datasets.simulation.layout_waymo import waymo_frame, write_segment
from upcycle3d.datasets.simulation.places import CLASS_NAMES, WAYMO
from upcycle3d.datasets.simulation.simulate import simulate_frame
from upcycle3d.datasets.waymo import WaymoDataset, labels_from_waymo
from upcycle3d.datasets.waymo_geometry import WaymoObjects
from upcycle3d.datasets.waymo_parquet import SegmentReader
from upcycle3d.datasets.waymo_places import find_waymo_frames
from upcycle3d.perception.evaluation.waymo import WaymoTruth


def rewrite(path: Path, change) -> None:
    pq.write_table(change(pq.read_table(path)), path)


def by_direction(points: torch.Tensor) -> torch.Tensor:
    """Rows of points in an order that does not depend on how they were stored."""
    azimuth = torch.atan2(points[:, 1], points[:, 0])
    return points[torch.from_numpy(np.lexsort((points[:, 2].numpy(), (azimuth / 0.004).round().numpy())))]


# ---- what is written comes back


def test_simulated_points_and_labels_survive_the_tables(written):
    data = WaymoDataset(places(written))
    assert len(data) == FRAMES
    assert data.ids[0] == "simulated_000000_000005_1500000000000000"
    kinds = torch.tensor([{"Pedestrian": 1, "Cyclist": 2}.get(name, 0) for name in CLASS_NAMES])
    for index in (0, 4, 5):
        made = simulate_frame(SMALL, seed=4, index=index, view="full")
        shift = torch.tensor([0, 0, SENSOR.height])
        frame = data[index]
        assert frame.points.feature_names == ("intensity", "elongation")
        assert len(frame.points) == len(made.frame.points)
        # Each point's nearest is its own: neighbours lie decimetres apart, the round trip costs a tenth of a millimetre.
        near = torch.cdist(
            frame.points.xyz[None], (made.frame.points.xyz + shift)[None], compute_mode="donot_use_mm_for_euclid_dist"
        )
        distance, match = near[0].min(1)
        assert distance.max() < 2e-4
        assert len(match.unique()) == len(match)
        intensity = made.frame.points.features[match, 0]
        torch.testing.assert_close(frame.points.features[:, 0], intensity.clamp(max=0.999999), atol=1e-5, rtol=0)
        assert (frame.points.features[:, 1] == 0).all()

        labels = made.frame.labels
        torch.testing.assert_close(frame.labels.boxes.data[:, :3], labels.boxes.data[:, :3] + shift)
        torch.testing.assert_close(frame.labels.boxes.data[:, 3:], labels.boxes.data[:, 3:])
        assert (frame.labels.classes == kinds[labels.classes]).all()
        counted = with_point_counts(frame.labels, frame.points).num_points
        assert (frame.labels.num_points == counted).all()
        assert (counted - with_point_counts(labels, made.frame.points).num_points).abs().max() <= 2  # points on a box's face
        assert ((frame.labels.difficulty == 2) == (counted <= 5)).all()
        assert ((frame.labels.weight == 0) == (counted == 0)).all()


def test_jitter_costs_the_angle_to_the_pixel_and_no_range(tmp_path):
    sensor = replace(SENSOR, jitter=WAYMO.sensor.jitter)
    made = simulate_frame(replace(SMALL, sensor=sensor), seed=4, index=1, view="full")
    write_segment(tmp_path, "s", [waymo_frame(made, sensor, segment="s", index=1)])
    cloud = WaymoDataset(places(tmp_path))[0].points
    xyz = cloud.xyz - torch.tensor([0, 0, sensor.height])
    assert len(xyz) == len(made.frame.points)
    near = torch.cdist(xyz[None], made.frame.points.xyz[None], compute_mode="donot_use_mm_for_euclid_dist")[0]
    match = near.argmin(1)
    there, back = made.frame.points.xyz[match].norm(dim=1), xyz.norm(dim=1)
    close = (there - back).abs() < 1e-4
    assert close.float().mean() > 0.999  # a neighbour can lie nearer than a jittered self
    angle = near.gather(1, match[:, None])[:, 0] / back
    assert angle.max() < np.deg2rad(6 * sensor.jitter)


def test_both_returns_all_lasers_and_no_label_zones_come_back(tmp_path):
    made = simulate_frame(SMALL, seed=4, index=0, view="full")
    frame = waymo_frame(made, SENSOR, segment="s", index=0)
    (top,) = frame.lasers
    second = top.returns[0].copy()
    second[..., 0] += 1
    second[: len(second) // 2, :, 3] = 1  # the upper half in a no-label zone
    rear = replace(top, name=5, returns=(top.returns[0][:3, :40].copy(),), pixel_poses=None, inclinations=None)
    write_segment(tmp_path, "s", [replace(frame, lasers=(replace(top, returns=(top.returns[0], second)), rear))])
    found = places(tmp_path)
    first = int((top.returns[0][..., 0] > 0).sum())
    extra = int((rear.returns[0][..., 0] > 0).sum())
    lower = int((second[len(second) // 2 :, :, 0] > 0).sum())
    assert len(WaymoDataset(found, second_return=False)[0].points) == first + extra
    reading = WaymoDataset(found)[0].reading
    assert len(WaymoDataset(found)[0].points) == first + lower + extra
    hidden = int((second[..., 0] > 0).sum()) - lower
    assert (reading.points, reading.points_no_label_zone) == (first + lower + extra + hidden, hidden)
    everything = int((second[..., 0] > 0).sum())
    assert len(WaymoDataset(found, drop_no_label_zones=False)[0].points) == first + everything + extra


def test_classes_are_renamed_shifted_and_signs_dropped(written):
    found = places(written)
    plain, cars = WaymoDataset(found)[0], WaymoDataset(found, classes=("Car",), class_map={"Vehicle": "Car"}, z_shift=0.5)[0]
    vehicles = plain.labels.select(plain.labels.classes == 0)
    torch.testing.assert_close(
        cars.labels.boxes.data - vehicles.boxes.data, torch.tensor([0, 0, 0.5, 0, 0, 0, 0]).expand(len(vehicles), 7)
    )
    torch.testing.assert_close(cars.points.xyz - plain.points.xyz, torch.tensor([0, 0, 0.5]).expand(len(cars.points), 3))
    assert WaymoDataset(found, with_labels=False)[0].labels is None
    for options in ({"classes": ("Car",)}, {"class_map": {"Bus": "Car"}}, {"classes": ()}):
        with pytest.raises(InvalidInput, match="Waymo has Vehicle, Pedestrian, Sign, Cyclist"):
            WaymoDataset(found, **options)
    with pytest.raises(InvalidInput, match=r"no class Vehicule: .*did you mean 'Vehicle'\?.*--class-map Vehicle Car$"):
        WaymoDataset(found, classes=("Vehicule",))


def test_levels_follow_the_label_then_the_points_and_boxes_without_points_are_ignored():
    objects = WaymoObjects(
        boxes=np.tile([10.0, 0, 1, 4, 2, 1.5, 4.0], (7, 1)),
        types=np.array([1, 1, 1, 1, 2, 3, 4]),
        num_points=np.array([100, 100, 5, 0, 6, 50, -1]),
        levels=np.array([0, 2, 0, 0, 1, 0, 0]),
        names=tuple("abcdefg"),
    )
    labels = labels_from_waymo(objects, ("Cyclist", "Vehicle", "Pedestrian"))
    assert labels.classes.tolist() == [1, 1, 1, 1, 2, 0]
    assert labels.difficulty.tolist() == [1, 2, 2, 2, 1, -1]
    assert labels.weight.tolist() == [1, 1, 1, 0, 1, 1]
    assert labels.num_points.tolist() == [100, 100, 5, 0, 6, -1]
    torch.testing.assert_close(labels.boxes.data[:, 6], torch.full((6,), 4 - 2 * torch.pi))
    known = labels.select(labels.num_points >= 0)
    truth = WaymoTruth.from_labels(known, difficulty_is_level=True)
    assert truth.levels.tolist() == [1, 2, 2, 1]  # the empty one does not exist there
    for bad in (np.nan, 0.0, -1.0):
        boxes = objects.boxes.copy()
        boxes[4, 3] = bad
        with pytest.raises(InvalidInput, match=r"object e has the box .* not positive"):
            labels_from_waymo(replace(objects, boxes=boxes), ("Pedestrian",))
        assert len(labels_from_waymo(replace(objects, boxes=boxes), ("Vehicle",))) == 4  # not asked for, not judged


def test_a_label_without_a_point_count_is_counted(waymo_copy):
    path = waymo_copy / "lidar_box" / f"{SEGMENTS[0]}.parquet"
    before = WaymoDataset(places(waymo_copy))[2].labels
    column = "[LiDARBoxComponent].num_lidar_points_in_box"
    rewrite(path, lambda t: t.set_column(t.column_names.index(column), column, pa.nulls(len(t), pa.int64())))
    data = WaymoDataset(places(waymo_copy))
    after = data[2].labels
    for name in ("num_points", "weight", "difficulty"):
        assert (getattr(after, name) == getattr(before, name)).all()
    assert (data.labels(2).num_points == -1).all()  # without points there is nothing to count


# ---- reading


def test_frames_can_be_read_in_any_order_and_only_their_row_groups(written, tmp_path):
    order = [3, 1, 1, 6, 0, 4, 2, 5]
    data = WaymoDataset(places(written))
    straight = [WaymoDataset(places(written))[i].points.xyz for i in range(FRAMES)]
    for i in order:
        assert torch.equal(data[i].points.xyz, straight[i])
    # As in the real files: fifty frames in a row group, times not sorted, strings as dictionaries.
    other = Path(shutil.copytree(written, tmp_path / "other"))
    for component in ("lidar", "lidar_pose"):
        path = other / component / f"{SEGMENTS[0]}.parquet"
        table = pq.read_table(path).take([4, 0, 1, 3, 2])
        key = "key.segment_context_name"
        table = table.set_column(table.column_names.index(key), key, table[key].dictionary_encode())
        pq.write_table(table, path, row_group_size=3)
    again = WaymoDataset(places(other))
    assert again.ids == data.ids
    for i in order:
        assert torch.equal(again[i].points.xyz, straight[i])
    # A damaged row group costs its own frames.
    path = written / "lidar" / f"{SEGMENTS[0]}.parquet"
    chunk = pq.ParquetFile(path).metadata.row_group(2).column(3)
    bytes_ = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    bytes_[start + chunk.total_compressed_size - 5] ^= 1  # one bit: found by the page's checksum
    (other / "lidar" / path.name).write_bytes(bytes_)
    shutil.copy(written / "lidar_pose" / path.name, other / "lidar_pose" / path.name)
    broken = WaymoDataset(places(other))
    for i in (0, 1, 3, 4, 0):
        assert torch.equal(broken[i].points.xyz, straight[i])
    with pytest.raises(InvalidInput, match=rf"frame {SEGMENTS[0]}_1500000000200000: .*not a readable Parquet file"):
        broken[2]
    assert torch.equal(broken[3].points.xyz, straight[3])


def test_every_nth_frame_of_each_segment_is_taken(written):
    assert [p.id[-8:] for p in places(written, every=2)] == ["00000000", "00200000", "00400000", "00500000"]
    with pytest.raises(InvalidInput, match="every must be at least 1"):
        find_waymo_frames(written, every=0)


@pytest.mark.parametrize("component", ["lidar_pose", "lidar_calibration", "vehicle_pose", "lidar_box"])
def test_a_missing_component_file_is_named(waymo_copy, component):
    (waymo_copy / component / f"{SEGMENTS[1]}.parquet").unlink()
    data = WaymoDataset(places(waymo_copy))
    assert len(data[0].points) > 0
    with pytest.raises(
        InvalidInput, match=rf"frame {SEGMENTS[1]}_\d+: segment .*: there is no table .*; download the component {component}"
    ):
        data[6]
    if component == "lidar_box":
        assert len(WaymoDataset(places(waymo_copy), with_labels=False)[6].points) > 0


@pytest.mark.parametrize(
    ("component", "column"),
    [
        ("lidar", "[LiDARComponent].range_image_return2.values"),
        ("lidar_pose", "[LiDARPoseComponent].range_image_return1.shape"),
        ("lidar_box", "[LiDARBoxComponent].box.heading"),
        ("lidar_calibration", "[LiDARCalibrationComponent].beam_inclination.min"),
        ("vehicle_pose", "key.frame_timestamp_micros"),
    ],
)
def test_a_missing_column_is_named(waymo_copy, component, column):
    rewrite(waymo_copy / component / f"{SEGMENTS[0]}.parquet", lambda t: t.drop_columns([column]))
    with pytest.raises(InvalidInput) as caught:
        WaymoDataset(places(waymo_copy))[0]
    assert f"no column {column}; it has key.segment_context_name" in str(caught.value)


@pytest.mark.parametrize(
    ("component", "change", "message"),
    [
        (
            "lidar_pose",
            lambda t: t.slice(1),
            "no pose for each pixel of the TOP laser: its points would lie in other coordinates",
        ),
        ("vehicle_pose", lambda t: t.slice(1), "no vehicle pose: its points would lie in other coordinates"),
        ("lidar_calibration", lambda t: t.slice(1), "laser 1: lidar_calibration has no row of this laser"),
        ("vehicle_pose", lambda t: t.set_column(0, t.column_names[0], pa.array(["other"] * len(t))), "rows of segment other"),
        (
            "lidar",
            lambda t: t.set_column(4, t.column_names[4], pa.array([[1, 2, 4]] * len(t), pa.list_(pa.int32(), 3))),
            r"declares the shape \[1, 2, 4\] and holds",
        ),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(waymo_copy, component, change, message):
    rewrite(waymo_copy / component / f"{SEGMENTS[0]}.parquet", change)
    with pytest.raises(InvalidInput, match=message):
        WaymoDataset(places(waymo_copy))[0]


def test_a_frame_without_a_labeled_object_has_empty_labels(waymo_copy):
    rewrite(waymo_copy / "lidar_box" / f"{SEGMENTS[0]}.parquet", lambda t: t.slice(0, 0))
    labels = WaymoDataset(places(waymo_copy))[0].labels
    assert (len(labels), labels.complete) == (0, True)


def test_a_file_that_is_no_parquet_or_a_segment_without_files_keeps_a_place(waymo_copy):
    (waymo_copy / "lidar" / f"{SEGMENTS[0]}.parquet").write_bytes(b"PAR1 not at all")
    found = find_waymo_frames(waymo_copy, [*SEGMENTS, "simulated_000005_00007"])
    data = WaymoDataset([place for part in found.values() for place in part])
    assert data.ids[:1] == (SEGMENTS[0],)
    with pytest.raises(InvalidInput, match="not a readable Parquet file"):
        data[0]
    with pytest.raises(
        InvalidInput, match=r"segment simulated_000005_00007: there is no file of it .*; did you mean simulated_000005_000007?"
    ):
        data[3]
    assert len(data[1].points) > 0
    with pytest.raises(InvalidInput, match="no lidar/<segment>"):
        find_waymo_frames(waymo_copy / "ImageSets")


def test_frames_of_a_time_or_reader_that_do_not_exist(written):
    reader = SegmentReader(written, SEGMENTS[0])
    empty = reader.frame(5)
    assert (empty.lasers, empty.pose, len(empty.objects.boxes)) == ((), None, 0)
    with pytest.raises(IndexError):
        WaymoDataset(places(written))[FRAMES]


def test_what_was_kept_and_dropped_of_a_frame_is_counted(written):
    frame = WaymoDataset(places(written), classes=("Pedestrian",))[0]
    everything = WaymoDataset(places(written))[0]
    reading = frame.reading
    assert reading.points == len(frame.points)
    assert sum(reading.types_dropped.values()) == len(everything.labels) - len(frame.labels) > 0


def test_tables_that_unpack_into_much_memory_are_refused(waymo_copy, monkeypatch):
    monkeypatch.setattr(waymo_parquet, "_MOST_TABLE_BYTES", 1000)
    with pytest.raises(InvalidInput, match=r"take more than 1,000 bytes; a real segment has a few megabytes"):
        WaymoDataset(places(waymo_copy))[0]
    monkeypatch.undo()
    monkeypatch.setattr(waymo_parquet, "_MOST_ROW_VALUES", 100)
    with pytest.raises(
        InvalidInput, match=r"row group 0 declares [\d,]+ numbers in \d+ rows; a real row has fewer than two million"
    ):
        WaymoDataset(places(waymo_copy), with_labels=False)[0]
