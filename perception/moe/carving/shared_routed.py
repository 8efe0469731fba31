"""Carvings of another family: units that serve every token, and small groups of units of which each token chooses some in every layer.

This follows CMoE (Pei et al., 2025). The units that are most often among the most active ones of a token are shared. The others are
clustered into groups of equal size by the tokens in which they are active together. In each group one unit represents it, and the size of
that unit's value tells how well the group fits a token: an analytic router, which nothing trains.

ExpertWeaver (2026) also divides an FFN into shared and routed units by its activations without training. What its abstract says of it is
this scheme; its details are not claimed here.

The differences from Read-ME: no unit is pruned, a token may use any of many groups, and the decision of a layer is known only when
the layer is reached.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.tensor_value import shape_of
from ..layers.dense_ffn import DenseFfn, activate
from ..layers.routers import Router
from ..layers.routing import Routing, TokenPlaces
from ..surgery.replacement import ReplacementPlan
from .activity import watched_ffns
from .units import Carving, SiteUnits, top_units, units_of_ratio

_B = TypeVar("_B")


@dataclass(frozen=True, kw_only=True, eq=False)
class UnitPatterns:
    """In which tokens each unit was among the most active ones."""

    plan: ReplacementPlan
    """The FFNs."""
    marks: tuple[Tensor, ...]
    """For each FFN (T, F) bool: True where the unit was among the token's most active ones."""
    share: float
    """Share of the units that is marked in each token."""


def unit_patterns(
    model: nn.Module,
    plan: ReplacementPlan,
    batches: Iterable[_B],
    run: Callable[[nn.Module, _B], object],
    *,
    share: float = 0.1,
    tokens: int = 2048,
    padding_of: Callable[[_B], Tensor | None] | None = None,
) -> UnitPatterns:
    """Mark the most active units of some tokens. The model is the same afterwards.

    Args:
        model: The dense model.
        plan: Its FFNs.
        batches: Data of all domains, in turn: the first tokens are taken.
        run: Runs the model on a batch.
        share: Share of the units that is marked in each token.
        tokens: Most tokens of each FFN.
        padding_of: Gives the bool mask of a batch, True for padding.

    Returns:
        The patterns. They take one byte for each token and unit.

    Raises:
        InvalidInput: No token arrived at an FFN.
    """
    require_counts("unit_patterns", tokens=tokens)
    kept: list[list[Tensor]] = [[] for _ in plan.sites]
    counts = [0] * len(plan.sites)
    padding: Tensor | None = None

    def see(site: int, x: Tensor, hidden: Tensor) -> None:
        rows = hidden.reshape(-1, hidden.shape[-1])
        rows = rows if padding is None else rows[~padding.reshape(-1).to(rows.device)]
        rows = rows[: tokens - counts[site]]
        if len(rows):
            kept[site].append(top_units(rows.abs().float(), units_of_ratio(rows.shape[1], share)).cpu())
            counts[site] += len(rows)

    with watched_ffns(model, plan, see):
        for batch in batches:
            padding = None if padding_of is None else padding_of(batch)
            run(model, batch)
            if min(counts) >= tokens:
                break
    for site, count in zip(plan.sites, counts):
        require(count > 0, f"no token arrived at the FFN {site.name!r}; run the model on data that reaches it")
    return UnitPatterns(plan=plan, marks=tuple(torch.cat(parts) for parts in kept), share=share)


def shared_and_routed(
    patterns: UnitPatterns, *, shared: float = 0.25, groups: int = 8, active: int = 2, rounds: int = 5
) -> Carving:
    """Divide each FFN into shared units and groups of which a token chooses some.

    Args:
        patterns: In which tokens each unit was active.
        shared: Share of the units that serves every token: those that are most often marked.
        groups: Number of groups of the other units. Their sizes differ by 1 at most.
        active: Number of groups that serve a token. For a ratio r of active units choose shared + active / groups * (1 - shared) = r.
        rounds: Most rounds of the clustering.

    Returns:
        The carving. Its `ratio` is what these numbers make.

    Raises:
        InvalidInput: More groups than units are left, or more are active than there are.
    """
    require_numbers("shared_and_routed", least=0.0, most=1.0, shared=shared)
    require_counts("shared_and_routed", groups=groups, active=active, rounds=rounds)
    require(active <= groups, f"a token cannot use {active} of {groups} groups; lower `active` or raise `groups`")
    units = []
    for site, marks in zip(patterns.plan.sites, patterns.marks):
        always = top_units(marks.sum(0).double(), round(shared * site.width_hidden))
        rest = (~always).nonzero()[:, 0]
        require(
            len(rest) >= groups,
            f"{site.name!r} has {len(rest)} of {site.width_hidden} units left for {groups} groups; lower `shared` or `groups`",
        )
        group, representative = _balanced_groups(marks[:, rest].T.float(), groups, rounds)
        own = torch.zeros(groups, site.width_hidden, dtype=torch.bool)
        own[group, rest] = True
        chosen = tuple(rest[representative].tolist())
        units.append(SiteUnits(site=site.name, shared=always, own=own, representatives=chosen))
    ratio = shared + active / groups * (1 - shared)
    plan = replace(patterns.plan, experts=groups, active=active)
    names = tuple(f"group {number}" for number in range(groups))
    return Carving(plan=plan, domains=names, ratio=ratio, method="shared_routed", units=tuple(units))


