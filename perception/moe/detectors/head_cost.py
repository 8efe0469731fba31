"""What an upcycled head costs compared with its dense decoder: parameters that are stored, parameters that compute, and multiply-adds.

Read next: `upcycle.py`, which makes the head.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from torch import nn

from ...models.decoders.decoder import Decoder
from ...models.decoders.mixture import GridMeanRouter, MixtureDecoder, bev_backbone_of, region_plan
from ...models.decoders.scene_blocks import SceneBlockMixture
from ...models.detector import Detector
from ..layers.moe_ffn import moe_layers
from ..layers.routers import Router, SoftRouter, TopKRouter


@dataclass(frozen=True, kw_only=True)
class PartCost:
    """Cost of one part of a decoder, dense and upcycled."""

    part: str
    """What it is."""
    parameters: tuple[int, int]
    """Parameters of the dense part, and parameters that are stored now."""
    active: tuple[int, int]
    """Parameters that compute one scene or region, before and now."""
    per: Literal["scene", "region"]
    """What the multiply-adds are counted for."""
    multiply_adds: tuple[int, int] | None
    """Multiply-adds for it, before and now; None where they stay the same."""


def head_costs(dense: Detector, made: Detector) -> tuple[PartCost, ...]:
    """Count what the parts of an upcycled decoder cost.

    Args:
        dense: One of the specialists.
        made: The detector that was made of them.

    Returns:
        The replaced parts of the region head, each replaced BEV block, the routers, and everything else.
    """
    decoder = made.decoder
    assert isinstance(decoder, MixtureDecoder)
    head = decoder.config
    replaced = [*_regions(dense.decoder, decoder)]
    for block in head.bev_blocks:
        layer = bev_backbone_of(decoder.decoder).blocks[block]
        assert isinstance(layer, SceneBlockMixture)
        stored = _count(layer.experts) + _count(layer.norms)
        active = _count(layer.experts) * head.active // len(head.experts) + _count(layer.norms)
        work = _block_multiply_adds(dense, block)
        replaced.append(
            PartCost(
                part=f"BEV block {block}",
                parameters=(_count(bev_backbone_of(dense.decoder).blocks[block]), stored),
                active=(_count(bev_backbone_of(dense.decoder).blocks[block]), active),
                per="scene",
                multiply_adds=(work, work * head.active),
            )
        )
    replaced += [
        PartCost(part=name, parameters=(0, learned), active=(0, learned), per=per, multiply_adds=(0, work))
        for name, per, learned, work in _routers(decoder)
    ]
    before = _count(dense.decoder) - sum(part.parameters[0] for part in replaced)
    after = _count(decoder) - sum(part.parameters[1] for part in replaced)
    rest = PartCost(part="all other layers", parameters=(before, after), active=(before, after), per="scene", multiply_adds=None)
    return (*replaced, rest)


def _regions(dense: Decoder, decoder: MixtureDecoder) -> Iterator[PartCost]:
    """The FFNs of the region head that became mixtures, as one part."""
    head = decoder.config
    plan = region_plan(dense, head)
    if plan is None:
        return
    layers = [layer for _, layer in moe_layers(decoder.decoder)]
    stored = sum(_count(layer.bank) for layer in layers)
    before = sum(plan.site_parameters)
    yield PartCost(
        part="branches of the region head" if head.regions == "branches" else "region head with its wide layers",
        parameters=(before, stored),
        active=(before, stored * head.active // len(head.experts)),
        per="region",
        multiply_adds=(plan.multiply_adds_before, plan.multiply_adds_before * head.active),
    )


def _routers(decoder: MixtureDecoder) -> Iterator[tuple[str, Literal["scene", "region"], int, int]]:
    """Name, parameters and multiply-adds of the gate, and of all routers that decide per region."""
    experts = len(decoder.config.experts)
    if decoder.gate is not None:
        yield "gate", "scene", _count(decoder.gate), experts * _width(decoder.gate)
    regions = [router for router in decoder.routers() if router is not decoder.gate]
    if regions:
        yield "routers of the branches", "region", sum(map(_count, regions)), experts * sum(map(_width, regions))


def _width(router: Router) -> int:
    """Width of the tokens that a router maps to logits; 0 for routers that compute nothing."""
    inner = router.inner if isinstance(router, GridMeanRouter) else router
    if isinstance(inner, TopKRouter | SoftRouter):
        return inner.weight.shape[1]
    weight = getattr(inner, "weight", None)
    return 0 if weight is None else int(weight.shape[1])


def _block_multiply_adds(dense: Detector, block: int) -> int:
    """Multiply-adds of one scene in a block of the BEV backbone."""
    height, width = dense.spec.shape[1:]
    work = 0
    for number, layers in enumerate(bev_backbone_of(dense.decoder).blocks):
        assert isinstance(layers, nn.Sequential)
        for conv in (layer for layer in layers if isinstance(layer, nn.Conv2d)):
            height, width = ((size - 1) // conv.stride[0] + 1 for size in (height, width))  # 3 x 3 with one cell of padding
            if number == block:
                work += height * width * conv.weight.numel()
    return work


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())
