"""docs/own_data.md runs as it is printed, from top to bottom; only the trainings are cut to two steps."""

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
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.tools import main

pytestmark = pytest.mark.usefixtures("one_thread")
PAGE = Path(upcycle3d.__file__).resolve().parent / "docs" / "own_data.md"
SHORT = ["--preset.train.loop.optim.total-steps", "2"]


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


def test_every_block_of_the_page_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_argoverse_log(tmp_path / "argoverse" / "log")
    ran = []
    for kind, text in re.findall(r"^```(\w*)\n(.*?)^```$", PAGE.read_text(), re.DOTALL | re.MULTILINE):
        if kind == "python":
            exec(compile(text, str(PAGE), "exec"), {})
        for line in [line for line in text.splitlines() if line.startswith("upcycle3d ")]:
            words = shlex.split(line)[1:]
            monkeypatch.setattr(sys, "argv", ["upcycle3d", *words, *(SHORT if words[0] == "train" else [])])
            with pytest.raises(SystemExit) as ended:
                main.main()
            assert ended.value.code == 0, line
            ran.append(words[0])
    assert ran == ["prepare", "train", "evaluate", "predict", "train"]
    assert (tmp_path / "boxes" / "000011.json").is_file()
    log = PreparedDataset("data/argoverse", "train")
    assert log[0].labels.num_points.min() > 150
    assert 0.5 < float(log[0].points.features.max()) <= 1
    heard = capsys.readouterr()
    assert "next: upcycle3d evaluate run --detector runs/mine --data data/mine:val --protocol cross_dataset" in heard.out
    assert "warning" not in heard.err
