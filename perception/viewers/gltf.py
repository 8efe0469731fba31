"""One glTF 2.0 file (`.glb`) with all frames: a scene for each frame, with points, cells and the edges of boxes.

glTF has y up, so each scene has a root that turns our axes. A viewer that knows one scene only shows the first frame. Classes, scores and
boxes stand in the `extras` of each layer's node. Layout of the file: twelve bytes, a piece of JSON, a piece of numbers, each aligned to four
bytes (Khronos, glTF 2.0 specification, section 4). Read next: `ply.py`, the same as separate files.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.errors import InvalidInput, require
from ...core.files import write_atomically
from ...core.foreign_text import shown
from .colors import LAYER_COLORS, FeatureColors, height_colors, height_span
from .drawn_frame import BOX_EDGES, LAYER_TITLES, BoxLayer, DrawnFrame

MOST_GLTF_BYTES = 1 << 30
"""Bytes of numbers of the largest file that is written."""

_POINTS, _LINES = 0, 1  # modes of a primitive
_BYTE, _WORD, _FLOAT = 5121, 5125, 5126  # types of components: unsigned byte, unsigned int, float
_VERTICES, _INDICES = 34962, 34963  # what a part of the numbers is for
_TURN = [0, 0, -1, 0, -1, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]  # columns: x forward becomes -z, y left becomes -x, z up becomes y


def write_gltf(path: Path | str, frames: Sequence[DrawnFrame]) -> int:
    """Write frames as one binary glTF file.

    Args:
        path: The file, by custom with the suffix `.glb`.
        frames: At least one frame.

    Returns:
        Size of the file in bytes.

    Raises:
        InvalidInput: There is no frame, or the file would hold more than `MOST_GLTF_BYTES` of numbers.
        OSError: The file cannot be written.
    """
    require(len(frames) > 0, "a glTF file needs at least one frame")
    file, heights, colors = _File(), height_span(frames), FeatureColors.of(frames)
    for frame in frames:
        parts = [*_places(file, frame, heights, colors), *(_layer(file, layer) for layer in frame.layers())]
        file.add_scene(shown(frame.id), parts)
        if file.size > MOST_GLTF_BYTES:
            raise InvalidInput(f"the glTF file would hold more than {MOST_GLTF_BYTES >> 20} MiB; draw fewer frames (--limit)")
    data = file.to_bytes()
    write_atomically(path, data)
    return len(data)


@dataclass
class _File:
    """The parts of a file while it is written. JSON refers to numbers by position, so each list only grows."""

    nodes: list[dict[str, Any]] = field(default_factory=list)
    meshes: list[dict[str, Any]] = field(default_factory=list)
    accessors: list[dict[str, Any]] = field(default_factory=list)
    views: list[dict[str, Any]] = field(default_factory=list)
    scenes: list[dict[str, Any]] = field(default_factory=list)
    pieces: list[bytes] = field(default_factory=list)
    size: int = 0

    def add_numbers(self, array: NDArray[Any], kind: str, component: int, target: int, **more: object) -> int:
        """Add an array; returns the number of its accessor."""
        data = array.tobytes()
        self.views.append({"buffer": 0, "byteOffset": self.size, "byteLength": len(data), "target": target})
        self.pieces.append(data + bytes(-len(data) % 4))
        self.size += len(self.pieces[-1])
        self.accessors.append(
            {"bufferView": len(self.views) - 1, "componentType": component, "count": len(array), "type": kind, **more}
        )
        return len(self.accessors) - 1

    def add_mesh(
        self, name: str, xyz: NDArray[np.float32], colors: NDArray[np.uint8], edges: NDArray[np.uint32] | None, extras: object
    ) -> int | None:
        """Add points, or lines where `edges` holds pairs of points; returns the number of the node, None where there is nothing."""
        if not len(xyz):
            return None  # glTF knows no empty array
        opaque = np.concatenate([colors, np.full((len(colors), 1), 255, np.uint8)], 1)
        bounds = {"min": xyz.min(0).tolist(), "max": xyz.max(0).tolist()}
        primitive: dict[str, Any] = {
            "mode": _POINTS if edges is None else _LINES,
            "attributes": {
                "POSITION": self.add_numbers(xyz.astype("<f4"), "VEC3", _FLOAT, _VERTICES, **bounds),
                "COLOR_0": self.add_numbers(opaque, "VEC4", _BYTE, _VERTICES, normalized=True),
            },
        }
        if edges is not None:
            primitive["indices"] = self.add_numbers(edges.astype("<u4").reshape(-1), "SCALAR", _WORD, _INDICES)
        self.meshes.append({"name": name, "primitives": [primitive]})
        self.nodes.append({"name": name, "mesh": len(self.meshes) - 1} | ({"extras": extras} if extras else {}))
        return len(self.nodes) - 1

    def add_scene(self, name: str, parts: Sequence[int | None]) -> None:
        children = [part for part in parts if part is not None]
        self.nodes.append({"name": name, "matrix": _TURN} | ({"children": children} if children else {}))
        self.scenes.append({"name": name, "nodes": [len(self.nodes) - 1]})

    def to_bytes(self) -> bytes:
        parts: dict[str, list[Any]] = {
            "meshes": self.meshes,
            "accessors": self.accessors,
            "bufferViews": self.views,
            "buffers": [{"byteLength": self.size}] if self.size else [],
        }
        # A list that is there must not be empty.
        description = {
            "asset": {"version": "2.0", "generator": "upcycle3d"},
            "scene": 0,
            "scenes": self.scenes,
            "nodes": self.nodes,
        }
        text = json.dumps(description | {name: each for name, each in parts.items() if each}, allow_nan=False).encode()
        text += b" " * (-len(text) % 4)
        numbers = b"".join(self.pieces)
        chunks = struct.pack("<I4s", len(text), b"JSON") + text
        if numbers:
            chunks += struct.pack("<I4s", len(numbers), b"BIN\0") + numbers
        return struct.pack("<4sII", b"glTF", 2, 12 + len(chunks)) + chunks


def _places(file: _File, frame: DrawnFrame, heights: tuple[float, float], colors: FeatureColors | None) -> list[int | None]:
    """The nodes of points and cells."""
    nodes = []
    if (points := frame.points_to_draw()) is not None:
        nodes.append(file.add_mesh("points", points.xyz, height_colors(points.xyz, heights), None, None))
    if (cells := frame.cells_to_draw()) is not None and colors is not None:
        extras = {"size": cells.size}
        nodes.append(file.add_mesh("occupied cells", cells.centers, colors.colors(cells.features), None, extras))
    return nodes


def _layer(file: _File, layer: BoxLayer) -> int | None:
    outline = layer.outline()
    edges = 10 * np.arange(len(layer))[:, None, None] + np.array(BOX_EDGES)
    colors = np.tile(np.array(LAYER_COLORS[layer.name], np.uint8), (10 * len(layer), 1))
    boxes = [
        {
            "class": name,
            "score": None if score != score else round(score, 4),
            "box": [round(v, 4) for v in box],
            "ignored": ignored,
        }
        for name, score, box, ignored in zip(
            layer.classes, layer.scores.tolist(), layer.boxes.tolist(), layer.ignored.tolist(), strict=True
        )
    ]
    return file.add_mesh(LAYER_TITLES[layer.name], outline.reshape(-1, 3), colors, edges.astype(np.uint32), {"boxes": boxes})
