"""A recording for the Rerun viewer (`.rrd`): points, cells colored by their features, boxes with class and score, over a time line of frames.

A viewer of Rerun reads recordings of its own version and of the one before, so a recording is a view, never an archive. The package
`rerun-sdk` comes with the extra `viz`. Read next: `html_page.py`, which needs no package.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from ...core.errors import InvalidInput, require
from ...core.foreign_text import shown
from .colors import LAYER_COLORS, FeatureColors, height_colors, height_span
from .drawn_frame import LAYER_TITLES, BoxLayer, DrawnFrame


def write_rerun(path: Path | str, frames: Sequence[DrawnFrame], *, title: str) -> int:
    """Write frames as a recording.

    The entities are `world/points`, `world/cells` and `world/truth`, `world/detections` and so on, at step `frame` of the time line.

    Args:
        path: The file, by custom with the suffix `.rrd`.
        frames: At least one frame.
        title: Name of the recording.

    Returns:
        Size of the file in bytes.

    Raises:
        InvalidInput: There is no frame, or the package `rerun-sdk` is not installed.
        OSError: The file cannot be written.
    """
    require(len(frames) > 0, "a recording needs at least one frame")
    try:
        import rerun
    except ImportError as error:
        raise InvalidInput(
            "a recording for Rerun needs the package rerun-sdk, which is not installed; install it with: pip install -c constraints.txt -e '.[viz]'"
        ) from error
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        _record(rerun, temporary, frames, title)
        temporary.replace(path)
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
    return path.stat().st_size


def _record(rerun: Any, path: Path, frames: Sequence[DrawnFrame], title: str) -> None:
    recording = rerun.RecordingStream("upcycle3d", recording_id=secrets.token_hex(8), send_properties=False)
    recording.save(path)
    recording.send_recording_name(shown(title))
    recording.log("world", rerun.ViewCoordinates.FLU, static=True)  # x forward, y left, z up
    heights, colors = height_span(frames), FeatureColors.of(frames)
    # Every entity that any frame has gets a value in each frame: what is not known there is cleared, not left from the frame before.
    known = {layer.name for frame in frames for layer in frame.layers()}
    for number, frame in enumerate(frames):
        recording.set_time("frame", sequence=number)
        recording.log("frame", rerun.TextDocument(shown(frame.id)))
        points, cells = frame.points_to_draw(), frame.cells_to_draw()
        none = rerun.Clear(recursive=False)
        shades = None if points is None else height_colors(points.xyz, heights)
        recording.log("world/points", none if points is None else rerun.Points3D(points.xyz, colors=shades, radii=-1.0))
        tints = None if cells is None or colors is None else colors.colors(cells.features)
        drawn = none if cells is None else rerun.Points3D(cells.centers, colors=tints, radii=min(cells.size) / 2)
        recording.log("world/cells", drawn)
        layers = {layer.name: layer for layer in frame.layers()}
        for name in LAYER_TITLES:
            if name in layers:
                recording.log(f"world/{name}", *_boxes(rerun, layers[name]))
            elif name in known:
                recording.log(f"world/{name}", none)
    recording.flush()
    recording.disconnect()


def _boxes(rerun: Any, layer: BoxLayer) -> list[Any]:
    """Boxes with captions, and their scores and classes as values of their own, which the viewer shows for a selected box."""
    turn = np.zeros((len(layer), 4), np.float32)  # a rotation about z as a quaternion x, y, z, w
    turn[:, 2], turn[:, 3] = np.sin(layer.boxes[:, 6] / 2), np.cos(layer.boxes[:, 6] / 2)
    boxes = rerun.Boxes3D(
        centers=layer.boxes[:, :3],
        half_sizes=layer.boxes[:, 3:6] / 2,
        quaternions=turn,
        colors=[LAYER_COLORS[layer.name]] * len(layer),
        labels=layer.captions(),
        show_labels=False,
    )
    values: dict[str, Any] = {"class_name": list(layer.classes)}
    if not np.isnan(layer.scores).all():
        values["score"] = layer.scores
    return [boxes, rerun.AnyValues(**values)] if len(layer) else [boxes]
