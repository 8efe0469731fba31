"""A simulated dataset in Lyft's layout reads back as it was made, and is prepared from beginning to end, damaged sweeps and all."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.datasets.nuscenes import LYFT_DIALECT, NuScenesDataset, split_by_scene
from upcycle3d.datasets.nuscenes_tables import read_tables
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation import places
from upcycle3d.datasets.simulation.layout_lyft import CATEGORIES, VERSION, frame_poses, write_lyft_layout
from upcycle3d.datasets.simulation.simulate import simulate_frame
from upcycle3d.ops.points_in_boxes import count_points_in_boxes
from upcycle3d.tools import prepare, simulate
from upcycle3d.tools.console import run_command

SMALL = replace(places.domain("lyft"), sensor=replace(places.domain("lyft").sensor, azimuths=240))
NAMES = places.CLASS_NAMES
CLASS_MAP = {category: name for name, category in CATEGORIES.items()}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lyft")
    assert write_lyft_layout(folder, SMALL, num_frames=4, seed=3, workers=1, splits={"train": 3, "val": 1}) == 4
    return folder


def reader(root: Path) -> NuScenesDataset:
    tables = read_tables(root, VERSION)
    return NuScenesDataset(tables, tables.samples, LYFT_DIALECT, classes=NAMES, class_map=CLASS_MAP)


def test_points_boxes_and_counts_read_back_as_they_were_made(root):
    data = reader(root)
    assert len(data) == 4
    for index in range(4):
        made, read = simulate_frame(SMALL, seed=3, index=index, view="full").frame, data[index]
        torch.testing.assert_close(read.points.xyz, made.points.xyz, atol=3e-5, rtol=0)  # two roundings of float32 at 120 m
        torch.testing.assert_close(read.points.features, made.points.features, atol=2e-7, rtol=0)
        assert read.labels.classes.tolist() == made.labels.classes.tolist()
        torch.testing.assert_close(read.labels.boxes.data, made.labels.boxes.data, atol=1e-5, rtol=0)
        margin = torch.tensor([0, 0, 0, 1e-4, 1e-4, 1e-4, 0])  # a point on a face may fall on either side
        low, high = (count_points_in_boxes(made.points.xyz, made.labels.boxes.data + m) for m in (-margin, margin))
        assert bool(((low <= read.labels.num_points) & (read.labels.num_points <= high)).all())
        assert int((read.labels.num_points != count_points_in_boxes(made.points.xyz, made.labels.boxes.data)).sum()) <= 1


def test_every_frame_has_a_pose_and_a_calibration_of_its_own(root):
    tables = read_tables(root, VERSION)
    keyframes = [tables.keyframe(sample) for sample in tables.samples]
    for get in (lambda k: k.sensor.rotation, lambda k: k.vehicle.rotation, lambda k: k.vehicle.translation):
        assert len({tuple(get(k).flatten().tolist()) for k in keyframes}) == 4
    for k in keyframes:
        assert k.sensor.rotation[0, 0] < -0.9  # about half a turn, as on Lyft's cars
        torch.testing.assert_close(k.vehicle.rotation @ k.vehicle.rotation.T, torch.eye(3).double())
    assert keyframes[0].sensor.translation.tolist() == frame_poses(SMALL.sensor.height, seed=3, index=0)[0].translation.tolist()


def test_a_split_names_the_scenes_of_its_frames(root):
    names = (root / "ImageSets" / "val.txt").read_text().split()
    assert names == ["simulated-000003"]
    assert [len(v) for v in split_by_scene(read_tables(root, VERSION), {"val": names}).values()] == [1]


def test_an_interrupted_run_goes_on_and_other_settings_are_refused(root, tmp_path):
    assert write_lyft_layout(tmp_path, SMALL, num_frames=2, seed=3, workers=1) == 2
    assert write_lyft_layout(tmp_path, SMALL, num_frames=4, seed=3, workers=2, splits={"train": 3, "val": 1}) == 2
    for path in (*root.glob("v1.01-train/*.json"), *root.glob("lidar/*.bin"), *root.glob("ImageSets/*")):
        assert (tmp_path / path.relative_to(root)).read_bytes() == path.read_bytes()
    with pytest.raises(InvalidInput, match="describes another simulation"):
        write_lyft_layout(tmp_path, SMALL, num_frames=2, seed=4, workers=1)
    (tmp_path / "simulation.json").unlink()
    with pytest.raises(InvalidInput, match="it is no simulated dataset"):
        write_lyft_layout(tmp_path, SMALL, num_frames=2, seed=3, workers=1)


def run(module, *arguments: object) -> int:
    return run_command(module.command, [str(a) for a in arguments])


def test_prepare_lists_the_damaged_sweep_keeps_the_rest_and_tries_it_again(root, tmp_path):
    raw, out, report = tmp_path / "raw", tmp_path / "data", tmp_path / "report.json"
    write_lyft_layout(raw, SMALL, num_frames=4, seed=3, workers=1, splits={"train": 3, "val": 1})
    sweep = raw / "lidar" / "simulated_lidar1_000001.bin"
    whole = sweep.read_bytes()
    sweep.write_bytes(whole[:-8])  # two numbers short, as in Lyft v1.01
    arguments = (
        "lyft",
        raw,
        "--out",
        out,
        "--z-shift",
        1.83,
        "--neighbors",
        "other_vehicle",
        "Car",
        "--workers",
        1,
        "--json",
        report,
    )
    assert run(prepare, *arguments) == 0
    found = json.loads(report.read_text())
    assert found["splits"] == {"train": 2, "val": 1}
    (failure,) = found["failures"]
    assert failure["id"] == read_tables(raw, VERSION).samples[1]
    assert "simulated_lidar1_000001.bin" in failure["reason"]
    assert "whole in v1.02" in failure["reason"]

    sweep.write_bytes(whole)
    assert run(prepare, *arguments) == 0
    found = json.loads(report.read_text())
    assert (found["splits"], found["failures"]) == ({"train": 3, "val": 1}, [])
    prepared = PreparedDataset(out, "val")
    direct = NuScenesDataset(
        read_tables(raw, VERSION), prepared.ids, LYFT_DIALECT, z_shift=1.83, neighbors={"other_vehicle": "Car"}
    )[0]
    torch.testing.assert_close(prepared[0].points.xyz, direct.points.xyz)
    torch.testing.assert_close(prepared[0].labels.boxes.data, direct.labels.boxes.data)
    assert prepared[0].labels.weight.tolist() == direct.labels.weight.tolist()
    assert run(prepare, *arguments) == 0
    assert json.loads(report.read_text())["reused_frames"] == 4
    assert run(prepare, *arguments, "--max-length", 10) == 2  # another option is another preparation


def test_without_scene_lists_whole_drives_are_drawn(root, tmp_path):
    for name in (VERSION, "lidar"):
        (tmp_path / name).symlink_to(root / name)
    report = tmp_path / "report.json"
    options = ("lyft", tmp_path, "--workers", 1, "--json", report)
    assert run(prepare, *options, "--out", tmp_path / "a") == 0
    assert json.loads(report.read_text())["splits"] == {"all": 4}
    assert run(prepare, *options, "--out", tmp_path / "b", "--val-share", 0.25) == 0
    assert json.loads(report.read_text())["splits"] == {"train": 3, "val": 1}
    assert run(prepare, "lyft", root, "--out", tmp_path / "c", "--val-share", 0.25) == 2  # its lists already say which
    assert run(prepare, *options, "--out", tmp_path / "c", "--version", "v1.02-train") == 2


def test_simulate_writes_lyft_s_layout_and_says_how_to_go_on(tmp_path, capsys):
    raw, data = tmp_path / "raw", tmp_path / "data"
    arguments = (
        "--domain",
        "lyft",
        "--layout",
        "lyft",
        "--out",
        raw,
        "--frames",
        2,
        "--splits",
        "train",
        1,
        "val",
        1,
        "--workers",
        1,
    )
    assert run(simulate, *arguments) == 0
    step = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("next: upcycle3d prepare lyft"))
    assert (
        run(prepare, *step.removeprefix("next: upcycle3d prepare ").replace("PREPARED", str(data)).split(), "--workers", "1") == 0
    )
    assert len(PreparedDataset(data, "train")) == 1
