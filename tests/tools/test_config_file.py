"""`--print-config` and `--config`: what is printed is read back, the command line wins, and mistakes name the nearest option."""

import json
from pathlib import Path

import pytest

import tiny
from upcycle3d.core.config_json import config_to_json
from upcycle3d.datasets.data_split import DataSplit
from upcycle3d.perception.recipes.presets import PRESETS
from upcycle3d.perception.training.run_folder import RunFolder
from upcycle3d.tools import train, upcycle
from upcycle3d.tools.console import run_command

SMALL = ["small", "--data", "d:train", "--out", "o"]


def run(tool, *words: str) -> int:
    """The command of a module with these words."""
    return run_command(tool.command, words, program="upcycle3d", parsed_as=tool.ARGUMENTS)


def printed(capsys, tool, *words: str) -> dict:
    """What `--print-config` prints, as JSON."""
    assert run(tool, *words, "--print-config") == 0
    return json.loads(capsys.readouterr().out)


@pytest.fixture(autouse=True)
def in_json(monkeypatch, tmp_path):
    """Without PyYAML, so that the tests need no extra; `tests/core/test_yaml_text.py` tests YAML."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("upcycle3d.core.yaml_text.importlib.util.find_spec", lambda name: None)


def write(value: object) -> str:
    Path("c.json").write_text(json.dumps(value))
    return "c.json"


def test_the_whole_configuration_is_printed_and_read_back(capsys):
    whole = printed(capsys, train, *SMALL, "--seed", "5", "--preset.train.loop.optim.lr", "0.5")
    assert whole["preset"]["train"]["loop"]["optim"]["lr"] == 0.5
    assert whole["preset"]["upcycle"] == config_to_json(PRESETS["small"])["upcycle"]
    assert whole["data"] == {"root": "d", "name": "train"}
    assert not {"config", "print_config"} & whole.keys()
    assert printed(capsys, train, "--config", write(whole)) == whole


def test_options_on_the_command_line_win(capsys):
    whole = printed(capsys, train, *SMALL, "--seed", "5")
    other = printed(capsys, train, "--seed", "6", f"--config={write(whole)}", "--preset.train.batch-size", "7", "--out", "p")
    assert (other["seed"], other["out"], other["preset"]["train"]["batch_size"]) == (6, "p", 7)
    other["preset"]["train"]["batch_size"] = whole["preset"]["train"]["batch_size"]
    assert {**other, "seed": 5, "out": "o"} == whole


def test_a_file_may_hold_a_few_options_over_a_preset(capsys):
    few = write({"preset": {"train": {"loop": {"optim": {"lr": 0.25}}}}, "steps": 3})
    given = printed(capsys, train, *SMALL, "--config", few)
    assert given["steps"] == 3
    wanted = printed(capsys, train, *SMALL, "--preset.train.loop.optim.lr", "0.25", "--steps", "3")
    assert given == wanted


def test_a_part_of_another_kind_is_replaced_as_a_whole(capsys):
    pv_rcnn = config_to_json(PRESETS["small_pv_rcnn"])["detector"]
    given = printed(capsys, train, *SMALL, "--config", write({"preset": {"detector": pv_rcnn}}))
    assert given["preset"]["detector"] == pv_rcnn


def test_upcycle_takes_files_with_all_its_options(capsys):
    words = [
        *SMALL,
        "--store",
        "a",
        "b",
        "--truth",
        "r.json",
        "d:val",
        "--target-labels",
        "t",
        "--z-shift",
        "1.5",
        "--log",
        "none",
    ]
    whole = printed(capsys, upcycle, *words)
    assert whole["truth"] == ["r.json", {"root": "d", "name": "val"}]
    assert printed(capsys, upcycle, "--config", write(whole)) == whole


@pytest.mark.parametrize(
    ("value", "words", "said"),
    [
        ({"sead": 1}, SMALL, "unknown option `sead` of Train; did you mean `seed`?"),
        (
            {"preset": {"train": {"lop": 1}}},
            SMALL,
            "unknown option `preset.train.lop` of SupervisedConfig; did you mean `preset.train.loop`?",
        ),
        ({"seed": "one"}, SMALL, "seed must be int, found 'one'"),
        ({"preset": {"train": {"loop": {"optim": {"lr": -1}}}}}, SMALL, "c.json: OneCycle needs lr > 0"),
        (
            {"preset": "small"},
            ["--data", "d", "--out", "o"],
            "holds a preset by its name; leave it out, and name it before the options",
        ),
        ({"data": "d:train"}, SMALL, "data must be DataSplit with the entries root, name, found 'd:train'"),
        ({"log": "aim"}, SMALL, "log must be 'tensorboard', 'wandb'"),
        ({"config": "x"}, SMALL, "cannot hold the option `config`"),
        ([1], SMALL, "must hold names and values"),
        ({"seed": 1}, ["--data", "d", "--out", "o"], "holds no `preset`; name one before the options"),
        ({"seed": 1}, ["smal", "--data", "d", "--out", "o"], "there is no preset 'smal'; did you mean small?"),
        ({"seed": 1}, ["small", "--data", "d", "--outt", "o"], "has no option --outt (did you mean --out?)"),
    ],
)
def test_mistakes_in_a_file_are_sentences(capsys, value, words, said):
    assert run(train, *words, "--config", write(value)) == 2
    assert said in " ".join(capsys.readouterr().err.split())
    assert not Path("o").exists()


def test_the_option_itself_is_checked(capsys):
    for words in (["--config"], ["--config", "--out", "o"], ["--config", "a", "--config", "b"], ["--config", "missing.json"]):
        assert run(train, *SMALL, *words) == 2
    said = capsys.readouterr().err
    assert said.count("--config takes the name of a YAML or JSON file") == 2
    assert "--config is given 2 times" in said
    assert "missing.json" in said


@pytest.mark.usefixtures("one_thread")
def test_a_training_from_a_file_says_where_everything_is(capsys, tmp_path):
    data = tiny.prepared(tmp_path / "data")
    options = train.Train(
        preset=tiny.preset(steps=2), data=DataSplit(root=data.root, name="train"), out=Path("run"), workers=0, log="none"
    )
    whole = {name: value for name, value in config_to_json(options).items() if name not in ("config", "print_config")}
    assert run(train, "--config", write(whole)) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "run after" in said
    assert (
        "detector.safetensors (the detector), encoder.safetensors (for vehicles), metrics.jsonl (all metrics), checkpoints (to resume)"
        in said
    )
    assert not (tmp_path / "run" / "tensorboard").exists()
    assert len(RunFolder.open(tmp_path / "run").metrics("train")) == 2