def _balanced_groups(points: Tensor, groups: int, rounds: int) -> tuple[Tensor, Tensor]:
    """k-means with groups of equal size: each round assigns all points at the smallest total distance that the sizes allow.

    The first centers are the points that are most often active, as in CMoE. Returns the (n,) group of each point and, for each group, the
    point that lies nearest to its center.
    """
    number = len(points)
    sizes = [number // groups + (group < number % groups) for group in range(groups)]
    slot = torch.repeat_interleave(torch.arange(groups), torch.tensor(sizes))
    centers = points[points.sum(1).sort(descending=True, stable=True).indices[:groups]]
    group = torch.full((number,), -1)
    for _ in range(rounds):
        cost = torch.cdist(points, centers).square()
        _, column = linear_sum_assignment(cost[:, slot].double().numpy())
        before, group = group, slot[torch.from_numpy(np.ascontiguousarray(column))]
        centers = torch.stack([points[group == g].mean(0) for g in range(groups)])
        if torch.equal(before, group):
            break
    cost = torch.cdist(points, centers)
    nearest = [int(cost[:, g].masked_fill(group != g, torch.inf).argmin()) for g in range(groups)]
    return group, torch.tensor(nearest)


class RepresentativeRouter(Router):
    """Chooses the k experts whose representative unit is largest in a token; each has the weight 1.

    Its weights are copies of the representatives' rows at the time of the carving. They are buffers, so nothing trains them.
    """

    up: Tensor
    gate: Tensor | None
    up_bias: Tensor | None
    gate_bias: Tensor | None

    def __init__(self, ffn: DenseFfn, representatives: tuple[int, ...], k: int) -> None:
        super().__init__()
        require(1 <= k <= len(representatives), f"a token cannot use {k} of {len(representatives)} experts")
        self.num_experts, self.k, self.activation = len(representatives), k, ffn.activation
        rows = torch.tensor(representatives)
        for name in ("up", "gate", "up_bias", "gate_bias"):
            tensor: Tensor | None = getattr(ffn, name)
            self.register_buffer(name, None if tensor is None else tensor.detach()[rows.to(tensor.device)].clone())

    def forward(self, x: Tensor, places: TokenPlaces | None = None) -> Routing:
        """Choose experts. No gradient reaches the token through the choice.

        Args:
            x: (T, D) tokens.
            places: Not used.

        Returns:
            The decision, with weights of 1.

        Raises:
            InvalidInput: The tokens have another width.
        """
        if x.ndim != 2 or x.shape[1] != self.up.shape[1]:
            raise InvalidInput(f"the router takes tokens of shape (T, {self.up.shape[1]}), found {shape_of(x)}")
        dtype = torch.float64 if x.dtype == torch.float64 else torch.float32

        def linear(weight: Tensor, bias: Tensor | None) -> Tensor:
            return F.linear(x.detach().to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

        with torch.autocast(x.device.type, enabled=False):
            size = linear(self.up, self.up_bias)
            if self.gate is None:
                size = activate(size, self.activation)
            else:
                size = activate(linear(self.gate, self.gate_bias), self.activation) * size
            size = size.abs()
        index = size.topk(self.k, dim=1).indices
        return Routing(logits=size, probs=size.softmax(1), index=index, weight=torch.ones_like(index, dtype=dtype))

    def extra_repr(self) -> str:
        """Describe the router, for `print`.

        Returns:
            Sizes.
        """
        return f"top {self.k} of {self.num_experts} by the size of one unit each"
