"""SECOND's vehicle half: points -> voxels -> sparse 3D backbone, cut at stride 8.

    points ─ voxelize (mean of ≤ 5 points) ─ conv_input ─ conv1 ─ conv2 ↓2 ─ conv3 ↓4 ─ conv4 ↓8 ─ conv_out (z only) ─ CutFeatures

Layer table: OpenPCDet ``VoxelBackBone8x`` (pcdet/models/backbones_3d/spconv_backbone.py), 0.711 M parameters at reference width.
Module indices follow it, so that its weights load by name. PV-RCNN shares this half.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec, VoxelGrid
from ....core.errors import InvalidInput
from ....core.features import CutFeatures, SparseVoxels
from ....core.structures import PointCloud
from ....ops.sparse_conv import Rulebook, StridedConv3d, SubmanifoldConv3d, submanifold_rulebook
from ....ops.voxelize import voxelize
from .encoder import Encoder
from .norm import RowBatchNorm


@dataclass(frozen=True, kw_only=True)
class SecondEncoderConfig:
    """Everything that shapes the vehicle half. Covered by the encoder's fingerprint.

    grid: space and voxel size. point_features: used beside x, y, z, by name. channels: conv_input+conv1, conv2, conv3, conv4,
    conv_out.
    """

    grid: VoxelGrid
    point_features: tuple[str, ...] = ("intensity",)
    max_points_per_voxel: int = 5
    max_voxels: int = 40_000
    channels: tuple[int, int, int, int, int] = (16, 32, 64, 64, 128)

    def build(self) -> SecondEncoder:
        """Make the encoder with fresh weights, drawn from torch's global generator.

        Returns:
            The encoder, in training mode.
        """
        return SecondEncoder(self)


class ConvBlock(nn.Sequential):
    """Sparse convolution, batch norm, ReLU on the rows of a sparse tensor."""

    def __init__(self, conv: SubmanifoldConv3d | StridedConv3d, channels: int) -> None:
        super().__init__(conv, RowBatchNorm(channels, eps=1e-3, momentum=0.01), nn.ReLU())

    def forward(self, features: Tensor, rulebook: Rulebook) -> Tensor:  # type: ignore[override]
        """(M_in, in) -> (M_out, out)."""
        return self[2](self[1](self[0](features, rulebook)))

    def downsample(self, voxels: SparseVoxels) -> Rulebook:
        """The rulebook of a strided block for these voxels."""
        return cast(StridedConv3d, self[0]).rulebook(voxels.coords, voxels.shape, voxels.batch_size)


class SparseBackbone(nn.Module):
    """Twelve sparse convolutions from the voxel grid to stride 8. Every stage shares one submanifold rulebook."""

    def __init__(self, in_channels: int, channels: tuple[int, int, int, int, int]) -> None:
        super().__init__()
        c1, c2, c3, c4, c_out = channels
        self.conv_input = ConvBlock(SubmanifoldConv3d(in_channels, c1, (3, 3, 3)), c1)
        self.conv1 = nn.ModuleList([ConvBlock(SubmanifoldConv3d(c1, c1, (3, 3, 3)), c1)])
        self.conv2 = self._stage(c1, c2, padding=(1, 1, 1))
        self.conv3 = self._stage(c2, c3, padding=(1, 1, 1))
        self.conv4 = self._stage(c3, c4, padding=(0, 1, 1))
        self.conv_out = ConvBlock(StridedConv3d(c4, c_out, (3, 1, 1), stride=(2, 1, 1), padding=(0, 0, 0)), c_out)

    @staticmethod
    def _stage(c_in: int, c_out: int, padding: tuple[int, int, int]) -> nn.ModuleList:
        down = StridedConv3d(c_in, c_out, (3, 3, 3), stride=(2, 2, 2), padding=padding)
        same = [ConvBlock(SubmanifoldConv3d(c_out, c_out, (3, 3, 3)), c_out) for _ in range(2)]
        return nn.ModuleList([ConvBlock(down, c_out), *same])

    def stages(self, voxels: SparseVoxels) -> list[SparseVoxels]:
        """Outputs of conv1, conv2, conv3, conv4 and conv_out (strides 1, 2, 4, 8 and the cut)."""
        same = submanifold_rulebook(voxels.coords, voxels.shape, voxels.batch_size, (3, 3, 3))
        x = self.conv_input(voxels.features, same)
        x = self.conv1[0](x, same)
        outputs = [replace(voxels, features=x)]
        for stage in (self.conv2, self.conv3, self.conv4):
            first, *rest = cast(list[ConvBlock], list(stage))
            down = first.downsample(outputs[-1])
            x = first(x, down)
            same = submanifold_rulebook(down.out_coords, down.out_shape, voxels.batch_size, (3, 3, 3))
            for block in rest:
                x = block(x, same)
            outputs.append(replace(voxels, features=x, coords=down.out_coords, shape=down.out_shape))
        down = self.conv_out.downsample(outputs[-1])
        x = self.conv_out(x, down)
        outputs.append(replace(voxels, features=x, coords=down.out_coords, shape=down.out_shape))
        return outputs

    def forward(self, voxels: SparseVoxels) -> SparseVoxels:
        return self.stages(voxels)[-1]


def _strided_shape(shape: tuple[int, int, int]) -> tuple[int, int, int]:
    """The grid (z, y, x) after conv2, conv3, conv4 and conv_out."""

    def out(n: int, kernel: int, stride: int, padding: int) -> int:
        return (n + 2 * padding - kernel) // stride + 1

    z, y, x = shape
    for z_padding in (1, 1, 0):
        z, y, x = out(z, 3, 2, z_padding), out(y, 3, 2, 1), out(x, 3, 2, 1)
    return (out(z, 3, 2, 0), y, x)


class SecondEncoder(Encoder):
    """Points to features at the cut. ``spec`` says where the cut is; ``config`` is what was asked for."""

    config: SecondEncoderConfig
    openpcdet_parts: ClassVar[Mapping[str, str]] = {"sparse_backbone": "backbone_3d"}

    def __init__(self, config: SecondEncoderConfig) -> None:
        super().__init__()
        self.config = config
        z, y, x = config.grid.shape
        self.sparse_shape = (z + 1, y, x)  # the reference adds one layer on top, so that strided layers keep the last one
        if min(_strided_shape(self.sparse_shape)) < 1:
            raise InvalidInput(
                f"a grid of {(z, y, x)} voxels (z, y, x) is gone before the cut at stride (16, 8, 8); it needs at least 24 voxels in z "
                "and 1 in y and x: use smaller voxels or a larger range"
            )
        self.sparse_backbone = SparseBackbone(3 + len(config.point_features), config.channels)
        self.spec = CutSpec(
            layer="sparse_backbone.conv_out",
            channels=config.channels[-1],
            stride=(16, 8, 8),
            shape=_strided_shape(self.sparse_shape),
            grid=config.grid,
        )

    def voxelize(self, points: Sequence[PointCloud]) -> SparseVoxels:
        """Mean features of the voxels of each cloud, (M, 3 + C), on the device of the first cloud."""
        if not points:
            raise InvalidInput("encoding needs at least one point cloud; found none")
        features, coords = [], []
        for batch, cloud in enumerate(points):
            voxels = voxelize(
                self.columns(cloud),
                point_range=self.config.grid.range,
                voxel_size=self.config.grid.voxel_size,
                max_points=self.config.max_points_per_voxel,
                max_voxels=self.config.max_voxels,
            )
            features.append(voxels.features)
            coords.append(nn.functional.pad(voxels.coords, (1, 0), value=batch))
        return SparseVoxels(
            features=torch.cat(features), coords=torch.cat(coords), shape=self.sparse_shape, batch_size=len(points)
        )

    def columns(self, cloud: PointCloud) -> Tensor:
        """(N, 3 + C) x, y, z and the point features that the encoder reads."""
        missing = [n for n in self.config.point_features if n not in cloud.feature_names]
        if missing:
            raise InvalidInput(
                f"the encoder needs point features {self.config.point_features}, the cloud has {cloud.feature_names}: "
                f"{missing} missing; read the scans with these columns or use an encoder without them"
            )
        index = [cloud.feature_names.index(n) for n in self.config.point_features]
        return torch.cat([cloud.xyz, cloud.features[:, index]], 1)

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Features at the cut of scans with their input voxels (``voxelize``); the points themselves are not looked at again."""
        return CutFeatures(voxels=self.sparse_backbone(voxels), spec=self.spec)
