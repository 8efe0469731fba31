"""Run by `open3d_view.py` in a process of its own, as `python open3d_child.py FRAMES.npz [PICTURE.png WIDTH HEIGHT]`.

It imports Open3D and numpy only. Its exit code is `NO_WINDOW` where no window can be opened.
"""

from __future__ import annotations

import ctypes
import os
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

NO_WINDOW = 3
"""Exit code where no window can be opened."""
_GROUND = [0.055, 0.067, 0.086]


def has_screen() -> bool:
    """Say whether there is a screen. Without one Open3D opens a window that nobody sees, and waits for ever."""
    if os.environ.get("WAYLAND_DISPLAY"):
        return True
    try:
        x11 = ctypes.CDLL("libX11.so.6")
    except OSError:
        return False
    x11.XOpenDisplay.restype = ctypes.c_void_p
    return bool(x11.XOpenDisplay(None))


def shapes(open3d: Any, arrays: Mapping[str, np.ndarray], number: int) -> list[Any]:
    """Make Open3D's points and lines of one frame.

    Args:
        open3d: The package.
        arrays: What `open3d_view.py` wrote.
        number: Number of the frame.

    Returns:
        A point cloud and a set of lines; one that is empty is left out.
    """
    vector = open3d.utility.Vector3dVector
    found = []
    if len(arrays[f"points{number}"]):
        cloud = open3d.geometry.PointCloud(vector(arrays[f"points{number}"].astype(np.float64)))
        cloud.colors = vector(arrays[f"colors{number}"].astype(np.float64))
        found.append(cloud)
    if len(arrays[f"edges{number}"]):
        pairs = open3d.utility.Vector2iVector(arrays[f"edges{number}"].astype(np.int32))
        lines = open3d.geometry.LineSet(vector(arrays[f"corners{number}"].astype(np.float64)), pairs)
        lines.colors = vector(arrays[f"edge_colors{number}"].astype(np.float64))
        found.append(lines)
    return found


def middle_of(arrays: Mapping[str, np.ndarray], number: int) -> tuple[np.ndarray, float]:
    """Find where a camera should look, and from which distance.

    Args:
        arrays: What `open3d_view.py` wrote.
        number: Number of the frame.

    Returns:
        (3,) point and meters.
    """
    xyz = np.concatenate([arrays[f"points{number}"], arrays[f"corners{number}"]])
    if not len(xyz):
        return np.zeros(3), 40.0
    low, high = np.quantile(xyz, 0.05, 0), np.quantile(xyz, 0.95, 0)
    return (low + high) / 2, float(np.clip(0.9 * np.hypot(*(high - low)[:2]), 15, 120))


def render_picture(open3d: Any, arrays: Mapping[str, np.ndarray], path: str, width: int, height: int) -> None:
    """Draw the first frame without a window.

    Args:
        open3d: The package.
        arrays: What `open3d_view.py` wrote.
        path: PNG file to write.
        width: Pixels.
        height: Pixels.
    """
    rendering = open3d.visualization.rendering
    renderer = rendering.OffscreenRenderer(width, height)
    renderer.scene.set_background([*_GROUND, 1.0])
    renderer.scene.view.set_post_processing(False)  # colors as they are given
    for index, shape in enumerate(shapes(open3d, arrays, 0)):
        material = rendering.MaterialRecord()
        is_lines = isinstance(shape, open3d.geometry.LineSet)
        material.shader = "unlitLine" if is_lines else "defaultUnlit"
        material.line_width, material.point_size = 2.0, 2.0
        renderer.scene.add_geometry(str(index), shape, material)
    target, distance = middle_of(arrays, 0)
    eye = target + distance * np.array([-np.cos(0.5), 0, np.sin(0.5)])
    renderer.setup_camera(45.0, target.astype(np.float32), eye.astype(np.float32), np.array([0, 0, 1], np.float32))
    if not open3d.io.write_image(path, renderer.render_to_image()):
        sys.exit(f"the picture {path} cannot be written")


def show_window(open3d: Any, arrays: Mapping[str, np.ndarray]) -> None:
    """Show the frames in a window until the reader closes it.

    Args:
        open3d: The package.
        arrays: What `open3d_view.py` wrote.
    """
    ids = arrays["ids"].tolist()
    window = open3d.visualization.VisualizerWithKeyCallback()
    if not has_screen() or not window.create_window("upcycle3d view: N next frame, B frame before, H help", 1280, 800):
        sys.exit(NO_WINDOW)
    window.get_render_option().background_color = np.array(_GROUND)
    window.get_render_option().point_size = 2.0
    at = 0

    def show(number: int, first: bool = False) -> bool:
        nonlocal at
        at = number % len(ids)
        window.clear_geometries()
        for shape in shapes(open3d, arrays, at):
            window.add_geometry(shape, reset_bounding_box=first)
        print(f"frame {at + 1} of {len(ids)}: {ids[at]}", flush=True)
        return True

    show(0, first=True)
    target, _ = middle_of(arrays, 0)
    view = window.get_view_control()
    view.set_lookat(target)
    view.set_front([-np.cos(0.5), 0, np.sin(0.5)])
    view.set_up([0, 0, 1])
    window.register_key_callback(ord("N"), lambda _: show(at + 1))
    window.register_key_callback(ord("B"), lambda _: show(at - 1))
    window.run()
    window.destroy_window()


def draw_request(words: list[str]) -> None:
    """Draw what a file describes.

    Args:
        words: The file, and for a picture its name, width and height.
    """
    import open3d

    with np.load(words[0], allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if len(words) > 1:
        render_picture(open3d, arrays, words[1], int(words[2]), int(words[3]))
    else:
        show_window(open3d, arrays)


if __name__ == "__main__":
    draw_request(sys.argv[1:])
