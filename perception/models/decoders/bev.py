"""From the cut to dense predictions: height compression, the 2D backbone and the anchor head.

Shared by SECOND, SECOND-IoU and PV-RCNN. Sources: OpenPCDet ``height_compression.py``, ``base_bev_backbone.py``,
``anchor_head_single.py``; module indices follow them, so that weights load by name.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ...features import SparseVoxels


def height_compression(voxels: SparseVoxels) -> Tensor:
    """(B, C * Z, Y, X) bird's-eye-view map of sparse voxels; channel = c * Z + z."""
    return voxels.dense().flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class BevBackboneConfig:
    """Two blocks at strides 1 and 2 of the cut: convolutions after the first one, channels, and channels after up-sampling."""

    layers: tuple[int, int] = (5, 5)
    channels: tuple[int, int] = (128, 256)
    up_channels: tuple[int, int] = (256, 256)


class BevBackbone(nn.Module):
    """(B, C, H, W) -> (B, sum(up_channels), H, W)."""

    def __init__(self, in_channels: int, config: BevBackboneConfig) -> None:
        super().__init__()
        self.out_channels = sum(config.up_channels)
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        for stride, n, c, up in zip((1, 2), config.layers, config.channels, config.up_channels, strict=True):
            modules: list[nn.Module] = [nn.ZeroPad2d(1), nn.Conv2d(in_channels, c, 3, stride=stride, bias=False), *_norm(c)]
            for _ in range(n):
                modules += [nn.Conv2d(c, c, 3, padding=1, bias=False), *_norm(c)]
            self.blocks.append(nn.Sequential(*modules))
            self.deblocks.append(nn.Sequential(nn.ConvTranspose2d(c, up, stride, stride=stride, bias=False), *_norm(up)))
            in_channels = c

    def forward(self, bev: Tensor) -> Tensor:
        height, width = bev.shape[-2:]
        ups = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            bev = block(bev)
            ups.append(deblock(bev)[..., :height, :width])  # an odd map grows by one when halved and doubled
        return torch.cat(ups, 1)


def _norm(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01), nn.ReLU()]


class DenseOutputs(NamedTuple):
    """Per anchor, flat in (row, column, anchor) order: class logits (B, A, C), box codes (B, A, 7), direction logits (B, A, 2)."""

    class_logits: Tensor
    box_codes: Tensor
    direction_logits: Tensor


class AnchorHead(nn.Module):
    """Three 1 x 1 convolutions: class, box and direction of two anchors per class and cell."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        anchors = 2 * num_classes
        self.conv_cls = nn.Conv2d(in_channels, anchors * num_classes, 1)
        self.conv_box = nn.Conv2d(in_channels, anchors * 7, 1)
        self.conv_dir_cls = nn.Conv2d(in_channels, anchors * 2, 1)
        assert self.conv_cls.bias is not None
        nn.init.constant_(self.conv_cls.bias, -math.log((1 - 0.01) / 0.01))  # focal loss: start from "rare"
        nn.init.normal_(self.conv_box.weight, std=0.001)

    def forward(self, bev: Tensor) -> DenseOutputs:
        def flat(x: Tensor, width: int) -> Tensor:
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)

        return DenseOutputs(
            class_logits=flat(self.conv_cls(bev), self.num_classes),
            box_codes=flat(self.conv_box(bev), 7),
            direction_logits=flat(self.conv_dir_cls(bev), 2),
        )
