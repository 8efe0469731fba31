"""Sparse 3D convolution over occupied voxels: gather, multiply, scatter along a rulebook.

``out[o] = sum over kernel offsets k and pairs (i, o) of k: weight[:, k] @ features[i]``: cross-correlation, as torch's ``conv3d``
and spconv compute it, evaluated at occupied sites only. The weight has spconv's layout (out, kz, ky, kx, in), so that weights of
OpenPCDet load by name.

The CPU backend cuts the output rows into short ranges. For a range it walks the kernel offsets and takes a tile of pairs at a
time: gather their input rows, multiply with the offset's matrix, add to the output rows, all within the inner caches. Products
that small run on the calling thread (BLAS through numba), so threads meet once a layer, not once a product: on a busy machine
the latter costs seconds. Ranges do not depend on the number of threads, hence neither does any bit of the result. Features, not
gathered copies, are kept for the backward.
"""

from __future__ import annotations

import math
from typing import Any

import numba
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .rulebook import Rulebook, Triple, strided_rulebook, submanifold_rulebook
from .spconv_backend import sparse_conv_spconv, spconv_runs_on_cuda
from .threads import in_threads

_PRODUCT = 1 << 18  # multiply-adds of one tile's product; above this BLAS (OpenBLAS, for numba) starts threads of its own
_TILES = (8, 256)  # the least and most pairs of a tile
_RANGE = 1024  # output rows a thread takes at a time


def sparse_conv(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """Sparse convolution, differentiable (once) in features and weight.

    On the CPU in fp32 and fp64 it runs the numba backend; on CUDA in fp32 and fp16 spconv's kernels, where its CUDA build is
    installed; everything else runs `sparse_conv_reference`.

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
    if features.device.type == "cuda" and features.dtype in (torch.float32, torch.float16) and spconv_runs_on_cuda():
        return sparse_conv_spconv(features, weight, rulebook)
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
        features = features.contiguous()
        ctx.save_for_backward(features, weight)
        ctx.rulebook = rulebook
        matrices = weight.flatten(1, 3).permute(1, 2, 0).contiguous()  # (K, in, out)
        return _convolve(features, matrices, rulebook.pairs_in, rulebook.pairs_out, rulebook.starts, rulebook.num_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        features, weight = ctx.saved_tensors
        rulebook: Rulebook = ctx.rulebook
        grad = grad.contiguous()
        grad_features = grad_weight = None
        if ctx.needs_input_grad[0]:  # the same convolution with input and output rows exchanged
            matrices = weight.flatten(1, 3).transpose(0, 1).contiguous()  # (K, out, in)
            rows_out, rows_in = _ascending_by_input(rulebook)
            grad_features = _convolve(grad, matrices, rows_out, rows_in, rulebook.starts, rulebook.num_in)
        if ctx.needs_input_grad[1]:
            total = weight.new_zeros(len(rulebook.starts) - 1, weight.shape[0], weight.shape[4])  # (K, out, in)
            arrays = (features, grad, rulebook.pairs_in, rulebook.pairs_out)
            in_threads(_weight_gradient, len(total), *(t.numpy() for t in arrays), np.array(rulebook.starts), total.numpy())
            grad_weight = total.transpose(0, 1).reshape(weight.shape)
        return grad_features, grad_weight, None


def _convolve(
    source: Tensor, matrices: Tensor, rows_from: Tensor, rows_to: Tensor, starts: tuple[int, ...], num_rows: int
) -> Tensor:
    """(num_rows, C_to): per offset k, ``source[rows_from] @ matrices[k]`` added to ``rows_to``, which ascend within an offset."""
    out = source.new_zeros(num_rows, matrices.shape[2])
    arrays = (t.numpy() for t in (source, matrices, rows_from, rows_to))
    in_threads(_convolve_range, -(-num_rows // _RANGE), *arrays, np.array(starts), out.numpy())
    return out


def _ascending_by_input(rulebook: Rulebook) -> tuple[Tensor, Tensor]:
    """(output rows, input rows) of the pairs with input rows ascending within each offset.

    They already ascend where the coordinates were in key order.
    """
    rows_in = rulebook.pairs_in
    falls = torch.nonzero(rows_in[1:] < rows_in[:-1])[:, 0] + 1
    if set(falls.tolist()) <= set(rulebook.starts):
        return rulebook.pairs_out, rows_in
    counts = torch.tensor(rulebook.starts).diff()
    offset = torch.repeat_interleave(torch.arange(len(counts)), counts)
    order = torch.argsort(offset * rulebook.num_in + rows_in)
    return rulebook.pairs_out[order], rows_in[order]


@numba.njit(cache=True, nogil=True)
def _tile(width_a: int, width_b: int) -> int:
    return min(max(_PRODUCT // (width_a * width_b), _TILES[0]), _TILES[1])


@numba.njit(cache=True, nogil=True)
def _convolve_range(
    task: int,
    source: NDArray[Any],
    matrices: NDArray[Any],
    rows_from: NDArray[Any],
    rows_to: NDArray[Any],
    starts: NDArray[Any],
    out: NDArray[Any],
) -> None:
    tile = _tile(matrices.shape[1], matrices.shape[2])
    gathered = np.empty((tile, source.shape[1]), source.dtype)
    products = np.empty((tile, out.shape[1]), out.dtype)
    for k in range(len(matrices)):
        group = rows_to[starts[k] : starts[k + 1]]
        begin = starts[k] + np.searchsorted(group, task * _RANGE)
        end = starts[k] + np.searchsorted(group, (task + 1) * _RANGE)
        for low in range(begin, end, tile):
            count = min(tile, end - low)
            for p in range(count):
                row = rows_from[low + p]
                for c in range(source.shape[1]):
                    gathered[p, c] = source[row, c]
            np.dot(gathered[:count], matrices[k], products[:count])
            for p in range(count):
                row = rows_to[low + p]
                for c in range(out.shape[1]):
                    out[row, c] += products[p, c]


@numba.njit(cache=True, nogil=True)
def _weight_gradient(
    k: int,
    features: NDArray[Any],
    grad: NDArray[Any],
    rows_in: NDArray[Any],
    rows_out: NDArray[Any],
    starts: NDArray[Any],
    total: NDArray[Any],
) -> None:
    """total[k] = transposed output gradients times input features over the pairs of offset k."""
    tile = _tile(features.shape[1], grad.shape[1])
    inputs = np.empty((tile, features.shape[1]), features.dtype)
    grads = np.empty((tile, grad.shape[1]), grad.dtype)
    product = np.empty((grad.shape[1], features.shape[1]), total.dtype)
    for low in range(starts[k], starts[k + 1], tile):
        count = min(tile, starts[k + 1] - low)
        for p in range(count):
            row_in, row_out = rows_in[low + p], rows_out[low + p]
            for c in range(features.shape[1]):
                inputs[p, c] = features[row_in, c]
            for c in range(grad.shape[1]):
                grads[p, c] = grad[row_out, c]
        np.dot(grads[:count].T, inputs[:count], product)
        for o in range(product.shape[0]):
            for c in range(product.shape[1]):
                total[k, o, c] += product[o, c]


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
