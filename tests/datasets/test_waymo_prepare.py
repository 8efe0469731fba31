"""Splits by sequence, and the commands ``simulate --layout waymo`` and ``prepare waymo``; a real scan through the encoder."""

import json
import shutil
from dataclasses import replace

import pyarrow.parquet as pq
import pytest
import torch
from tiny_waymo import FRAMES, SEGMENTS, SMALL, places

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.point_files import read_points
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation.layout_waymo import write_waymo_layout
from upcycle3d.datasets.simulation.places import domain
from upcycle3d.datasets.waymo import WaymoDataset
from upcycle3d.datasets.waymo_places import find_waymo_splits
from upcycle3d.tools import prepare, simulate
from upcycle3d.tools.console import run_command

# ---- splits


def test_splits_come_from_lists_then_from_folders(written, tmp_path):
    assert find_waymo_splits(written) == {"train": SEGMENTS[:1], "val": SEGMENTS[1:]}
    assert find_waymo_splits(written, ["val"]) == {"val": SEGMENTS[1:]}
    with pytest.raises(InvalidInput, match=r"no split trian in .*; there are train, val"):
        find_waymo_splits(written, ["trian"])
    for folder, segment in (("training", SEGMENTS[0]), ("validation", SEGMENTS[1])):
        for component in ("lidar", "lidar_pose", "lidar_calibration", "vehicle_pose", "lidar_box"):
            (tmp_path / folder / component).mkdir(parents=True)
            shutil.copy(written / component / f"{segment}.parquet", tmp_path / folder / component)
    assert find_waymo_splits(tmp_path) == {"train": SEGMENTS[:1], "val": SEGMENTS[1:]}
    assert [p.segment for p in places(tmp_path)] == [SEGMENTS[0]] * 5 + [SEGMENTS[1]] * 2
    assert torch.equal(WaymoDataset(places(tmp_path))[6].points.xyz, WaymoDataset(places(written))[6].points.xyz)
    (tmp_path / "ImageSets").mkdir()  # OpenPCDet's lists hold v1 file names
    (tmp_path / "ImageSets" / "few.txt").write_text(f"segment-{SEGMENTS[1]}_with_camera_labels.tfrecord\n")
    assert find_waymo_splits(tmp_path) == {"few": SEGMENTS[1:]}


# ---- the commands


def run(module, *arguments: object) -> int:
    return run_command(module.command, [str(a) for a in arguments])


def test_prepare_goes_on_past_what_is_broken_and_lists_it(waymo_copy, tmp_path, capsys):
    poses = waymo_copy / "lidar_pose" / f"{SEGMENTS[0]}.parquet"
    pq.write_table(pq.read_table(poses).slice(1), poses)
    (waymo_copy / "ImageSets" / "train.txt").write_text(f"{SEGMENTS[0]}\nlost_segment\n")
    report, out = tmp_path / "report.json", tmp_path / "prepared"
    arguments = (
        "waymo",
        waymo_copy,
        "--out",
        out,
        "--classes",
        "Car",
        "--class-map",
        "Vehicle",
        "Car",
        "--workers",
        1,
        "--json",
        report,
    )
    assert run(prepare, *arguments) == 0
    found = json.loads(report.read_text())
    assert found["splits"] == {"train": 4, "val": 2}
    assert [f["id"] for f in found["failures"]] == [f"{SEGMENTS[0]}_1500000000000000", "lost_segment"]
    assert "left out" in capsys.readouterr().out
    assert found["gt_objects"]["train"] > 0
    data = PreparedDataset(out, "train")
    assert data.classes == ("Car",)
    assert data.feature_names == ("intensity", "elongation")
    original = WaymoDataset(places(waymo_copy), classes=("Car",), class_map={"Vehicle": "Car"})[1]
    frame = data[0]
    assert frame.id == original.id
    assert torch.equal(frame.points.xyz, original.points.xyz)
    assert torch.equal(frame.labels.num_points, original.labels.num_points)
    assert run(prepare, *arguments) == 0
    assert json.loads(report.read_text())["splits"] == {"train": 4, "val": 2}
    assert run(prepare, *arguments, "--no-second-return") == 2
    assert run(prepare, "waymo", waymo_copy, "--out", tmp_path / "other", "--splits", "vall") == 2
    assert "no split vall" in capsys.readouterr().err


