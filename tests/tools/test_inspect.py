"""`inspect` shows what lies at a path so that a person can read it: shards of a folder, metrics of a run, the training of weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import tiny
from upcycle3d.core.rig import RigSpec
from upcycle3d.core.trained_on import ScanStatistics, TrainedOn
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.vehicle.extractor import Extractor, extract
from upcycle3d.perception.wire.encoder_file import save_encoder
from upcycle3d.tools import inspect
from upcycle3d.tools.console import run_command

pytestmark = pytest.mark.usefixtures("one_thread")


def facts(path: Path, report: Path) -> dict:
    assert run_command(inspect.command, [str(path), "--json", str(report)]) == 0
    return json.loads(report.read_text())


def test_a_folder_of_shards_is_listed_with_scenes_codecs_and_encoder(tmp_path):
    for codec, count in (("fp16", 2), ("int8", 1)):
        extractor = Extractor(tiny.source_model().encoder, RigSpec(), codec)
        with extractor.shard_writer(tmp_path / "shards") as writer:
            extract([tiny.scan_with_car(seed) for seed in range(count)], extractor, writer)
    broken = tmp_path / "shards" / f"{0:032x}.json"
    broken.write_text("{")
    found = facts(tmp_path / "shards", tmp_path / "j")
    assert (found["kind"], found["shards"], found["scenes"], found["codecs"]) == ("folder of shards", 3, 3, "fp16 2, int8 1")
    assert found["encoder fingerprint"] == extractor.fingerprint
    assert "the manifest" in found[broken.name]
    rows = [value for name, value in found.items() if name.endswith(".json") and name != broken.name]
    assert sorted(row[:14] for row in rows) == ["1 scenes, int8", "2 scenes, fp16"]
    (tmp_path / "empty").mkdir()
    assert run_command(inspect.command, [str(tmp_path / "empty")]) == 2


def test_the_training_of_an_encoder_is_said_in_rows_and_no_word_is_cut(tmp_path):
    encoder = tiny.source_model().encoder.eval()
    encoder.trained_on = TrainedOn(
        rig=RigSpec(z_shift=1.73, intensity_scale=1 / 255),
        feature_names=("intensity",),
        classes=("Car",),
        point_range=tiny.GRID.range,
        axes=("y", "-x", "z"),
        scans=ScanStatistics(scans=9, points=3000.0, cells=2500.0, ground_height=-0.02, intensity=0.5),
    )
    save_encoder(tmp_path / "encoder.safetensors", encoder)
    found = facts(tmp_path / "encoder.safetensors", tmp_path / "j")
    assert found["rig of the training"] == "z_shift 1.73, intensity_scale 0.00392157"
    assert found["read with axes"] == "y -x z"
    assert found["medians of the training"] == "3,000 points in range, 2,500 cells, road at z = -0.02 m, intensity 0.5 (9 scans)"
    assert "trained_on" not in found
    assert found["config"].removesuffix(" …").endswith((",", ":", "}"))


def test_the_last_metrics_of_a_run_are_rows_with_few_digits(tmp_path):
    with RunFolder.create(tmp_path / "run", tiny.preset().train, seed=0, tracker="none") as run:
        run.log(3, {"total_loss": 1 / 3})
    found = facts(tmp_path / "run", tmp_path / "j")
    assert (found["last step"], found["last kind"], found["last total_loss"]) == (3, "train", 0.33333)
