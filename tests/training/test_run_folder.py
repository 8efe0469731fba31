"""The run folder: configurations survive JSON, mistakes are named, metrics have each step once."""

import json
import multiprocessing
import re
import sys
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from upcycle3d.core.config_json import config_from_json
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.perception.training import run_folder
from upcycle3d.perception.training.environment import describe_environment, relative_command
from upcycle3d.perception.training.run_folder import RunFolder, why_unfinished


@dataclass(frozen=True, kw_only=True)
class Second:
    channels: tuple[int, ...] = (16, 32)


@dataclass(frozen=True, kw_only=True)
class PvRcnn:
    keypoints: int = 2048


@dataclass(frozen=True, kw_only=True)
class Optim:
    lr: float
    clip: float = float("inf")


@dataclass(frozen=True, kw_only=True)
class Config:
    optim: Optim
    root: Path
    model: Second | PvRcnn = Second()
    second: Second | None = None
    ranges: tuple[float, float] = (0.0, 70.4)
    stages: tuple[tuple[str, int], ...] = ()
    any_model: tuple[Second | PvRcnn, ...] = ()
    method: Literal["upcycling", "none", 3] = "upcycling"
    limit: int | None = None
    flag: bool = False
    weights: dict[str, float] = field(default_factory=dict)


CONFIG = Config(
    optim=Optim(lr=0.1 + 0.2),
    root=Path("/data/kitti"),
    model=PvRcnn(keypoints=7),
    second=Second(channels=()),
    stages=(("a", 1), ("b", 2)),
    any_model=(PvRcnn(), Second()),
    method=3,
    limit=4,
    flag=True,
    weights={"Car": 1.5},
)


def _run(path: Path, *, config: Config = CONFIG, resume: bool = False) -> RunFolder:
    return RunFolder.create(path, config, seed=5, resume=resume, tracker="none")


def test_a_new_run_records_configuration_environment_and_status(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "orig_argv", ["upcycle3d", "train", "a b"])
    with _run(tmp_path / "run") as run:
        run.set_status("running", step=3, total_steps=9)
    found = RunFolder.open(tmp_path / "run")
    assert config_from_json(Config, found.config_json()) == CONFIG
    (start,) = found.environment()
    assert start["command"] == ["upcycle3d", "train", "a b"]
    assert start["seed"] == 5
    assert {"torch", "numpy", "numba"} <= start["packages"].keys()
    assert {"python", "platform", "cpus", "git"} <= start.keys()
    assert start["git"] is None or len(start["git"]["commit"]) == 40
    assert (found.status()["state"], found.status()["step"]) == ("running", 3)


def test_a_run_without_tensorboard_is_refused_before_its_first_step_and_leaves_no_folder(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for start in (lambda: RunFolder.create(tmp_path / "run", CONFIG, seed=5), lambda: run_folder.check_unused(tmp_path / "run")):
        with pytest.raises(InvalidInput, match="the package tensorboard, which is not installed"):
            start()
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("command", "starts", "hint"),
    [
        (["upcycle3d", "train", "a b"], [False], "upcycle3d train 'a b' --resume"),
        (["upcycle3d", "train", "--resume"], [True], "upcycle3d train --resume"),
        (["upcycle3d", "train", "--resume"], [False, True], "upcycle3d train --resume"),
        (["upcycle3d", "demo"], [True], "upcycle3d demo"),  # it has no such option
    ],
)
def test_the_hint_is_a_command_that_resumes(tmp_path, monkeypatch, command, starts, hint):
    monkeypatch.setattr(sys, "orig_argv", command)
    for resume in starts:
        _run(tmp_path / "run", resume=resume).close()
    assert RunFolder.open(tmp_path / "run").resume_command == hint


def test_the_recorded_command_has_no_path_of_this_machine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "bin" / "upcycle3d"
    script.parent.mkdir()
    script.write_text("#!/bin/sh")
    script.chmod(0o755)
    data = [
        f"--data={tmp_path}/kitti:train",
        "--out",
        str(tmp_path / "runs" / "a"),
        "--detector",
        str(tmp_path.parent / "b"),
        "x",
    ]
    relative = ["--data=kitti:train", "--out", "runs/a", "--detector", "../b", "x"]
    assert relative_command([sys.executable, "-m", "upcycle3d.tools.main", *data]) == [
        "python",
        "-m",
        "upcycle3d.tools.main",
        *relative,
    ]
    assert relative_command([sys.executable, str(script), *data]) == ["python", "bin/upcycle3d", *relative]
    monkeypatch.setenv("PATH", str(script.parent))
    assert relative_command([sys.executable, str(script), *data]) == ["upcycle3d", *relative]
    assert relative_command([str(script), *data]) == ["upcycle3d", *relative]
    assert relative_command([]) == []
    assert describe_environment(command=[str(script)], seed=0)["command"] == ["upcycle3d"]


def _start_and_answer(path: Path, answer) -> None:
    with _run(path) as run:
        answer.put(run.resume_command)


def test_a_spawned_process_records_the_command_that_a_person_gave(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["upcycle3d", "demo"])  # what spawn hands down; the child's own is "python -c ..."
    answer = multiprocessing.get_context("fork").Queue()
    child = multiprocessing.get_context("fork").Process(target=_start_and_answer, args=(tmp_path / "run", answer))
    child.start()
    assert answer.get(timeout=30) == "upcycle3d demo --resume"
    child.join(timeout=30)