def test_prepare_draws_label_shares_by_segment(written, tmp_path, capsys):
    report = tmp_path / "report.json"
    (tmp_path / "raw").mkdir()
    for folder in written.iterdir():
        if folder.is_dir() and folder.name != "ImageSets":
            (tmp_path / "raw" / folder.name).symlink_to(folder)
    lists = tmp_path / "raw" / "ImageSets"
    lists.mkdir()
    (lists / "train.txt").write_text("\n".join(SEGMENTS))
    options = ("--workers", 1, "--every", 5, "--label-shares", 0.5, "--json", report, "--labeled", "train-0.5-0", "train-0.5-2")
    assert run(prepare, "waymo", tmp_path / "raw", "--out", tmp_path / "out", *options) == 0
    found = json.loads(report.read_text())
    assert found["splits"] == {"train": 2, **{f"train-0.5-{seed}{side}": 1 for seed in range(3) for side in ("", "-rest")}}
    assert set(found["gt_objects"]) == {"train-0.5-0", "train-0.5-2"}


def test_simulate_writes_the_layout_and_completes_it(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("upcycle3d.datasets.simulation.places.DOMAINS", (SMALL,))
    assert domain("waymo") is SMALL
    arguments = ("--domain", "waymo", "--layout", "waymo", "--view", "full", "--out", tmp_path / "raw", "--workers", 1)
    assert run(simulate, *arguments, "--frames", 3, "--splits", "val", 1, "train", 0) == 0
    assert "prepare waymo" in capsys.readouterr().out
    splits = find_waymo_splits(tmp_path / "raw")
    assert splits == {"train": ("simulated_000001_000003",), "val": ("simulated_000000_000001",)}
    before = (tmp_path / "raw" / "lidar" / "simulated_000001_000003.parquet").read_bytes()
    (tmp_path / "raw" / "lidar_box" / "simulated_000001_000003.parquet").unlink()  # as if killed
    assert run(simulate, *arguments, "--frames", 3, "--splits", "val", 1, "train", 0) == 0
    assert (tmp_path / "raw" / "lidar" / "simulated_000001_000003.parquet").read_bytes() == before
    assert len(WaymoDataset(places(tmp_path / "raw"))) == 3
    assert run(simulate, *arguments, "--frames", 3, "--seed", 1) == 2
    assert "another simulation" in capsys.readouterr().err
    shutil.copytree(tmp_path / "raw" / "lidar", tmp_path / "else" / "lidar")
    with pytest.raises(InvalidInput, match="no simulated dataset"):
        write_waymo_layout(tmp_path / "else", SMALL, num_frames=1, seed=0, workers=1)
    with pytest.raises(InvalidInput, match="splits within them"):
        write_waymo_layout(tmp_path / "new", SMALL, num_frames=1, seed=0, splits={"train": 2})


def test_two_workers_write_the_same_bytes(written, tmp_path):
    write_waymo_layout(tmp_path, SMALL, num_frames=FRAMES, seed=4, workers=2, splits={"train": 5, "val": 2})
    for path in written.rglob("*.parquet"):
        assert path.read_bytes() == (tmp_path / path.relative_to(written)).read_bytes()


# ---- real points


def test_a_real_frame_goes_through_the_cross_dataset_encoder():
    from upcycle3d.core.rig import RigSpec
    from upcycle3d.perception.models.encoders.second import SecondEncoder
    from upcycle3d.perception.recipes.architectures import CROSS_DATASET_SECOND_IOU_DETECTOR
    from upcycle3d.perception.vehicle.extractor import Extractor

    scan = tiny.shared("data/waymo/points_unlabelled/seq_0_frame_100.bin", "a real Waymo scan becomes a smashed scene")
    columns = ("x", "y", "z", "intensity", "elongation")
    cloud = read_points(scan, columns=columns, intensity_scale=None)
    assert len(cloud) == 177_125
    assert cloud.feature_names == ("intensity", "elongation")
    assert cloud.xyz[:, :2].abs().max() < 80
    near = cloud.xyz[cloud.xyz[:, :2].norm(dim=1) < 15, 2]
    assert abs(float(near.quantile(0.3))) < 0.3  # the vehicle's frame: the road is at z = 0
    torch.manual_seed(0)
    encoder = SecondEncoder(CROSS_DATASET_SECOND_IOU_DETECTOR.encoder).eval()
    scene, _ = Extractor(encoder, RigSpec(), "int8").smash(replace(cloud, features=cloud.features[:, :0], feature_names=()))
    assert scene.coords.shape[0] > 5_000
    assert scene.features.isfinite().all()
    reach = (scene.coords[:, 1:].double() + 0.5) * 0.8 - 75.2
    assert reach.abs().max() < 75.2
    assert reach.max() > 70
    assert reach.min() < -70
