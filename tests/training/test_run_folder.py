"""The run folder: configurations survive JSON, mistakes are named, metrics have each step once."""

import json
import multiprocessing
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from upcycle3d.perception.structures import InvalidInput
from upcycle3d.perception.training.run_folder import RunFolder, config_from_json, config_to_json


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


@pytest.mark.parametrize("config", [CONFIG, Config(optim=Optim(lr=1), root=Path("x"))])
def test_a_configuration_survives_json(config):
    text = json.dumps(config_to_json(config), allow_nan=False)
    assert config_from_json(Config, json.loads(text)) == config


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optim": {"lrr": 0.1, "lr": 0.1}}, "unknown option `optim.lrr` of Optim; did you mean `optim.lr`?"),
        ({"metod": "none"}, "unknown option `metod` of Config; did you mean `method`?"),
        ({"zzz": 1}, "unknown option `zzz` of Config; known are ['any_model', 'flag'"),
        ({"optim": {}}, "the option `optim.lr` of Optim is missing and has no default"),
        ({"optim": {"lr": "fast"}}, "optim.lr must be float, found 'fast'"),
        ({"flag": 1}, "flag must be bool, found 1"),
        ({"limit": True}, "limit must be int or NoneType, found True"),
        ({"limit": 1.5}, "limit must be int or NoneType, found 1.5"),
        ({"ranges": [1.0]}, "ranges must be tuple[float, float], found [1.0]"),
        ({"stages": [["a", "b"]]}, "stages.0.1 must be int, found 'b'"),
        ({"method": "upcycle"}, "method must be typing.Literal['upcycling', 'none', 3], found 'upcycle'"),
        ({"model": {"kind": "PvRcn"}}, "`model.kind` cannot be 'PvRcn'; did you mean `PvRcnn`?"),
        (
            {"model": {"kind": "PvRcnn", "keypoint": 1}},
            "unknown option `model.keypoint` of PvRcnn; did you mean `model.keypoints`?",
        ),
    ],
)
def test_a_mistake_is_named_with_the_nearest_option(change, message):
    with pytest.raises(InvalidInput, match=re.escape(message)):
        config_from_json(Config, {**config_to_json(CONFIG), **change})


def test_a_value_that_json_cannot_keep_is_refused():
    with pytest.raises(InvalidInput, match=r"'root' holds a set"):
        config_to_json(replace(CONFIG, root={1}))


def _run(path: Path, *, config: Config = CONFIG, resume: bool = False) -> RunFolder:
    return RunFolder.create(path, config, command=["upcycle3d", "train", "a b"], seed=5, resume=resume, tensorboard=False)


def test_a_new_run_records_configuration_environment_and_status(tmp_path):
    with _run(tmp_path / "run") as run:
        run.set_status("running", step=3, total_steps=9)
    found = RunFolder.open(tmp_path / "run")
    assert found.config(Config) == CONFIG
    (start,) = found.environment()
    assert start["command"] == ["upcycle3d", "train", "a b"]
    assert start["seed"] == 5
    assert {"torch", "numpy", "numba"} <= start["packages"].keys()
    assert {"python", "platform", "cpus", "git"} <= start.keys()
    assert start["git"] is None or len(start["git"]["commit"]) == 40
    assert (found.status()["state"], found.status()["step"]) == ("running", 3)
    assert found.resume_command == "upcycle3d train 'a b' --resume"


def test_another_configuration_is_refused_by_its_first_field(tmp_path):
    _run(tmp_path / "run").close()
    other = replace(CONFIG, optim=Optim(lr=0.5), flag=False)
    for resume in (False, True):
        with pytest.raises(InvalidInput, match=r"optim\.lr: stored 0\.30000000000000004, now 0\.5"):
            _run(tmp_path / "run", config=other, resume=resume)
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
            run.log(step, {"AP": float("nan")}, kind="val")
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "kind": "tr')
    assert [m["step"] for m in run.metrics("train")] == [1, 2, 3, 4, 5]
    assert run.metrics("val")[0] == {"step": 2, "kind": "val", "AP": None}
    run.rewind(4)  # the round at 4 is repeated by the loop, step 4 itself is not
    run.log(5, {"loss": 0.2})
    assert [(m["step"], m["kind"]) for m in run.metrics()] == [
        (1, "train"),
        (2, "train"),
        (2, "val"),
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

    with RunFolder.create(tmp_path / "run", CONFIG, seed=0) as run:
        run.log(3, {"loss": 0.5})
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(3, 0.5)]
