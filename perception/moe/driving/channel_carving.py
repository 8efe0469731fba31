"""Carves a detector by driving context: which channels of its decoder serve which context, in a form to train and in a form to drive.

A *context* is a named group of frames: a sensor, a place, weather, a distance. The encoder is not touched, so one fleet sends the same
smashed scenes whatever is carved. The units of the region head and of the BEV blocks (`models/decoders/channels.py`) are measured and
divided as the hidden units of FFNs are (`carving/splits.py`):

    measure_channels ─ readme_split, pooled_units, … ─┬─ masked_detector   all weights once; each scene has a context; trains
                                                      └─ narrow_detector   the slices of one context; an ordinary, smaller detector

Both forms compute the same. Read next: `context_gate.py`, which finds the context of a scan before the network runs.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ....core.errors import InvalidInput, require, require_counts
from ....core.features import CutFeatures
from ...models.decoders.channels import ChannelSite, channel_sites, keep_channels
from ...models.decoders.decoder import Decoder
from ...models.decoders.mixture import RegionMixtures
from ...models.decoders.scene_decision import SceneDecision, SceneRouter
from ...models.derived import DenseDetectorConfig
from ...models.detector import Detector
from ...models.narrow import KeptChannels, NarrowDetectorConfig
from ..carving.activity import ActivitySums, UnitActivity
from ..carving.units import CarvingMethod, SiteUnits, UnitCarving
from ..layers.control_routers import OracleRouter

# ---- what is measured and what is made of it


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelCarving(UnitCarving):
    """A division of a decoder's channels among driving contexts. `print(carving)` shows it."""

    sites: tuple[ChannelSite, ...]
    """Where the units are, in the order of `units`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for site, units in zip(self.sites, self.units, strict=True):
            require(
                (units.site, units.width) == (site.name, site.width),
                f"the site {site.name!r} has {site.width} units, and the carving describes {units.site!r} with {units.width}",
            )

    def kept(self, context: int) -> dict[ChannelSite, Tensor]:
        """Get the units that serve a context.

        Args:
            context: Number of the context.

        Returns:
            (K,) int64 units of each site, ascending.
        """
        return {site: units.with_shared[context].nonzero()[:, 0] for site, units in zip(self.sites, self.units)}

    def number(self, context: str) -> int:
        """Find the expert of a context. One expert serves all contexts where nothing is divided, as in pooled pruning.

        Args:
            context: Name of the context.

        Returns:
            Number of its expert.

        Raises:
            InvalidInput: There is no such context.
        """
        if self.experts == 1:
            return 0
        require(context in self.domains, f"there is no context {context!r}; there are {', '.join(self.domains)}")
        return self.domains.index(context)

    def __str__(self) -> str:
        lines = [f"{self.method}: {self.experts} contexts ({', '.join(self.domains)}), ratio {self.ratio:g}"]
        for units in self.units:
            kept = units.with_shared.sum(1).tolist()
            lines.append(
                f"  {units.site}: {units.width} units, {int(units.shared.sum())} shared, {min(kept)} per context, "
                f"{units.width - units.union} in no context"
            )
        lines.append(f"shared {self.shared_share:.1%} and in use {self.union_share:.1%} of all units")
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class ChannelActivity(UnitActivity[ChannelCarving]):
    """How active the channels of a decoder were in each driving context. A token is a cell of the map, or a region."""

    layers: ClassVar[str] = "sets of channels"
    """What `sites` are, for `print`."""
    channels: tuple[ChannelSite, ...]
    """Where the units are, in the order of `sites`."""

    def carved(
        self, domains: tuple[str, ...], ratio: float, method: CarvingMethod, units: tuple[SiteUnits, ...]
    ) -> ChannelCarving:
        """Make the carving of the decoder.

        Args:
            domains: Name of each expert.
            ratio: Share of the units that was asked for.
            method: How the units were chosen.
            units: The units of each site.

        Returns:
            The carving.
        """
        return ChannelCarving(sites=self.channels, domains=domains, ratio=ratio, method=method, units=units)


@torch.no_grad()
def measure_channels(
    detector: Detector,
    contexts: Mapping[str, Iterable[CutFeatures]],
    *,
    regions: RegionMixtures = "all",
    bev_blocks: Sequence[int] = (0, 1),
    least_tokens: int = 1024,
) -> ChannelActivity:
    """Measure how active each channel of a decoder is in each driving context. Smashed scenes are enough: no raw point, no label.

    Args:
        detector: A dense detector. It is not changed.
        contexts: Features at the cut of some scenes of each context.
        regions: Which chains of the region head are carved.
        bev_blocks: Which blocks of the BEV backbone are carved.
        least_tokens: A context with fewer cells or regions is reported.

    Returns:
        The activity.

    Raises:
        InvalidInput: There is no context, nothing of one reaches a site, or nothing can be carved.

    Example:
        ```python
        activity = measure_channels(detector, {"city": city_features, "fog": fog_features})
        carving = readme_split(activity, ratio=0.5)
        ```
    """
    require(bool(contexts), "measure_channels needs at least one context with scenes")
    require_counts("measure_channels", least=0, most=10**9, least_tokens=least_tokens)
    sites = channel_sites(detector.decoder, regions=regions, bev_blocks=bev_blocks)
    sums = ActivitySums({site.name: site.width for site in sites}, len(contexts))

    def see(number: int, units: Tensor) -> None:
        sums.add(number, units.movedim(1, -1).flatten(0, -2))

    hooks = [
        detector.decoder.get_submodule(site.activation).register_forward_hook(lambda m, x, units, n=number: see(n, units))
        for number, site in enumerate(sites)
    ]
    was_training = detector.training
    detector.eval()
    try:
        for number, scenes in enumerate(contexts.values()):
            sums.domain = number
            for features in scenes:
                detector.decode(features)
    finally:
        detector.train(was_training)
        for hook in hooks:
            hook.remove()
    return ChannelActivity(channels=sites, domains=tuple(contexts), sites=sums.sites, least_tokens=least_tokens)


# ---- the form to train


class MaskedChannels(nn.Module):
    """Takes the place of a ReLU: keeps the units that serve the context of each row, and sets the others to zero."""

    keep: Tensor

    def __init__(self, activation: nn.Module, units: SiteUnits, router: SceneRouter) -> None:
        super().__init__()
        self.activation, self.router = activation, router
        self.register_buffer("keep", units.with_shared.clone())

    def forward(self, x: Tensor) -> Tensor:
        """Compute the units.

        Args:
            x: (T, F, ...) of T scenes or regions.

        Returns:
            (T, F, ...).
        """
        units: Tensor = self.activation(x)
        keep = self.keep[self.router(units.flatten(1)[:, :1]).top1]
        return units * keep.view(*keep.shape, *[1] * (units.ndim - 2))

    def extra_repr(self) -> str:
        """Describe the layer, for `print`.

        Returns:
            Numbers of units.
        """
        return f"kept={self.keep.sum(1).tolist()} of {self.keep.shape[1]}"


def masked_detector(detector: Detector, carving: ChannelCarving) -> Detector:
    """Make the form to train: one set of weights, of which each scene sees the units of its context.

    It runs inside `in_contexts` only, costs what the dense detector costs, and has no file; `narrow_detector` gives its results away.

    Args:
        detector: The dense detector. It is not changed.
        carving: Which units serve which context.

    Returns:
        A copy. Its parameters have the names of the dense detector's.

    Raises:
        InvalidInput: The detector has other layers than the carved one, or decides something per scene already.
    """
    twin = copy.deepcopy(detector)
    decoder = twin.decoder
    require(
        decoder.scene_decision is None, f"this {detector.label} has layers that are chosen per scene already; carve a dense one"
    )
    decoder.scene_decision = SceneDecision()
    for site, units in zip(carving.sites, carving.units):
        activation = _layer(decoder, site)
        owner, _, name = site.activation.rpartition(".")
        router = SceneRouter(carving.experts, decoder.scene_decision, site.tokens)
        setattr(decoder.get_submodule(owner), name, MaskedChannels(activation, units, router).train(activation.training))
    return twin


def _layer(decoder: Decoder, site: ChannelSite) -> nn.Module:
    """The ReLU of a site, after checking that the layers around it are those of the carving."""
    try:
        found = decoder.get_submodule(site.activation)
        width = getattr(decoder.get_submodule(site.name), "out_channels", None)
    except AttributeError as error:
        raise InvalidInput(f"this decoder has no layer {site.activation!r}, which is carved: {error}") from error
    require(
        isinstance(found, nn.ReLU) and width == site.width,
        f"the layer {site.name!r} has {width} outputs and then a {type(found).__name__}; the carving is of {site.width} units behind a ReLU",
    )
    return found


@contextmanager
def in_contexts(detector: Detector, contexts: Sequence[int]) -> Iterator[None]:
    """Say which context each scene of the next forward passes has.

    Args:
        detector: What `masked_detector` made.
        contexts: Number of the context of each scene of the batch.

    Yields:
        Nothing.

    Raises:
        InvalidInput: The detector is not masked, or there is no such context.
    """
    decision = detector.decoder.scene_decision
    masks = [module for module in detector.decoder.modules() if isinstance(module, MaskedChannels)]
    if decision is None or not masks:
        raise InvalidInput(f"this {detector.label} is not carved; make its masked form with masked_detector")
    router, device = OracleRouter(len(masks[0].keep)), masks[0].keep.device
    with decision.given(router.decide(torch.tensor(list(contexts), dtype=torch.int64, device=device))):
        yield


# ---- the form to drive


def unmasked_detector(detector: Detector) -> Detector:
    """Make the dense detector with the weights of a masked one: what a training that was stopped can be kept as.

    Args:
        detector: What `masked_detector` made, or a dense detector. It is not changed.

    Returns:
        A dense detector in evaluation mode.

    Raises:
        InvalidInput: The detector has no configuration of a dense detector.
    """
    config: Any = detector.config
    if not isinstance(config, DenseDetectorConfig):
        raise InvalidInput(
            f"this {detector.label} has no configuration of a dense detector, so no file could hold its slices; carve a detector of "
            "`upcycle3d train`"
        )
    twin = config.build().eval()
    twin.load_state_dict({name: value for name, value in detector.state_dict().items() if not name.endswith(".keep")})
    twin.trained_on = detector.trained_on
    return twin.to(next(detector.parameters()).device)


def narrow_detector(detector: Detector, carving: ChannelCarving, context: int) -> Detector:
    """Make the form to drive: an ordinary detector with the units of one context. It is really smaller.

    Args:
        detector: The dense detector, or what `masked_detector` made of it. It is not changed.
        carving: Which units serve which context.
        context: Number of the context.

    Returns:
        A detector in evaluation mode whose file every command reads. It finds what the masked form finds for scenes of this context.

    Raises:
        InvalidInput: The detector has other layers than the carved one, or no configuration of a dense detector.
    """
    twin = unmasked_detector(detector)
    for site in carving.sites:
        _layer(twin.decoder, site)
    smaller = {site: units for site, units in carving.kept(context).items() if len(units) < site.width}
    keep_channels(twin.decoder, smaller)
    left = tuple(KeptChannels(site=site.name, count=len(units)) for site, units in smaller.items())
    if left:
        assert isinstance(twin.config, DenseDetectorConfig)
        twin.config = NarrowDetectorConfig(detector=twin.config, kept=left)
        twin.label = twin.config.label
    return twin


def context_tensors(carving: ChannelCarving) -> frozenset[str]:
    """Name the tensors of a decoder that differ between contexts: what is loaded when the context changes.

    Args:
        carving: Which units serve which context.

    Returns:
        Names in the state dict of a detector. Some may not exist, such as a bias that a layer lacks.
    """
    return frozenset(f"decoder.{name}" for site in carving.sites for name in site.tensors)


@torch.no_grad()
def decoder_multiply_adds(detector: Detector, features: CutFeatures) -> int:
    """Count what a decoder computes for some scenes, convolutions and matrix products alone.

    Args:
        detector: The detector in evaluation mode.
        features: Features at the cut of the scenes. The region head computes as many regions as they have.

    Returns:
        Multiply-adds.
    """
    with FlopCounterMode(display=False) as counter:
        detector.decode(features)
    return counter.get_total_flops() // 2
