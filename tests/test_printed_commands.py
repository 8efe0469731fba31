"""The remaining commands of README.md and docs/data_format.md run as they are printed, on tiny data in the layout that each names.

`test_own_data_page.py` runs the main job and the commands for a folder. Only numbers of simulated frames are made smaller here.
"""

import json
import re
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import tiny_layouts
import tiny_waymo
import torch

import upcycle3d
from upcycle3d.datasets.kitti import KittiDataset
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation import places
from upcycle3d.datasets.simulation.layout_lyft import write_lyft_layout
from upcycle3d.datasets.simulation.layout_waymo import write_waymo_layout
from upcycle3d.perception.models.openpcdet import openpcdet_state
from upcycle3d.perception.recipes.presets import KITTI_PV_RCNN_PUBLISHED
from upcycle3d.perception.training.detector_files import load_detector
from upcycle3d.tools import main

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(upcycle3d.__file__).resolve().parent
LYFT = replace(places.domain("lyft"), sensor=replace(places.domain("lyft").sensor, azimuths=240))


def printed(page: str, start: str) -> list[str]:
    """The words of the only printed command that begins like this, in a code block or between backticks, without `upcycle3d`."""
    text = (ROOT / page).read_text()
    found = {
        " ".join(match.split())
        for match in re.findall(rf"^(upcycle3d {start}.*)$", text, re.M) + re.findall(rf"`(upcycle3d {start}[^`]*)`", text)
    }
    (line,) = found
    return line.split()[1:]


def run(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["upcycle3d", *words])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0, words


def write_nuscenes(root: Path) -> None:
    """Simulated frames of Lyft's layout under nuScenes' names: rows of five values, intensity to 255, `vehicle.car`."""
    write_lyft_layout(root, LYFT, num_frames=2, seed=3, workers=1)
    tables = (root / "v1.01-train").rename(root / "v1.0-mini")
    (root / "samples" / "LIDAR_TOP").mkdir(parents=True)
    sweeps = json.loads((tables / "sample_data.json").read_text())
    for row in sweeps:
        old = root / row["filename"]
        row["filename"] = f"samples/LIDAR_TOP/{old.stem}.pcd.bin"
        rows = np.fromfile(old, "<f4").reshape(-1, 5)
        rows[:, 3] = np.round(100 + 50 * np.sin(np.arange(len(rows))))
        rows[:, 4] = np.arange(len(rows)) % 32
        rows.tofile(root / row["filename"])
    (tables / "sample_data.json").write_text(json.dumps(sweeps))
    categories = json.loads((tables / "category.json").read_text())
    names = {"car": "vehicle.car", "pedestrian": "human.pedestrian.adult", "bicycle": "vehicle.bicycle"}
    for row in categories:
        row["name"] = names.get(row["name"], row["name"])
    (tables / "category.json").write_text(json.dumps(categories))
    annotations = json.loads((tables / "sample_annotation.json").read_text())
    for row in annotations:
        row.setdefault("num_lidar_pts", 20)
    (tables / "sample_annotation.json").write_text(json.dumps(annotations))
    sensors = json.loads((tables / "sensor.json").read_text())
    assert any(row["channel"] == "LIDAR_TOP" for row in sensors)


def test_prepare_kitti_of_the_page_of_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_layouts.kitti(tmp_path / "KITTI")
    run(printed("docs/data_format.md", "prepare kitti KITTI --out data/kitti"), monkeypatch)
    assert len(PreparedDataset("data/kitti", "train")) == 3


def test_prepare_lyft_and_nuscenes_of_the_page_of_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_lyft_layout(tmp_path / "ROOT", LYFT, num_frames=2, seed=3, workers=1)
    run(printed("docs/data_format.md", "prepare lyft ROOT"), monkeypatch)
    (tmp_path / "ROOT").rename(tmp_path / "LYFT")
    write_nuscenes(tmp_path / "ROOT")
    run(printed("docs/data_format.md", "prepare nuscenes ROOT"), monkeypatch)
    lyft, nuscenes = PreparedDataset("data/lyft"), PreparedDataset("data/nuscenes")
    assert [len(lyft), len(nuscenes)] == [2, 2]
    cars = nuscenes[0].labels.select(nuscenes[0].labels.classes == 0)
    assert len(cars) == len(lyft[0].labels) > 0
    torch.testing.assert_close(cars.boxes.data[:, 3:], lyft[0].labels.boxes.data[:, 3:], atol=1e-4, rtol=0)


def test_prepare_waymo_of_the_page_of_formats(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_waymo_layout(tmp_path / "ROOT", tiny_waymo.SMALL, num_frames=2, seed=4, workers=1, splits={"train": 2})
    run(printed("docs/data_format.md", "prepare waymo ROOT"), monkeypatch)
    assert len(PreparedDataset("DIR", "train")) == 2


def test_simulate_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    fewer = {"100": "3", "60": "1", "30": "1", "10": "1"}
    run([fewer.get(word, word) for word in printed("README.md", "simulate --domain kitti")], monkeypatch)
    assert len(KittiDataset("KITTI", ("000000", "000001", "000002"))[0].labels) > 0
    assert sorted(path.stem for path in Path("KITTI/ImageSets").iterdir()) == ["train", "unlabelled", "val"]


def test_import_of_the_readme(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    torch.save({"model_state": openpcdet_state(KITTI_PV_RCNN_PUBLISHED.detector.build())}, "pv_rcnn_8369.pth")
    run(printed("README.md", "import openpcdet"), monkeypatch)
    assert load_detector("runs/published").config == KITTI_PV_RCNN_PUBLISHED.detector
