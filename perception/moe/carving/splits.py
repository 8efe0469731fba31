"""Carvings by activity: Read-ME's experts (Cai et al., 2024), and the controls that tell whether its domains matter.

| carving | experts | what it answers |
|---|---|---|
| `readme_split` | the most active units of each domain | the method |
| `pooled_units` | one: the most active units of all domains together | static pruning of the same width: **the baseline to beat** |
| `wrong_domain` | those of Read-ME, each domain with another one's | does it matter which expert serves a token? |
| `random_units` | drawn | does activity matter at all? (pruning at random is ruinous, so beating it says little) |

`shared_routed.py` has another family: units that all tokens use, and small groups that are chosen per token.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

import torch

from ....core.errors import require
from .activity import UnitActivity
from .units import UnitCarving, divided, top_units, units_of_ratio

_C = TypeVar("_C", bound=UnitCarving)


def readme_split(activity: UnitActivity[_C], ratio: float = 0.5) -> _C:
    """Cut one expert for each domain: its most active units, exactly the same number in each domain.

    Units that belong to all domains are shared. Each layer is divided by itself; expert i serves domain i everywhere.

    Args:
        activity: How active each unit is in each domain.
        ratio: Share of a layer's units that serves a token. 1 keeps the dense model.

    Returns:
        The carving. Of units that are equally active those with the smaller index are taken.

    Raises:
        InvalidInput: The ratio is outside of (0, 1].
    """
    units = tuple(divided(s.site, top_units(s.mean, units_of_ratio(s.mean.shape[1], ratio))) for s in activity.sites)
    return activity.carved(activity.domains, ratio, "readme", units)


def pooled_units(activity: UnitActivity[_C], ratio: float = 0.5) -> _C:
    """Keep one set of units for everything: static pruning of the same width, the honest baseline of a carving.

    Every domain counts the same, whatever its number of tokens and the size of its values: the means of each domain are divided by
    their own mean over the units of the layer. Join the domains first (`Activity.joined`) to count every token the same instead.

    Args:
        activity: How active each unit is in each domain.
        ratio: Share of a layer's units that is kept.

    Returns:
        A carving with one expert, all of whose units are shared.

    Raises:
        InvalidInput: The ratio is outside of (0, 1].
    """
    units = []
    for site in activity.sites:
        relative = site.mean / site.mean.mean(1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
        kept = top_units(relative.mean(0), units_of_ratio(site.mean.shape[1], ratio))
        units.append(divided(site.site, kept[None]))
    return activity.carved(("all",), ratio, "pooled", tuple(units))


def random_units(activity: UnitActivity[_C], ratio: float = 0.5, *, seed: int) -> _C:
    """Draw the units of each expert: as many as Read-ME gives them.

    Args:
        activity: Says which layers and domains there are; its numbers are not used.
        ratio: Share of a layer's units that serves a token.
        seed: Number that the draw depends on.

    Returns:
        The carving.

    Raises:
        InvalidInput: The ratio is outside of (0, 1].
    """
    draw = torch.Generator().manual_seed(seed)
    units = []
    for site in activity.sites:
        values = torch.rand(site.mean.shape, generator=draw)
        units.append(divided(site.site, top_units(values, units_of_ratio(site.mean.shape[1], ratio))))
    return activity.carved(activity.domains, ratio, "random", tuple(units))


def wrong_domain(carving: _C, shift: int = 1) -> _C:
    """Give each domain the units of another domain. The costs stay the same.

    Args:
        carving: A carving with an expert for each domain.
        shift: Domain i gets the units of domain i + shift, in a circle.

    Returns:
        The carving with its experts rotated.

    Raises:
        InvalidInput: The rotation gives every domain its own units back, or the experts belong to no domain.
    """
    number = carving.experts
    require(shift % number != 0, f"a shift of {shift} gives each of {number} domains its own units; use 1 to {number - 1}")
    fixed = [units.site for units in carving.units if units.representatives is not None]
    require(
        not fixed, f"the experts of {fixed[:1]} are chosen by their own units and belong to no domain; rotate a `readme_split`"
    )
    units = tuple(replace(units, own=units.own.roll(-shift, 0)) for units in carving.units)
    return replace(carving, method="wrong_domain", units=units)
