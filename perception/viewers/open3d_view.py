"""A window of Open3D, or a picture that it draws without a window, always in a process of its own.

Open3D aborts its process where it finds no driver for OpenGL or Vulkan, and no exception can catch that. So this file never imports it:
`open3d_child.py` does, in a new process, and reads what to draw from a file of plain arrays. The package comes with the extra `viz`.
Read next: `open3d_child.py`.
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from ...core.errors import InvalidInput, UpcycleError, require
from ...core.files import write_atomically
from ...core.foreign_text import shown
from .colors import LAYER_COLORS, FeatureColors, height_colors, height_span
from .drawn_frame import BOX_EDGES, DrawnFrame
from .open3d_child import NO_WINDOW

_OTHER = "`view --html FILE` draws the same in any browser"
_NO_SCREEN = f"Open3D cannot open a window: it needs a screen (DISPLAY or WAYLAND_DISPLAY) and OpenGL (packages libgl1 and libegl1). {_OTHER}"
_CHILD = Path(__file__).with_name("open3d_child.py")


def show_open3d(frames: Sequence[DrawnFrame]) -> None:
    """Show frames in a window, one after the other, until the reader closes it. N and B go to the next frame and back.

    Args:
        frames: At least one frame.

    Raises:
        InvalidInput: There is no frame, or Open3D is not installed.
        UpcycleError: No window can be opened; the message says what is missing.
    """
    _run(frames, None)


def picture_open3d(path: Path | str, frame: DrawnFrame, *, size: tuple[int, int] = (1280, 800)) -> None:
    """Draw one frame without a window, seen from behind and above.

    Args:
        path: The PNG file to write.
        frame: The frame.
        size: Width and height in pixels.

    Raises:
        InvalidInput: Open3D is not installed, or the size is below 16 or above 8192 pixels.
        UpcycleError: Nothing can be drawn; the message says what is missing.
        OSError: The file cannot be written.
    """
    require(
        all(16 <= side <= 8192 for side in size), f"a picture has 16 to 8192 pixels on each side, found {size[0]} x {size[1]}"
    )
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        _run([frame], picture, size)
        write_atomically(path, picture.read_bytes())


def _run(frames: Sequence[DrawnFrame], picture: Path | None, size: tuple[int, int] = (1280, 800)) -> None:
    require(len(frames) > 0, "there is no frame to show")
    if importlib.util.find_spec("open3d") is None:
        raise InvalidInput(
            "this needs the package Open3D, which is not installed; install it with: pip install -c constraints.txt -e '.[viz]'. "
            "`view --html FILE` needs no package"
        )
    with tempfile.TemporaryDirectory() as folder:
        request = Path(folder) / "frames.npz"
        np.savez(request, allow_pickle=False, **_arrays(frames))
        place = [] if picture is None else [str(picture), *map(str, size)]
        done = subprocess.run([sys.executable, str(_CHILD), str(request), *place], capture_output=True, text=True)
    if done.returncode:
        raise UpcycleError(_why(done.returncode, done.stderr, window=picture is None))
    if picture is not None and not picture.is_file():
        raise UpcycleError("Open3D ended without an error and wrote no picture; `view --html FILE` draws the same in a browser")


def _arrays(frames: Sequence[DrawnFrame]) -> dict[str, np.ndarray]:
    """Points, cells and edges of each frame with their colors in 0..1, by the frame's number and what they are."""
    heights, colors = height_span(frames), FeatureColors.of(frames)
    arrays: dict[str, np.ndarray] = {"ids": np.array([shown(frame.id) for frame in frames])}
    for number, frame in enumerate(frames):
        places, shades = [np.zeros((0, 3), np.float32)], [np.zeros((0, 3), np.uint8)]
        if (points := frame.points_to_draw()) is not None:
            places.append(points.xyz)
            shades.append(height_colors(points.xyz, heights))
        if (cells := frame.cells_to_draw()) is not None and colors is not None:
            places.append(cells.centers)
            shades.append(colors.colors(cells.features))
        layers = frame.layers()
        outlines = [layer.outline().reshape(-1, 3) for layer in layers]
        count = sum(map(len, layers))
        edges = 10 * np.arange(count)[:, None, None] + np.array(BOX_EDGES)
        tints = [np.tile(LAYER_COLORS[layer.name], (len(BOX_EDGES) * len(layer), 1)) for layer in layers]
        arrays |= {
            f"points{number}": np.concatenate(places),
            f"colors{number}": np.concatenate(shades) / 255,
            f"corners{number}": np.concatenate([np.zeros((0, 3), np.float32), *outlines]),
            f"edges{number}": edges.reshape(-1, 2),
            f"edge_colors{number}": np.concatenate([np.zeros((0, 3)), *tints]) / 255,
        }
    return arrays


def _why(code: int, said: str, *, window: bool) -> str:
    last = shown((said.strip().splitlines() or ["nothing"])[-1], most=300)
    if window and code == NO_WINDOW:
        return _NO_SCREEN
    if code < 0 or "vulkan" in last.lower():
        driver = "OpenGL (packages libgl1 and libegl1)" if window else "Vulkan (packages libvulkan1 and mesa-vulkan-drivers)"
        how = f"was aborted by signal {-code}" if code < 0 else "failed"
        return f"Open3D {how}, as it does where a graphics driver is missing: install {driver}. {_OTHER}. It said: {last}"
    if "cannot open shared object file" in last:
        return f"Open3D could not be loaded, because a library of the system is missing ({last}); install the package that has it. {_OTHER}"
    return f"Open3D failed with exit code {code}: {last}. {_OTHER}"
