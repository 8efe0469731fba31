"""SECOND's vehicle half: points -> voxels -> sparse 3D backbone, cut at stride 8.

    points ─ voxelize (mean of ≤ 5 points) ─ conv_input ─ conv1 ─ conv2 ↓2 ─ conv3 ↓4 ─ conv4 ↓8 ─ conv_out (z only) ─ CutFeatures

Layer table: OpenPCDet `VoxelBackBone8x` (pcdet/models/backbones_3d/spconv_backbone.py), 0.711 M parameters at reference width.
Module indices follow it, so that its weights load by name. PV-RCNN (`pv_rcnn.py`) builds on this half; `ops/sparse_conv.py` has the
convolutions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec, VoxelGrid
from ....core.errors import InvalidInput, require_counts
from ....core.features import CutFeatures, SparseVoxels
from ....core.structures import PointCloud
from ....ops.sparse_conv import Rulebook, StridedConv3d, SubmanifoldConv3d, submanifold_rulebook
from ....ops.voxelize import voxelize
from .encoder import Encoder
from .norm import RowBatchNorm


@dataclass(frozen=True, kw_only=True)
class SecondEncoderConfig:
    """Everything that shapes the vehicle half. The encoder's fingerprint covers all of it, names included."""

    grid: VoxelGrid
    """Range and voxel size of the input. Points outside the range are dropped."""
    point_features: tuple[str, ...] = ("intensity",)
    """Names of the point features that are read besides x, y, z. Empty if source and target domain measure them differently."""
    max_points_per_voxel: int = 5
    """Points of a voxel that are averaged: the first ones in the order of the scan."""
    max_voxels: int = 40_000
    """Maximum number of voxels per scan. A scan with more loses some of them in every direction alike, and the loss is counted. Raise it
    for a larger range, or for scans of a full turn."""
    channels: tuple[int, int, int, int, int] = (16, 32, 64, 64, 128)
    """Channels of conv_input and conv1, conv2, conv3, conv4, and conv_out. The last is the number of values per cell that leaves
    the vehicle."""

    def __post_init__(self) -> None:
        require_counts("SecondEncoderConfig", channels=self.channels)
        require_counts(
            "SecondEncoderConfig", most=2**31 - 1, max_points_per_voxel=self.max_points_per_voxel, max_voxels=self.max_voxels
        )

    def build(self) -> SecondEncoder:
        """Make the encoder with fresh weights, drawn from torch's global generator.

        Returns:
            The encoder, in training mode.
        """
        return SecondEncoder(self)


class ConvBlock(nn.Sequential):
    """Sparse convolution, batch norm, ReLU on the rows of a sparse tensor."""

    def __init__(self, conv: SubmanifoldConv3d | StridedConv3d, channels: int) -> None:
        super().__init__(conv, RowBatchNorm(channels, eps=1e-3, momentum=0.01), nn.ReLU(inplace=True))

    def forward(self, features: Tensor, rulebook: Rulebook) -> Tensor:  # type: ignore[override]
        """Apply the three layers.

        Args:
            features: (M_in, C_in) features of the input cells.
            rulebook: which input cells reach which output cells.

        Returns:
            (M_out, C_out) features of the output cells.
        """
        return self[2](self[1](self[0](features, rulebook)))

    def downsample(self, voxels: SparseVoxels) -> Rulebook:
        """Make the rulebook of a strided block.

        Args:
            voxels: the input cells.

        Returns:
            The rulebook, with the coordinates and the grid of the output cells.
        """
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
        """Compute the outputs of all stages.

        Args:
            voxels: input voxels with their features.

        Returns:
            Voxels after conv1, conv2, conv3, conv4 and conv_out: strides 1, 2, 4, 8 and the cut.
        """
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
        """Compute the features at the cut.

        Args:
            voxels: input voxels with their features.

        Returns:
            Voxels after conv_out.
        """
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
    """Points to the sparse features at the cut. Never rename this class or its modules: fingerprints and files hold the names."""

    config: SecondEncoderConfig
    """The configuration that built this encoder."""
    openpcdet_parts: ClassVar[Mapping[str, str]] = {"sparse_backbone": "backbone_3d"}
    """The only submodule, with its name in OpenPCDet's weights."""

    def __init__(self, config: SecondEncoderConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            config: sizes and settings.

        Raises:
            InvalidInput: The grid is so small that no cell is left at the cut.
        """
        super().__init__()
        self.config = config
        z, y, x = config.grid.shape
        self.sparse_shape = (z + 1, y, x)  # OpenPCDet adds one layer on top, so that strided layers keep the last one
        if min(_strided_shape(self.sparse_shape)) < 1:
            raise InvalidInput(
                f"a grid of {(z, y, x)} voxels (z, y, x) has no cell at the cut with its stride of (16, 8, 8); it needs at least 24 "
                "voxels in z and 1 in y and x: use smaller voxels or a larger range"
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
        """Average the points of each voxel.

        Args:
            points: one scan per scene, in the shifted frame.

        Returns:
            Occupied voxels with (M, 3 + C) mean x, y, z and point features, in the order in which points reach them, and the counts of
            each scan.

        Raises:
            InvalidInput: There is no scan, or a scan lacks point features that the encoder reads.
        """
        if not points:
            raise InvalidInput("encoding needs at least one point cloud and found none; pass one scan per scene")
        features, coords, counts = [], [], []
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
            counts.append(voxels.counts)
        return SparseVoxels(
            features=torch.cat(features),
            coords=torch.cat(coords),
            shape=self.sparse_shape,
            batch_size=len(points),
            counts=tuple(counts),
        )

    def columns(self, cloud: PointCloud) -> Tensor:
        """Pick the values of each point that the encoder reads.

        Args:
            cloud: a scan.

        Returns:
            (N, 3 + C) x, y, z and the point features, in the order of `config.point_features`.

        Raises:
            InvalidInput: The scan lacks some of them.
        """
        missing = [n for n in self.config.point_features if n not in cloud.feature_names]
        if missing:
            raise InvalidInput(
                f"the encoder reads the point features {self.config.point_features}, and the scan has {cloud.feature_names}: "
                f"{', '.join(missing)} missing; read the scans with these columns or use an encoder without them"
            )
        index = [cloud.feature_names.index(n) for n in self.config.point_features]
        return torch.cat([cloud.xyz, cloud.features[:, index]], 1)

    def features(self, points: Sequence[PointCloud], voxels: SparseVoxels) -> CutFeatures:
        """Run the sparse backbone.

        Args:
            points: not looked at again.
            voxels: what `voxelize` returned.

        Returns:
            Features at the cut.
        """
        return CutFeatures(voxels=self.sparse_backbone(voxels), spec=self.spec)
