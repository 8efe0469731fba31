"""`upcycle3d adapt features` and `adapt_features`: one npz in; labels, numbers and pictures out; mistakes become sentences."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.adapt_features import adapt_features
from upcycle3d.perception.adapt.glc.feature_file import TargetFeatures, at_one_scale
from upcycle3d.tools import adapt
from upcycle3d.tools.console import run_command


def arrays(n: int = 240) -> dict[str, np.ndarray]:
    """Four source classes; the target has three of them and two of its own, 4 and 5."""
    rng = np.random.default_rng(0)
    means = rng.normal(size=(6, 12)) * 3
    label = rng.choice([0, 1, 2, 4, 5], n)
    features = (means[label] + rng.normal(size=(n, 12))).astype(np.float32)
    logits = -((features[:, None] - means[None, :4]) ** 2).sum(2) / 20
    p = np.exp(logits - logits.max(1, keepdims=True))
    return {"features": features, "probabilities": (p / p.sum(1, keepdims=True)).astype(np.float32), "labels": label}


def run(*arguments: object) -> int:
    return run_command(adapt.command, [str(a) for a in arguments])


def test_a_file_gives_labels_numbers_and_a_report(tmp_path: Path, capsys):
    np.savez(tmp_path / "day.npz", **arrays())
    assert run(tmp_path / "day.npz", "--out", tmp_path / "out") == 0
    with np.load(tmp_path / "out" / "day.npz") as found:
        assert set(found.files) == {"labels", "margin", "nearest", "weight", "unknown_score", "classes"}
        assert (found["labels"] == np.minimum(arrays()["labels"], 4)).mean() > 0.7
    numbers = json.loads((tmp_path / "out" / "day.json").read_text())
    assert numbers["class_number"] == 4  # as many as the source has; the target's 5 are not known
    assert not numbers["fell_back"]
    assert numbers["certainty"]["adapted"] >= numbers["certainty"]["unadapted"]
    assert "at least as certain" in numbers["guard"]
    assert 0.7 < numbers["metrics"]["labels: H"] <= 1
    assert numbers["metrics"]["novel-category accuracy"] > 0.95
    page = (tmp_path / "out" / "day.html").read_text()
    assert page.count("<svg") == 2
    assert "day" in capsys.readouterr().out


def test_the_labels_of_the_file_decide_nothing(tmp_path: Path):
    data = arrays()
    np.savez(tmp_path / "a.npz", **data)
    np.savez(tmp_path / "b.npz", features=data["features"], probabilities=data["probabilities"])
    assert run(tmp_path / "a.npz", tmp_path / "b.npz", "--out", tmp_path / "out", "--threshold", "yen") == 0
    with np.load(tmp_path / "out" / "a.npz") as a, np.load(tmp_path / "out" / "b.npz") as b:
        assert all((a[name] == b[name]).all() for name in a.files)
    assert json.loads((tmp_path / "out" / "b.json").read_text())["metrics"] == {}


@pytest.mark.parametrize("extra", [["--options", "paper"], ["--class-number", "6"], ["--labeler", "lead"]])
def test_options_run(tmp_path: Path, extra):
    data = arrays(80)
    np.savez(tmp_path / "a.npz", **data, weight=np.random.default_rng(0).normal(size=(4, 12)))
    assert run(tmp_path / "a.npz", "--out", tmp_path / "out", *extra) == 0


@pytest.mark.parametrize("scale", [1e30, 1e-30, 1e200, 1e-200, 3.0])
def test_the_length_of_features_decides_nothing(tmp_path: Path, scale):
    """Only directions count; squares of very long and very short features overflow or vanish in float32."""
    data = arrays(80)
    np.savez(tmp_path / "a.npz", **data)
    np.savez(tmp_path / "b.npz", **(data | {"features": data["features"].astype(float) * scale}))
    assert run(tmp_path / "a.npz", tmp_path / "b.npz", "--out", tmp_path / "out") == 0
    with np.load(tmp_path / "out" / "a.npz") as a, np.load(tmp_path / "out" / "b.npz") as b:
        assert (a["labels"] == b["labels"]).all()
    assert torch.equal(at_one_scale(torch.tensor([[0.0, -1e-40], [3e38, 0]])) != 0, torch.tensor([[False, True], [True, False]]))


@pytest.mark.parametrize("features", [np.zeros((80, 12)), np.ones((80, 12))])
def test_features_that_tell_nothing_apart_are_refused(tmp_path: Path, capsys, features):
    np.savez(tmp_path / "a.npz", **(arrays(80) | {"features": features}))
    assert run(tmp_path / "a.npz", "--out", tmp_path / "out") == 2
    assert "so nothing tells the samples apart" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--class-number", "81", "from 1 to the number of samples, 80, found 81"),
        ("--class-number", "0", "from 1 to the number of samples, 80, found 0"),
        ("--fixed-threshold", "7", "UnknownRule.value must be in 0..1, found 7.0"),
        ("--fixed-threshold", "nan", "UnknownRule.value must be in 0..1"),
        ("--seed", "-5", "a seed must be a whole number from 0 to"),
    ],
)
def test_numbers_out_of_range_are_refused(tmp_path: Path, capsys, option, value, message):
    np.savez(tmp_path / "a.npz", **arrays(80))
    assert run(tmp_path / "a.npz", "--out", tmp_path / "out", option, value) == 2
    assert message in " ".join(capsys.readouterr().err.split())


def bad(name: str) -> dict[str, np.ndarray]:
    data = arrays(40)
    match name:
        case "missing":
            return {"features": data["features"]}
        case "nan":
            data["features"][3, 1] = np.nan
        case "logits":
            data["probabilities"] *= 3
        case "one class":
            data["probabilities"] = np.ones((40, 1), np.float32)
        case "labels":
            data["labels"] = data["labels"][:7]
        case "floats":
            data["labels"] = data["labels"].astype(np.float32)
        case "integers":
            data["features"] = np.zeros((40, 12), np.int64)
        case "object":
            data["features"] = np.array([None] * 40, dtype=object)
        case "few":
            data = {key: value[:1] for key, value in data.items()}
    return data


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "no array probabilities"),
        ("nan", "not finite, the first at row 3"),
        ("logits", "give the softmax"),
        ("one class", "at least 2 source classes"),
        ("labels", "labels must be (40,)"),
        ("floats", "labels must be integers"),
        ("integers", "features must be floats"),
        ("object", "not a readable npz"),
        ("few", "at least 2 target samples, found 1"),
    ],
)
def test_bad_files_are_refused_by_name_and_nothing_is_written(tmp_path: Path, capsys, name, message):
    np.savez(tmp_path / "x.npz", **bad(name))
    assert run(tmp_path / "x.npz", "--out", tmp_path / "out") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert message in error
    assert "x.npz" in error
    assert not (tmp_path / "out").exists()


def test_what_is_no_npz_and_what_would_be_overwritten_is_refused(tmp_path: Path, capsys):
    (tmp_path / "x.npz").write_bytes(b"not a zip")
    assert run(tmp_path / "x.npz", "--out", tmp_path / "out") == 2
    np.save(tmp_path / "plain.npy", np.zeros(3))
    with zipfile.ZipFile(tmp_path / "huge.npz", "w") as archive:
        archive.writestr(
            "features.npy",
            b"\x93NUMPY\x01\x00\x76\x00"
            + b"{'descr': '<f4', 'fortran_order': False, 'shape': (1000000000000, 9)}".ljust(117)
            + b"\n",
        )
    assert run(tmp_path / "huge.npz", "--out", tmp_path / "out") == 2
    assert "declares (1000000000000, 9)" in " ".join(capsys.readouterr().err.split())
    assert run(tmp_path / "plain.npy", "--out", tmp_path / "out") == 2
    assert run(tmp_path / "x.npz", "--out", tmp_path) == 2
    assert "would overwrite" in capsys.readouterr().err
    assert run(tmp_path / "none.npz", "--out", tmp_path / "out") == 2
    assert run(tmp_path / "x.npz", tmp_path / "y" / "x.npz", "--out", tmp_path / "out") == 2


def test_the_entry_takes_features_in_memory_and_writes_nothing_unless_asked(tmp_path: Path):
    data = arrays()
    features, probabilities = torch.from_numpy(data["features"]), torch.from_numpy(data["probabilities"])
    found = adapt_features(TargetFeatures(features=features, probabilities=probabilities))
    assert (found.labels.hard.numpy() == np.minimum(data["labels"], 4)).mean() > 0.7
    np.savez(tmp_path / "day.npz", **data)
    same = adapt_features(str(tmp_path / "day.npz"), str(tmp_path / "out"), name="night")
    assert torch.equal(same.labels.hard, found.labels.hard)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["night.html", "night.json", "night.npz"]
    with pytest.raises(InvalidInput, match="labels must be"):
        TargetFeatures(features=features, probabilities=probabilities, labels=data["labels"][:7])
