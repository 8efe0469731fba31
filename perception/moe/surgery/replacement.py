"""Replace FFNs of a model by other modules: say first what it will do and what it costs, do it, and undo it exactly.

`plan_replacement` looks at a model and changes nothing. Print the plan, then `apply` it; the result can `reverse` itself. Building
mixtures from dense models is the work of `upcyclers.py`, which uses these plans.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from fnmatch import fnmatchcase
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.nn import functional

from ....core.errors import InvalidInput, require, require_counts
from .ffn_search import BatchNormRule, Refused, find_ffns
from .ffn_sites import Edit, FfnSite, tensors_of

_Any = TypeVar("_Any")


@dataclass(frozen=True, kw_only=True)
class ReplacementPlan:
    """What will be replaced in a model, and what it costs. `print(plan)` shows a table.

    Example:
        plan = plan_replacement(model, experts=4, active=2)
        print(plan)
        result = sparse_copy(model, plan, RandomRouters(experts=4, rule=TopKRule(k=2, norm="renorm")))
    """

    sites: tuple[FfnSite, ...]
    """FFNs that will be replaced, in the order of the model's modules."""
    refused: tuple[Refused, ...]
    """What was looked at and stays as it is, with the reasons."""
    experts: int
    """Number of experts in the place of each FFN, E."""
    active: int
    """Number of experts that compute each token, k."""
    batch_norm: BatchNormRule
    """What happens to batch norms of the FFNs."""
    widest_input: int | None
    """FFNs with more inputs stay dense."""
    model_parameters: int
    """Parameters of the model before; tied ones count once."""
    site_parameters: tuple[int, ...]
    """Parameters of each dense FFN in the model, those of folded batch norms included."""
    expert_parameters: tuple[int, ...]
    """Parameters of one expert of each site: a folded batch norm has become a bias."""

    @property
    def parameters_after(self) -> int:
        """Parameters of the model after the replacement: E experts and a router without bias in each place."""
        routers = sum(site.width_in for site in self.sites)
        return self.model_parameters - sum(self.site_parameters) + self.experts * (sum(self.expert_parameters) + routers)

    @property
    def ffn_modules(self) -> tuple[str, ...]:
        """Names of the modules that hold the FFNs' tensors in the dense model: what a stage that trains FFNs only lets train."""
        owners = (tensor.rpartition(".")[0] for site in self.sites for tensor in site.tensors)
        return tuple(dict.fromkeys(owners))

    @property
    def multiply_adds_before(self) -> int:
        """Multiply-adds per token in all FFNs of the plan before."""
        return sum(site.multiply_adds for site in self.sites)

    @property
    def multiply_adds_after(self) -> int:
        """Multiply-adds per token in all FFNs of the plan after: k experts and the router."""
        return sum(self.active * site.multiply_adds + self.experts * site.width_in for site in self.sites)

    def __str__(self) -> str:
        return f"{self.table()}\nmodel: {self.model_parameters:,} -> {self.parameters_after:,} parameters"

    def table(self) -> str:
        """Show the FFNs, for callers that replace other parts too and count the whole model themselves.

        Returns:
            A line per FFN, their sum, and what stays dense.
        """
        header = ("FFN", "form", "widths", "parameters", "-> after", "multiply-adds", "-> after")
        rows = [header, *map(self._row, self.sites, self.site_parameters, self.expert_parameters)]
        before, after = sum(self.site_parameters), self.parameters_after - self.model_parameters + sum(self.site_parameters)
        sums = (f"{before:,}", f"{after:,}", f"{self.multiply_adds_before:,}", f"{self.multiply_adds_after:,}")
        rows.append((f"all {len(self.sites)}", "", "", *sums))
        widths = [max(len(row[i]) for row in rows) for i in range(len(header))]
        lines = ["  ".join(c.ljust(w) if i < 3 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths))) for row in rows]
        title = f"{len(self.sites)} FFNs become mixtures of {self.experts} experts, {self.active} active per token"
        rest = [f"stays dense: {refused}" for refused in self.refused]
        return "\n".join([title, *(line.rstrip() for line in lines), *rest])

    def _row(self, site: FfnSite, before: int, expert: int) -> tuple[str, ...]:
        gate = "gated " if site.gate is not None else ""
        folded = ", batch norm folded" if any(s is not None and s.norm is not None for s in (site.up, site.down)) else ""
        return (
            site.name,
            f"{site.kind}, {gate}{site.activation}{folded}",
            f"{site.width_in} -> {site.width_hidden} -> {site.width_out}",
            f"{before:,}",
            f"{self.experts * (expert + site.width_in):,}",
            f"{site.multiply_adds:,}",
            f"{self.active * site.multiply_adds + self.experts * site.width_in:,}",
        )

    def check(self, model: nn.Module, said: str = "the model") -> None:
        """Search a model again and refuse it if its FFNs are others than those of the plan.

        Args:
            model: A model that should have the structure of the planned one.
            said: What the message calls it.

        Raises:
            InvalidInput: An FFN of the plan is missing or differs in widths, gate, activation or place; the message names the first.
        """
        search = find_ffns(model, batch_norm=self.batch_norm, widest_input=self.widest_input)
        there = {site.name: site for site in search.sites}
        reasons = {refused.name: refused.reason for refused in search.refused}
        for site in self.sites:
            found = there.get(site.name)
            if found is None:
                raise InvalidInput(
                    f"{said} has no FFN {site.name!r}, which the plan replaces: {reasons.get(site.name, 'nothing like one is there')}"
                )
            for field in fields(FfnSite):
                mine, theirs = getattr(site, field.name), getattr(found, field.name)
                if mine != theirs and not field.name.startswith("dropout"):
                    raise InvalidInput(f"the FFN {site.name!r} of {said} has {field.name} {theirs}, and the plan has {mine}")

    def apply(self, model: nn.Module, modules: Mapping[str, nn.Module]) -> AppliedReplacement:
        """Put modules in the place of the FFNs, in the model itself.

        Args:
            model: The model that was planned for, or a copy.
            modules: One module for each site, by the site's name: (..., D) in, (..., O) out.

        Returns:
            What was done; its `reverse` undoes it.

        Raises:
            InvalidInput: A module is missing or belongs to no site, or the model has another structure. Nothing is changed then.
        """
        names = [site.name for site in self.sites]
        require(
            set(modules) == set(names),
            f"a plan for {len(names)} FFNs needs one module for each; missing {sorted(set(names) - set(modules))[:3]}, "
            f"and without a place {sorted(set(modules) - set(names))[:3]}",
        )
        tensors = tensors_of(model)
        for site in self.sites:
            site.read(tensors)
        changes = [change for site in self.sites for change in _changes(model, site, modules[site.name])]
        return AppliedReplacement(changes)


