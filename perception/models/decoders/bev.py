"""From the cut to dense predictions: height compression, the 2D backbone, the anchor head and its losses.

Shared by SECOND-IoU (`second_iou.py`) and PV-RCNN (`pv_rcnn.py`). Sources: OpenPCDet `height_compression.py`,
`base_bev_backbone.py`, `anchor_head_single.py`; module indices follow them, so that weights load by name.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import require_counts, require_numbers
from ....core.features import SparseVoxels
from ....core.structures import Labels, LossTerms
from ..anchors import AnchorClass
from ..losses import box_code_loss, sigmoid_focal_loss
from ..targets import DIRECTION_OFFSET, assign_anchors


def height_compression(voxels: SparseVoxels) -> Tensor:
    """Lay sparse voxels out as a BEV map, the cells of one column becoming its channels.

    Args:
        voxels: sparse voxels of B scenes, C channels, on a grid of Z x Y x X cells.

    Returns:
        (B, C * Z, Y, X) map; channel c of cell z is channel c * Z + z. Empty cells are 0.
    """
    return voxels.dense().flatten(1, 2)


@dataclass(frozen=True, kw_only=True)
class BevBackboneConfig:
    """Size of the 2D backbone: two blocks of convolutions, at strides 1 and 2 of the cut."""

    layers: tuple[int, int] = (5, 5)
    """Convolutions of each block after its first one."""
    channels: tuple[int, int] = (128, 256)
    """Channels of each block. Most of a decoder's parameters and time are here."""
    up_channels: tuple[int, int] = (256, 256)
    """Channels of each block after up-sampling to stride 1; their sum goes to the heads."""

    def __post_init__(self) -> None:
        require_counts("BevBackboneConfig", least=0, most=1000, layers=self.layers)
        require_counts("BevBackboneConfig", channels=self.channels, up_channels=self.up_channels)


class UpConv2d(nn.ConvTranspose2d):
    """A transposed convolution. At stride 1 with a kernel of 1 x 1 it is an ordinary one, for which torch has faster code."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Convolve.

        Args:
            input: (B, C_in, H, W) map.
            output_size: as for `nn.ConvTranspose2d`.

        Returns:
            (B, C_out, H * stride, W * stride) map.
        """
        if output_size is not None or self.kernel_size != (1, 1) or self.stride != (1, 1):
            return super().forward(input, output_size)
        return F.conv2d(input, self.weight.transpose(0, 1), self.bias)


