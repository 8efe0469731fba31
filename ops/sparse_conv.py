"""Sparse 3D convolution over occupied voxels: gather, multiply, scatter along a rulebook.

``out[o] = sum over kernel offsets k and pairs (i, o) of k: weight[:, k] @ features[i]``: cross-correlation, as torch's ``conv3d``
and spconv compute it, evaluated at occupied sites only. The weight has spconv's layout (out, kz, ky, kx, in), so that weights of
OpenPCDet load by name.

The CPU backend gathers the rows of a few kernel offsets into a buffer that fits the cache, multiplies each offset's slice with its
matrix, and adds the products to the output rows. Threads of that last step own disjoint output rows and every row sums its offsets
in the same order, so the result does not depend on the number of threads. Features, not gathered copies, are kept for the backward.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import FunctionCtx, once_differentiable

from .rulebook import Rulebook, Triple, over_ranges, strided_rulebook, submanifold_rulebook

_BUFFER_ELEMENTS = 1 << 18  # of the gather buffer and of the product buffer: with fp32 1 MiB each, which stays in a CPU's cache


def sparse_conv(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """Sparse convolution, differentiable (once) in features and weight.

    On the CPU in fp32 and fp64 it runs the numba backend; CUDA tensors and other types run `sparse_conv_reference`.

    Args:
        features: (num_in, in) rows in the order of the coordinates the rulebook was built from.
        weight: (out, kz, ky, kx, in), same dtype and device.
        rulebook: from `submanifold_rulebook` or `strided_rulebook`, same device.

    Returns:
        (num_out, out), rows in the order of ``rulebook.out_coords``.

    Raises:
        ValueError: sizes, types or devices that do not fit together.
    """
    _check(features, weight, rulebook)
    if features.device.type == "cpu" and features.dtype in (torch.float32, torch.float64):
        return _SparseConv.apply(features, weight, rulebook)
    return sparse_conv_reference(features, weight, rulebook)


def sparse_conv_reference(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """`sparse_conv` in plain torch operators, on any device, differentiated by autograd."""
    _check(features, weight, rulebook)
    out = features.new_zeros(rulebook.num_out, weight.shape[0])
    for k, matrix in enumerate(weight.flatten(1, 3).unbind(1)):  # (out, in) of one kernel offset
        pairs = slice(rulebook.starts[k], rulebook.starts[k + 1])
        products = features.index_select(0, rulebook.pairs_in[pairs]) @ matrix.t()
        out = out.index_add(0, rulebook.pairs_out[pairs], products)
    return out


class SubmanifoldConv3d(nn.Module):
    """Convolution whose output sites are its input sites (spconv's ``SubMConv3d`` without bias); odd kernel, centred."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: Triple = (3, 3, 3)) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = _initial_weight(in_channels, out_channels, kernel_size)

    def rulebook(self, coords: Tensor, shape: Triple, batch_size: int) -> Rulebook:
        """See `submanifold_rulebook`. Layers of equal kernel size on the same sites share one."""
        return submanifold_rulebook(coords, shape, batch_size, self.kernel_size)

    def forward(self, features: Tensor, rulebook: Rulebook) -> Tensor:
        """(M, in) -> (M, out)."""
        if rulebook.centre is None:
            raise ValueError("SubmanifoldConv3d needs a submanifold rulebook, found a strided one")
        return sparse_conv(features, self.weight, rulebook)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        return f"{self.weight.shape[-1]}, {self.weight.shape[0]}, kernel_size={self.kernel_size}"


class StridedConv3d(nn.Module):
    """Convolution with an output site wherever its window holds an input site (spconv's ``SparseConv3d`` without bias)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: Triple = (3, 3, 3),
        stride: Triple = (2, 2, 2),
        padding: Triple = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.weight = _initial_weight(in_channels, out_channels, kernel_size)

    def rulebook(self, coords: Tensor, shape: Triple, batch_size: int) -> Rulebook:
        """See `strided_rulebook`."""
        return strided_rulebook(coords, shape, batch_size, self.kernel_size, self.stride, self.padding)

    def forward(self, features: Tensor, rulebook: Rulebook) -> Tensor:
        """(M_in, in) -> (M_out, out)."""
        return sparse_conv(features, self.weight, rulebook)

    def extra_repr(self) -> str:
        """Sizes, for ``repr``."""
        sizes = f"{self.weight.shape[-1]}, {self.weight.shape[0]}, kernel_size={self.kernel_size}"
        return f"{sizes}, stride={self.stride}, padding={self.padding}"


def _initial_weight(in_channels: int, out_channels: int, kernel_size: Triple) -> nn.Parameter:
    """Uniform in +-1 / sqrt(fan_in), fan_in = kz * ky * kx * in: the initialisation of torch's and spconv's convolutions."""
    bound = 1 / math.sqrt(math.prod(kernel_size) * in_channels)
    return nn.Parameter(torch.empty(out_channels, *kernel_size, in_channels).uniform_(-bound, bound))


class _SparseConv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
        ctx.save_for_backward(features, weight)
        ctx.rulebook = rulebook
        matrices = weight.flatten(1, 3).permute(1, 2, 0).contiguous()  # (K, in, out)
        return _gather_multiply_scatter(features, matrices, rulebook, rulebook.pairs_in, rulebook.pairs_out, rulebook.num_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        rulebook: Rulebook = ctx.rulebook
        grad = grad.contiguous()
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:
            matrices = weight.flatten(1, 3).transpose(0, 1).contiguous()  # (K, out, in)
            rows_out, rows_in = _sorted_by_input(rulebook)
            grad_features = _gather_multiply_scatter(grad, matrices, rulebook, rows_out, rows_in, rulebook.num_in)
        if ctx.needs_input_grad[1]:
            grad_weight = _weight_gradient(features, grad, rulebook).permute(1, 0, 2).reshape(weight.shape)
        return grad_features, grad_weight, None


def _gather_multiply_scatter(
    source: Tensor, matrices: Tensor, rulebook: Rulebook, rows_from: Tensor, rows_to: Tensor, num_rows: int
) -> Tensor:
    """(num_rows, C_to): the sum over pairs of ``source[rows_from] @ matrices[k]`` into ``rows_to``, ascending per offset."""
    _, width_from, width_to = matrices.shape
    size = _block_size(width_from, width_to)
    gathered, products = source.new_empty(size, width_from), source.new_empty(size, width_to)
    out = source.new_zeros(num_rows, width_to) if rulebook.centre is None else source @ matrices[rulebook.centre]
    for first, last, parts in _blocks(rulebook, size):
        torch.index_select(source, 0, rows_from[first:last], out=gathered[: last - first])
        for k, begin, end in parts:
            torch.mm(gathered[begin:end], matrices[k], out=products[begin:end])
        bounds = np.array([parts[0][1], *(end for _, _, end in parts)])
        over_ranges(_scatter_add, num_rows, out.numpy(), products.numpy(), rows_to[first:last].numpy(), bounds)
    return out


def _weight_gradient(features: Tensor, grad: Tensor, rulebook: Rulebook) -> Tensor:
    """(K, out, in): per offset, the gathered output gradients transposed times the gathered features."""
    width_in, width_out = features.shape[1], grad.shape[1]
    size = _block_size(width_in, width_out)
    inputs, grads = features.new_empty(size, width_in), grad.new_empty(size, width_out)
    total = features.new_zeros(len(rulebook.starts) - 1, width_out, width_in)
    if rulebook.centre is not None:
        torch.mm(grad.t(), features, out=total[rulebook.centre])
    for first, last, parts in _blocks(rulebook, size):
        torch.index_select(features, 0, rulebook.pairs_in[first:last], out=inputs[: last - first])
        torch.index_select(grad, 0, rulebook.pairs_out[first:last], out=grads[: last - first])
        for k, begin, end in parts:
            total[k].addmm_(grads[begin:end].t(), inputs[begin:end])
    return total


def _block_size(width_a: int, width_b: int) -> int:
    return max(1, _BUFFER_ELEMENTS // max(width_a, width_b))


def _blocks(rulebook: Rulebook, size: int) -> Iterator[tuple[int, int, list[tuple[int, int, int]]]]:
    """Cut the pairs into blocks of at most ``size``: (first pair, last pair, [(offset, begin, end) within the block]).

    The centre of a submanifold kernel is left out: its pairs are every row with itself and need no gather and no scatter.
    """
    starts, centre = rulebook.starts, rulebook.centre
    ends = (0, starts[-1]) if centre is None else (0, starts[centre], starts[centre + 1], starts[-1])
    k = 0
    for low, high in zip(ends[::2], ends[1::2]):
        for first in range(low, high, size):
            last = min(first + size, high)
            while starts[k + 1] <= first:
                k += 1
            parts = []
            offset = k
            while offset < len(starts) - 1 and starts[offset] < last:
                if starts[offset + 1] > starts[offset]:
                    parts.append((offset, max(starts[offset], first) - first, min(starts[offset + 1], last) - first))
                offset += 1
            yield first, last, parts


def _sorted_by_input(rulebook: Rulebook) -> tuple[Tensor, Tensor]:
    """(output rows, input rows) of the pairs with input rows ascending within each offset: the rulebook of the transpose.

    They already ascend where the coordinates were in key order.
    """
    rows_in, starts = rulebook.pairs_in, rulebook.starts
    falls = torch.nonzero(rows_in[1:] < rows_in[:-1])[:, 0] + 1
    if set(falls.tolist()) <= set(starts):
        return rulebook.pairs_out, rows_in
    counts = torch.tensor(starts).diff()
    group = torch.repeat_interleave(torch.arange(len(counts)), counts)
    order = torch.argsort(group * rulebook.num_in + rows_in)
    return rulebook.pairs_out[order], rows_in[order]


@numba.njit(cache=True, nogil=True)
def _scatter_add(
    first: int, last: int, out: NDArray[Any], products: NDArray[Any], rows: NDArray[Any], bounds: NDArray[Any]
) -> None:
    """Add each product to its output row, for output rows first..last; ``rows`` ascend between two bounds."""
    for part in range(len(bounds) - 1):
        p = bounds[part] + np.searchsorted(rows[bounds[part] : bounds[part + 1]], first)
        while p < bounds[part + 1] and rows[p] < last:
            for c in range(out.shape[1]):
                out[rows[p], c] += products[p, c]
            p += 1


def _check(features: Tensor, weight: Tensor, rulebook: Rulebook) -> None:
    if weight.dim() != 5 or tuple(weight.shape[1:4]) != rulebook.kernel_size:
        raise ValueError(f"weight must be (out, *{rulebook.kernel_size}, in) for this rulebook, found {tuple(weight.shape)}")
    if features.dim() != 2 or features.shape != (rulebook.num_in, weight.shape[4]):
        raise ValueError(
            f"features must be ({rulebook.num_in}, {weight.shape[4]}) for this rulebook and weight, found {tuple(features.shape)}"
        )
    if features.dtype != weight.dtype:
        raise ValueError(f"features are {features.dtype} and weight is {weight.dtype}: convert one of them")
    if not features.device == weight.device == rulebook.pairs_in.device:
        raise ValueError(f"features on {features.device}, weight on {weight.device}, rulebook on {rulebook.pairs_in.device}")
