"""The study of drives: what counts as after a switch, whose detections count, what is concluded; and, slowly, every arm on tiny frames."""

import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tiny
import upcycle3d
from upcycle3d.core.structures import Boxes3D, Predictions
from upcycle3d.datasets.prepare import prepare
from upcycle3d.perception.evaluation.protocols import LabeledDetections
from upcycle3d.perception.moe.runtime.recorded_decisions import read_decisions
from upcycle3d.perception.recipes.result_csv import read_rows

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("ignore::UserWarning")]


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(upcycle3d.__file__).resolve().parent / "benchmarks" / "studies"))
    import moe_drive

    return moe_drive


def predicted(score: float) -> Predictions:
    box, value = Boxes3D.from_array([[5.0, 0, 0, 4, 2, 1.5, 0]]), torch.tensor([score])
    return Predictions(boxes=box, classes=torch.zeros(1, dtype=torch.int64), scores=value, class_scores=value, iou_scores=value)


def found(*scores: float) -> LabeledDetections:
    """One detection per frame, with a score that tells whose it is."""
    frames = [tiny.frame_with_car(i) for i in range(len(scores))]
    return LabeledDetections(
        ids=tuple(frame.id for frame in frames),
        labels=tuple(frame.labels for frame in frames),
        predictions=tuple(predicted(score) for score in scores),
        label_classes=("Car",),
        detector_classes=("Car",),
    )


def test_the_detections_of_the_decided_context_count(study):
    import moe_drive_bench as bench

    tables = [found(0.1, 0.2, 0.3), found(0.4, 0.5, 0.6)]
    taken = bench.chosen(tables, (1, 0, 1))
    assert [round(float(p.scores[0]), 1) for p in taken.predictions] == [0.4, 0.2, 0.6]
    assert bench.some(taken, (True, False, True)).ids == ("frame0", "frame2")


def test_frames_after_a_switch_are_those_behind_a_change_of_the_true_context(study):
    import moe_drive_bench as bench

    contexts = (0, 0, 0, 1, 1, 1, 1, 2, 2)
    drive = bench.Drive(frames=tuple(tiny.frame_with_car(i) for i in range(9)), contexts=contexts)
    near = [i for i, after in enumerate(drive.after_switch(2)) if after]
    assert near == [3, 4, 7, 8]


def test_a_falsifier_fires_where_the_difference_is_not_above_zero(study):
    def results(values):
        ap = {c: {study.MAIN: 0.0} for c in study.CONTEXTS}
        return {
            s: {"oracle": {c: {study.MAIN: v} for c in study.CONTEXTS}, "predicted": ap, "wrong": ap}
            for s, v in enumerate(values)
        }

    def first(readme, pooled):
        return study.verdicts({"readme_50": results(readme), "pooled_50": results(pooled)}, 0.5)[0]

    assert "shown" in first([30.0, 31.0, 32.0], [20.0, 21.5, 21.9])
    assert "FALSIFIED" in first([20.0, 21.0, 22.0], [20.0, 21.5, 21.9])
    assert "FALSIFIED" in first([30.0, 21.0, 40.0], [20.0, 21.5, 21.9])  # the interval reaches zero
    assert "one seed has no interval" in first([30.0], [20.0])
    assert study.verdicts({}, 0.5) == []


@pytest.mark.slow
def test_all_arms_of_one_seed(study, tmp_path, monkeypatch, capsys):
    """Every cell is made, kept, published, and not made twice; the trace of decisions is read back."""
    import moe_domain_bench

    def frames(folder, place, sizes, *, seed, classes, workers):
        if (folder / "dataset.json").exists():
            return folder
        source = [replace(tiny.frame_with_car(seed * 100 + i), id=f"frame{i}") for i in range(sum(sizes.values()))]
        ids, splits = [frame.id for frame in source], {}
        for name, size in sizes.items():
            splits[name], ids = ids[:size], ids[size:]
        prepare(source, [frame.id for frame in source], folder, splits=splits, classes=classes, workers=0)
        return folder

    monkeypatch.setattr(moe_domain_bench, "prepared_stand_in", frames)
    monkeypatch.setitem(moe_domain_bench.PRESETS, "second_iou", tiny.preset())
    monkeypatch.setattr(study, "QUICK", {**study.QUICK, "train": 4, "validation": 2, "fleet": 1, "measured": 2, "segment": 2})
    words = [
        "moe_drive.py",
        "--out",
        str(tmp_path / "out"),
        "--seeds",
        "0",
        "--quick",
        "--csv",
        str(tmp_path / "p" / "results.csv"),
    ]
    monkeypatch.setattr(sys, "argv", words)
    study.main()
    assert "fetching ahead saves waiting frames" in capsys.readouterr().out
    rows = read_rows(tmp_path / "p")
    assert {row["arm"] for row in rows} >= {"dense", "pooled_50", "readme_25", "random_50", "drive_oracle", "runtime_budget_2"}
    assert {row["decided"] for row in rows if row["arm"] == "readme_50"} == {"oracle", "predicted", "wrong", "worst"}
    assert len(read_decisions(tmp_path / "p" / "decisions.json").sources[0].experts) == 8
    study.main()
    assert "CPU s now" not in capsys.readouterr().out
