"""A mixture of whole BEV blocks: each scene passes the blocks of the experts that were chosen for it.

A convolution of 3 x 3 cells is no map of single tokens, so a cell cannot choose an expert, but a scene can. Read next: `mixture.py`.
"""

from __future__ import annotations

import copy
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InvalidInput
from ...moe.layers.routers import Router
from ...moe.layers.routing import Routing
from ...moe.layers.usage import UsageCounter, in_backward

BatchNormOfExperts = Literal["fold", "share"]
"""What happens to batch norms of experts. `fold`: each expert takes its own into its weights, and they do not follow the data any more.
`share`: all experts have one common batch norm, which learns on and can be measured again."""


class SceneBlockMixture(nn.Module):
    """Takes the place of one block of `BevBackbone`: (S, C, H, W) in, (S, C', H', W') out."""

    def __init__(self, block: nn.Sequential, router: Router, *, batch_norm: BatchNormOfExperts) -> None:
        """Make experts of the shape of a block, with fresh weights.

        Args:
            block: A block of `BevBackbone`: padding, then convolutions, each with batch norm and ReLU.
            router: Decides for each scene.
            batch_norm: What happens to the batch norms.

        Raises:
            InvalidInput: The block has other layers.
        """
        super().__init__()
        kinds = (nn.Conv2d, nn.BatchNorm2d, nn.ReLU)
        layers = list(block)[1:]
        if not layers or any(not isinstance(layer, kinds[i % 3]) for i, layer in enumerate(layers)) or len(layers) % 3:
            raise InvalidInput(f"a mixture of blocks needs convolutions with batch norm and ReLU, found {block}")
        self.router, self.batch_norm = router, batch_norm
        self.pad = block[0]
        convolutions = [layer for layer in layers if isinstance(layer, nn.Conv2d)]
        self.experts = nn.ModuleList(
            nn.ModuleList(_like(layer, bias=batch_norm == "fold") for layer in convolutions) for _ in range(router.num_experts)
        )
        norms = [layer for layer in layers if isinstance(layer, nn.BatchNorm2d)]
        self.norms = nn.ModuleList(nn.Identity() if batch_norm == "fold" else copy.deepcopy(norm) for norm in norms)
        self.usage = UsageCounter(router.num_experts)

    def forward(self, bev: Tensor) -> Tensor:
        """Compute the block of each chosen expert, and their weighted sum.

        Args:
            bev: (S, C, H, W) map.

        Returns:
            (S, C', H', W') map.
        """
        routing = self.router(bev.flatten(1)[:, :1])
        if not in_backward():
            self.usage.add(routing)
        index, weight = _choices(routing)
        order = index.flatten().argsort(stable=True)  # every choice of a scene is a scene of its own, sorted by expert
        scene = order.div(index.shape[1], rounding_mode="floor")
        counts = torch.bincount(index.flatten(), minlength=routing.num_experts).tolist()
        rows = self.pad(bev[scene])
        for layer, norm in enumerate(self.norms):
            parts = [
                convolutions[layer](part)  # type: ignore[index]
                for convolutions, part in zip(self.experts, rows.split(counts), strict=True)
                if len(part)
            ]
            rows = F.relu(norm(torch.cat(parts) if len(parts) > 1 else parts[0]))
        rows = rows * weight.flatten()[order].to(rows.dtype)[:, None, None, None]
        return rows.new_zeros(len(bev), *rows.shape[1:]).index_add(0, scene, rows)

    def extra_repr(self) -> str:
        """Describe the mixture, for `print`.

        Returns:
            Number of experts and the rule of batch norms.
        """
        return f"{len(self.experts)} experts, batch_norm={self.batch_norm}"


def _choices(routing: Routing) -> tuple[Tensor, Tensor]:
    """(S, k) experts and weights; under soft routing all experts."""
    if routing.index is not None:
        return routing.index, routing.weight
    every = torch.arange(routing.num_experts, device=routing.probs.device).expand_as(routing.probs)
    return every, routing.weight


def _like(layer: nn.Conv2d, *, bias: bool) -> nn.Conv2d:
    kernel, stride, padding = layer.kernel_size, layer.stride, layer.padding
    return nn.Conv2d(layer.in_channels, layer.out_channels, kernel, stride=stride, padding=padding, bias=bias)  # type: ignore[arg-type]
