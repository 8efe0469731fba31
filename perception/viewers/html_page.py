"""One HTML file that draws frames with WebGL: it can be opened from a disk, sent by mail, and needs no network.

The page holds points as whole steps of two bytes, so that 150,000 points take 1.4 MB; the page says how large a step is. The script is
written by hand in `web/`: `camera.js` and `boxes.js` (geometry), `painter.js` (WebGL), `page.js` (the panel). A content security policy
lets the browser run this script and load nothing. Text from data is escaped here and only ever set as text there.
Read next: `web/page.js`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InvalidInput, require
from ...core.files import write_atomically
from ...core.foreign_text import shown
from .colors import LAYER_COLORS, SCALE, FeatureColors, height_span
from .drawn_frame import LAYER_TITLES, DrawnCells, DrawnFrame, DrawnPoints

MOST_PAGE_POINTS = 150_000
"""Points of a frame that a page holds unless it is told otherwise."""
MOST_PAGE_BYTES = 256 << 20
"""Bytes of the largest page that is written. A browser may stop at larger ones."""
STEPS = 65_535
"""Steps of a coordinate from the lowest to the highest point of a frame: the largest whole number of two bytes."""

_WEB = Path(__file__).with_name("web")
_SCRIPTS = ("camera.js", "boxes.js", "painter.js", "page.js")


@dataclass(frozen=True, kw_only=True)
class WrittenPage:
    """What a page holds."""

    bytes: int
    """Size of the file."""
    points: int
    """Points of all frames that the page holds."""
    points_left_out: int
    """Points that it leaves out: those over the limit of their frame, chosen at random, and those that are not finite."""
    rounding: float
    """Half of the largest step: by how many meters a coordinate of a point or a cell is off at most."""


def write_viewer_page(
    path: Path | str, frames: Sequence[DrawnFrame], *, title: str, source: str = "", most_points: int = MOST_PAGE_POINTS
) -> WrittenPage:
    """Write frames as one HTML file.

    Args:
        path: The file.
        frames: At least one frame.
        title: Heading of the page.
        source: Sentence that says what the page was made with.
        most_points: Points that are kept of a frame. A frame with more is thinned out at random, the same way each time.

    Returns:
        What the page holds.

    Raises:
        InvalidInput: There is no frame, `most_points` is below 1, or the page would be larger than `MOST_PAGE_BYTES`.
        OSError: The file cannot be written.

    Example:
        write_viewer_page("scan.html", [DrawnFrame(id="scan", class_names=("Car",), points=scan, detections=found)], title="My scan")
    """
    require(len(frames) > 0, "a page needs at least one frame")
    require(most_points >= 1, f"the number of points of a frame must be at least 1, found {most_points}")
    packed = [_Packed.of(frame, most_points) for frame in frames]
    size = sum(len(p.points.xyz) * 10 for p in packed if p.points) + sum(len(p.cells.centers) * 12 for p in packed if p.cells)
    if size > MOST_PAGE_BYTES:
        raise InvalidInput(
            f"the page would have about {size >> 20} MiB, more than the {MOST_PAGE_BYTES >> 20} MiB that are written; draw fewer frames (--limit), or fewer "
            "points of each (--html-points)"
        )
    rounding = max((step / 2 for p in packed for step in p.steps()), default=0.0)
    colors, heights = FeatureColors.of(frames), height_span(frames)
    names = [name for name in LAYER_TITLES if any(layer.name == name for frame in frames for layer in frame.layers())]
    data = {
        "source": shown(source, most=1000),
        "rounding": f"Coordinates of points and cells are rounded by at most {1000 * rounding:.2g} mm, so that the page is small; those of boxes by 0.05 mm.",
        "heights": heights,
        "ground": sum(heights) / 2,
        "scale": SCALE,
        "view": _first_view(frames),
        "layers": {name: {"title": LAYER_TITLES[name], "color": LAYER_COLORS[name]} for name in names},
        "frames": [p.to_json(colors) for p in packed],
    }
    page = _page(title, data).encode()
    write_atomically(path, page)
    drawn = [p.points for p in packed if p.points is not None]
    return WrittenPage(
        bytes=len(page),
        points=sum(len(points.xyz) for points in drawn),
        points_left_out=sum(len(f.points) for f in frames if f.points is not None) - sum(len(points.xyz) for points in drawn),
        rounding=rounding,
    )


@dataclass(frozen=True, kw_only=True)
class _Packed:
    """What the page holds of one frame, before it becomes JSON."""

    frame: DrawnFrame
    points: DrawnPoints | None
    cells: DrawnCells | None
    finite: int
    """Points of the frame that could be drawn."""

    @staticmethod
    def of(frame: DrawnFrame, most_points: int) -> _Packed:
        points = frame.points_to_draw()
        finite = 0 if points is None else len(points.xyz)
        if points is not None:  # in random order, so that the page can draw the first part of them while the camera moves
            kept = np.random.default_rng(0).permutation(finite)[:most_points]
            intensity = None if points.intensity is None else points.intensity[kept]
            points = DrawnPoints(xyz=points.xyz[kept], intensity=intensity, left_out=points.left_out)
        cells = frame.cells_to_draw()
        if cells is not None:
            order = np.random.default_rng(0).permutation(len(cells.centers))
            cells = replace(cells, centers=cells.centers[order], features=cells.features[order])
        return _Packed(frame=frame, points=points, cells=cells, finite=finite)

    def steps(self) -> list[float]:
        """Sizes of the steps of points and cells along each axis."""
        places = [*([self.points.xyz] if self.points else []), *([self.cells.centers] if self.cells else [])]
        return [step for xyz in places for step in _in_steps(xyz)[2]]

    def to_json(self, colors: FeatureColors | None) -> dict[str, Any]:
        points = cells = None
        if self.points is not None:
            whole, origin, steps = _in_steps(self.points.xyz)
            shades = self.points.intensity
            points = {
                "count": len(whole),
                "of": self.finite,
                "origin": origin,
                "steps": steps,
                "xyz": _base64(whole.astype("<u2")),
                "intensity": None if shades is None else _base64((shades * 255).round().astype(np.uint8)),
            }
        if self.cells is not None:
            whole, origin, steps = _in_steps(self.cells.centers)
            tints = np.zeros((0, 3), np.uint8) if colors is None else colors.colors(self.cells.features)
            cells = {
                "count": len(whole),
                "size": self.cells.size,
                "origin": origin,
                "steps": steps,
                "centers": _base64(whole.astype("<u2")),
                "colors": _base64(tints),
            }
        layers = [
            {
                "name": layer.name,
                "boxes": [[round(v, 4) for v in box] for box in layer.boxes.tolist()],
                "classes": layer.classes,
                "scores": [None if score != score else round(score, 4) for score in layer.scores.tolist()],
                "ignored": layer.ignored.tolist(),
            }
            for layer in self.frame.layers()
        ]
        return {"id": shown(self.frame.id), "points": points, "cells": cells, "layers": layers}


def _in_steps(xyz: NDArray[np.float32]) -> tuple[NDArray[np.int64], list[float], list[float]]:
    """(N, 3) meters as whole steps 0..65535 from an origin, with the origin and the size of a step along each axis."""
    if not len(xyz):
        return np.zeros((0, 3), np.int64), [0.0] * 3, [0.0] * 3
    low, high = xyz.min(0).astype(np.float64), xyz.max(0).astype(np.float64)
    steps = (high - low) / STEPS
    whole = np.rint((xyz - low) / np.where(steps > 0, steps, 1)).astype(np.int64)
    return whole, low.tolist(), steps.tolist()


def _base64(array: NDArray[Any]) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")


def _first_view(frames: Sequence[DrawnFrame]) -> dict[str, object]:
    """Where the camera looks at first: the middle of what is drawn in the first frame, from a distance that shows most of it."""
    points, cells = frames[0].points_to_draw(), frames[0].cells_to_draw()
    places = [points.xyz if points else np.zeros((0, 3)), cells.centers if cells else np.zeros((0, 3))]
    xyz = np.concatenate([*places, *(layer.boxes[:, :3] for layer in frames[0].layers())])
    if not len(xyz):
        return {"target": [0.0, 0.0, 0.0], "distance": 40.0}
    low, high = np.quantile(xyz, 0.05, 0), np.quantile(xyz, 0.95, 0)
    middle = [float(v) for v in (low + high) / 2]
    return {"target": middle, "distance": float(np.clip(0.9 * np.hypot(*(high - low)[:2]), 15, 120))}


def _page(title: str, data: object) -> str:
    script = "\n".join(['"use strict";', *((_WEB / name).read_text(encoding="utf-8") for name in _SCRIPTS)])
    style = (_WEB / "page.css").read_text(encoding="utf-8")
    policy = (
        f"default-src 'none'; script-src '{_digest(script)}'; style-src '{_digest(style)}'; base-uri 'none'; form-action 'none'"
    )
    # `<` is written as an escape, so that no text from data can end the script element that holds the JSON.
    frames = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {"policy": policy, "title": escape(shown(title)), "style": style, "frames": frames, "script": script}
    template = (_WEB / "page.html").read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _digest(text: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}"
