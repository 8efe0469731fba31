"""A package that is not installed as editable holds every folder of code: a missing one fails only on the machines of others."""

import importlib
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import upcycle3d
from upcycle3d.tools import main

ROOT = Path(upcycle3d.__file__).resolve().parent
PARTS = ("core", "ops", "datasets", "perception", "tools")


def test_every_folder_of_code_is_in_the_package():
    folders = {path.parent.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*.py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(["upcycle3d", *(".".join(("upcycle3d", *folder.parts)) for folder in folders)])


def test_the_program_also_starts_as_a_module():
    """Where pip's folder of scripts is not on the path."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    words = [sys.executable, "-m", "upcycle3d", "--version"]
    said = subprocess.run(words, capture_output=True, text=True, check=True, env=environment, timeout=60)
    assert said.stdout.split() == ["upcycle3d", upcycle3d.__version__]


def test_a_command_whose_package_is_missing_says_which_and_how_to_install_it(monkeypatch, capsys):
    def missing(name: str, package: str | None = None) -> None:
        raise ModuleNotFoundError("No module named 'pyarrow'", name="pyarrow")

    monkeypatch.setattr(sys, "argv", ["upcycle3d", "ingest", "--help"])
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(SystemExit) as ended:
        main.main()
    assert ended.value.code == 2
    assert "the package pyarrow is not installed" in capsys.readouterr().err
