"""The examples in the docstrings of `core/`, `ops/` and `perception/moe/` run and print what they say."""

import doctest
import importlib
from pathlib import Path

import numpy as np
import pytest
import torch

import upcycle3d

ROOT = Path(upcycle3d.__file__).resolve().parent
FILES = [
    path for room in ("core", "ops", "perception/moe") for path in sorted((ROOT / room).glob("*.py")) if ">>>" in path.read_text()
]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_examples_of_a_module_run(path, capsys):
    module = importlib.import_module(f"upcycle3d.{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}")
    result = doctest.testmod(module, extraglobs={"np": np, "torch": torch})
    assert result.attempted > 0
    assert result.failed == 0, capsys.readouterr().out
