"""A decoder with an upcycled head: mixtures of experts in the place of the branches of its region head, of its BEV blocks, or of both.

    CutFeatures ─┬─ description of the scene ─ gate ─ decision ────┐ (where the head decides per scene)
                 └─ dense decoder: BEV block = mixture of blocks ──┴─ region branch = mixture of FFNs ─ outputs and decisions

The dense decoder stays what it was, and only layers inside it are replaced; so every mixture is made, stored and loaded by one
configuration. Detectors with such a decoder are in `../upcycled.py`; `perception/moe/detectors/` makes them of specialists.
Read next: `scene_decision.py`, `scene_blocks.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from ....core.cut import CutSpec
from ....core.errors import InvalidInput, require, require_counts
from ....core.features import CutFeatures
from ....core.structures import Labels, LossTerms, Predictions
from ...moe.layers.bank import ExpertBank
from ...moe.layers.control_routers import FrozenRouter, OracleRouter, UniformRouter
from ...moe.layers.losses import RouterLossConfig, router_losses
from ...moe.layers.moe_ffn import MoeFfn, moe_layers, take_routings
from ...moe.layers.routers import Router, SoftRouter, TopKRouter
from ...moe.layers.routing import Norm, Routing, TokenPlaces, TopKRule
from ...moe.layers.usage import UsageCounter
from ...moe.surgery.ffn_sites import tensors_of
from ...moe.surgery.replacement import ReplacementPlan, plan_replacement
from .bev import BevBackbone
from .decoder import Decoder
from .regions import ScoredProposals, padded_regions
from .scene_blocks import BatchNormOfExperts, SceneBlockMixture
from .scene_decision import SceneDecision, SceneDescriptor, SceneRouter

HeadRouter = Literal["top_k", "soft", "frozen", "uniform", "oracle"]
RegionMixtures = Literal["none", "branches", "all"]
DecidesPer = Literal["region", "scene"]


@dataclass(frozen=True, kw_only=True)
class HeadMixtureConfig:
    """Structure of an upcycled head: all that is needed to build it again. Field names are stored in detector files."""

    experts: tuple[str, ...]
    """Names of the experts, such as the domains of the specialists that they come from."""
    regions: RegionMixtures = "branches"
    """Where the region head gets mixtures: in its `branches`, which read score and box from the features of a region; in `all` chains,
    also in the very wide first one, whose experts outweigh the rest of the head; or in `none`."""
    bev_blocks: tuple[int, ...] = ()
    """Numbers of the blocks of the BEV backbone that become mixtures of blocks. They always decide per scene."""
    decides_per: DecidesPer = "region"
    """Whether each `region` chooses its experts, or one decision serves all regions of a `scene`. Take `scene` where domains are weather,
    sensors or places, and `region` where they are kinds of objects or distances."""
    router: HeadRouter = "top_k"
    """How experts are chosen: `top_k` learns it; `soft` weighs all experts, and learns the weights. The others are controls: `frozen`
    draws a top-k router once, `uniform` is the average, and `oracle` is given the domain of each scene (`given_domains`)."""
    k: int = 2
    """Experts per token of `top_k` and `frozen`. As many as there are is no choice: then take `soft`, whose balance loss has an effect."""
    norm: Norm = "renorm"
    """Whether the weights of the chosen experts are divided by their sum. With `renorm`, equal experts are one of them exactly."""
    batch_norm: BatchNormOfExperts = "fold"
    """What happens to batch norms of the layers that become experts."""
    losses: RouterLossConfig = RouterLossConfig()
    """Losses of the routers, which join the training loss."""

    def __post_init__(self) -> None:
        require_counts("HeadMixtureConfig", experts=len(self.experts), k=self.k)
        require(
            len(set(self.experts)) == len(self.experts) and all(self.experts),
            f"HeadMixtureConfig.experts: each needs a name of its own, found {self.experts}",
        )
        for name, value, kinds in (
            ("regions", self.regions, RegionMixtures),
            ("decides_per", self.decides_per, DecidesPer),
            ("router", self.router, HeadRouter),
            ("norm", self.norm, Norm),
            ("batch_norm", self.batch_norm, BatchNormOfExperts),
        ):
            require(value in get_args(kinds), f"HeadMixtureConfig.{name} must be one of {get_args(kinds)}, found {value!r}")
        require(
            self.regions != "none" or bool(self.bev_blocks),
            'this head has no mixture: regions is "none" and bev_blocks is empty; give one of them',
        )
        require(
            len(set(self.bev_blocks)) == len(self.bev_blocks) and all(0 <= b < 2 for b in self.bev_blocks),
            f"HeadMixtureConfig.bev_blocks: the BEV backbone has the blocks 0 and 1, found {self.bev_blocks}",
        )
        require(self.k <= len(self.experts), f"a head cannot choose k = {self.k} of {len(self.experts)} experts; lower k")
        if self.router == "top_k" and self.k == 1 and self.norm == "renorm" and len(self.experts) > 1:
            raise InvalidInput(
                "a top-1 router that is renormalized always weighs its expert by 1, so the detection losses give it no gradient; "
                'take k = 2, or norm = "none"'
            )
        require(
            self.router != "oracle" or self.regions == "none" or self.decides_per == "scene",
            'an oracle knows the domain of a scene; set decides_per = "scene"',
        )
        if self.router in ("frozen", "uniform", "oracle") and (self.losses.balance or self.losses.z):
            raise InvalidInput(
                f"a {self.router} router learns nothing, so its losses could change nothing; set losses.balance and losses.z to 0"
            )

    @property
    def active(self) -> int:
        """Number of experts that compute each token."""
        return {"soft": len(self.experts), "uniform": len(self.experts), "oracle": 1}.get(self.router, self.k)

    @property
    def has_gate(self) -> bool:
        """Whether something is decided per scene."""
        return bool(self.bev_blocks) or (self.regions != "none" and self.decides_per == "scene")

    @property
    def rule(self) -> TopKRule:
        """How logits become choices."""
        return TopKRule(k=self.k, norm=self.norm)

    def __str__(self) -> str:
        places = [] if self.regions == "none" else [f"{self.regions} of the region head, per {self.decides_per}"]
        places += [f"BEV block {block}, per scene" for block in self.bev_blocks]
        chosen = f"top {self.k} ({self.norm})" if self.router in ("top_k", "frozen") else "all" if self.active > 1 else "one"
        return (
            f"{len(self.experts)} experts ({', '.join(self.experts)}) in {'; '.join(places)}; router {self.router}, {chosen}; batch norm: "
            f"{self.batch_norm}; balance {self.losses.balance:g}, z {self.losses.z:g}"
        )


@dataclass(frozen=True, kw_only=True)
class MixtureOutputs:
    """Raw outputs of a batch."""

    dense: Any
    """Raw outputs of the decoder that holds the mixtures."""
    routings: tuple[Routing, ...]
    """Decisions of the routers: that of the gate first, then one for each branch that decides per region."""


class MixtureDecoder(Decoder):
    """The server half with an upcycled head."""

    def __init__(self, dense: Decoder, spec: CutSpec, config: HeadMixtureConfig) -> None:
        """Put mixtures with fresh weights into a dense decoder.

        Args:
            dense: The decoder. It is changed.
            spec: The cut whose features it reads.
            config: Where the mixtures are.

        Raises:
            InvalidInput: The decoder lacks the layers that the configuration names.
        """
        super().__init__()
        self.config, self.shared = config, SceneDecision()
        self.class_parts = tuple(f"decoder.{part}" for part in dense.class_parts)
        self.descriptor = SceneDescriptor(spec) if config.has_gate else None
        self.gate = None if self.descriptor is None else new_router(config, self.descriptor.width, bias=True)
        self.gate_usage = UsageCounter(len(config.experts))
        plan = region_plan(dense, config)
        if plan is not None:
            tensors = tensors_of(dense)
            layers = {}
            for site in plan.sites:
                bank = ExpertBank.from_dense([site.read(tensors)] * len(config.experts), dropout=site.dropout)
                layers[site.name] = MoeFfn(bank, self._region_router(dense, site.name, site.width_in))
            plan.apply(dense, layers)
        for block in config.bev_blocks:
            backbone = bev_backbone_of(dense)
            router = SceneRouter(len(config.experts), self.shared, "scenes")
            layer = backbone.blocks[block]
            assert isinstance(layer, nn.Sequential)
            backbone.blocks[block] = SceneBlockMixture(layer, router, batch_norm=config.batch_norm)
        self.decoder = dense
        self.decoder.scene_decision = self.shared if config.has_gate else None

    def _region_router(self, dense: Decoder, name: str, width: int) -> Router:
        if self.config.decides_per == "scene":
            return SceneRouter(len(self.config.experts), self.shared, "regions")
        if any(name.startswith(f"{part}.") for part in dense.wide_parts):
            return GridMeanRouter(self.config, width // dense.grid_points, dense.grid_points)
        return new_router(self.config, width)

    def decide(self, features: CutFeatures) -> Routing | None:
        """Decide for each scene, before anything else is computed.

        Args:
            features: Features at the cut.

        Returns:
            The decision; None where this head decides nothing per scene.
        """
        if self.gate is None or self.descriptor is None:
            return None
        decision: Routing = self.gate(self.descriptor(features.voxels))
        self.gate_usage.add(decision)
        return decision

    def forward(self, features: CutFeatures, labels: Sequence[Labels] | None = None) -> MixtureOutputs:
        """Compute the raw outputs of a batch.

        Args:
            features: features at the cut, on the device of the weights.
            labels: one per scene in training, None otherwise.

        Returns:
            Raw outputs, with the decisions that led to them.
        """
        decision = self.decide(features)
        with self.shared.given(decision):
            outputs = self.decoder(features, labels)
        per_region = [routing for routing in take_routings(self.decoder) if self.config.decides_per == "region"]
        return MixtureOutputs(dense=outputs, routings=(*(() if decision is None else (decision,)), *per_region))

    def loss(self, outputs: MixtureOutputs, labels: Sequence[Labels]) -> LossTerms:
        """Compute the losses of the dense decoder and those of the routers.

        Args:
            outputs: what `forward` returned.
            labels: one per scene.

        Returns:
            The decoder's own terms and, where routers train and have coefficients, `router_balance` and `router_z`.
        """
        terms, config = self.decoder.loss(outputs.dense, labels), self.config.losses
        if not (config.balance or config.z) or not any(p.requires_grad for r in self.routers() for p in r.parameters()):
            return terms
        found = router_losses(outputs.routings, config)
        named = {"router_balance": config.balance * found.balance, "router_z": config.z * found.z}
        asked = {"router_balance": config.balance, "router_z": config.z}
        return terms.merged(LossTerms(terms={name: value.float() for name, value in named.items() if asked[name]}))

    def predict(self, outputs: MixtureOutputs) -> list[Predictions]:
        """Choose the detections of every scene.

        Args:
            outputs: what `forward` returned without labels.

        Returns:
            Detections of every scene, best first.
        """
        return self.decoder.predict(outputs.dense)

    def proposals(self, features: CutFeatures) -> list[ScoredProposals]:
        """Score every proposal of the first stage.

        Args:
            features: features at the cut.

        Returns:
            The scored proposals of every scene.
        """
        with torch.no_grad(), self.shared.given(self.decide(features)):
            found = self.decoder.proposals(features)
        take_routings(self.decoder)
        return found

    def bev_map(self, features: CutFeatures) -> Tensor:
        """Compute the map that the heads read.

        Args:
            features: features at the cut.

        Returns:
            (B, C, H, W) map with one cell for each cell of the cut.
        """
        with self.shared.given(self.decide(features)):
            found = self.decoder.bev_map(features)
        take_routings(self.decoder)
        return found

    def region_features(self, features: CutFeatures, regions: Sequence[Tensor]) -> Tensor:
        """Compute what the second stage knows about given regions.

        Args:
            features: features at the cut.
            regions: (R, 7) boxes of each scene.

        Returns:
            (N, C) features of all regions, scene by scene.
        """
        with self.shared.given(self.decide(features)):
            self.shared.note_regions(padded_regions(regions).valid)
            return self.decoder.region_features(features, regions)

    def routers(self) -> tuple[Router, ...]:
        """List the routers that decide something themselves: the gate and those of branches that decide per region."""
        own = (layer.router for _, layer in moe_layers(self.decoder) if not isinstance(layer.router, SceneRouter))
        return (*(() if self.gate is None else (self.gate,)), *own)

    def usages(self) -> Iterator[tuple[str, UsageCounter]]:
        """List the counters of the experts' use.

        Yields:
            `scenes` for the gate, then the name of each branch that decides per region.
        """
        if self.gate is not None:
            yield "scenes", self.gate_usage
        for name, layer in moe_layers(self.decoder):
            if not isinstance(layer.router, SceneRouter):
                yield name.removesuffix(".mixture"), layer.usage

    def log_values(self) -> Mapping[str, float]:
        """The share of the choices and the mean weight of each expert since this decoder was made or loaded, by place and expert."""
        values: dict[str, float] = {}
        for place, counter in self.usages():
            use = counter.value
            values |= {f"use/{place}/{expert}": share for expert, share in zip(self.config.experts, use.shares, strict=True)}
            values |= {
                f"weight/{place}/{expert}": mean for expert, mean in zip(self.config.experts, use.mean_weights, strict=True)
            }
        return values


class GridMeanRouter(Router):
    """Routes regions by the mean over their grid: one value per channel instead of one per channel and place."""

    def __init__(self, config: HeadMixtureConfig, channels: int, places: int) -> None:
        """Make the router.

        Args:
            config: How experts are chosen.
            channels: Channels of a region.
            places: Places of its grid.
        """
        super().__init__()
        self.num_experts, self.grid = len(config.experts), (channels, places)
        self.inner = new_router(config, channels)

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Decide.

        Args:
            x: (T, channels * places) pooled regions, channel by channel.
            places: Where they stand in the batch.

        Returns:
            The decision for the T regions.
        """
        decision: Routing = self.inner(x.unflatten(1, self.grid).mean(2), places)
        return decision