class CellConv2d(nn.Conv2d):
    """A convolution of 1 x 1, computed as a product over cells: with few output channels torch's own is slow, above all backward."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, input: Tensor) -> Tensor:
        """Convolve.

        Args:
            input: (B, C_in, H, W) map.

        Returns:
            (B, C_out, H, W) map, whose channels lie side by side in memory.
        """
        return F.linear(input.permute(0, 2, 3, 1), self.weight[:, :, 0, 0], self.bias).permute(0, 3, 1, 2)


class BevBackbone(nn.Module):
    """Two blocks of 2D convolutions, up-sampled to the size of the map and joined."""

    def __init__(self, in_channels: int, config: BevBackboneConfig) -> None:
        """Make the layers with fresh weights.

        Args:
            in_channels: channels of the map.
            config: sizes.
        """
        super().__init__()
        self.out_channels = sum(config.up_channels)
        self.blocks, self.deblocks = nn.ModuleList(), nn.ModuleList()
        for stride, n, c, up in zip((1, 2), config.layers, config.channels, config.up_channels, strict=True):
            modules: list[nn.Module] = [nn.ZeroPad2d(1), nn.Conv2d(in_channels, c, 3, stride=stride, bias=False), *_norm(c)]
            for _ in range(n):
                modules += [nn.Conv2d(c, c, 3, padding=1, bias=False), *_norm(c)]
            self.blocks.append(nn.Sequential(*modules))
            self.deblocks.append(nn.Sequential(UpConv2d(c, up, stride, stride=stride, bias=False), *_norm(up)))
            in_channels = c

    def forward(self, bev: Tensor) -> Tensor:
        """Compute the features that the heads read.

        Args:
            bev: (B, in_channels, H, W) map.

        Returns:
            (B, out_channels, H, W) map.
        """
        height, width = bev.shape[-2:]
        if bev.device.type == "cpu" and not torch.is_grad_enabled():
            bev = bev.contiguous(memory_format=torch.channels_last)  # the faster order here, but the slower one with gradients
        ups = []
        for block, deblock in zip(self.blocks, self.deblocks, strict=True):
            bev = block(bev)
            ups.append(deblock(bev)[..., :height, :width])  # an odd map grows by one when halved and doubled
        return torch.cat(ups, 1)


def _norm(channels: int) -> list[nn.Module]:
    return [nn.BatchNorm2d(channels, eps=1e-3, momentum=0.01), nn.ReLU()]


class DenseOutputs(NamedTuple):
    """Outputs of the anchor head for every anchor, flat in (row, column, anchor) order."""

    class_logits: Tensor
    """(B, A, C) logits, one per class."""
    box_codes: Tensor
    """(B, A, 7) residuals from the anchor to the box."""
    direction_logits: Tensor
    """(B, A, 2) logits of the two half turns."""


class AnchorHead(nn.Module):
    """Three 1 x 1 convolutions: class, box and direction of two anchors per class and cell."""

    def __init__(self, in_channels: int, num_classes: int) -> None:
        """Make the layers with fresh weights.

        Args:
            in_channels: channels of the map.
            num_classes: number of classes.
        """
        super().__init__()
        self.num_classes = num_classes
        anchors = 2 * num_classes
        self.conv_cls = CellConv2d(in_channels, anchors * num_classes)
        self.conv_box = CellConv2d(in_channels, anchors * 7)
        self.conv_dir_cls = CellConv2d(in_channels, anchors * 2)
        # Objects are rare: with the focal loss, training starts from a probability of 1 % everywhere (Lin et al., section 3.3).
        nn.init.constant_(cast(Tensor, self.conv_cls.bias), -math.log((1 - 0.01) / 0.01))
        nn.init.normal_(self.conv_box.weight, std=0.001)

    def forward(self, bev: Tensor) -> DenseOutputs:
        """Classify and move every anchor.

        Args:
            bev: (B, in_channels, H, W) map.

        Returns:
            Outputs of the A = H * W * 2 * num_classes anchors.
        """

        def flat(x: Tensor, width: int) -> Tensor:
            return x.permute(0, 2, 3, 1).reshape(x.shape[0], -1, width)

        return DenseOutputs(
            class_logits=flat(self.conv_cls(bev), self.num_classes),
            box_codes=flat(self.conv_box(bev), 7),
            direction_logits=flat(self.conv_dir_cls(bev), 2),
        )


@dataclass(frozen=True, kw_only=True)
class DenseLossWeights:
    """Weights of the anchor head's losses. Defaults are OpenPCDet's; that of the class loss is 1."""

    box: float = 2.0
    """Weight of the box loss."""
    direction: float = 0.2
    """Weight of the direction loss."""

    def __post_init__(self) -> None:
        require_numbers("DenseLossWeights", least=0, most=1e6, box=self.box, direction=self.direction)


def dense_loss(
    dense: DenseOutputs,
    anchors: Tensor,
    classes: tuple[AnchorClass, ...],
    labels: Sequence[Labels],
    weights: DenseLossWeights,
    direction_offset: float = DIRECTION_OFFSET,
) -> LossTerms:
    """Compute the losses of the anchor head: per scene divided by its number of positive anchors, then averaged over scenes.

    Args:
        dense: outputs of the anchor head for a batch.
        anchors: (H, W, 2 * classes, 7) what `make_anchors` returned.
        classes: the anchor of each class.
        labels: one per scene.
        weights: weights of the losses.
        direction_offset: where the first half turn begins, in radians.

    Returns:
        Terms `class`, `box` and `direction`.
    """
    batch, total = len(labels), anchors.view(-1, 7).shape[0]
    num_classes = len(classes)
    anchor_class = torch.arange(2 * num_classes, device=anchors.device).div(2, rounding_mode="floor")
    one_hot = F.one_hot(anchor_class, num_classes).float().repeat(total // (2 * num_classes), 1)  # (A, C)
    cls, box, direction = [], [], []
    for b, scene in enumerate(labels):
        targets = assign_anchors(anchors, classes, scene, direction_offset)
        positives = targets.positive.sum().clamp_min(1)
        focal = sigmoid_focal_loss(dense.class_logits[b], one_hot * targets.positive[:, None])
        cls.append((focal.sum(1) * targets.class_weight).sum() / positives)
        rows = targets.positive.nonzero().squeeze(1)
        off = box_code_loss(dense.box_codes[b, rows], targets.box_codes[rows])
        box.append((targets.box_weight[rows] * off).sum() / positives)
        turn = F.cross_entropy(dense.direction_logits[b, rows].float(), targets.direction[rows], reduction="sum")
        direction.append(turn / positives)
    return LossTerms(
        terms={
            "class": torch.stack(cls).sum() / batch,
            "box": weights.box * torch.stack(box).sum() / batch,
            "direction": weights.direction * torch.stack(direction).sum() / batch,
        }
    )
