"""Fit what depends on data in a fresh upcycled head, without a gradient: the description of scenes, the gate's rows, batch norms.

All of it needs features at the cut alone, such as smashed scenes: no raw point and no label. Read next: `upcycle.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_numbers
from ....core.features import CutFeatures
from ...adapt.glc.kmeans import KMeansConfig, kmeans
from ...models.decoders.mixture import MixtureDecoder
from ...models.decoders.scene_decision import FARTHEST
from ...models.detector import Detector
from ..layers.routers import SoftRouter, TopKRouter, equal_rows
from ..layers.usage import UsageCounter
from ..surgery.batch_norm import recalibrate_batch_norm


def upcycled_decoder(detector: Detector) -> MixtureDecoder:
    """Get the decoder of a detector with an upcycled head.

    Args:
        detector: The detector.

    Returns:
        Its decoder.

    Raises:
        InvalidInput: The detector is dense.
    """
    if not isinstance(detector.decoder, MixtureDecoder):
        raise InvalidInput(f"this {detector.label} is dense; make an upcycled head with `upcycle3d moe detector`")
    return detector.decoder


@torch.no_grad()
def fit_gate(detector: Detector, domains: Sequence[Iterable[CutFeatures] | Tensor], *, sharpness: float = 1.0) -> None:
    """Scale the description of scenes over all domains, and let a learned gate choose the domain whose center is nearest.

    The gate then starts by sending each scene to the expert of the domain that it looks like. Other gates only get the scale.

    Args:
        detector: A detector with an upcycled head, which is changed.
        domains: Features of some scenes of each domain in the order of the experts, or what `describe_scenes` returned for them. One entry
            for all domains together fits the scale only.
        sharpness: How much the logits differ at the centers, in units of their mean squared distance. Raise it for gates that start surer.

    Raises:
        InvalidInput: The head decides nothing per scene, the number of domains is neither 1 nor the number of experts, a domain has no
            scene, or two domains look the same.
    """
    _fit(upcycled_decoder(detector), [describe_scenes(detector, domain) for domain in domains], sharpness)


@torch.no_grad()
def fit_gate_to_groups(
    detector: Detector, scenes: Iterable[CutFeatures] | Tensor, *, seed: int = 0, sharpness: float = 1.0
) -> tuple[int, ...]:
    """Divide scenes into as many groups as there are experts, and let the gate begin with one expert for each group.

    It needs no name of a domain: scenes of several fleets in one store are enough.

    Args:
        detector: A detector with an upcycled head, which is changed.
        scenes: Features of scenes of all domains, or what `describe_scenes` returned for them.
        seed: Decides the groups.
        sharpness: As for `fit_gate`.

    Returns:
        Number of scenes of each group, in the order of the experts.

    Raises:
        InvalidInput: The head decides nothing per scene, or there are fewer scenes than experts.
    """
    decoder = upcycled_decoder(detector)
    described, experts = describe_scenes(detector, scenes), len(decoder.config.experts)
    require(len(described) >= experts, f"{len(described)} scenes cannot make {experts} groups; give more scenes")
    group = cluster_scenes(described, experts, seed=seed)
    _fit(decoder, [described[group == number] for number in range(experts)], sharpness)
    return tuple(torch.bincount(group, minlength=experts).tolist())


def describe_scenes(detector: Detector, scenes: Iterable[CutFeatures] | Tensor) -> Tensor:
    """Describe scenes as the gate sees them, before any scaling.

    Args:
        detector: A detector with an upcycled head.
        scenes: Features of the scenes; a description is returned as it is.

    Returns:
        (N, width) float32.

    Raises:
        InvalidInput: The head decides nothing per scene.
    """
    descriptor = upcycled_decoder(detector).descriptor
    if descriptor is None:
        raise InvalidInput("this head decides nothing per scene, so it has no gate to fit")
    if isinstance(scenes, Tensor):
        return scenes
    return torch.cat([descriptor.raw(features.voxels) for features in scenes] or [torch.zeros(0, descriptor.width)])


@dataclass(frozen=True, kw_only=True)
class GateUse:
    """Where a gate sends some scenes."""

    scenes: int
    """Number of the scenes."""
    largest: tuple[float, ...]
    """Share of the scenes in which each expert has the largest weight."""
    weights: tuple[float, ...]
    """Mean weight of each expert."""


@torch.no_grad()
def gate_use(detector: Detector, described: Tensor) -> GateUse:
    """Count where the gate sends scenes, without running the network.

    Args:
        detector: A detector with an upcycled head whose gate decides by itself (no oracle).
        described: (N, width) what `describe_scenes` returned.

    Returns:
        The experts of the N scenes.

    Raises:
        InvalidInput: The head decides nothing per scene.
    """
    decoder = upcycled_decoder(detector)
    if decoder.descriptor is None or decoder.gate is None:
        raise InvalidInput("this head decides nothing per scene, so it has no gate")
    counter = UsageCounter(len(decoder.config.experts))
    counter.add(decoder.gate(decoder.descriptor.scaled(described)))
    use = counter.value
    return GateUse(scenes=use.tokens, largest=use.largest_shares, weights=use.mean_weights)


def _fit(decoder: MixtureDecoder, described: Sequence[Tensor], sharpness: float) -> None:
    descriptor, gate, experts = decoder.descriptor, decoder.gate, decoder.config.experts
    assert descriptor is not None
    require_numbers("fit_gate", least=0.0, most=1e3, sharpness=sharpness)
    require(
        len(described) in (1, len(experts)),
        f"give scenes of one domain for each of the {len(experts)} experts, or one for all; found {len(described)}",
    )
    for name, rows in zip(experts if len(described) > 1 else ("the head",), described, strict=True):
        require(len(rows) > 0, f"there is no scene for {name}, so its place among the domains is unknown")
    descriptor.fit(torch.cat(list(described)))
    if len(described) > 1 and isinstance(gate, TopKRouter | SoftRouter):
        centers = torch.stack([descriptor.scaled(rows).mean(0) for rows in described])
        pairs = equal_rows(centers, tolerance=1e-3)
        if pairs:
            first, second = (experts[i] for i in pairs[0])
            raise InvalidInput(f"the scenes of {first} and {second} look the same to the gate; give scenes of different domains")
        distance = torch.cdist(centers, centers).square().sum() / (len(centers) * (len(centers) - 1))
        gate.weight.copy_(2 * sharpness / distance * centers)
        assert gate.bias is not None
        gate.bias.copy_(-sharpness / distance * centers.square().sum(1))


def cluster_scenes(described: Tensor, clusters: int, *, seed: int = 0) -> Tensor:
    """Divide scenes into groups that look alike, without a label: a stand-in for domains that nobody has named.

    Args:
        described: (N, width) what `SceneDescriptor.raw` returned.
        clusters: Number of groups.
        seed: Decides the first centers; the best of five runs counts.

    Returns:
        (N,) int64 group of each scene.

    Raises:
        InvalidInput: There are fewer scenes than groups.
    """
    spread = described.std(0).clamp_min(1e-3)
    scaled = ((described - described.mean(0)) / spread).clamp(-FARTHEST, FARTHEST)
    settings = KMeansConfig(init="plusplus", restarts=5, points_per_centroid=0)
    return kmeans(scaled, clusters, settings, seed=seed).assignment


def recalibrate_head(detector: Detector, batches: Iterable[CutFeatures]) -> int:
    """Measure the running statistics of the decoder's batch norms again, with the mixtures in place. The encoder is not touched.

    Args:
        detector: The detector, which is changed.
        batches: Features of scenes of all domains, mixed; every batch counts the same.

    Returns:
        Number of batch norms.

    Raises:
        InvalidInput: The batches reach none of them, for example because no scene has a region.
    """

    def run(decoder: nn.Module) -> None:
        for features in batches:
            detector.decode(features)

    recalibrate: Callable[[nn.Module, Callable[[nn.Module], None]], int] = recalibrate_batch_norm
    return recalibrate(detector.decoder, run)
