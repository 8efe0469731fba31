"""`doctor` names every package of every extra, with the version that is here and whether it is new enough."""

import importlib.metadata
import tomllib
from pathlib import Path

import pytest

import upcycle3d
from upcycle3d.tools import doctor, installed_packages
from upcycle3d.tools.installed_packages import WantedPackage, by_extra, wanted_packages

PROJECT = tomllib.loads((Path(upcycle3d.__file__).parent / "pyproject.toml").read_text())["project"]


def test_every_requirement_of_the_project_is_looked_up():
    found = wanted_packages()
    assert list(found) == ["", *PROJECT["optional-dependencies"]]
    assert [one.name for one in found[""]] == [text.partition(">")[0] for text in PROJECT["dependencies"]]
    assert all(one.serves for one in found[""])
    (spconv,) = found["spconv"]
    assert (spconv.name, spconv.least) == ("spconv", "2.3.8")


def test_an_installed_package_knows_its_extras_from_its_metadata(monkeypatch, tmp_path):
    texts = [
        "torch>=2.4",
        'wandb>=0.31; extra == "wandb"',
        'spconv>=2.3.8; python_version < "3.14" and extra == "spconv"',
        "nameless",
        'mmengine<1,>=0.10.7; extra == "mmdet3d"',
        'mkdocstrings[python]>=1.0.8; extra == "docs"',
    ]
    assert {extra: len(found) for extra, found in by_extra(texts).items()} == {
        "": 2,
        "wandb": 1,
        "spconv": 1,
        "mmdet3d": 1,
        "docs": 1,
    }
    monkeypatch.setattr(installed_packages, "__file__", str(tmp_path / "tools" / "installed_packages.py"))
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: texts)
    found = wanted_packages()
    assert [(one.name, one.least) for one in found["spconv"]] == [("spconv", "2.3.8")]
    assert [(one.name, one.least) for one in found["mmdet3d"]] == [
        ("mmengine", "0.10.7")
    ]  # limits in the order that archives have
    assert [(one.name, one.least) for one in found["docs"]] == [("mkdocstrings", "1.0.8")]
    assert [(one.name, one.least) for one in found[""]] == [("torch", "2.4"), ("nameless", "")]


def test_a_backend_that_computes_something_else_is_warned_of(monkeypatch, capsys):
    monkeypatch.setattr(
        doctor, "check_backends", lambda: {"one": "WRONG by 1.0e+00", "other": "agrees", "third": "not installed"}
    )
    doctor.command(doctor.Doctor(repeats=0))
    assert "compute something else than their references, so do not use them: one" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    ("found", "least", "state", "serves"),
    [
        (None, "1.0", "not installed", False),
        ("2.13.0+cpu", "2.4", "2.13.0+cpu", True),
        ("2.4", "2.13", "2.4, needs 2.13 or newer", False),
        ("0.31.0rc1", "0.31", "0.31.0rc1", True),
        ("1.0", "", "1.0", True),
    ],
)
def test_an_old_version_is_told_from_a_new_one(found, least, state, serves):
    one = WantedPackage(name="x", least=least, found=found)
    assert (one.state, one.serves) == (state, serves)
