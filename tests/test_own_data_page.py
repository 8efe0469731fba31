"""The commands of docs/own_data.md, docs/data_format.md and README.md run as they are printed; only trainings are cut to two steps."""

import re
import shlex
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather
import pytest
import tiny_layouts

import upcycle3d
from upcycle3d.core.point_files import write_bin
from upcycle3d.datasets.kitti import KittiDataset
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.tools import main

pytestmark = pytest.mark.usefixtures("one_thread")
ROOT = Path(upcycle3d.__file__).resolve().parent
SHORT = {name: [f"--preset.{name}.loop.optim.total-steps", "2"] for name in ("train", "upcycle")}


def write_argoverse_log(log: Path) -> None:
    """Two scans of three cars in the files of Argoverse 2's sensor dataset."""
    (log / "sensors" / "lidar").mkdir(parents=True)
    rows: list[dict[str, object]] = []
    for index, time in enumerate((315966080359713000, 315966080459713000)):
        scan = tiny_layouts.scan(index) + np.array([0, 0, 1.4, 0], np.float32)
        columns = {name: scan[:, i] for i, name in enumerate(("x", "y", "z"))} | {
            "intensity": (255 * scan[:, 3]).astype(np.uint8)
        }
        pyarrow.feather.write_feather(pa.table(columns), str(log / "sensors" / "lidar" / f"{time}.feather"))
        for x, y, z, dx, dy, dz, yaw in tiny_layouts.BOXES:
            place = {"tx_m": x, "ty_m": y, "tz_m": z + 1.4, "length_m": dx, "width_m": dy, "height_m": dz}
            turn = {"qw": np.cos(yaw / 2), "qx": 0.0, "qy": 0.0, "qz": np.sin(yaw / 2)}
            rows.append({"timestamp_ns": time, "category": "REGULAR_VEHICLE", **place, **turn})
    rows.append(rows[0] | {"category": "BOLLARD"})
    pyarrow.feather.write_feather(pa.Table.from_pylist(rows), str(log / "annotations.feather"))


def run_line(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Run one printed command line in this process; returns the command's name."""
    words = shlex.split(line)[1:]
    monkeypatch.setattr(sys, "argv", ["upcycle3d", *words, *SHORT.get(words[0], [])])
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 0, line
    return words[0]


def blocks(page: str, heading: str = "") -> list[tuple[str, str]]:
    """Language and text of the code blocks of a page, from a heading on."""
    text = (ROOT / page).read_text()
    return re.findall(r"^```(\w*)\n(.*?)^```$", text[text.index(heading) :], re.DOTALL | re.MULTILINE)


def command_lines(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("upcycle3d ")]


def test_every_block_of_the_page_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_argoverse_log(tmp_path / "argoverse" / "log")
    ran = []
    for kind, text in blocks("docs/own_data.md"):
        if kind == "python":
            exec(compile(text, "docs/own_data.md", "exec"), {})
        ran += [run_line(line, monkeypatch) for line in command_lines(text)]
    assert ran == ["prepare", "train", "evaluate", "predict", "train"]
    assert (tmp_path / "boxes" / "000011.json").is_file()
    log = PreparedDataset("data/argoverse", "train")
    assert log[0].labels.num_points.min() > 150
    assert 0.5 < float(log[0].points.features.max()) <= 1
    heard = capsys.readouterr()
    assert "next: upcycle3d evaluate run --detector runs/mine --data data/mine:val --protocol cross_dataset" in heard.out
    assert "warning" not in heard.err


def test_the_commands_for_a_folder_on_the_page_of_formats_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_layouts.folder(tmp_path / "my_data")
    lines = [line for _, text in blocks("docs/data_format.md", "### As a folder")[:3] for line in command_lines(text)]
    assert [run_line(line, monkeypatch) for line in lines] == ["prepare", "train", "evaluate"]


def test_the_main_job_of_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    splits = {"train": tiny_layouts.IDS[:2], "val": tiny_layouts.IDS[2:3], "unlabelled": tiny_layouts.IDS[3:]}
    root = tiny_layouts.kitti(tmp_path / "KITTI", splits=splits)
    for frame in KittiDataset(root, tiny_layouts.IDS):
        write_bin(root / "training" / "velodyne_reduced" / f"{frame.id}.bin", frame.points)
    (tmp_path / "my_scan.bin").write_bytes((root / "training" / "velodyne_reduced" / "000002.bin").read_bytes())
    lines = [line for _, text in blocks("README.md", "## The main job on your data") for line in command_lines(text)]
    ran = [run_line(line, monkeypatch) for line in lines]
    assert ran == ["prepare", "train", "extract", "ingest", "upcycle", "evaluate", "predict"]
