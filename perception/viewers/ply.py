"""PLY files of a frame, for MeshLab, CloudCompare, Blender and point cloud libraries: points, cells, and boxes as colored edges.

All are binary, low byte first: a text header that names every column, then the rows. Read next: `gltf.py`, one file with everything.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.files import write_atomically
from ...core.foreign_text import check_name
from .colors import LAYER_COLORS, FeatureColors, height_colors
from .drawn_frame import BOX_EDGES, BoxLayer, DrawnFrame

_NAMES = {"f4": "float", "u1": "uchar", "i4": "int"}
_COLORS = [("red", "u1"), ("green", "u1"), ("blue", "u1")]
_PLACES = [("x", "<f4"), ("y", "<f4"), ("z", "<f4")]


def write_ply(
    folder: Path | str, frame: DrawnFrame, *, heights: tuple[float, float], feature_colors: FeatureColors | None
) -> tuple[Path, ...]:
    """Write what is known of a frame as PLY files.

    `ID.points.ply` has x, y, z, colors by height, and intensity where the scan has it. `ID.cells.ply` has the centers of the occupied cells with
    the colors of their features. `ID.boxes.ply` has the edges of all boxes in the colors of their layers.

    Args:
        folder: The folder. Files of these names are replaced.
        frame: The frame.
        heights: Heights of the color scale, from `height_span`.
        feature_colors: Colors of the features, from `FeatureColors.of`; None where no frame has a cell.

    Returns:
        The files, in this order; one that would hold nothing that is known is not written.

    Raises:
        InvalidInput: The id of the frame cannot be a file name.
        OSError: A file cannot be written.
    """
    stem = Path(folder) / check_name(frame.id, "frame id")
    files: list[Path] = []

    def write(kind: str, **elements: NDArray[Any]) -> None:
        files.append(stem.with_name(f"{stem.name}.{kind}.ply"))
        write_atomically(files[-1], _ply(elements))

    if (points := frame.points_to_draw()) is not None:
        extra = {} if points.intensity is None else {"intensity": points.intensity}
        write("points", vertex=_vertices(points.xyz, height_colors(points.xyz, heights), **extra))
    if (cells := frame.cells_to_draw()) is not None:
        tints = np.zeros((0, 3), np.uint8) if feature_colors is None else feature_colors.colors(cells.features)
        write("cells", vertex=_vertices(cells.centers, tints))
    if layers := frame.layers():
        vertices, edges = _boxes(layers)
        write("boxes", vertex=vertices, edge=edges)
    return tuple(files)


def _vertices(xyz: NDArray[np.float32], colors: NDArray[np.uint8], **columns: NDArray[np.float32]) -> NDArray[Any]:
    table = np.zeros(len(xyz), dtype=[*_PLACES, *_COLORS, *((name, "<f4") for name in columns)])
    for index, (name, _) in enumerate(_PLACES):
        table[name] = xyz[:, index]
    for index, (name, _) in enumerate(_COLORS):
        table[name] = colors[:, index]
    for name, values in columns.items():
        table[name] = values
    return table


def _boxes(layers: tuple[BoxLayer, ...]) -> tuple[NDArray[Any], NDArray[Any]]:
    outlines = np.concatenate([layer.outline().reshape(-1, 3) for layer in layers])
    colors = np.concatenate([np.tile(np.array(LAYER_COLORS[layer.name], np.uint8), (10 * len(layer), 1)) for layer in layers])
    starts = 10 * np.arange(len(outlines) // 10)
    pairs = (starts[:, None, None] + np.array(BOX_EDGES)).reshape(-1, 2)
    edges = np.zeros(len(pairs), dtype=[("vertex1", "<i4"), ("vertex2", "<i4"), *_COLORS])
    edges["vertex1"], edges["vertex2"] = pairs.T
    for index, (name, _) in enumerate(_COLORS):
        edges[name] = colors[pairs[:, 0], index]
    return _vertices(outlines, colors), edges


def _ply(elements: dict[str, NDArray[Any]]) -> Iterator[bytes]:
    """elements: one table of named columns for each element."""
    lines = ["ply", "format binary_little_endian 1.0", "comment x forward, y left, z up, in meters"]
    for name, table in elements.items():
        lines.append(f"element {name} {len(table)}")
        lines += [f"property {_NAMES[table.dtype[column].str[1:]]} {column}" for column in table.dtype.names or ()]
    yield ("\n".join([*lines, "end_header"]) + "\n").encode("ascii")
    for table in elements.values():
        yield table.tobytes()
