"""Open3D runs in a process of its own: whatever ends that process becomes a sentence here. A small stand-in plays Open3D."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import viewers_scene

import upcycle3d
from upcycle3d.core.errors import InvalidInput, UpcycleError
from upcycle3d.perception.viewers import open3d_view
from upcycle3d.perception.viewers.open3d_view import picture_open3d, show_open3d

FRAME = viewers_scene.frame()


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The file of a package `open3d`, which the child process imports instead of the real one."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(folder), *sys.path]))
    return folder / "open3d.py"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("import os; os.abort()", r"aborted by signal 6.*Vulkan \(packages libvulkan1 and mesa-vulkan-drivers\).*--html"),
        ("raise RuntimeError('Failed to load vulkan library!')", r"failed, as it does where a graphics driver is missing"),
        ("raise ImportError('libusb-1.0.so.0: cannot open shared object file')", r"library of the system is missing.*libusb"),
        ("raise ValueError('other')", r"failed with exit code 1: ValueError: other"),
    ],
)
def test_an_open3d_that_cannot_draw_gives_a_sentence_and_no_file(stand_in, tmp_path, program, message):
    stand_in.write_text(program)
    with pytest.raises(UpcycleError, match=message):
        picture_open3d(tmp_path / "a.png", FRAME)
    assert not (tmp_path / "a.png").exists()


def test_without_a_screen_no_window_is_opened(stand_in, monkeypatch):
    stand_in.write_text(
        "class visualization:\n    class VisualizerWithKeyCallback:\n        def create_window(self, *a):\n            return True"
    )
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    with pytest.raises(UpcycleError, match=r"cannot open a window: it needs a screen \(DISPLAY"):
        show_open3d([FRAME])


def test_without_open3d_the_message_says_how_to_install_it(monkeypatch, tmp_path):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InvalidInput, match=r"Open3D, which is not installed; install it with: pip install .*\[viz\]"):
        picture_open3d(tmp_path / "a.png", FRAME)
    with pytest.raises(InvalidInput, match="no frame to show"):
        show_open3d([])
    with pytest.raises(InvalidInput, match="16 to 8192 pixels on each side, found 8 x 100"):
        picture_open3d(tmp_path / "a.png", FRAME, size=(8, 100))


def test_the_child_gets_every_point_cell_and_edge_with_its_color():
    arrays = open3d_view._arrays([FRAME, viewers_scene.frame("b", points=3)])
    assert [len(arrays[f"points{n}"]) for n in (0, 1)] == [202, 5]
    assert all(len(arrays[f"points{n}"]) == len(arrays[f"colors{n}"]) for n in (0, 1))
    assert arrays["edges0"].shape == (5 * 13, 2)
    assert len(arrays["edge_colors0"]) == 5 * 13
    assert arrays["edges0"].max() == len(arrays["corners0"]) - 1
    np.testing.assert_allclose(arrays["edge_colors0"][0] * 255, [86, 180, 233])


def test_nothing_but_the_child_imports_open3d():
    root = Path(upcycle3d.__file__).parent
    parts = ("core", "ops", "datasets", "perception", "tools")
    users = [path.name for part in parts for path in (root / part).rglob("*.py") if "import open3d" in path.read_text()]
    assert users == ["open3d_child.py"]


def test_open3d_draws_a_picture_where_vulkan_is_installed(tmp_path):
    pytest.importorskip("PIL", reason="not checked: a picture of Open3D")
    if importlib.util.find_spec("open3d") is None:
        pytest.skip("not checked: a picture of Open3D. It needs the extra `viz`")
    vulkan = subprocess.run([sys.executable, "-c", "import ctypes; ctypes.CDLL('libvulkan.so.1')"], capture_output=True)
    if vulkan.returncode:
        pytest.skip("not checked: a picture of Open3D. It needs Vulkan, which this machine lacks")
    picture_open3d(tmp_path / "a.png", FRAME, size=(320, 200))
    from matplotlib.image import imread

    pixels = imread(tmp_path / "a.png")
    assert pixels.shape[:2] == (200, 320)
    assert len(np.unique(pixels.reshape(-1, pixels.shape[-1]), axis=0)) > 20
