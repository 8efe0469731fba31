"""The sparse backbone in plain torch operators, so that `torch.export` can follow it: no compiled kernel, no list whose length depends on data.

It has the weights of a `SparseBackbone` and computes the same, up to the order of float32 sums. Sites are found by their numbers in the grid:
sorted once per stage, then looked up by binary search. Products are taken plane by plane of the kernel, over all offsets of a plane, so
absent neighbors cost time: this form is for other runtimes, and `ops/sparse_conv.py` is the one that runs here.

Read next: `vehicle_package.py`, which compiles it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn

from ...ops.rulebook import ZYX
from ...ops.sparse_conv import StridedConv3d, SubmanifoldConv3d
from ..models.encoders.norm import RowBatchNorm
from ..models.encoders.second import ConvBlock, SparseBackbone


class PlainBackbone(nn.Module):
    """A `SparseBackbone` for one scene, in operators that every runtime has. Make it of a backbone in evaluation mode."""

    def __init__(self, backbone: SparseBackbone, shape: ZYX, *, every_stage: bool) -> None:
        """Take over the layers; they are shared, not copied.

        Args:
            backbone: The backbone, in evaluation mode.
            shape: Cells of the input grid along z, y, x.
            every_stage: Whether `forward` gives the outputs of all stages, which PV-RCNN's keypoints read, or only those at the cut.
        """
        super().__init__()
        first = _blocks(backbone.conv_input, backbone.conv1[0])
        stages = [first, *(_blocks(*stage) for stage in (backbone.conv2, backbone.conv3, backbone.conv4))]
        stages.append(_blocks(backbone.conv_out))
        self.stages = nn.ModuleList(_Stage(blocks, strided=place > 0) for place, blocks in enumerate(stages))
        self.shape, self.every_stage = shape, every_stage

    def forward(self, features: Tensor, coords: Tensor) -> tuple[Tensor, ...]:
        """Compute the features of every stage.

        Args:
            features: (M, C) means of the points of each voxel.
            coords: (M, 3) int64 cells z, y, x, unique, in any order.

        Returns:
            Coordinates (M', 3) int64, ascending in z, y, x, and features (M', C') of the cut; or those of conv1, conv2, conv3, conv4 and the cut
            one after another.
        """
        shape = self.shape
        keys, order = torch.sort(_keys(coords, shape))
        coords, x = coords[order], features[order]
        found: list[Tensor] = []
        for stage in self.stages:
            x, coords, keys, shape = cast(_Stage, stage)(x, coords, keys, shape)
            found += [coords, x]
        return tuple(found) if self.every_stage else tuple(found[-2:])


class _Stage(nn.Module):
    """Blocks of one resolution; the first one is strided in every stage but the first."""

    def __init__(self, blocks: Sequence[ConvBlock], *, strided: bool) -> None:
        super().__init__()
        self.blocks, self.strided = nn.ModuleList(blocks), strided

    def forward(self, x: Tensor, coords: Tensor, keys: Tensor, shape: ZYX) -> tuple[Tensor, Tensor, Tensor, ZYX]:
        blocks = [cast(ConvBlock, block) for block in self.blocks]
        if self.strided:
            first, *blocks = blocks
            conv = cast(StridedConv3d, first[0])
            out_shape = cast(
                ZYX, tuple((n + 2 * p - k) // s + 1 for n, p, k, s in zip(shape, conv.padding, conv.kernel_size, conv.stride))
            )
            out_coords, out_keys = _reached(coords, conv, out_shape)
            x = _block(first, x, _neighbors(keys, shape, out_coords, conv.kernel_size, conv.stride, conv.padding))
            coords, keys, shape = out_coords, out_keys, out_shape
        if blocks:
            kernel = cast(SubmanifoldConv3d, blocks[0][0]).kernel_size
            same = _neighbors(keys, shape, coords, kernel, (1, 1, 1), cast(ZYX, tuple(k // 2 for k in kernel)))
            for block in blocks:
                x = _block(block, x, same)
        return x, coords, keys, shape


def _blocks(*blocks: nn.Module) -> list[ConvBlock]:
    return [cast(ConvBlock, block) for block in blocks]


def _block(block: ConvBlock, x: Tensor, rows: Tensor) -> Tensor:
    """Convolution, batch norm, ReLU. `rows` (M', K) names the input row of each offset; the number of rows means that there is none."""
    weight = cast(Tensor, block[0].weight)
    out_channels, planes, height, width, in_channels = weight.shape
    padded = torch.cat([x, x.new_zeros(1, in_channels)])
    matrices = weight.permute(1, 2, 3, 4, 0).reshape(planes, height * width * in_channels, out_channels)
    by_plane = rows.reshape(-1, planes, height * width)
    total = padded[by_plane[:, 0]].flatten(1) @ matrices[0]
    for plane in range(1, planes):
        total = total + padded[by_plane[:, plane]].flatten(1) @ matrices[plane]
    norm = cast(RowBatchNorm, block[1])  # written out, because its own test for empty rows cannot be followed
    mean, variance = cast(Tensor, norm.running_mean), cast(Tensor, norm.running_var)
    scale = norm.weight / torch.sqrt(variance + norm.eps)
    return torch.relu(total * scale + (norm.bias - mean * scale))


def _keys(coords: Tensor, shape: ZYX) -> Tensor:
    """The number of each cell in its grid."""
    return (coords[..., 0] * shape[1] + coords[..., 1]) * shape[2] + coords[..., 2]


def _offsets(kernel: ZYX, like: Tensor) -> Tensor:
    """(K, 3) offsets kz, ky, kx in C order."""
    return torch.cartesian_prod(*(torch.arange(size, device=like.device) for size in kernel)).reshape(-1, 3)


def _inside(coords: Tensor, shape: ZYX) -> Tensor:
    limits = torch.tensor(shape, device=coords.device)
    return ((coords >= 0) & (coords < limits)).all(-1)


def _neighbors(keys: Tensor, shape: ZYX, out_coords: Tensor, kernel: ZYX, stride: ZYX, padding: ZYX) -> Tensor:
    """(M', K) input row under each kernel offset of each output site; the number of input rows where there is none."""
    step, pad = (torch.tensor(values, device=keys.device) for values in (stride, padding))
    sites = out_coords[:, None] * step - pad + _offsets(kernel, keys)
    wanted = torch.where(_inside(sites, shape), _keys(sites, shape), -1)
    place = torch.searchsorted(keys, wanted)
    count = keys.shape[0]
    place = place.clamp(max=count - 1)
    return torch.where(keys[place] == wanted, place, count)


def _reached(coords: Tensor, conv: StridedConv3d, out_shape: ZYX) -> tuple[Tensor, Tensor]:
    """Sites and numbers of the output cells whose window holds an input voxel, ascending."""
    step, pad = (torch.tensor(values, device=coords.device) for values in (conv.stride, conv.padding))
    moved = coords[:, None] + pad - _offsets(conv.kernel_size, coords)
    sites = torch.div(moved, step, rounding_mode="floor")
    meets = (sites * step == moved).all(-1) & _inside(sites, out_shape)
    nowhere = out_shape[0] * out_shape[1] * out_shape[2]
    candidates = torch.sort(torch.where(meets, _keys(sites, out_shape), nowhere).flatten()).values
    new = torch.cat([candidates.new_ones(1, dtype=torch.bool), candidates[1:] != candidates[:-1]])
    keys = torch.masked_select(candidates, new & (candidates < nowhere))
    area = out_shape[1] * out_shape[2]
    return torch.stack([keys // area, keys // out_shape[2] % out_shape[1], keys % out_shape[2]], 1), keys
