"""Results survive a killed process, are computed once, and belong to one configuration."""

import json
import shutil
import signal
import subprocess
import sys

import pytest

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.recipes.result_cache import ResultCache

CONFIGURATION = {"frames": 200, "train": {"steps": 400, "sizes": (1, 2)}}


def never() -> None:
    raise AssertionError("the result is there")


def test_a_result_is_made_once_and_read_back(tmp_path):
    cache = ResultCache(tmp_path, CONFIGURATION)
    assert cache.read_or_make("upcycling", 20, lambda: {"ap": 0.1 + 0.2, "steps": (1, 2)}) == {"ap": 0.1 + 0.2, "steps": [1, 2]}
    again = ResultCache(tmp_path, CONFIGURATION)
    assert again.has("upcycling", 20)
    assert not again.has("upcycling", 21)
    assert again.read_or_make("upcycling", 20, never)["ap"] == 0.1 + 0.2
    assert {key: stored["result"]["steps"] for key, stored in again.stored().items()} == {("upcycling", 20): [1, 2]}
    assert again.stored()["upcycling", 20]["environment"]["seed"] == 20


def test_a_folder_of_another_configuration_is_refused_and_the_difference_is_named(tmp_path):
    ResultCache(tmp_path, CONFIGURATION)
    with pytest.raises(InvalidInput, match=r"another configuration \(train.steps: stored 400, now 500\); choose another folder"):
        ResultCache(tmp_path, {**CONFIGURATION, "train": {"steps": 500, "sizes": (1, 2)}})


def test_a_result_that_was_copied_from_another_configuration_is_refused(tmp_path):
    ResultCache(tmp_path / "a", CONFIGURATION).write("upcycling", 0, 1)
    other = ResultCache(tmp_path / "b", {"frames": 100})
    shutil.copy(tmp_path / "a" / "upcycling_seed0.json", tmp_path / "b")
    with pytest.raises(InvalidInput, match="not a result of this configuration"):
        other.read("upcycling", 0)


def test_a_damaged_file_is_named(tmp_path):
    cache = ResultCache(tmp_path, CONFIGURATION)
    cache.path("upcycling", 0).write_text('{"result": ')
    with pytest.raises(InvalidInput, match=r"upcycling_seed0.json .* is not valid JSON.*delete it"):
        cache.read("upcycling", 0)


@pytest.mark.parametrize("name", ["../x", "a/b", ""])
def test_a_name_cannot_leave_the_folder(tmp_path, name):
    with pytest.raises(InvalidInput, match="letters, digits"):
        ResultCache(tmp_path, CONFIGURATION).path(name, 0)


def test_what_was_finished_before_a_kill_is_kept_and_the_rest_goes_on(tmp_path):
    program = """
import os, signal, sys
from pathlib import Path
from upcycle3d.perception.recipes.result_cache import ResultCache

cache = ResultCache(Path(sys.argv[1]), {"frames": 200})
for seed in range(3):
    cache.read_or_make("upcycling", seed, lambda: seed if seed < 2 else os.kill(os.getpid(), signal.SIGKILL))
"""
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)])
    assert done.returncode == -signal.SIGKILL
    (tmp_path / ".0123456789abcdef.tmp").write_text("half a fi")  # what a kill within a write leaves
    cache = ResultCache(tmp_path, {"frames": 200})
    assert [cache.read_or_make("upcycling", seed, never) for seed in range(2)] == [0, 1]
    assert cache.read_or_make("upcycling", 2, lambda: 2) == 2
    assert json.loads((tmp_path / "comparison.json").read_text()) == {"frames": 200}