@dataclass(frozen=True, kw_only=True, eq=False)
class _Change:
    owner: nn.Module
    attribute: str
    path: str
    old: Any
    new: Any


class AppliedReplacement:
    """A replacement that was done. It holds the old modules, so `reverse` gives back the very same tensors."""

    def __init__(self, changes: Sequence[_Change]) -> None:
        self._changes: list[_Change] = []
        for change in changes:
            setattr(change.owner, change.attribute, change.new)
            self._changes.append(change)

    def reverse(self) -> None:
        """Put the old modules back.

        Raises:
            InvalidInput: A place was changed since, or the replacement was reversed already. Nothing is changed then.
        """
        require(bool(self._changes), "this replacement was reversed already")
        now: dict[tuple[int, str], Any] = {}
        for change in self._changes:
            now[id(change.owner), change.attribute] = change.new
        for change in self._changes:
            found, expected = getattr(change.owner, change.attribute), now[id(change.owner), change.attribute]
            require(
                found is expected or (not isinstance(expected, nn.Module) and found == expected),
                f"cannot put the old module back at {change.path!r}: it was changed since and is now {type(found).__name__}",
            )
        for change in reversed(self._changes):
            if isinstance(change.old, nn.Module) and isinstance(change.new, nn.Module):
                change.old.train(change.new.training)
            setattr(change.owner, change.attribute, change.old)
        self._changes = []


class MixtureSpot(nn.Module):
    """Holds a mixture where an FFN was spread over several layers, had its channels in front, or had a dropout behind it."""

    def __init__(self, mixture: nn.Module, *, channel_dim: int | None = None, dropout_after: float = 0.0) -> None:
        super().__init__()
        self.mixture = mixture
        self.channel_dim = channel_dim
        self.dropout_after = dropout_after

    @property
    def weight(self) -> Tensor:
        """First parameter of the mixture, for models that ask their first linear map for its type and device."""
        return next(self.mixture.parameters())

    def forward(self, x: Tensor) -> Tensor:
        """Run the mixture on the tokens.

        Args:
            x: (..., D), or with the channels at `channel_dim`.

        Returns:
            The outputs in the same order of dimensions.
        """
        if self.channel_dim is None:
            y = self.mixture(x)
        else:
            y = self.mixture(x.movedim(self.channel_dim, -1)).movedim(-1, self.channel_dim)
        return functional.dropout(y, self.dropout_after, self.training) if self.dropout_after else y

    def extra_repr(self) -> str:
        """Describe the spot, for `print`.

        Returns:
            The place of the channels and the dropout.
        """
        return f"channel_dim={self.channel_dim}, dropout_after={self.dropout_after}"