def new_router(config: HeadMixtureConfig, width: int, *, bias: bool = False) -> Router:
    """Make a router with fresh weights.

    Args:
        config: The kind.
        width: Width of its tokens.
        bias: Whether a learned router has a bias per expert. A gate needs it to find the nearest domain.

    Returns:
        The router.
    """
    experts = len(config.experts)
    if config.router == "top_k":
        return TopKRouter(width, experts, config.rule, bias=bias)
    if config.router == "soft":
        return SoftRouter(width, experts, bias=bias)
    if config.router == "frozen":
        return FrozenRouter(width, experts, config.rule, seed=0)
    return UniformRouter(experts) if config.router == "uniform" else OracleRouter(experts)


def region_plan(dense: Decoder, config: HeadMixtureConfig) -> ReplacementPlan | None:
    """Find the FFNs of a region head that become mixtures, and what that costs.

    Args:
        dense: A decoder without mixtures.
        config: Which ones.

    Returns:
        The plan; None where the region head stays dense.

    Raises:
        InvalidInput: The decoder names no branches, or no FFN is in them.
    """
    if config.regions == "none":
        return None
    parts = dense.branch_parts + (dense.wide_parts if config.regions == "all" else ())
    if not parts:
        raise InvalidInput(
            f"{type(dense).__name__} names no branches of a region head; replace BEV blocks, or a two-stage detector's"
        )
    return plan_replacement(
        dense,
        experts=len(config.experts),
        active=config.active,
        only=[f"{part}.*" for part in parts],
        batch_norm=config.batch_norm,
        widest_input=None,
    )


def bev_backbone_of(dense: Decoder) -> BevBackbone:
    """Find the BEV backbone of a decoder.

    Args:
        dense: The decoder.

    Returns:
        The backbone.

    Raises:
        InvalidInput: It has none.
    """
    found = getattr(dense, "bev_backbone", None)
    if not isinstance(found, BevBackbone):
        raise InvalidInput(f"{type(dense).__name__} has no BEV backbone of blocks")
    return found
