"""Configurations as JSON: nothing is lost on the way, every mistake is named, and differences are told by their place."""

import json
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import pytest

from upcycle3d.core.config_json import config_from_json, config_to_json, first_difference
from upcycle3d.core.errors import InvalidInput


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
        ({"limit": True}, "limit must be int or None, found True"),
        ({"limit": 1.5}, "limit must be int or None, found 1.5"),
        ({"ranges": [1.0]}, "ranges must be tuple[float, float], found [1.0]"),
        ({"stages": [["a", "b"]]}, "stages.0.1 must be int, found 'b'"),
        ({"method": "upcycle"}, "method must be 'upcycling', 'none' or 3, found 'upcycle'"),
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


def test_a_long_value_is_cut_in_the_message():
    with pytest.raises(InvalidInput, match=r"limit must be int or None, found \[0, 1, .{80,110}\.\.\.$"):
        config_from_json(Config, {**config_to_json(CONFIG), "limit": list(range(1000))})


def test_the_first_difference_is_told_by_its_place():
    old = config_to_json(CONFIG)
    assert first_difference(old, old) is None
    assert first_difference(old, {**old, "flag": False, "limit": 5}) == "limit: stored 4, now 5"
    assert first_difference({"a": {"b": [1, 2]}}, {"a": {"b": [1, 3]}}) == "a.b: stored [1, 2], now [1, 3]"
    assert first_difference({"a": 1}, {}) == "a: stored 1, now unknown"
    assert first_difference({}, {"a": 1}, names=("one has", "the other has")) == "a: not one has, the other has 1"
