"""Which units of a dense model's FFNs belong to which expert, as values, and what that costs when it is counted honestly.

In each FFN some units are *shared*: they are active for every token. Every expert has further units of its own. Experts are cut out of one
FFN, so a unit may belong to several of them and still has one set of weights. That is why there are three counts of parameters: *unique*
(different numbers that exist), *active* (numbers that a token uses) and *stored* (numbers in memory after the experts are materialized).

Read next: `splits.py`, which makes carvings; `masked_ffn.py`, the form to train; `carved_ffn.py`, the form to serve.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of
from ..surgery.ffn_sites import FfnSite, MapSpot
from ..surgery.replacement import ReplacementPlan

CarvingMethod = Literal["readme", "pooled", "random", "wrong_domain", "shared_routed", "given"]
"""How units were chosen: see `splits.py` and `shared_routed.py`; `given` by the caller."""


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteUnits:
    """Which units of one FFN belong to whom."""

    site: str
    """Name of the FFN."""
    shared: Tensor
    """(F,) bool, True for units that serve every token."""
    own: Tensor
    """(N, F) bool, True for units of each expert besides the shared ones; no unit is in both."""
    representatives: tuple[int, ...] | None = None
    """One unit of each expert whose size tells how well the expert fits a token; None where the decision comes from a router."""

    def __post_init__(self) -> None:
        good = self.shared.dtype == self.own.dtype == torch.bool and self.own.ndim == 2 and len(self.own) > 0
        if not good or self.shared.shape != self.own.shape[1:]:
            raise InvalidInput(
                f"units of {self.site!r} must be bool, shared (F,) and own (N, F), found {shape_of(self.shared)} and {shape_of(self.own)}"
            )
        both = (self.own & self.shared).any(0).nonzero()[:, 0].tolist()
        require(not both, f"units {both[:5]} of {self.site!r} are shared and an expert's own; a unit that all use is shared only")
        bare = (~self.with_shared.any(1)).nonzero()[:, 0].tolist()
        require(not bare, f"the experts {bare} of {self.site!r} have no unit at all; raise the ratio")
        if self.representatives is not None:
            number = len(self.representatives)
            require(
                number == self.experts and all(0 <= unit < self.width for unit in self.representatives),
                f"{self.experts} experts of {self.site!r} need one representative of {self.width} units each, found {self.representatives}",
            )

    @property
    def width(self) -> int:
        """Number of units of the dense FFN, F."""
        return self.shared.shape[0]

    @property
    def experts(self) -> int:
        """Number of experts, N."""
        return self.own.shape[0]

    @property
    def with_shared(self) -> Tensor:
        """(N, F) bool, all units that serve the tokens of each expert."""
        return self.own | self.shared

    @property
    def shared_units(self) -> Tensor:
        """(S,) int64 indices of the shared units, ascending."""
        return self.shared.nonzero()[:, 0]

    @property
    def own_widths(self) -> tuple[int, ...]:
        """Number of own units of each expert."""
        return tuple(self.own.sum(1).tolist())

    @property
    def union(self) -> int:
        """Number of units that belong to anyone; the others are pruned."""
        return int(self.with_shared.any(0).sum())

    def own_units(self, expert: int) -> Tensor:
        """Get the own units of an expert.

        Args:
            expert: Number of the expert.

        Returns:
            (P,) int64 indices, ascending.
        """
        return self.own[expert].nonzero()[:, 0]


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitCarving:
    """A division of the units of several layers among experts, whatever the layers are: FFNs, or channels of convolutions."""

    domains: tuple[str, ...]
    """Name of each expert: its domain, or its number where it has none."""
    ratio: float
    """Share of the units of a layer that a token uses, as it was asked for."""
    method: CarvingMethod
    """How the units were chosen."""
    units: tuple[SiteUnits, ...]
    """The units of each layer."""

    def __post_init__(self) -> None:
        require(
            self.method in get_args(CarvingMethod),
            f"{type(self).__name__}.method: one of {', '.join(get_args(CarvingMethod))}, found {self.method!r}",
        )
        require(0 < self.ratio <= 1, f"{type(self).__name__}.ratio must be in (0, 1], found {self.ratio}")
        odd = [units.site for units in self.units if units.experts != self.experts]
        require(
            not odd, f"{self.experts} experts ({', '.join(self.domains[:5])}) need units each, and {odd[:3]} has another number"
        )

    @property
    def experts(self) -> int:
        """Number of experts, N."""
        return len(self.domains)

    @property
    def shared_share(self) -> float:
        """Share of all units that is shared by all experts (the paper's permanent units)."""
        return sum(int(units.shared.sum()) for units in self.units) / self._all_units

    @property
    def union_share(self) -> float:
        """Share of all units that belongs to anyone."""
        return sum(units.union for units in self.units) / self._all_units

    @property
    def _all_units(self) -> int:
        return sum(units.width for units in self.units)


@dataclass(frozen=True, kw_only=True, eq=False)
class Carving(UnitCarving):
    """A division of all planned FFNs of a model into experts. `print(carving)` shows a table and the counts."""

    plan: ReplacementPlan
    """The FFNs, the number of experts N, and the number of experts per token (`plan.active`, 1 in Read-ME). `units` are in its order."""

    def __post_init__(self) -> None:
        require(
            self.plan.experts == len(self.domains),
            f"a plan for {self.plan.experts} experts needs their names, found {len(self.domains)}: {self.domains[:5]}",
        )
        super().__post_init__()
        for site, units in zip(self.plan.sites, self.units, strict=True):
            require(
                (units.site, units.width) == (site.name, site.width_hidden),
                f"the FFN {site.name!r} has {site.width_hidden} units, and the carving describes {units.site!r} with {units.width}",
            )

    @property
    def active(self) -> int:
        """Number of experts that serve a token, besides the shared units."""
        return self.plan.active

    @property
    def dense_parameters(self) -> int:
        """Parameters of the dense FFNs."""
        return sum(self._count(site, site.width_hidden) for site in self.plan.sites)

    @property
    def unique_parameters(self) -> int:
        """Different parameters that are left: those of units that belong to anyone, and the output biases."""
        return sum(self._count(site, units.union) for site, units in self._pairs())

    @property
    def active_parameters(self) -> int:
        """Parameters that a token uses in all FFNs, at most: the shared units and the widest experts that it can choose. Without routers."""
        return sum(self._count(site, self._active_units(units)) for site, units in self._pairs())

    @property
    def expert_parameters(self) -> tuple[int, ...]:
        """Parameters of the own units of each expert over all FFNs: what is loaded when the expert is needed."""
        return tuple(sum(_per_unit(s) * u.own_widths[expert] for s, u in self._pairs()) for expert in range(self.experts))

    @property
    def shared_parameters(self) -> int:
        """Parameters of the shared units and the output biases over all FFNs: what is always in memory."""
        return sum(self._count(site, int(units.shared.sum())) for site, units in self._pairs())

    def stored_parameters(self, *, fuse: bool = False) -> int:
        """Count the numbers that the serving form holds, copies and padding included, routers left out.

        Args:
            fuse: Whether every expert holds a copy of the shared units.

        Returns:
            Number of parameters.
        """
        total = 0
        for site, units in self._pairs():
            out_bias = site.width_out if _has_bias(site.down) else 0
            shared = int(units.shared.sum())
            if fuse and any(units.own_widths):  # without own units there is nothing to choose, and one FFN serves all
                widest = shared + max(units.own_widths)
                total += self.experts * (_per_unit(site, stacked=True) * widest + out_bias)
            else:
                total += _per_unit(site) * shared + out_bias
                total += self.experts * _per_unit(site, stacked=True) * max(units.own_widths)
        return total

    def __str__(self) -> str:
        header = ("FFN", "units", "shared", "own", "active", "pruned")
        rows = [header, *(self._row(units) for units in self.units)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        table = ["  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows]
        dense = self.dense_parameters

        def said(number: int) -> str:
            return f"{number:,} ({number / dense:.1%})"

        return "\n".join(
            [
                f"{self.method}: {self.experts} experts ({', '.join(self.domains)}), {self.active} per token, ratio {self.ratio:g}",
                *(line.rstrip() for line in table),
                f"shared {self.shared_share:.1%} and in use {self.union_share:.1%} of all units",
                f"parameters of the FFNs: dense {dense:,}, unique {said(self.unique_parameters)}, active {said(self.active_parameters)}",
                f"stored {said(self.stored_parameters())}; with the shared units in every expert {said(self.stored_parameters(fuse=True))}",
            ]
        )

    def _row(self, units: SiteUnits) -> tuple[str, ...]:
        low, high = min(units.own_widths), max(units.own_widths)
        own = f"{low:,}" if low == high else f"{low:,}..{high:,}"
        counts = (units.width, int(units.shared.sum()), self._active_units(units), units.width - units.union)
        width, shared, active, pruned = (f"{count:,}" for count in counts)
        return units.site, width, shared, own, active, pruned

    def _active_units(self, units: SiteUnits) -> int:
        return int(units.shared.sum()) + sum(sorted(units.own_widths)[-self.active :])

    def _pairs(self) -> list[tuple[FfnSite, SiteUnits]]:
        return list(zip(self.plan.sites, self.units))

    @staticmethod
    def _count(site: FfnSite, units: int) -> int:
        return _per_unit(site) * units + (site.width_out if _has_bias(site.down) else 0)


def _has_bias(spot: MapSpot | None) -> bool:
    """Whether a linear map has a bias once its batch norm is folded in."""
    return spot is not None and (spot.bias is not None or spot.norm is not None)


def _per_unit(site: FfnSite, *, stacked: bool = False) -> int:
    """Parameters of one unit. Banks of gated experts hold both biases where one exists."""
    biases = int(_has_bias(site.up)) + int(_has_bias(site.gate))
    if stacked and site.gate is not None and biases:
        biases = 2
    return site.width_in * (1 if site.gate is None else 2) + site.width_out + biases


def top_units(values: Tensor, count: int) -> Tensor:
    """Choose the units with the largest values. Of equal values the unit with the smaller index wins.

    Args:
        values: (..., F) one value per unit.
        count: Number of units to choose.

    Returns:
        (..., F) bool with exactly `count` True in each row.

    Raises:
        InvalidInput: There are fewer units, or a value is NaN.
    """
    require(0 <= count <= values.shape[-1], f"cannot choose {count} of {values.shape[-1]} units")
    if bool(values.isnan().any()):
        raise InvalidInput("the value of a unit is NaN, so units cannot be put in order; the model is damaged or its input is")
    order = values.sort(dim=-1, descending=True, stable=True).indices[..., :count]
    return torch.zeros(values.shape, dtype=torch.bool, device=values.device).scatter_(-1, order, True)


def units_of_ratio(width: int, ratio: float) -> int:
    """Count the units that a ratio asks for.

    Args:
        width: Number of units of the FFN, F.
        ratio: Share in (0, 1].

    Returns:
        The nearest whole number, at least 1.

    Raises:
        InvalidInput: The ratio is outside of (0, 1].
    """
    require(0 < ratio <= 1, f"the ratio of units must be in (0, 1], found {ratio}")
    return max(1, round(width * ratio))


def divided(site: str, kept: Tensor, representatives: Sequence[int] | None = None) -> SiteUnits:
    """Divide the units of each expert into those that all experts have, which are shared, and its own.

    Args:
        site: Name of the FFN.
        kept: (N, F) bool, all units of each expert.
        representatives: One unit of each expert, or None.

    Returns:
        The units.
    """
    shared = kept.all(0)
    return SiteUnits(
        site=site,
        shared=shared,
        own=kept & ~shared,
        representatives=None if representatives is None else tuple(representatives),
    )
