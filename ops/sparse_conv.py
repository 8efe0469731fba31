"""Sparse 3D convolution over occupied voxels: gather, multiply, scatter along a rulebook.

    out[o] = sum over kernel offsets k and pairs (i, o) of k: weight[:, k] @ features[i]

This is cross-correlation, as torch's `conv3d` and spconv compute it, evaluated at occupied sites only. The weight has spconv's
layout (out, kz, ky, kx, in), so that weights of OpenPCDet load by name.

The CPU implementation cuts the output rows into short ranges, which stay in the inner caches. For a range it walks the kernel offsets,
multiplies a few input rows at a time where they lie, and adds the products to the output rows; no row is copied. Ranges do not depend on
the number of threads, hence neither does any bit of the result. Read next: `cpu/sparse_conv.py`, the kernels.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ..core.compiled import compiles
from ..core.errors import InvalidInput
from ..core.tensor_value import shape_of
from .cpu.row_products import padded_width
from .cpu.sparse_conv import ROWS_PER_TASK, convolve_range, weight_gradient
from .dispatch import dispatch
from .rulebook import ZYX, Rulebook, strided_rulebook, submanifold_rulebook
from .spconv_backend import sparse_conv_spconv, spconv_runs_on_cuda
from .threads import in_threads


def sparse_conv(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """Convolve features at occupied sites. It is differentiable once in `features` and `weight`.

    On the CPU in float32 and float64 it runs the compiled kernels; on CUDA in float32 and float16 spconv's kernels, where its CUDA
    build is installed; everything else runs `sparse_conv_reference`.

    Args:
        features: (num_in, in) rows in the order of the coordinates that the rulebook was built from.
        weight: (out, kz, ky, kx, in), same type and device.
        rulebook: From `submanifold_rulebook` or `strided_rulebook`, on the same device.

    Returns:
        (num_out, out), rows in the order of `rulebook.out_coords`.

    Raises:
        InvalidInput: Sizes, types or devices that do not fit together.
    """
    _check(features, weight, rulebook)
    on_cpu = features.dtype in (torch.float32, torch.float64) and compiles()  # the kernels are no plain Python
    on_cuda = features.device.type == "cuda" and features.dtype in (torch.float32, torch.float16) and spconv_runs_on_cuda()
    convolve = dispatch(
        (features, weight, rulebook.pairs_in),
        sparse_conv_reference,
        cpu=_SparseConv.apply if on_cpu else None,
        cuda=sparse_conv_spconv if on_cuda else None,
    )
    out: Tensor = convolve(features, weight, rulebook)
    return out


def sparse_conv_reference(features: Tensor, weight: Tensor, rulebook: Rulebook) -> Tensor:
    """Compute `sparse_conv` with plain torch operators, on any device, differentiated by autograd.

    Args:
        features: (num_in, in) rows.
        weight: (out, kz, ky, kx, in).
        rulebook: The pairs.

    Returns:
        (num_out, out) rows.
    """
    _check(features, weight, rulebook)
    out = features.new_zeros(rulebook.num_out, weight.shape[0])
    for k, matrix in enumerate(weight.flatten(1, 3).unbind(1)):  # (out, in) of one kernel offset
        pairs = slice(rulebook.starts[k], rulebook.starts[k + 1])
        products = features.index_select(0, rulebook.pairs_in[pairs]) @ matrix.t()
        out = out.index_add(0, rulebook.pairs_out[pairs], products)
    return out


class SubmanifoldConv3d(nn.Module):
    """Convolution whose output sites are its input sites (spconv's `SubMConv3d` without bias); its kernel is odd and centered."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: ZYX = (3, 3, 3)) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.weight = _initial_weight(in_channels, out_channels, kernel_size)

    def rulebook(self, coords: Tensor, shape: ZYX, batch_size: int) -> Rulebook:
        """Build the rulebook of this layer. Layers of equal kernel size on the same sites share one.

        Args:
            coords: (M, 4) int32 batch, z, y, x.
            shape: Grid cells along z, y, x.
            batch_size: Number of scenes.

        Returns:
            The rulebook for `forward`.
        """
        return submanifold_rulebook(coords, shape, batch_size, self.kernel_size)

    def forward(self, features: Tensor, rulebook: Rulebook) -> Tensor:
        """Convolve features.

        Args:
            features: (M, in) rows in the order of the rulebook's coordinates.
            rulebook: From `rulebook`.

        Returns:
            (M, out) rows.
        """
        return sparse_conv(features, self.weight, rulebook)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        return f"{self.weight.shape[-1]}, {self.weight.shape[0]}, kernel_size={self.kernel_size}"


class StridedConv3d(nn.Module):
    """Convolution with an output site wherever its window holds an input site (spconv's `SparseConv3d` without bias)."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: ZYX = (3, 3, 3),
        stride: ZYX = (2, 2, 2),
        padding: ZYX = (1, 1, 1),
    ) -> None:
        super().__init__()
        self.kernel_size, self.stride, self.padding = kernel_size, stride, padding
        self.weight = _initial_weight(in_channels, out_channels, kernel_size)

    def rulebook(self, coords: Tensor, shape: ZYX, batch_size: int) -> Rulebook:
        """Build the rulebook of this layer.

        Args:
            coords: (M, 4) int32 batch, z, y, x.
            shape: Grid cells along z, y, x.
            batch_size: Number of scenes.

        Returns:
            The rulebook for `forward`.
        """
        return strided_rulebook(coords, shape, batch_size, self.kernel_size, self.stride, self.padding)

    def forward(self, features: Tensor, rulebook: Rulebook) -> Tensor:
        """Convolve features.

        Args:
            features: (M_in, in) rows in the order of the rulebook's coordinates.
            rulebook: From `rulebook`.

        Returns:
            (M_out, out) rows.
        """
        return sparse_conv(features, self.weight, rulebook)

    def extra_repr(self) -> str:
        """Sizes, for `repr`."""
        sizes = f"{self.weight.shape[-1]}, {self.weight.shape[0]}, kernel_size={self.kernel_size}"
        return f"{sizes}, stride={self.stride}, padding={self.padding}"


def _initial_weight(in_channels: int, out_channels: int, kernel_size: ZYX) -> nn.Parameter:
    """Uniform in +-1 / sqrt(fan_in), fan_in = kz * ky * kx * in: the initialization of torch's and spconv's convolutions."""
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
            grad = _padded(grad)
            total = weight.new_zeros(len(rulebook.starts) - 1, weight.shape[4], grad.shape[1])  # (K, in, out)
            arrays = (features, grad, rulebook.pairs_in, rulebook.pairs_out)
            in_threads(weight_gradient, len(total), *(t.numpy() for t in arrays), np.array(rulebook.starts), total.numpy())
            grad_weight = total[..., : len(weight)].permute(2, 0, 1).reshape(weight.shape)
        return grad_features, grad_weight, None


def _convolve(
    source: Tensor, matrices: Tensor, rows_from: Tensor, rows_to: Tensor, starts: tuple[int, ...], num_rows: int
) -> Tensor:
    """(num_rows, C_to): per offset k, `source[rows_from] @ matrices[k]` added to `rows_to`, which ascend within an offset."""
    width, matrices = matrices.shape[2], _padded(matrices)
    out = source.new_zeros(num_rows, matrices.shape[2])
    arrays = (t.numpy() for t in (source, matrices, rows_from, rows_to))
    in_threads(convolve_range, -(-num_rows // ROWS_PER_TASK), *arrays, np.array(starts), out.numpy())
    return out[:, :width].contiguous()


def _padded(matrix: Tensor) -> Tensor:
    """The matrix with columns of zeros, so that its rows fill registers."""
    missing = padded_width(matrix.shape[-1], matrix.element_size()) - matrix.shape[-1]
    return F.pad(matrix, (0, missing)) if missing else matrix


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


def _check(features: Tensor, weight: Tensor, rulebook: Rulebook) -> None:
    if weight.dim() != 5 or tuple(weight.shape[1:4]) != rulebook.kernel_size:
        raise InvalidInput(
            f"sparse_conv: weight must be (out, *{rulebook.kernel_size}, in) for this rulebook, found {shape_of(weight)}"
        )
    if features.dim() != 2 or features.shape != (rulebook.num_in, weight.shape[4]):
        raise InvalidInput(
            f"sparse_conv: features must be ({rulebook.num_in}, {weight.shape[4]}) for this rulebook and weight, "
            f"found {shape_of(features)}"
        )
    if features.dtype != weight.dtype:
        raise InvalidInput(f"sparse_conv: features are {features.dtype} and weight is {weight.dtype}; convert one of them")
