"""Channels inside a decoder that can be left out while everything around them stays whole: where they are, and how they are cut.

    convolution ─ batch norm ─ ReLU ─ (dropout) ─ convolution
        its rows    its values    ^ units         its columns

The *units* of a site are the outputs of a ReLU that exactly one further convolution reads. Without some of them, the rows of the first
convolution, the values of the batch norm and the columns of the second go, and nothing else changes: it is exact, in training too. Both the
chains of a region head and the blocks of the BEV backbone are built so. The output of a chain or of a block stays whole.

Read next: `../narrow.py`, a detector with such a decoder; `perception/moe/driving/channel_carving.py`, which chooses the units.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from .bev import BevBackbone
from .decoder import Decoder
from .mixture import RegionMixtures

UnitTokens = Literal["scenes", "regions"]
"""What one row of a site's units is: a scene, or a region."""


@dataclass(frozen=True, kw_only=True)
class ChannelSite:
    """One set of units: names of the modules around it."""

    name: str
    """The convolution whose outputs they are."""
    norm: str | None
    """Its batch norm, or None."""
    activation: str
    """The ReLU behind it, whose outputs are the units."""
    reader: str
    """The convolution that reads them."""
    width: int
    """Number of units, F."""
    tokens: UnitTokens
    """What one row of the units is."""

    @property
    def tensors(self) -> tuple[str, ...]:
        """Names of the tensors that change when units are left out, as in a state dict. Some may not exist, such as a bias."""
        norm = () if self.norm is None else tuple(f"{self.norm}.{key}" for key in _NORM_TENSORS)
        return (f"{self.name}.weight", f"{self.name}.bias", *norm, f"{self.reader}.weight")


_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")


def channel_sites(
    decoder: Decoder, *, regions: RegionMixtures = "all", bev_blocks: Sequence[int] = (0, 1)
) -> tuple[ChannelSite, ...]:
    """Find the units of a decoder.

    Args:
        decoder: A dense decoder.
        regions: Which chains of the region head: those that read score and box (`branches`), `all`, or `none`.
        bev_blocks: Numbers of the blocks of the BEV backbone.

    Returns:
        The sites, chain by chain and block by block, in the order in which they compute.

    Raises:
        InvalidInput: A part does not exist, or nothing in these parts can be left out.
    """
    require(regions in get_args(RegionMixtures), f"regions must be one of {get_args(RegionMixtures)}, found {regions!r}")
    backbone = getattr(decoder, "bev_backbone", None)
    blocks = len(backbone.blocks) if isinstance(backbone, BevBackbone) else 0
    odd = [block for block in bev_blocks if not 0 <= block < blocks]
    require(not odd, f"{type(decoder).__name__} has {blocks} BEV blocks, and {odd} were named")
    parts = {"none": (), "branches": decoder.branch_parts, "all": (*decoder.wide_parts, *decoder.branch_parts)}[regions]
    chains: list[tuple[str, UnitTokens]] = [(f"bev_backbone.blocks.{block}", "scenes") for block in bev_blocks]
    chains += [(part, "regions") for part in parts]
    found = [site for name, tokens in chains for site in _sites_of(name, decoder.get_submodule(name), tokens)]
    if not found:
        raise InvalidInput(
            f"found no channels to leave out in {', '.join(name for name, _ in chains) or 'no part'} of this "
            f"{type(decoder).__name__}: two convolutions with a ReLU between them are needed"
        )
    return tuple(found)


def _sites_of(chain: str, layers: nn.Module, tokens: UnitTokens) -> Iterator[ChannelSite]:
    """The units between the convolutions of one chain."""
    named = list(layers.named_children())
    for place, (name, layer) in enumerate(named):
        if not isinstance(layer, _ConvNd) or layer.groups != 1:
            continue
        rest = named[place + 1 :]
        norm = rest[0][0] if rest and isinstance(rest[0][1], _BatchNorm) else None
        rest = rest[norm is not None :]
        if not rest or not isinstance(rest[0][1], nn.ReLU):
            continue
        after = [(key, module) for key, module in rest[1:] if not isinstance(module, nn.Dropout | nn.Identity)]
        if after and isinstance(reader := after[0][1], _ConvNd) and reader.groups == 1:
            yield ChannelSite(
                name=f"{chain}.{name}",
                norm=None if norm is None else f"{chain}.{norm}",
                activation=f"{chain}.{rest[0][0]}",
                reader=f"{chain}.{after[0][0]}",
                width=layer.out_channels,
                tokens=tokens,
            )


@torch.no_grad()
def keep_channels(decoder: nn.Module, kept: Mapping[ChannelSite, Tensor]) -> None:
    """Leave out units of a decoder. Its layers become smaller, and compute what they would with the other units set to zero.

    Args:
        decoder: The decoder, which is changed. Its parameters are new objects.
        kept: (K,) int64 units of each site that stay, K at least 1.

    Raises:
        InvalidInput: A site has other units.
    """
    for site, units in kept.items():
        conv, reader = _conv(decoder, site.name), _conv(decoder, site.reader)
        good = units.ndim == 1 and len(units) > 0 and conv.out_channels == reader.in_channels == site.width
        if not good or not 0 <= int(units.min()) <= int(units.max()) < site.width:
            raise InvalidInput(
                f"the units of {site.name!r} must be some of {site.width}, found {shape_of(units)}; the layer has {conv.out_channels} "
                f"outputs and {site.reader!r} reads {reader.in_channels}"
            )
        _replace(conv, "weight", conv.weight[units])
        if conv.bias is not None:
            _replace(conv, "bias", conv.bias[units])
        _replace(reader, "weight", reader.weight[:, units])
        conv.out_channels = reader.in_channels = len(units)
        if site.norm is not None:
            norm = decoder.get_submodule(site.norm)
            assert isinstance(norm, _BatchNorm)
            norm.num_features = len(units)
            for key in _NORM_TENSORS:
                value = getattr(norm, key)
                if value is not None:
                    _replace(norm, key, value[units])


def _conv(decoder: nn.Module, name: str) -> _ConvNd:
    module = decoder.get_submodule(name)
    if not isinstance(module, _ConvNd):
        raise InvalidInput(f"{name!r} is a {type(module).__name__} here, and a convolution was expected")
    return module


def _replace(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a smaller tensor in the place of a parameter or a buffer."""
    old = getattr(module, name)
    own = value.clone(memory_format=torch.contiguous_format)
    setattr(module, name, nn.Parameter(own, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else own)
