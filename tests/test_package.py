"""A package that is not installed as editable holds every folder of code: a missing one fails only on the machines of others."""

import tomllib
from pathlib import Path

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent
PARTS = ("core", "ops", "datasets", "perception", "tools")


def test_every_folder_of_code_is_in_the_package():
    folders = {path.parent.relative_to(ROOT) for part in PARTS for path in (ROOT / part).rglob("*.py")}
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]
    assert sorted(listed) == sorted(["upcycle3d", *(".".join(("upcycle3d", *folder.parts)) for folder in folders)])
