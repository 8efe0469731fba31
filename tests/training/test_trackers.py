"""Trackers show what `metrics.jsonl` holds, and no fault of theirs reaches a training."""

import contextlib
import importlib.util
import json
import os
import sqlite3
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.training import trackers
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.perception.training.trackers import Tracking, require_tracker


@dataclass(frozen=True, kw_only=True)
class Config:
    lr: float = 0.1


class Broken:
    """A tracker whose calls fail from the second value on."""

    def __init__(self, folder, first_step, config):
        self.seen = []

    def log(self, step, values):
        self.seen.append(step)
        if len(self.seen) > 1:
            raise ConnectionError("\x1b[31mthe server is gone")

    def flush(self):
        raise OSError("no space")

    def close(self):
        raise RuntimeError("cannot close")


def test_a_tracker_that_fails_is_reported_once_counted_and_stops_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(trackers._TRACKERS, "trackio", Broken)
    monkeypatch.setattr(trackers, "require_tracker", lambda name: None)
    monkeypatch.setattr("upcycle3d.perception.training.run_folder.require_tracker", lambda name: None)

    def train() -> None:
        with RunFolder.create(tmp_path / "run", Config(), seed=0, tracker="trackio") as run:
            for step in (1, 2, 3):
                run.log(step, {"loss": float(step)})
            run.sync()
            run.set_status("finished", step=3, total_steps=3)

    with pytest.warns(UserWarning, match="the tracker trackio failed") as said:
        train()
    found = RunFolder.open(tmp_path / "run")
    assert [line["loss"] for line in found.metrics()] == [1.0, 2.0, 3.0]
    assert found.status()["tracker_failures"] == 3  # two values and the flush
    texts = [str(warning.message) for warning in said]
    assert len(texts) == 2
    assert "the tracker trackio failed (ConnectionError" in texts[0]
    assert "\x1b" not in texts[0]
    assert "failed 4 times in all" in texts[1]


def test_a_tracker_that_cannot_be_opened_is_tried_once(tmp_path, monkeypatch):
    opened = []

    def refuse(folder, first_step, config):
        opened.append(first_step)
        raise ImportError("no module")

    monkeypatch.setitem(trackers._TRACKERS, "wandb", refuse)
    tracking = Tracking("wandb", tmp_path, {})
    with pytest.warns(UserWarning, match="the tracker wandb failed"):
        tracking.log(5, {"train/loss": 1.0})
    tracking.log(6, {"train/loss": 1.0})
    tracking.log(7, {"train/loss": 1.0})
    with pytest.warns(UserWarning, match="failed 3 times in all"):
        tracking.close()
    assert opened == [5]
    assert tracking.failures == 3


def test_ctrl_c_in_a_tracker_is_no_failure(tmp_path, monkeypatch):
    def interrupted(folder, first_step, config):
        raise KeyboardInterrupt

    monkeypatch.setitem(trackers._TRACKERS, "wandb", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Tracking("wandb", tmp_path, {}).log(1, {"train/loss": 1.0})


def test_a_missing_package_is_refused_with_the_words_that_install_it(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"the package mlflow, which is not installed .*pip install mlflow\. With --log none"):
        require_tracker("mlflow")
    require_tracker("none")
    with pytest.raises(InvalidInput, match="no tracker 'aim'; choose one of tensorboard, wandb"):
        require_tracker("aim")  # type: ignore[arg-type]


def _written(tmp_path, monkeypatch, name):
    """A run folder with three values in a tracker, the last one of an earlier step, as scores on the way are."""
    for variable in ("WANDB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_DIR", "WANDB_PROJECT", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(variable, raising=False)
    for variable in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(variable, str(tmp_path / "wandb_of_the_user"))
    with RunFolder.create(tmp_path / "run", Config(), seed=0, tracker=name) as run:
        run.log(1, {"loss": 0.5})
        run.log(2, {"loss": 0.25})
        run.log(1, {"ap": float("nan")}, kind="validation")
        run.sync()
        assert run._tracking is not None
        assert run._tracking.failures == 0
    return tmp_path / "run"


@pytest.mark.filterwarnings("ignore")
def test_wandb_writes_into_the_run_folder_without_a_connection(tmp_path, monkeypatch):
    pytest.importorskip("wandb", reason="needs the extra [wandb]")
    folder = _written(tmp_path, monkeypatch, "wandb")
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    until = time.monotonic() + 30
    while b"validation/ap" not in (text := file.read_bytes()) and time.monotonic() < until:
        time.sleep(0.1)  # its service writes the last records after `finish` has returned
    assert b"train/loss" in text
    assert b"validation/ap" in text
    assert b"0.25" in text


@pytest.mark.filterwarnings("ignore")
def test_mlflow_writes_into_a_database_in_the_run_folder(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="needs the extra [mlflow]")
    folder = _written(tmp_path, monkeypatch, "mlflow")
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{folder / 'mlflow' / 'mlflow.db'}")
    (run,) = client.search_runs([client.get_experiment_by_name("upcycle3d").experiment_id])
    assert run.data.params == {"lr": "0.1"}
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 0.5), (2, 0.25)]
    assert run.info.status == "FINISHED"


@pytest.mark.skipif(importlib.util.find_spec("trackio") is None, reason="needs the extra [trackio]")
def test_trackio_writes_into_a_database_in_the_run_folder(tmp_path):
    """In a process of its own: trackio learns its folder when it is imported."""
    code = f"""
import sys
from pathlib import Path
from upcycle3d.perception.training.trackers import Tracking
tracking = Tracking("trackio", Path({str(tmp_path)!r}), {{"lr": 0.1}})
tracking.log(1, {{"train/loss": 0.5}})
tracking.log(2, {{"train/loss": 0.25}})
tracking.close()
sys.exit(tracking.failures)
"""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("TRACKIO")}
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        env=environment | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("trackio/*.db")
    with contextlib.closing(sqlite3.connect(file)) as database:
        rows = database.execute("select step, metrics from metrics order by rowid").fetchall()
    assert [(step, json.loads(text).get("train/loss")) for step, text in rows[:2]] == [(1, 0.5), (2, 0.25)]


def test_a_second_run_of_a_process_does_not_write_into_the_first_ones_trackio(tmp_path, monkeypatch):
    monkeypatch.delenv("TRACKIO_DIR", raising=False)
    monkeypatch.setitem(sys.modules, "trackio", object())
    tracking = Tracking("trackio", tmp_path, {})
    with pytest.warns(UserWarning, match="imported before this run"):
        tracking.log(1, {"train/loss": 1.0})
    assert tracking.failures == 1
