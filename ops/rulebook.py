"""Which input voxel meets which output voxel through which kernel offset: the rulebook of a sparse 3D convolution.

A sparse convolution touches only occupied voxels, so its whole geometry is a list of (input row, output row) pairs for every
kernel offset. The list depends on the coordinates alone; it is built once per resolution and shared by the layers of a stage
(Graham et al., "3D Semantic Segmentation with Submanifold Sparse Convolutional Networks", CVPR 2018, from where the term comes).

How the CPU finds pairs. A voxel is numbered by its place in the grid, its *key*. A shift by a kernel offset adds a constant to the
key, so two sorted lists of keys meet in one merge without a hash table and without branches to mispredict, and the pairs come out
already sorted. A submanifold kernel is symmetric: the pairs of offset k, swapped, are those of the mirrored offset.
Coordinates that are not in key order (batch, z, y, x) are sorted first and the pairs mapped back.

Read next: `sparse_conv.py`, which multiplies along a rulebook, and `cpu/rulebook.py`, the kernels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of
from .cpu.rulebook import RANKS_PER_TASK, list_meetings, merge, rank, restore_rows
from .dispatch import dispatch
from .threads import in_threads

ZYX = tuple[int, int, int]
"""A whole number for each of z, y, x."""


@dataclass(frozen=True, kw_only=True)
class Rulebook:
    """The pairs of one sparse convolution, grouped by kernel offset (kz, ky, kx) in C order."""

    pairs_in: Tensor
    """(P,) int32, input row of each pair."""

    pairs_out: Tensor
    """(P,) int32, output row of each pair, ascending and without repeats within an offset."""

    starts: tuple[int, ...]
    """K + 1 bounds of the offsets in the two lists, K = kz * ky * kx."""

    kernel_size: ZYX
    """Kernel along z, y, x."""

    num_in: int
    """Number of input rows."""

    out_coords: Tensor
    """(M_out, 4) int32 batch, z, y, x of the output rows."""

    out_shape: ZYX
    """Output cells along z, y, x."""

    batch_size: int
    """Number of scenes."""

    @property
    def num_out(self) -> int:
        """Number of output rows."""
        return len(self.out_coords)


def submanifold_rulebook(coords: Tensor, shape: ZYX, batch_size: int, kernel_size: ZYX = (3, 3, 3)) -> Rulebook:
    """Find the pairs of a submanifold convolution: the output sites are the input sites, in the same row order.

    Args:
        coords: (M, 4) int32 batch, z, y, x, in any order, without repeats.
        shape: Grid cells along z, y, x.
        batch_size: Number of scenes; scenes without voxels are legal.
        kernel_size: Odd sizes along z, y, x.

    Returns:
        The rulebook, whose output coordinates are `coords`.

    Raises:
        InvalidInput: Coordinates of a wrong type, outside the grid, or repeated; an even kernel.
    """
    build = dispatch((coords,), _submanifold_pairs_reference, cpu=_submanifold_pairs)
    return _submanifold(coords, shape, batch_size, kernel_size, build)


def submanifold_rulebook_reference(coords: Tensor, shape: ZYX, batch_size: int, kernel_size: ZYX = (3, 3, 3)) -> Rulebook:
    """Compute `submanifold_rulebook` in plain torch (sort and binary search), on any device.

    Args:
        coords: (M, 4) int32 batch, z, y, x.
        shape: Grid cells along z, y, x.
        batch_size: Number of scenes.
        kernel_size: Odd sizes along z, y, x.

    Returns:
        The rulebook.
    """
    return _submanifold(coords, shape, batch_size, kernel_size, _submanifold_pairs_reference)


def strided_rulebook(coords: Tensor, shape: ZYX, batch_size: int, kernel_size: ZYX, stride: ZYX, padding: ZYX) -> Rulebook:
    """Find the pairs of a strided convolution: an output site is occupied where its window holds at least one input voxel.

    Args:
        coords: (M, 4) int32 batch, z, y, x, in any order, without repeats.
        shape: Grid cells along z, y, x. The output has `(shape + 2 * padding - kernel_size) // stride + 1`.
        batch_size: Number of scenes; scenes without voxels are legal.
        kernel_size: Kernel along z, y, x.
        stride: Stride along z, y, x.
        padding: Padding along z, y, x.

    Returns:
        The rulebook, whose output rows ascend in (batch, z, y, x).

    Raises:
        InvalidInput: Coordinates of a wrong type, outside the grid, or repeated; a kernel larger than the padded grid.
    """
    build = dispatch((coords,), _strided_pairs_reference, cpu=_strided_pairs)
    return _strided(coords, shape, batch_size, kernel_size, stride, padding, build)


def strided_rulebook_reference(
    coords: Tensor, shape: ZYX, batch_size: int, kernel_size: ZYX, stride: ZYX, padding: ZYX
) -> Rulebook:
    """Compute `strided_rulebook` in plain torch (sort and binary search), on any device.

    Args:
        coords: (M, 4) int32 batch, z, y, x.
        shape: Grid cells along z, y, x.
        batch_size: Number of scenes.
        kernel_size: Kernel along z, y, x.
        stride: Stride along z, y, x.
        padding: Padding along z, y, x.

    Returns:
        The rulebook.
    """
    return _strided(coords, shape, batch_size, kernel_size, stride, padding, _strided_pairs_reference)


# ---- submanifold


def _submanifold(
    coords: Tensor, shape: ZYX, batch_size: int, kernel_size: ZYX, build: Callable[..., tuple[Tensor, Tensor, list[int]]]
) -> Rulebook:
    _check_coords(coords, shape, batch_size)
    if any(size < 1 or size % 2 == 0 for size in kernel_size):
        raise InvalidInput(f"submanifold_rulebook: kernel_size {kernel_size} must be odd, so that it has a center")
    radius = [size // 2 for size in kernel_size]
    # Each axis is widened by the radius: a neighbor beyond the border then has a key that no voxel has.
    _, height, width = (n + r for n, r in zip(shape, radius))
    keys = _keys(coords, tuple(n + r for n, r in zip(shape, radius)), batch_size)
    deltas = [
        ((kz - radius[0]) * height + ky - radius[1]) * width + kx - radius[2]
        for kz in range(kernel_size[0])
        for ky in range(kernel_size[1])
        for kx in range(kernel_size[2])
    ]
    order = _ascending_order(keys, coords)
    pairs_in, pairs_out, counts = build(keys, order, deltas)
    return Rulebook(
        pairs_in=pairs_in,
        pairs_out=pairs_out,
        starts=_bounds(counts),
        kernel_size=kernel_size,
        num_in=len(coords),
        out_coords=coords,
        out_shape=shape,
        batch_size=batch_size,
    )


def _submanifold_pairs_reference(keys: Tensor, order: Tensor | None, deltas: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    rows = torch.arange(len(keys), device=keys.device) if order is None else order
    ascending = keys[rows]
    pairs_in, pairs_out = [], []
    for delta in deltas:
        wanted = keys + delta
        place = torch.searchsorted(ascending, wanted).clamp(max=max(len(keys) - 1, 0))
        found = torch.nonzero(ascending[place] == wanted)[:, 0]
        pairs_in.append(rows[place[found]])
        pairs_out.append(found)
    return torch.cat(pairs_in).int(), torch.cat(pairs_out).int(), [len(p) for p in pairs_in]


def _submanifold_pairs(keys: Tensor, order: Tensor | None, deltas: list[int]) -> tuple[Tensor, Tensor, list[int]]:
    num, half = len(keys), len(deltas) // 2
    ascending = (keys if order is None else keys[order]).numpy()
    low, high = np.empty((half, num), np.int32), np.empty((half, num), np.int32)
    found = np.zeros(half, np.int64)
    in_threads(merge, half, ascending, np.array(deltas[:half], np.int64), low, high, found)

    center = np.arange(num, dtype=np.int32)
    lows, highs = [low[k, : found[k]] for k in range(half)], [high[k, : found[k]] for k in range(half)]
    pairs_in = np.concatenate([*lows, center, *highs[::-1]])
    pairs_out = np.concatenate([*highs, center, *lows[::-1]])
    counts = [*found.tolist(), num, *found[::-1].tolist()]
    if order is not None:
        restore_rows(pairs_in, pairs_out, np.array(_bounds(counts)), order.numpy(), np.empty(num, np.int32))
    return torch.from_numpy(pairs_in), torch.from_numpy(pairs_out), counts


# ---- strided


def _strided(
    coords: Tensor,
    shape: ZYX,
    batch_size: int,
    kernel_size: ZYX,
    stride: ZYX,
    padding: ZYX,
    build: Callable[..., tuple[Tensor, Tensor, Tensor, list[int]]],
) -> Rulebook:
    _check_coords(coords, shape, batch_size)
    if min(*kernel_size, *stride) < 1 or min(padding) < 0:
        raise InvalidInput(
            f"strided_rulebook: kernel_size {kernel_size} and stride {stride} must be >= 1, padding {padding} >= 0"
        )
    depth, height, width = ((n + 2 * p - k) // s + 1 for n, p, k, s in zip(shape, padding, kernel_size, stride))
    if min(depth, height, width) < 1:
        raise InvalidInput(f"strided_rulebook: kernel_size {kernel_size} is larger than the grid {shape} padded by {padding}")
    out_shape = (depth, height, width)
    order = _ascending_order(_keys(coords, shape, batch_size), coords)
    _check_key_range(out_shape, batch_size)
    pairs_in, pairs_out, out_keys, counts = build(coords, order, out_shape, kernel_size, stride, padding)
    zyx = (out_keys // (height * width) % depth, out_keys // width % height, out_keys % width)
    return Rulebook(
        pairs_in=pairs_in,
        pairs_out=pairs_out,
        starts=_bounds(counts),
        kernel_size=kernel_size,
        num_in=len(coords),
        out_coords=torch.stack([out_keys // (depth * height * width), *zyx], dim=1).int(),
        out_shape=out_shape,
        batch_size=batch_size,
    )


def _strided_pairs_reference(
    coords: Tensor, order: Tensor | None, out_shape: ZYX, kernel_size: ZYX, stride: ZYX, padding: ZYX
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    rows = torch.arange(len(coords), device=coords.device) if order is None else order
    batch, zyx = coords[rows, 0].long(), coords[rows, 1:].long()
    steps, limits = zyx.new_tensor(stride), zyx.new_tensor(out_shape)
    pairs_in, keys = [], []
    for offset in np.ndindex(*kernel_size):
        moved = zyx + zyx.new_tensor(padding) - zyx.new_tensor(offset)
        out = torch.div(moved, steps, rounding_mode="floor")
        meets = ((out * steps == moved) & (out >= 0) & (out < limits)).all(dim=1)
        z, y, x = out[meets].unbind(1)
        pairs_in.append(rows[meets])
        keys.append(((batch[meets] * out_shape[0] + z) * out_shape[1] + y) * out_shape[2] + x)
    out_keys, pairs_out = torch.unique(torch.cat(keys), sorted=True, return_inverse=True)
    return torch.cat(pairs_in).int(), pairs_out.int(), out_keys, [len(p) for p in pairs_in]


def _strided_pairs(
    coords: Tensor, order: Tensor | None, out_shape: ZYX, kernel_size: ZYX, stride: ZYX, padding: ZYX
) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    rows = np.arange(len(coords)) if order is None else order.numpy()
    geometry = (coords.contiguous().numpy(), rows, out_shape, kernel_size, stride, padding)
    nothing = (np.empty(0, np.int32), np.empty(0, np.int64))
    tasks = -(-len(rows) // RANKS_PER_TASK)
    found = np.zeros((tasks, math.prod(kernel_size)), np.int64)
    in_threads(list_meetings, tasks, *geometry, found, *nothing)
    counts = found.sum(0).tolist()
    starts = np.array(_bounds(counts))
    cursors = starts[:-1] + found.cumsum(0) - found  # within an offset, the pairs of one range of rows follow those of the last
    pairs_in, keys = np.empty(starts[-1], np.int32), np.empty(starts[-1], np.int64)
    in_threads(list_meetings, tasks, *geometry, cursors, pairs_in, keys)

    ascending = np.sort(keys, kind="stable")  # merges the sorted runs, one per offset: four times faster than the default
    out_keys = ascending[np.diff(ascending, prepend=-1) > 0]
    pairs_out = np.empty(starts[-1], np.int32)
    in_threads(rank, len(counts), keys, starts, out_keys, pairs_out)
    return torch.from_numpy(pairs_in), torch.from_numpy(pairs_out), torch.from_numpy(out_keys), counts


# ---- shared


def _check_coords(coords: Tensor, shape: ZYX, batch_size: int) -> None:
    if coords.dim() != 2 or coords.shape[1] != 4 or coords.dtype != torch.int32:
        raise InvalidInput(f"a rulebook expects coords as int32 (M, 4) of batch, z, y, x, found {shape_of(coords)}")
    limits = coords.new_tensor([batch_size, *shape])
    if not len(coords):
        return
    least, most = torch.aminmax(coords, dim=0)
    if bool(((least < 0) | (most >= limits)).any()):
        outside = ((coords < 0) | (coords >= limits)).any(dim=1)
        row = int(outside.nonzero()[0])
        raise InvalidInput(
            f"voxels must lie inside the grid, but row {row} is (batch, z, y, x) = {tuple(coords[row].tolist())} with {batch_size} "
            f"scenes of shape {shape} ({int(outside.sum())} such rows of {len(coords)}); drop them before building a rulebook"
        )


def _check_key_range(shape: tuple[int, ...], batch_size: int) -> None:
    if batch_size * math.prod(shape) >= 2**62:
        raise InvalidInput(
            f"a grid of {batch_size} x {shape} cells cannot be numbered with 64 bits; use larger voxels or a smaller range"
        )


def _keys(coords: Tensor, shape: tuple[int, ...], batch_size: int) -> Tensor:
    """(M,) int64 place of each voxel in a (batch, z, y, x) grid of `shape` in C order."""
    _check_key_range(shape, batch_size)
    batch, z, y, x = coords.long().unbind(1)
    return ((batch * shape[0] + z) * shape[1] + y) * shape[2] + x


def _ascending_order(keys: Tensor, coords: Tensor) -> Tensor | None:
    """(M,) int64 rows in ascending key order, or None if they already are. Refuses repeated keys."""
    if bool((keys[1:] > keys[:-1]).all()):
        return None
    ascending, order = torch.sort(keys, stable=True)
    repeats = torch.nonzero(ascending[1:] == ascending[:-1])[:, 0]
    if len(repeats):
        second = int(order[repeats + 1].min())
        first = int(torch.nonzero(keys == keys[second])[0])
        raise InvalidInput(
            f"voxels must not repeat, but rows {first} and {second} are both (batch, z, y, x) = {tuple(coords[second].tolist())}"
            f" ({len(repeats)} repeats of {len(coords)} rows); merge the points of a voxel before building a rulebook"
        )
    return order


def _bounds(counts: list[int]) -> tuple[int, ...]:
    bounds = [0]
    for count in counts:
        bounds.append(bounds[-1] + count)
    return tuple(bounds)
