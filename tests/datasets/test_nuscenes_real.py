"""Real nuScenes and Lyft samples: the frame conversion must put the points into the boxes that people drew around them."""

import json

import pytest
import torch

import tiny
from upcycle3d.core.boxes import rotate_z
from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.drive_tables import DriveTables
from upcycle3d.datasets.nuscenes import LYFT_DIALECT, NUSCENES_DIALECT, NuScenesDataset, read_sweep
from upcycle3d.datasets.nuscenes_tables import read_tables
from upcycle3d.ops.points_in_boxes import count_points_in_boxes
from upcycle3d.tools import prepare
from upcycle3d.tools.console import run_command

SAMPLES = tiny.shared("data/nuscenes", "points of real nuScenes and Lyft samples lie in their labeled boxes").parent


@pytest.fixture(scope="module")
def nuscenes() -> DriveTables:
    return read_tables(SAMPLES / "nuscenes", "v1.0-mini")


def everything(tables: DriveTables, scene: str) -> NuScenesDataset:
    names = tables.categories
    return NuScenesDataset(
        tables, tables.scenes[scene], NUSCENES_DIALECT, classes=names, class_map={name: name for name in names}
    )


def test_points_counted_in_upright_boxes_of_the_world_are_the_table_s_exactly(nuscenes):
    """Frame -> vehicle -> world, against nuScenes' own counts: 69 boxes, 1009 points, none differs."""
    data = everything(nuscenes, "scene-0061")
    frame = data[0]
    keyframe, boxes = nuscenes.keyframe(frame.id), nuscenes.annotations(frame.id)
    world = keyframe.vehicle.to_outer(frame.points.xyz.double() + keyframe.sensor.translation)
    heading = torch.atan2(boxes.rotation[:, 1, 0], boxes.rotation[:, 0, 0])
    local = rotate_z(world[None] - boxes.center[:, None], -heading[:, None])  # (boxes, points, 3)
    inside = (local.abs() <= boxes.size[:, None, [1, 0, 2]] / 2).all(-1).sum(1)
    assert (len(inside), int(inside.sum())) == (69, 1009)
    assert inside.tolist() == boxes.num_points.tolist()


def test_our_boxes_hold_those_points_up_to_the_vehicle_s_lean(nuscenes):
    """The vehicle leans by a degree against the world, in which labels stand upright: 63 of 69 counts stay, 20 of 1009 points go."""
    frame = everything(nuscenes, "scene-0061")[0]
    counted = count_points_in_boxes(frame.points.xyz, frame.labels.boxes.data)
    wrong = (counted - frame.labels.num_points).abs()
    assert int((wrong == 0).sum()) >= 62
    assert int(wrong.sum()) <= 30


def test_boxes_of_the_other_scene_hold_their_points_too(nuscenes):
    """The sample's rows for it are rebuilt, length before width and a quarter turn off: the same space, with less exact counts."""
    data = everything(nuscenes, "scene-0103")
    exact = total = counted_points = table_points = 0
    for i in range(len(data)):
        frame = data[i]
        counted = count_points_in_boxes(frame.points.xyz, frame.labels.boxes.data)
        exact += int((counted == frame.labels.num_points).sum())
        total += len(counted)
        counted_points += int(counted.sum())
        table_points += int(frame.labels.num_points.sum())
    assert total == 116
    assert exact / total > 0.7
    assert abs(counted_points / table_points - 1) < 0.08


def test_the_road_lies_at_the_mounting_height_and_cars_ahead_stand_on_it(nuscenes):
    frame = NuScenesDataset(nuscenes, nuscenes.scenes["scene-0061"], NUSCENES_DIALECT, classes=("Car", "Truck"), z_shift=1.84)[0]
    near = frame.points.xyz[:, :2].norm(dim=1) < 15
    assert abs(float(frame.points.xyz[near, 2].quantile(0.3))) < 0.15
    truck = frame.labels.boxes.data[frame.labels.classes == 1][0]  # the vehicle ahead
    assert 10 < truck[0] < 20
    assert abs(truck[6]) < 0.1
    assert abs(truck[2] - truck[5] / 2) < 0.3
    assert float(frame.points.features.max()) == 1.0


def test_prepare_reads_nuscenes_and_parts_its_drives(tmp_path):
    report = tmp_path / "report.json"
    arguments = [
        "nuscenes",
        str(SAMPLES / "nuscenes"),
        "--version",
        "v1.0-mini",
        "--out",
        str(tmp_path / "data"),
        "--z-shift",
        "1.84",
    ]
    options = ["--classes", "Car", "Pedestrian", "--val-share", "0.2", "--workers", "1", "--json", str(report)]
    assert run_command(prepare.command, arguments + options) == 0
    found = json.loads(report.read_text())
    assert (sorted(found["splits"].values()), found["failures"]) == ([1, 3], [])
    assert found["points"] == 34_752 + 34_720 + 34_784 + 34_688


def test_lyft_s_sample_gives_its_boxes_on_the_road(tmp_path):
    tables = read_tables(SAMPLES / "lyft", "v1.01-train")
    (sample,) = tables.samples
    data = NuScenesDataset(tables, tables.samples, LYFT_DIALECT, classes=("Car",), z_shift=1.83)
    labels = data.labels(sample)
    assert labels.classes.tolist() == [0, 0, 0, 0]
    assert labels.num_points.tolist() == [-1] * 4  # Lyft's tables do not know
    torch.testing.assert_close(labels.boxes.data[:, 3:6], torch.tensor(
        [[4.495, 2.046, 1.849], [4.495, 2.232, 1.491], [4.502, 2.086, 1.862], [4.495, 2.046, 1.787]]))  # fmt: skip
    bottoms = labels.boxes.data[:, 2] - labels.boxes.data[:, 5] / 2
    slope = bottoms / labels.boxes.data[:, :2].norm(dim=1)  # within 3 % of the plane the vehicle stands on
    assert float(slope.abs().max()) < 0.03
    with pytest.raises(InvalidInput, match=r"no sweep .*lidar/host-a101_lidar1_1240710385903083166.bin"):
        data[0]


def test_lyft_s_cut_sweeps_are_read_as_they_are_and_counted_in(tmp_path):
    """Cut to five whole rows they are legal sweeps; one stands in for the sample's own, which is not there."""
    cut = sorted((SAMPLES / "lyft" / "lidar_truncated").glob("*.bin"))
    assert [len(read_sweep(path)) for path in cut] == [5, 5, 5]
    (tmp_path / "v1.01-train").symlink_to(SAMPLES / "lyft" / "v1.01-train")
    (tmp_path / "lidar").mkdir()
    (tmp_path / "lidar" / "host-a101_lidar1_1240710385903083166.bin").symlink_to(cut[0])
    tables = read_tables(tmp_path, "v1.01-train")
    frame = NuScenesDataset(tables, tables.samples, LYFT_DIALECT, classes=("Car",))[0]
    assert frame.labels.num_points.tolist() == [0] * 4
    assert bool((frame.points.xyz[:, 0] < -45).all())  # this host's LiDAR looks backwards: the file's x is near +50


def test_lyft_s_full_sweep_is_whole_and_tells_no_intensity():
    (path,) = (SAMPLES / "lyft" / "lidar").glob("*.bin")
    points = read_sweep(path)
    assert len(points) == 53_146
    torch.testing.assert_close(points.features, torch.full((53_146, 1), 100 / 255))
