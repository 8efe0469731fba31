"""Kernels of `ops/rulebook.py`, which explains keys, ranks and pairs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ...core.compiled import compiled

_ZYX = tuple[int, int, int]

RANKS_PER_TASK = 8192
"""Input rows of a strided convolution that a thread takes at a time."""


@compiled()
def merge(k: int, keys: NDArray[Any], deltas: NDArray[Any], low: NDArray[Any], high: NDArray[Any], found: NDArray[Any]) -> None:
    """Find the pairs of an offset of a half kernel: the ranks with `keys[low] == keys[high] + delta`.

    Args:
        k: Index of the offset; a task of `in_threads`.
        keys: (M,) keys of the voxels, ascending.
        deltas: (H,) negative differences, one per kernel offset of the first half.
        low: (H, M), receives the lower ranks at [k].
        high: (H, M), receives the higher ranks at [k], ascending.
        found: (H,), receives the number of pairs at [k].
    """
    delta, count, i, o = deltas[k], 0, 0, 0
    while o < len(keys):  # i never overtakes o
        difference = keys[i] - keys[o] - delta
        low[k, count], high[k, count] = i, o
        count += difference == 0
        i += difference <= 0
        o += difference >= 0
    found[k] = count


@compiled()
def restore_rows(
    pairs_in: NDArray[Any], pairs_out: NDArray[Any], starts: NDArray[Any], order: NDArray[Any], partner: NDArray[Any]
) -> None:
    """Map ranks to rows in place, and within each offset bring the pairs into ascending order of output rows.

    Args:
        pairs_in: (P,) ranks of the inputs, which become rows.
        pairs_out: (P,) ranks of the outputs, which become rows.
        starts: (K + 1,) bounds of the offsets in the pairs.
        order: (M,) row of each rank.
        partner: (M,) scratch memory.
    """
    for k in range(len(starts) - 1):
        partner[:] = -1
        for p in range(starts[k], starts[k + 1]):
            partner[order[pairs_out[p]]] = order[pairs_in[p]]
        p = starts[k]
        for row in range(len(partner)):
            if partner[row] >= 0:
                pairs_in[p], pairs_out[p] = partner[row], row
                p += 1


@compiled()
def list_meetings(
    task: int,
    coords: NDArray[Any],
    rows: NDArray[Any],
    out_shape: _ZYX,
    kernel_size: _ZYX,
    stride: _ZYX,
    padding: _ZYX,
    cursors: NDArray[Any],
    pairs_in: NDArray[Any],
    keys: NDArray[Any],
) -> None:
    """List input row and output key of the pairs of some rows of a strided convolution, each at its offset's cursor.

    Visiting the rows in key order makes the output keys ascend within an offset, because moving and dividing keep the order.

    Args:
        task: Index of the range of rows; a task of `in_threads`.
        coords: (M, 4) batch, z, y, x of the input voxels.
        rows: (M,) their rows in key order.
        out_shape: Output cells along z, y, x.
        kernel_size: Kernel along z, y, x.
        stride: Stride along z, y, x.
        padding: Padding along z, y, x.
        cursors: (tasks, K) place of each offset's next pair of each range; advanced.
        pairs_in: (P,), receives the input rows; empty to count only.
        keys: (P,), receives the output keys; empty to count only.
    """
    (depth, height, width), (size_z, size_y, size_x), (step_z, step_y, step_x) = out_shape, kernel_size, stride
    cursor = cursors[task]
    for row in rows[task * RANKS_PER_TASK : (task + 1) * RANKS_PER_TASK]:
        z, y, x = coords[row, 1] + padding[0], coords[row, 2] + padding[1], coords[row, 3] + padding[2]
        oz = z // step_z
        for kz in range(z % step_z, size_z, step_z):
            oy = y // step_y
            for ky in range(y % step_y, size_y, step_y):
                line = ((np.int64(coords[row, 0]) * depth + oz) * height + oy) * width
                ox = x // step_x
                for kx in range(x % step_x, size_x, step_x):
                    if 0 <= oz < depth and 0 <= oy < height and 0 <= ox < width:
                        k = (kz * size_y + ky) * size_x + kx
                        if len(keys) > 0:
                            pairs_in[cursor[k]], keys[cursor[k]] = row, line + ox
                        cursor[k] += 1
                    ox -= 1
                oy -= 1
            oz -= 1


@compiled()
def rank(k: int, keys: NDArray[Any], starts: NDArray[Any], out_keys: NDArray[Any], pairs_out: NDArray[Any]) -> None:
    """Find the row of each key of an offset among the output keys; the keys ascend within an offset, so one merge finds them.

    Args:
        k: Index of the offset; a task of `in_threads`.
        keys: (P,) output keys of the pairs.
        starts: (K + 1,) bounds of the offsets in the pairs.
        out_keys: (M,) keys of the output rows, ascending.
        pairs_out: (P,), receives the output rows of the offset.
    """
    row = 0
    for p in range(starts[k], starts[k + 1]):
        while out_keys[row] < keys[p]:
            row += 1
        pairs_out[p] = row
