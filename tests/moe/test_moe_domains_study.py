"""Every arm of the study on domains runs to its end, is kept, and is not trained twice. Frames and detectors are tiny, the numbers mean nothing."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest

import tiny
import upcycle3d
from upcycle3d.datasets.prepare import prepare
from upcycle3d.perception.evaluation.score import score_detector
from upcycle3d.perception.recipes.result_csv import read_rows

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.slow, pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture(params=["second_iou", "pv_rcnn"])
def study(monkeypatch, request):
    """The modules of the study, with tiny frames in the place of simulated ones."""
    monkeypatch.syspath_prepend(str(Path(upcycle3d.__file__).resolve().parent / "benchmarks" / "studies"))
    import moe_domain_bench as bench
    import moe_domains

    def frames(folder, place, sizes, *, seed, classes, workers):
        if (folder / "dataset.json").exists():
            return folder
        source = [replace(tiny.frame_with_car(seed * 100 + i), id=f"frame{i}") for i in range(sum(sizes.values()))]
        ids, splits = [frame.id for frame in source], {}
        for name, size in sizes.items():
            splits[name], ids = ids[:size], ids[size:]
        prepare(source, [frame.id for frame in source], folder, splits=splits, classes=classes, workers=0)
        return folder

    def scores(self, detector, domain):
        return dict(score_detector(detector, self.split(domain, "val").open(), "cross_dataset").headline())

    preset = tiny.preset()
    if request.param == "pv_rcnn":
        preset = replace(preset, detector=tiny.pv_rcnn_config(width=8, keypoints=32))
    monkeypatch.setattr(bench, "prepared_stand_in", frames)
    monkeypatch.setattr(bench.Bench, "scores", scores)
    monkeypatch.setitem(bench.PRESETS, request.param, preset)
    sizes = {"train": 6, "fleet": 3, "validation": 2, "contrast_steps": 2}
    monkeypatch.setattr(moe_domains, "QUICK", {**moe_domains.QUICK, **sizes, "seed_steps": 3, "upcycle_steps": 2})
    moe_domains.tested = request.param
    return moe_domains


def test_all_arms_of_one_seed(study, tmp_path, monkeypatch, capsys):
    words = ["moe_domains.py", "--out", str(tmp_path), "--seeds", "0", "--quick", "--detector", study.tested]
    monkeypatch.setattr(sys, "argv", words)
    study.main()
    printed = capsys.readouterr().out
    assert "btx in fog minus its specialist" in printed
    rows = read_rows(tmp_path / study.tested / "published")
    assert {row["arm"] for row in rows} == set(study.ARMS)
    assert {row["domain"] for row in rows} == {"city", "town", "fog"}
    cost = {row["arm"]: float(row["cpu"]) for row in rows}
    assert cost["btx"] > cost["specialists_oracle"] > 0
    monkeypatch.setattr(study, "Arms", None)  # a finished study trains nothing
    study.main()
