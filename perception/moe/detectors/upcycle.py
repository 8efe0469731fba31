"""Make one detector with an upcycled head of several detectors that were specialized on different domains.

    specialist A ─┐ encoders: equal bit by bit, so smashed scenes of one fleet serve all ─────────── encoder
    specialist B ─┼ branches of the region head, blocks of the BEV backbone ──────────────────────── experts
    specialist C ─┘ everything else of the decoders: averaged, or the seed's ─────────────────────── the same layers

The function is pure: it trains nothing and changes no detector. Every tensor is accounted for once. Read next: `calibrate.py`, which fits
what depends on data; `models/decoders/mixture.py`, the structure that is made.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....core.config_json import config_to_json, first_difference
from ....core.errors import InvalidInput, require, require_numbers
from ...models.decoders.mixture import GridMeanRouter, HeadMixtureConfig, MixtureDecoder, bev_backbone_of, region_plan
from ...models.decoders.scene_blocks import SceneBlockMixture
from ...models.defended import DefendedDetectorConfig
from ...models.detector import Detector
from ...models.pv_rcnn import PvRcnnDetectorConfig
from ...models.second_iou import SecondIouDetectorConfig
from ...models.upcycled import UpcycledDetectorConfig
from ..layers.moe_ffn import moe_layers
from ..layers.routers import Router, SoftRouter, TopKRouter
from ..surgery.common_seed import require_common_seed
from ..surgery.ffn_sites import NormSpot, fold_batch_norm
from ..surgery.tensor_account import TensorAccount, TensorLedger
from ..upcycling.upcyclers import Rest
from .head_cost import PartCost, head_costs

_Common = Callable[[str], Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class UpcycledHead:
    """A detector that was made of others, and what it costs."""

    detector: Detector
    """The detector, on the CPU, in evaluation mode."""
    account: TensorAccount
    """What became of every tensor of the decoders."""
    costs: tuple[PartCost, ...]
    """What each part of the decoder costs, before and after."""

    @property
    def parameters(self) -> tuple[int, int]:
        """Parameters of the decoder before and after."""
        before, after = (sum(part.parameters[now] for part in self.costs) for now in (0, 1))
        return before, after

    @property
    def active(self) -> tuple[int, int]:
        """Parameters of the replaced layers that serve one region or scene, before and after. Routers are left out."""
        before, after = (sum(part.active[now] for part in self.costs if all(part.parameters)) for now in (0, 1))
        return before - self.costs[-1].active[0], after - self.costs[-1].active[1]


def upcycle_head(
    specialists: Sequence[Detector],
    head: HeadMixtureConfig,
    *,
    rest: Rest = "average",
    seed: Detector | None = None,
    draw: int = 0,
    router_std: float = 0.02,
    allow_strangers: bool = False,
) -> UpcycledHead:
    """Make a detector with an upcycled head.

    Copies of one detector as specialists are sparse upcycling: with renormalized routing the result finds what the dense detector finds.
    Different specialists with `rest="average"` are branch-train-mix.

    Args:
        specialists: One detector per expert, in the order of `head.experts`: fine-tuned from one seed with a frozen encoder.
        head: Structure of the head.
        rest: Where the other tensors of the decoder come from: the `average` of the specialists, or the `seed`.
        seed: The detector that the specialists started from, for `rest="seed"`. It is an expert only if it is also among the specialists.
        draw: Number that the rows of the routers depend on.
        router_std: Standard deviation of the rows.
        allow_strangers: Go on with decoders that do not come from one seed.

    Returns:
        The detector; train it, or at least its routers.

    Raises:
        InvalidInput: The number of specialists is another one, their architectures or encoders differ, one is upcycled already, they share
            no seed, or `rest="seed"` without a seed.

    Example:
        head = HeadMixtureConfig(experts=("clear", "rain", "fog"), decides_per="scene")
        made = upcycle_head([clear, rain, fog], head, rest="seed", seed=source)
        save_run_detector("runs/mixture", made.detector)
    """
    require_numbers("upcycle_head", least=0.0, most=10.0, router_std=router_std)
    require(
        len(specialists) == len(head.experts),
        f"the head has {len(head.experts)} experts ({', '.join(head.experts)}), and {len(specialists)} specialists were given; give one each",
    )
    require(rest != "seed" or seed is not None, 'rest="seed" keeps the seed\'s tensors, and no seed was given')
    names = list(head.experts)
    models = list(specialists)
    first = 0  # number of the model whose encoder and description are taken
    if seed is not None and not any(model is seed for model in models):
        models.append(seed)
        names.append("the seed")
    if seed is not None:
        first = next(number for number, model in enumerate(models) if model is seed)
    config = _common_config(models, names)
    _require_equal_encoders(models, names)
    made = UpcycledDetectorConfig(detector=config, head=head).build().eval()
    made.encoder.load_state_dict(models[first].encoder.state_dict())
    made.trained_on = models[first].trained_on
    decoder = made.decoder
    assert isinstance(decoder, MixtureDecoder)
    account = _fill(decoder, models, len(specialists), rest, first, allow_strangers)
    _draw_routers(decoder, draw, router_std)
    return UpcycledHead(detector=made, account=account, costs=head_costs(models[0], made))


def _common_config(
    models: Sequence[Detector], names: Sequence[str]
) -> SecondIouDetectorConfig | PvRcnnDetectorConfig | DefendedDetectorConfig:
    found = models[0].config
    for name, model in zip(names, models, strict=True):
        if isinstance(model.config, UpcycledDetectorConfig):
            raise InvalidInput(
                f"{name} has an upcycled head already ({model.config.head}); give dense detectors, or train this one further by `upcycle`"
            )
        if not isinstance(model.config, SecondIouDetectorConfig | PvRcnnDetectorConfig | DefendedDetectorConfig):
            raise InvalidInput(
                f"{name} is a {model.label} without a configuration of the table, so no file could hold its mixture"
            )
        mine, theirs = ({"kind": type(m.config).__name__, **config_to_json(m.config)} for m in (models[0], model))
        if different := first_difference(mine, theirs, names=(names[0], name)):
            raise InvalidInput(f"the specialists have different architectures: {different}; branch all of them from one detector")
    assert isinstance(found, SecondIouDetectorConfig | PvRcnnDetectorConfig | DefendedDetectorConfig)
    return found


def _require_equal_encoders(models: Sequence[Detector], names: Sequence[str]) -> None:
    mine = models[0].encoder.state_dict()
    for name, model in zip(names, models, strict=True):
        theirs = model.encoder.state_dict()
        odd = [
            key for key, value in mine.items() if not key.endswith("num_batches_tracked") and not torch.equal(value, theirs[key])
        ]
        if odd:
            raise InvalidInput(
                f"the encoders of {names[0]} and {name} differ in {len(odd)} of {len(mine)} tensors, first in {odd[0]!r}. Smashed scenes of "
                "one would mean nothing to the other. Specialize with a frozen encoder: `upcycle3d upcycle --method source_continued`"
            )


def _fill(
    decoder: MixtureDecoder, models: Sequence[Detector], experts: int, rest: Rest, first: int, allow_strangers: bool
) -> TensorAccount:
    """Write every tensor of the decoder."""
    head, sources = decoder.config, [model.decoder.state_dict() for model in models]
    target = {name.removeprefix("decoder."): value for name, value in decoder.state_dict().items()}
    ledger = TensorLedger(sources, target)
    plan = region_plan(models[0].decoder, head)
    sites = () if plan is None else plan.sites
    replaced = {name for site in sites for name in site.tensors}
    replaced |= {n for block in head.bev_blocks for n in sources[0] if n.startswith(f"bev_backbone.blocks.{block}.")}
    require_common_seed([model.decoder for model in models], tuple(replaced), allow_strangers=allow_strangers)

    def common(name: str) -> Tensor:
        return _common([source[name] for source in sources[:experts]], sources[first][name], rest)

    layers = {name.removesuffix(".mixture"): layer for name, layer in moe_layers(decoder.decoder)}
    for site in sites:
        norms = None
        if head.batch_norm == "share":
            inside = [n for spot in (site.up, site.down) if spot.norm is not None for n in spot.norm.names]
            norms = {name: common(name) for name in inside}
        for number in range(experts):
            layers[site.name].bank.set_expert(number, site.read(sources[number], norms))
    for block in head.bev_blocks:
        layer = bev_backbone_of(decoder.decoder).blocks[block]
        assert isinstance(layer, SceneBlockMixture)
        _fill_block(layer, f"bev_backbone.blocks.{block}", sources[:experts], common)
    for number, source in enumerate(sources):
        for name in source:
            is_expert = name in replaced and number < experts
            ledger.read(
                number, name, "became experts" if is_expert else "left out" if rest == "seed" and number != first else "kept"
            )
    for name in target:
        if name in sources[0] and name not in replaced:
            ledger.write(name, common(name), "the seed's" if rest == "seed" else "averaged")
        else:
            routes = name.startswith(("gate.", "descriptor.")) or ".router." in name
            ledger.mark_written(name, "router" if routes else "experts")
    return ledger.close()


def _fill_block(layer: SceneBlockMixture, name: str, sources: Sequence[dict[str, Tensor]], common: _Common) -> None:
    """Read the blocks of all sources into the experts of a BEV mixture."""
    for place in range(len(layer.norms)):
        conv, norm = f"{name}.{1 + 3 * place}", f"{name}.{2 + 3 * place}"
        for number, source in enumerate(sources):
            made = layer.experts[number][place]  # type: ignore[index]
            assert isinstance(made, nn.Conv2d)
            weight = source[f"{conv}.weight"]
            with torch.no_grad():
                if made.bias is None:
                    made.weight.copy_(weight)
                    continue
                flat, bias = fold_batch_norm(weight.flatten(1), None, _spot(norm), source)
                made.weight.copy_(flat.view_as(weight))
                made.bias.copy_(bias)
        shared = layer.norms[place]
        if isinstance(shared, nn.BatchNorm2d):
            shared.load_state_dict({key: common(f"{norm}.{key}") for key in shared.state_dict()})


def _spot(norm: str) -> NormSpot:
    keys = {
        "mean": "running_mean",
        "variance": "running_var",
        "weight": "weight",
        "bias": "bias",
        "counter": "num_batches_tracked",
    }
    return NormSpot(**{field: f"{norm}.{key}" for field, key in keys.items()}, eps=1e-3)


def _common(values: Sequence[Tensor], seed: Tensor, rest: Rest) -> Tensor:
    """The seed's tensor, or the mean in float64. Equal tensors stay as they are, bit by bit."""
    if rest == "seed":
        return seed
    if all(torch.equal(values[0], value) for value in values[1:]):
        return values[0]
    if not values[0].is_floating_point():
        return torch.stack(list(values)).amax(0)  # numbers of batches
    return torch.stack([value.double() for value in values]).mean(0).to(values[0].dtype)


@torch.no_grad()
def _draw_routers(decoder: MixtureDecoder, draw: int, std: float) -> None:
    """Draw the rows of all learned routers, each from its place and number."""
    for place, router in enumerate(learned_routers(decoder)):
        generator = torch.Generator().manual_seed(zlib.crc32(f"{draw}:{place}".encode()))
        router.weight.copy_(torch.randn(router.weight.shape, generator=generator) * std)
        if router.bias is not None:
            router.bias.zero_()


def learned_routers(decoder: MixtureDecoder) -> tuple[TopKRouter | SoftRouter, ...]:
    """List the routers of a head that have trained rows, the gate first.

    Args:
        decoder: The decoder.

    Returns:
        The routers in the order of the decoder.
    """
    inner: list[Router] = [router.inner if isinstance(router, GridMeanRouter) else router for router in decoder.routers()]
    return tuple(router for router in inner if isinstance(router, TopKRouter | SoftRouter))