def unchanged(x: _Any) -> _Any:
    """Give back what it gets: takes the place of an activation that was a function.

    Args:
        x: Anything.

    Returns:
        The same object.
    """
    return x


def _changes(model: nn.Module, site: FfnSite, module: nn.Module) -> list[_Change]:
    """What changes at one site."""
    bare = site.kind in ("module", "pair") and site.channel_dim is None and not site.dropout_after
    spot = module if bare else MixtureSpot(module, channel_dim=site.channel_dim, dropout_after=site.dropout_after)
    made = []
    for edit in site.edits:
        owner = model.get_submodule(edit.owner)
        old = getattr(owner, edit.attribute)
        new = _replacement(edit, old, spot)
        if isinstance(new, nn.Module):
            new.train(owner.training)
        made.append(_Change(owner=owner, attribute=edit.attribute, path=edit.path, old=old, new=new))
    return made


def _replacement(edit: Edit, old: Any, spot: nn.Module) -> Any:
    if edit.becomes == "mixture":
        return spot
    if edit.becomes == "identity":
        return nn.Identity() if isinstance(old, nn.Module) else unchanged
    return 0 if edit.becomes == "zero" else False


def plan_replacement(
    model: nn.Module,
    *,
    experts: int,
    active: int = 2,
    only: Sequence[str] | None = None,
    choose: Callable[[FfnSite], bool] | None = None,
    batch_norm: BatchNormRule = "fold",
    widest_input: int | None = 8192,
) -> ReplacementPlan:
    """Look for the FFNs of a model and say what replacing them costs. The model is not changed.

    Args:
        model: Any model.
        experts: Number of experts in the place of each FFN.
        active: Number of experts that compute each token.
        only: Names of the FFNs to replace, or patterns such as `layers.1?.mlp`; None for all.
        choose: Says for each FFN whether it is replaced; None for all.
        batch_norm: What happens to batch norms of the FFNs.
        widest_input: FFNs with more inputs stay dense.

    Returns:
        The plan.

    Raises:
        InvalidInput: No FFN was found (the message says what was looked at), a pattern fits none, the model is quantized, or `active` is
            larger than `experts`.
    """
    require_counts("plan_replacement", experts=experts, active=active)
    require(active <= experts, f"a token cannot use {active} of {experts} experts; lower `active` or raise `experts`")
    search = find_ffns(model, batch_norm=batch_norm, widest_input=widest_input)
    if not search.sites:
        looked = "\n".join(f"  {refused}" for refused in search.refused) or "  nothing looked like one"
        raise InvalidInput(
            "found no FFN to replace: two linear maps (or convolutions of kernel size 1) with relu, gelu, gelu_tanh, quick_gelu or "
            f"silu between them, with or without a gate. The model has {search.contents}. Looked at:\n{looked}"
        )
    chosen = search.sites
    for pattern in only or ():
        if not any(fnmatchcase(site.name, pattern) for site in search.sites):
            raise InvalidInput(f"no FFN fits {pattern!r}; there are {', '.join(site.name for site in search.sites)}")
    if only is not None:
        chosen = tuple(site for site in chosen if any(fnmatchcase(site.name, pattern) for pattern in only))
    chosen = tuple(site for site in chosen if choose is None or choose(site))
    require(bool(chosen), f"none of the {len(search.sites)} FFNs was chosen; there are {', '.join(s.name for s in search.sites)}")
    tensors = tensors_of(model)
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return ReplacementPlan(
        sites=chosen,
        refused=search.refused,
        experts=experts,
        active=active,
        batch_norm=batch_norm,
        widest_input=widest_input,
        model_parameters=sum(parameter.numel() for parameter in model.parameters()),
        site_parameters=tuple(sum(tensors[n].numel() for n in site.tensors if n in parameters) for site in chosen),
        expert_parameters=tuple(sum(t.numel() for t in site.read(tensors).tensors().values()) for site in chosen),
    )