def test_another_configuration_is_refused_by_its_first_field(tmp_path):
    _run(tmp_path / "run").close()
    other = replace(CONFIG, optim=Optim(lr=0.5), flag=False)
    for resume in (False, True):
        with pytest.raises(InvalidInput, match=r"optim\.lr: stored 0\.30000000000000004, now 0\.5"):
            _run(tmp_path / "run", config=other, resume=resume)
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored | {"round_every": None}))
    with pytest.raises(InvalidInput, match=r"\(round_every: stored None, now unknown\); .* the version of this program"):
        _run(tmp_path / "run", resume=True)  # an option of an older version
    (tmp_path / "run" / "config.json").write_text(json.dumps(stored))
    with pytest.raises(InvalidInput, match="already holds a run"):
        _run(tmp_path / "run")
    _run(tmp_path / "run", resume=True).close()
    assert len(RunFolder.open(tmp_path / "run").environment()) == 2


def test_a_folder_of_somebody_else_is_refused(tmp_path):
    (tmp_path / "holiday.jpg").write_bytes(b"")
    with pytest.raises(InvalidInput, match="is not empty and holds no run"):
        _run(tmp_path)
    with pytest.raises(InvalidInput, match="is not a run folder"):
        RunFolder.open(tmp_path)


def _try_to_resume(path: Path, answer) -> None:
    try:
        _run(path, resume=True).close()
        answer.put("")
    except InvalidInput as error:
        answer.put(str(error))


def test_two_writers_are_refused_and_the_lock_ends_with_the_writer(tmp_path):
    fork = multiprocessing.get_context("fork")
    answer = fork.Queue()
    for held in (True, False):
        run = _run(tmp_path / "run", resume=not held)
        if not held:
            run.close()
        child = fork.Process(target=_try_to_resume, args=(tmp_path / "run", answer))
        child.start()
        message = answer.get(timeout=30)
        child.join(timeout=30)
        run.close()
        assert ("another process is writing" in message) == held, message


def test_rewinding_leaves_each_step_once_and_a_half_written_line_is_dropped(tmp_path):
    run = _run(tmp_path / "run")
    for step in range(1, 6):
        run.log(step, {"loss": 1 / step})
        if step % 2 == 0:
            run.log(step, {"recall": float("nan")}, kind="pseudo_labels")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "kind": "tr')
    assert [m["step"] for m in run.metrics("train")] == [1, 2, 3, 4, 5]
    assert run.metrics("pseudo_labels")[0] == {"step": 2, "kind": "pseudo_labels", "recall": None}
    run.rewind(4)  # the 0-based step 4 is made again; the line "train" 4 is that of the step before
    run.log(5, {"loss": 0.2})
    assert [(m["step"], m["kind"]) for m in run.metrics()] == [
        (1, "train"),
        (2, "train"),
        (2, "pseudo_labels"),
        (3, "train"),
        (4, "train"),
        (5, "train"),
    ]


def test_a_broken_line_in_the_middle_is_named(tmp_path):
    run = _run(tmp_path / "run")
    (run.path / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\nrubbish\n')
    with pytest.raises(InvalidInput, match="line 2 is not JSON"):
        run.metrics()


def test_reading_never_writes_and_names_are_reserved(tmp_path):
    run = _run(tmp_path / "run")
    with pytest.raises(InvalidInput, match=r"cannot be called \['step'\]"):
        run.log(1, {"step": 1.0})
    run.close()
    with pytest.raises(InvalidInput, match="for reading only"):
        RunFolder.open(tmp_path / "run").log(1, {"loss": 1.0})


def test_tensorboard_gets_the_same_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = RunFolder.create(tmp_path / "run", CONFIG, seed=0)
    run.log(3, {"loss": 0.5})
    run.sync()  # on the disk with the checkpoint, whether or not the folder is ever closed
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.5)]


@pytest.mark.parametrize("name", ["config.json", "environment.json", "status.json"])
@pytest.mark.parametrize("content", ["[1, 2", "3", '"x"', "[" * 100_000, '{"a": 1, "a": 2}'])
def test_damaged_files_of_a_run_folder_are_sentences(tmp_path, name, content):
    with _run(tmp_path / "run") as run:
        run.set_status("running", step=1, total_steps=2)
    (tmp_path / "run" / name).write_text(content)
    read = {"config.json": "config_json", "environment.json": "environment", "status.json": "status"}[name]
    with pytest.raises(InvalidInput, match=name):
        getattr(RunFolder.open(tmp_path / "run"), read)()


def test_what_a_killed_process_left_half_written_is_removed_by_the_next_writer(tmp_path):
    _run(tmp_path / "run").close()
    run = tmp_path / "run"
    (run / ".0123456789abcdef.tmp").write_text("half")
    (run / "checkpoints" / ".tmp-step_00000002").mkdir(parents=True)
    (run / "checkpoints" / ".tmp-step_00000002" / "student.safetensors").write_text("half")
    _run(run, resume=True).close()
    assert [p for p in run.rglob("*") if "tmp" in p.name] == []


def test_a_status_fits_where_the_old_one_was_when_the_disk_is_full(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    with _run(tmp_path / "run") as run:
        run.set_status("running", step=1, total_steps=2)
        monkeypatch.setattr(run_folder, "write_atomically", full)
        with pytest.raises(UpcycleError, match=r"the disk is full .* resume with: .+ --resume"), run.reporting_failure(2):
            raise OSError(28, "No space left on device")
    assert run.status()["state"] == "failed"


def test_a_run_that_was_killed_says_so_and_how_to_go_on(tmp_path):
    with _run(tmp_path / "run") as run:
        run.set_status("running", step=1, total_steps=9)
        assert "this run is in training" in why_unfinished(run.path)
        body = json.loads((run.path / "status.json").read_text())
        (run.path / "status.json").write_text(json.dumps(body | {"pid": 2**22 + 1}))
    assert re.search(
        r"this run was killed at step 1 of 9, before its first checkpoint; start it again: .+ --resume$", why_unfinished(run.path)
    )
    assert why_unfinished(tmp_path) == ""
