"""The scripts of `examples/` run from another folder, end, and say what they found."""

import runpy
import sys
from pathlib import Path

import pytest

import upcycle3d

pytestmark = pytest.mark.usefixtures("one_thread")
EXAMPLES = Path(upcycle3d.__file__).resolve().parent / "examples"
RUNS = {  # script: (arguments, what it prints, what it writes)
    "detect.py": ((), "objects with a score of at least 0.3", "detect.png"),
    "smash.py": (("out",), "cells, features", "out/store"),
    "own_dataset.py": (("out", "2"), "2 steps on 10 frames", "out/parking_lot.png"),
    "own_method.py": (("out", "2"), "2 steps on 5 labeled frames and 5 scenes", "out/run/detector.safetensors"),
    "evaluate_files.py": ((), "Car, official, IoU 0.7: 3D AP", None),
    "adapt_classes.py": ((), "of the new class are called unknown", None),
}


def test_every_script_is_run_here_and_is_short():
    scripts = {path.name: path for path in EXAMPLES.glob("*.py")}
    assert set(scripts) == set(RUNS)
    assert all(len(path.read_text().splitlines()) <= 60 for path in scripts.values())


@pytest.mark.parametrize("name", RUNS)
def test_an_example_runs(name, tmp_path, monkeypatch, capsys):
    """As its own program, but in this process: six starts of Python and torch would take half a minute."""
    arguments, printed, written = RUNS[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", [str(EXAMPLES / name), *arguments])
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    found = capsys.readouterr().out
    assert printed in found
    if name == "detect.py":  # a detector file that no longer fits the code would still run and find nothing
        assert len([line for line in found.splitlines() if line.startswith("Car 0.")]) >= 8
    assert written is None or (tmp_path / written).exists()
