"""Coordinates of sparse cells as few bytes: gaps between sorted cells, in byte planes of the smallest width that fits.

The cells of a scene are numbered along z, y, x of the grid and sorted. What is stored is the number of free cells before each
cell. Most gaps are small, so one or two bytes per cell are usual, and bytes of equal weight lie together, which zstd compresses
well. The packing is exact.

Read next: `codec.py`, which puts the packed coordinates and the features into one scene.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from ...core.cut import CutSpec
from ...core.errors import InvalidInput
from .cut_json import CorruptScene

MAX_CELLS = 1 << 31  # linear indices and their sums stay far inside int64


def count_cells(spec: CutSpec) -> int:
    """Count the cells of the grid at a cut.

    Args:
        spec: The cut.

    Returns:
        Number of cells, at least 1.

    Raises:
        InvalidInput: The grid has no cell, or `MAX_CELLS` or more.
    """
    cells = math.prod(spec.shape)
    if not 0 < cells < MAX_CELLS:
        raise InvalidInput(f"a grid of {spec.shape} has {cells} cells; smashed scenes hold 1 to {MAX_CELLS - 1}")
    return cells


def pack_coordinates(coords: NDArray[np.int32], spec: CutSpec) -> NDArray[np.uint8]:
    """Pack the cells of a scene.

    Args:
        coords: (M, 3) cells z, y, x, ascending and unique.
        spec: The cut, whose grid the cells lie in.

    Returns:
        (width, M) free cells before each cell, least significant byte first; width is 1 to 4.
    """
    _, height, length = spec.shape
    wide = coords.astype(np.int64)
    index = (wide[:, 0] * height + wide[:, 1]) * length + wide[:, 2]
    gap = np.diff(index, prepend=-1) - 1
    width = max(1, (int(gap.max(initial=0)).bit_length() + 7) // 8)
    return np.ascontiguousarray(gap.astype("<i8").view(np.uint8).reshape(-1, 8)[:, :width].T)


def unpack_coordinates(planes: NDArray[np.uint8], spec: CutSpec) -> NDArray[np.int32]:
    """Unpack what `pack_coordinates` packed, from bytes that are not trusted.

    Args:
        planes: (width, M) bytes; width is at most 8.
        spec: The cut, whose grid the cells must lie in.

    Returns:
        (M, 3) cells z, y, x; ascending and unique, because every gap is at least 0.

    Raises:
        CorruptScene: A cell lies outside the grid.
    """
    cells = count_cells(spec)
    _, height, length = spec.shape
    width, m = planes.shape
    wide = np.zeros((m, 8), np.uint8)
    wide[:, :width] = planes.T
    gap = wide.view("<i8")[:, 0]
    if m and int(gap.max()) >= cells:
        raise CorruptScene(f"coordinates leave the grid {spec.shape}: a gap of {int(gap.max())} cells; the data is damaged")
    index = np.cumsum(gap + 1) - 1
    if m and int(index[-1]) >= cells:
        raise CorruptScene(f"coordinates leave the grid {spec.shape}: cell {int(index[-1])} of {cells}; the data is damaged")
    row, x = np.divmod(index, length)
    z, y = np.divmod(row, height)
    return np.stack([z, y, x], 1).astype(np.int32)
