"""How active each hidden unit of a dense model is, by domain: what experts are cut by.

The activity of a unit is the mean size of what the last linear map of its FFN reads from it: |act(gate x) * up x| with a gate, else
|act(up x)|. Means are taken over tokens, padding left out, and added up in float64.

A domain is a name with batches of data. Where no domains are known, measure each document or scene as a domain of its own and join those
that activate the same units (`found_domains`).

Read next: `splits.py`, which chooses units by it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts
from ....core.tensor_value import shape_of
from ..layers.dense_ffn import DenseFfn
from ..surgery.ffn_sites import tensors_of
from ..surgery.replacement import ReplacementPlan
from .units import Carving, CarvingMethod, SiteUnits, UnitCarving

_B = TypeVar("_B")
_C = TypeVar("_C", bound=UnitCarving)
_A = TypeVar("_A", bound="UnitActivity[Any]")

Cluster = Callable[[Tensor, int], Tensor]
"""Divides the rows of a matrix (N, D) into k groups and returns the (N,) group of each. `cluster_features` of `upcycling/clusters.py`
does it: `lambda rows, k: cluster_features(rows, k, ClusterConfig()).assignment`."""

SeeHidden = Callable[[int, Tensor, Tensor], None]
"""Gets the number of a site, the (..., D) inputs of its FFN and its (..., F) hidden units, in each forward pass."""


# ---- looking into the FFNs of a model


class _Tap(nn.Module):
    """Computes an FFN and shows its hidden units."""

    def __init__(self, ffn: DenseFfn, number: int, see: SeeHidden) -> None:
        super().__init__()
        self.ffn, self.number, self.see = ffn, number, see
        self.weight = nn.Parameter(ffn.up, requires_grad=False)  # some models ask their first layer for its type

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.ffn.hidden(x)
        self.see(self.number, x, hidden)
        return torch.nn.functional.linear(hidden, self.ffn.down, self.ffn.down_bias)


@contextmanager
def watched_ffns(model: nn.Module, plan: ReplacementPlan, see: SeeHidden) -> Iterator[None]:
    """Show the hidden units of a dense model's FFNs in every forward pass inside the block, without gradients and dropout.

    Args:
        model: The dense model. Afterwards it is the same as before.
        plan: Its FFNs.
        see: Is called by every FFN.

    Yields:
        Nothing.
    """
    tensors = tensors_of(model)
    taps = {site.name: _Tap(site.read(tensors), number, see) for number, site in enumerate(plan.sites)}
    modes = [(module, module.training) for module in model.modules()]
    applied = plan.apply(model, taps)
    try:
        model.eval()
        with torch.no_grad():
            yield
    finally:
        applied.reverse()
        for module, training in modes:
            module.training = training


# ---- the measurement


@dataclass(frozen=True, kw_only=True, eq=False)
class SiteActivity:
    """How active the units of one FFN were."""

    site: str
    """Name of the FFN."""
    total: Tensor
    """(M, F) float64 sum of the sizes of each unit over the tokens of each of M domains."""
    tokens: Tensor
    """(M,) int64 number of tokens of each domain."""

    @property
    def mean(self) -> Tensor:
        """(M, F) float64 mean size of each unit in each domain."""
        return self.total / self.tokens[:, None]

    @property
    def never(self) -> int:
        """Number of units that were 0 for every token of every domain."""
        return int((self.total == 0).all(0).sum())


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitActivity(ABC, Generic[_C]):
    """How active the units of several layers were in each domain. `print(activity)` shows what to beware of.

    `Activity` is that of FFNs. Whatever carves other layers derives its own, and `splits.py` divides their units by the same rules.
    """

    layers: ClassVar[str] = "layers"
    """What `sites` are, for `print`."""
    domains: tuple[str, ...]
    """Names of the M domains."""
    sites: tuple[SiteActivity, ...]
    """The measurement of each layer."""
    least_tokens: int
    """A domain with fewer tokens is reported: the order of its units is mostly chance."""

    def __post_init__(self) -> None:
        require(
            bool(self.domains) and len(set(self.domains)) == len(self.domains), f"domains need different names: {self.domains}"
        )
        for site in self.sites:
            require(
                site.total.ndim == 2 and len(site.total) == len(self.domains),
                f"the activity of {site.site!r} must be ({len(self.domains)}, F), found {shape_of(site.total)}",
            )
            if not bool(site.total.isfinite().all()):
                raise InvalidInput(f"units of {site.site!r} were NaN or infinite; the model is damaged or its input is")
            empty = [self.domains[i] for i in (site.tokens == 0).nonzero()[:, 0].tolist()]
            require(not empty, f"no token of the domains {empty[:5]} arrived at {site.site!r}; give them data that reaches it")

    @abstractmethod
    def carved(self, domains: tuple[str, ...], ratio: float, method: CarvingMethod, units: tuple[SiteUnits, ...]) -> _C:
        """Make the carving of the layers that were measured.

        Args:
            domains: Name of each expert.
            ratio: Share of the units that was asked for.
            method: How the units were chosen.
            units: The units of each layer, in the order of `sites`.

        Returns:
            The carving.
        """

    @property
    def thin_domains(self) -> tuple[str, ...]:
        """Domains with fewer tokens than `least_tokens` at some layer."""
        fewest = torch.stack([site.tokens for site in self.sites]).min(0).values.tolist()
        return tuple(name for name, tokens in zip(self.domains, fewest) if tokens < self.least_tokens)

    @property
    def never_active(self) -> dict[str, int]:
        """Number of units that were never active, by the name of the layer; layers without such units are left out."""
        return {site.site: site.never for site in self.sites if site.never}

    def joined(self, groups: Sequence[int], names: Sequence[str]) -> Self:
        """Join domains: all tokens of a group count as one domain.

        Args:
            groups: Group of each domain.
            names: Name of each group.

        Returns:
            The activity of the groups.

        Raises:
            InvalidInput: A domain has no group, or a group has no domain.
        """
        require(
            len(groups) == len(self.domains) and sorted(set(groups)) == list(range(len(names))),
            f"{len(self.domains)} domains need one group each, and the groups 0..{len(names) - 1} a domain each; found {list(groups)[:20]}",
        )
        index = torch.tensor(groups)

        def added(of: Tensor) -> Tensor:
            return of.new_zeros(len(names), *of.shape[1:]).index_add_(0, index.to(of.device), of)

        sites = tuple(replace(s, total=added(s.total), tokens=added(s.tokens)) for s in self.sites)
        return replace(self, domains=tuple(names), sites=sites)

    def profiles(self) -> Tensor:
        """Describe each domain by the activity of all units, each layer's divided by its mean over domains and units.

        Returns:
            (M, sum of F) float32.
        """
        parts = [s.mean / s.mean.mean().clamp_min(torch.finfo(torch.float64).tiny) for s in self.sites]
        return torch.cat(parts, dim=1).float()

    def __str__(self) -> str:
        tokens = torch.stack([site.tokens for site in self.sites])
        pairs = zip(self.domains, tokens.min(0).values.tolist(), tokens.max(0).values.tolist())
        counts = ", ".join(f"{name} {low:,}" if low == high else f"{name} {low:,}..{high:,}" for name, low, high in pairs)
        lines = [f"activity of {len(self.sites)} {self.layers} in {len(self.domains)} domains; tokens: {counts}"]
        if self.thin_domains:
            lines.append(
                f"too few tokens (below {self.least_tokens}): {', '.join(self.thin_domains)}; their units are mostly chance"
            )
        units = sum(site.total.shape[1] for site in self.sites)
        lines.append(f"never active: {sum(self.never_active.values()):,} of {units:,} units")
        lines += [f"  {name}: {count}" for name, count in self.never_active.items()]
        return "\n".join(lines)


@dataclass(frozen=True, kw_only=True, eq=False)
class Activity(UnitActivity[Carving]):
    """How active the units of a model's FFNs were in each domain."""

    layers: ClassVar[str] = "FFNs"
    """What `sites` are, for `print`."""
    plan: ReplacementPlan
    """The FFNs, in the order of `sites`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for site, wanted in zip(self.sites, self.plan.sites, strict=True):
            require(
                (site.site, site.total.shape[1]) == (wanted.name, wanted.width_hidden),
                f"the activity of the {wanted.width_hidden} units of {wanted.name!r} was expected, found {site.site!r} with "
                f"{site.total.shape[1]}",
            )

    def carved(self, domains: tuple[str, ...], ratio: float, method: CarvingMethod, units: tuple[SiteUnits, ...]) -> Carving:
        """Make the carving of the FFNs, with one expert per token.

        Args:
            domains: Name of each expert.
            ratio: Share of the units that was asked for.
            method: How the units were chosen.
            units: The units of each FFN.

        Returns:
            The carving.
        """
        plan = replace(self.plan, experts=len(domains), active=1)
        return Carving(plan=plan, domains=domains, ratio=ratio, method=method, units=units)


class ActivitySums:
    """Adds up the sizes of units, layer by layer, for one domain after the other."""

    def __init__(self, widths: Mapping[str, int], domains: int) -> None:
        """Begin with nothing.

        Args:
            widths: Number of units of each layer by its name.
            domains: Number of domains.
        """
        self.names = tuple(widths)
        self.domain = 0
        self._total = [torch.zeros(domains, width, dtype=torch.float64) for width in widths.values()]
        self._tokens = torch.zeros(len(widths), domains, dtype=torch.int64)

    def add(self, layer: int, rows: Tensor) -> None:
        """Add the units of some tokens of the current `domain`.

        Args:
            layer: Number of the layer.
            rows: (T, F) units.
        """
        self._total[layer][self.domain] += rows.abs().sum(0, dtype=torch.float64).cpu()
        self._tokens[layer, self.domain] += len(rows)

    @property
    def sites(self) -> tuple[SiteActivity, ...]:
        """The measurement of each layer until now."""
        parts = zip(self.names, self._total, self._tokens.unbind())
        return tuple(SiteActivity(site=name, total=total, tokens=tokens) for name, total, tokens in parts)


def _without_padding(rows: Tensor, x: Tensor, padding: Tensor, site: str) -> Tensor:
    if padding.dtype != torch.bool or padding.shape != x.shape[:-1]:
        raise InvalidInput(
            f"padding must be bool of shape {tuple(x.shape[:-1])} at the FFN {site!r}, True for padding, found {shape_of(padding)}"
        )
    return rows[~padding.reshape(-1).to(rows.device)]


def measure_activity(
    model: nn.Module,
    plan: ReplacementPlan,
    domains: Mapping[str, Iterable[_B]],
    run: Callable[[nn.Module, _B], object],
    *,
    padding_of: Callable[[_B], Tensor | None] | None = None,
    least_tokens: int = 1024,
) -> Activity:
    """Measure how active each unit is in each domain. The model is the same afterwards.

    Args:
        model: The dense model.
        plan: Its FFNs.
        domains: Batches of each domain.
        run: Runs the model on a batch; it is called without gradients and in evaluation mode.
        padding_of: Gives the bool mask of a batch with the shape of the FFNs' tokens, such as (B, N), True for padding. None where
            there is no padding.
        least_tokens: A domain with fewer tokens is reported.

    Returns:
        The activity.

    Raises:
        InvalidInput: There is no domain, a domain has no token, a unit is not finite, or a mask has another shape.

    Example:
        plan = plan_replacement(model, experts=2, active=1)
        activity = measure_activity(model, plan, {"code": code_batches, "law": law_batches}, lambda m, ids: m(ids))
        carving = readme_split(activity, ratio=0.5)
    """
    require(bool(domains), "measure_activity needs at least one domain with batches")
    require_counts("measure_activity", least=0, most=10**9, least_tokens=least_tokens)
    sums = ActivitySums({site.name: site.width_hidden for site in plan.sites}, len(domains))
    padding: Tensor | None = None

    def see(site: int, x: Tensor, hidden: Tensor) -> None:
        rows = hidden.reshape(-1, hidden.shape[-1])
        sums.add(site, rows if padding is None else _without_padding(rows, x, padding, sums.names[site]))

    with watched_ffns(model, plan, see):
        for number, batches in enumerate(domains.values()):
            sums.domain = number
            for batch in batches:
                padding = None if padding_of is None else padding_of(batch)
                run(model, batch)
    return Activity(plan=plan, domains=tuple(domains), sites=sums.sites, least_tokens=least_tokens)


def found_domains(items: _A, count: int, cluster: Cluster) -> tuple[_A, Tensor]:
    """Find domains: items that activate the same units belong together.

    Args:
        items: The activity of each document or scene as a domain of its own. It takes 8 bytes for each item and unit.
        count: Number of domains to find.
        cluster: Divides rows into groups.

    Returns:
        The activity of the domains, called `cluster 0`, `cluster 1` and on; and the (items,) int64 domain of each item.

    Raises:
        InvalidInput: There are fewer items than domains, or a domain stayed empty.
    """
    require_counts("found_domains", count=count)
    require(count <= len(items.domains), f"{count} domains cannot be found among {len(items.domains)} items; measure more items")
    groups = cluster(items.profiles(), count)
    if groups.shape != (len(items.domains),) or len(groups.unique()) != count:
        raise InvalidInput(
            f"clustering {len(items.domains)} items gave {len(groups.unique())} of {count} groups as {shape_of(groups)}; ask for fewer domains"
        )
    return items.joined(groups.tolist(), [f"cluster {number}" for number in range(count)]), groups


def nearest_domains(items: Activity, domains: Activity) -> Tensor:
    """Find the domain that each item resembles most: the oracle of `found_domains` for documents that it has not seen.

    Args:
        items: The activity of each document or scene as a domain of its own.
        domains: The activity of the domains, in the same FFNs.

    Returns:
        (items,) int64 domain whose profile has the largest cosine with that of the item; of equal ones the first.

    Raises:
        InvalidInput: The two are of different FFNs.
    """
    if [s.site for s in items.sites] != [s.site for s in domains.sites]:
        raise InvalidInput("items and domains were measured in different FFNs; measure both with one plan")
    item, domain = (torch.nn.functional.normalize(part.profiles(), dim=1) for part in (items, domains))
    return (item @ domain.T).argmax(1)
