"""Compiled kernels where nothing can be written: a container or a service imports, computes and warns once."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import numba
import pytest

import upcycle3d
from upcycle3d.core import compiled as compiled_module
from upcycle3d.core.compiled import compiled, find_cache, take_cache_warning
from upcycle3d.core.private_folder import private_folder

ROOT = Path(upcycle3d.__file__).resolve().parent
EVERY_COMMAND = """
import importlib, sys
from upcycle3d.tools.main import COMMANDS, main
for module, _ in COMMANDS.values():
    importlib.import_module(f"upcycle3d.tools.{module}")
sys.argv = ["upcycle3d", "inspect", "/nowhere"]
main()
"""


@pytest.fixture(scope="module")
def unwritable_package(tmp_path_factory):
    """A copy of the package whose folders take no `__pycache__`: a file has that name. (Tests may run as root, whom no mode stops.)"""
    folder = tmp_path_factory.mktemp("unwritable")

    def only_code(at: str, names: list[str]) -> list[str]:
        return [n for n in names if not (n.endswith(".py") or Path(at, n).is_dir()) or n.startswith((".", "__pycache__"))]

    (folder / "upcycle3d").mkdir()
    shutil.copy(ROOT / "__init__.py", folder / "upcycle3d")
    for part in ("core", "ops", "datasets", "perception", "tools"):
        shutil.copytree(ROOT / part, folder / "upcycle3d" / part, ignore=only_code)
    for at in [folder / "upcycle3d", *(folder / "upcycle3d").rglob("*")]:
        if at.is_dir():
            (at / "__pycache__").touch()
    return folder


def run_in(package: Path, code: str, temporary: Path, **more: str) -> subprocess.CompletedProcess[str]:
    nowhere = {
        "HOME": "/proc/nowhere",
        "XDG_CACHE_HOME": "/proc/nowhere",
        "NUMBA_CACHE_DIR": "/proc/nowhere",
        "TMPDIR": str(temporary),
    }
    kept = {k: v for k, v in os.environ.items() if k != "UPCYCLE3D_CACHE_WARNED" and not k.startswith("XDG")}
    environment = {**kept, **nowhere, "PYTHONPATH": str(package), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1", **more}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd="/")


def test_every_command_starts_where_neither_package_nor_home_can_be_written_with_one_warning(unwritable_package, tmp_path):
    done = run_in(unwritable_package, EVERY_COMMAND, tmp_path)
    assert done.returncode == 2, done.stderr
    lines = done.stderr.splitlines()
    assert lines[-1] == "error: there is nothing at /nowhere"
    assert [line for line in lines if "compiled kernels" in line] == lines[:-1]
    assert len(lines) == 2
    assert lines[0].startswith("warning: compiled kernels are kept in ")
    assert "NUMBA_CACHE_DIR" in lines[0]


def test_kernels_are_kept_in_the_temporary_folder_and_work(unwritable_package, tmp_path):
    code = "import numpy as np; from upcycle3d.ops.cpu.segment_max import *; import upcycle3d.ops.cpu.segment_max as m; print(m.__file__)\n"
    code += "from upcycle3d.perception.evaluation.kitti_matching import true_positive_scores as f\n"
    code += (
        "i = np.zeros(1, np.int64); e = np.zeros(0); print(f(i, i, i, e, 0.5, e, np.zeros(0, np.int64), np.zeros(0, np.int64)))"
    )
    done = run_in(unwritable_package, code, tmp_path)
    assert done.returncode == 0, done.stderr
    assert str(unwritable_package) in done.stdout
    assert list(tmp_path.rglob("*.nbc"))
    assert done.stderr.count("compiled kernels are kept in") == 1


def without_places(monkeypatch) -> None:
    monkeypatch.delenv("UPCYCLE3D_CACHE_WARNED", raising=False)
    monkeypatch.setattr(numba.config, "CACHE_DIR", "")
    monkeypatch.setattr("numba.core.caching.InTreeCacheLocator.get_cache_path", lambda self: "/proc/nowhere")
    monkeypatch.setattr("numba.core.caching.UserWideCacheLocator.get_cache_path", lambda self: "/proc/nowhere")
    monkeypatch.setattr(compiled_module, "_notes", [])


def double(x):
    return 2 * x


def test_without_any_place_each_process_compiles_and_says_so_once(monkeypatch):
    without_places(monkeypatch)
    monkeypatch.setattr(compiled_module, "private_folder", lambda: None)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        kernels = [compiled()(double), compiled()(double)]
    assert [kernel(4) for kernel in kernels] == [8, 8]
    found = [str(w.message) for w in told] + [note for note in [take_cache_warning()] if note]
    assert len(found) == 1
    assert "every process" in found[0]
    assert take_cache_warning() is None


def test_a_system_without_a_temporary_folder_is_served_too(monkeypatch):
    def none(**_: object) -> str:
        raise FileNotFoundError("no usable temporary directory")

    monkeypatch.setattr(tempfile, "gettempdir", none)
    monkeypatch.setattr(tempfile, "TemporaryFile", none)  # nor is shared memory writable
    assert private_folder() is None


def test_a_folder_that_others_can_write_is_not_trusted(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "gettempdir", lambda: str(tmp_path))
    folder = private_folder()
    assert folder is not None
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert folder.parent == tmp_path
    folder.chmod(0o777)
    assert private_folder() != folder
    folder.rmdir()
    folder.symlink_to(tmp_path)
    assert private_folder() != folder


def test_a_damaged_cache_costs_time_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    assert compiled()(double)(4) == 8
    for path in tmp_path.rglob("*.nb?"):
        path.write_bytes(path.read_bytes()[:40])
    assert compiled()(double)(4) == 8
    shutil.rmtree(tmp_path)
    assert compiled()(double)(5) == 10
    assert find_cache(double) is not None
