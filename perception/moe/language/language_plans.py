"""What BAM or a baseline will replace in a language model and what that costs, before anything is loaded twice, trained or written.

Options that do not fit together are refused here: by `check_experts` from the arguments alone, and by the plans from the structure of the
model. Read next: `language_upcycling.py`, which carries the plans out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import nn

from ....core.errors import InvalidInput, require
from ..attention.attention_sites import AttentionPlan, plan_attentions
from ..attention.model_cost import ModelCost, model_cost
from ..attention.soft_attention import KeyValues
from ..checkpoints.mixtral import require_mixtral_base
from ..layers.routing import TopKRule
from ..surgery.replacement import ReplacementPlan, plan_replacement
from ..upcycling.upcyclers import RandomRouters

FfnRouting = Literal["top1", "top2", "soft"]
"""How FFN experts are chosen: `top1` by its probability (BAM), `top2` renormalized (BTX, Mixtral), `soft` all of them."""
BaselineMethod = Literal["sparse", "drop", "cluster", "btx", "soup", "wide", "continued", "flexolmo"]
"""A method to compare BAM with."""
ModelFormat = Literal["auto", "mixtral", "mixture"]
"""`mixtral` writes a Hugging Face folder, `mixture` our own file; `auto` a Mixtral where the model is one."""


def rule_of(routing: FfnRouting) -> TopKRule | None:
    """Give the rule of a way to choose FFN experts.

    Args:
        routing: The way.

    Returns:
        The rule; None for soft routing.

    Raises:
        InvalidInput: The way is unknown.
    """
    require(
        routing in get_args(FfnRouting), f"FFN experts are chosen by one of {', '.join(get_args(FfnRouting))}, found {routing!r}"
    )
    return {"top1": TopKRule(k=1, norm="none"), "top2": TopKRule(k=2, norm="renorm"), "soft": None}[routing]


@dataclass(frozen=True, kw_only=True)
class MixOptions:
    """What BAM and the baselines that take specialists have in common."""

    ffn: FfnRouting = "top1"
    """How FFN experts are chosen."""
    only: tuple[str, ...] = ()
    """Names or patterns of the blocks' parts to replace, such as `model.layers.2?.*`; all by default."""
    corrected: bool = True
    """Whether a top-1 FFN is multiplied by the number of experts, so that it starts as strong as the dense one."""
    seed: int = 0
    """Number that the routers depend on."""

    def plan(self, model: nn.Module, experts: int) -> ReplacementPlan:
        """Plan the FFNs.

        Args:
            model: The dense model.
            experts: Number of experts.

        Returns:
            The plan.
        """
        rule = rule_of(self.ffn)
        return plan_replacement(model, experts=experts, active=experts if rule is None else rule.k, only=self.only or None)

    def routers(self, experts: int) -> RandomRouters:
        """Make routers.

        Args:
            experts: Number of experts.

        Returns:
            What makes them.
        """
        return RandomRouters(experts=experts, rule=rule_of(self.ffn), seed=self.seed)

    def scale(self, experts: int) -> float:
        """Give the factor of the experts' outputs.

        Args:
            experts: Number of experts.

        Returns:
            The factor.
        """
        return float(experts) if self.corrected and self.ffn == "top1" else 1.0


@dataclass(frozen=True, kw_only=True)
class LanguagePlan:
    """What will be replaced in a language model, and what the whole model costs before and after. `print(plan)` shows it."""

    ffns: ReplacementPlan | None
    """The FFNs; None where the result is as dense as the seed."""
    attentions: AttentionPlan | None
    """The attentions; None where they stay as they are."""
    before: ModelCost
    """Cost of the dense model."""
    after: ModelCost
    """Cost of the result."""
    wider: bool = False
    """Whether each FFN becomes as wide as the active experts of `ffns`, instead of a mixture of them."""

    def __str__(self) -> str:
        parts = ["the result is dense and costs what the seed costs"]
        if self.ffns is not None:
            parts = [self.ffns.table()]
            if self.wider:
                parts = [f"{len(self.ffns.sites)} FFNs become {self.ffns.active} times as wide; the result is dense"]
        parts += [] if self.attentions is None else [str(self.attentions)]
        return "\n".join([*parts, cost_text(self.before, self.after)])


def cost_text(before: ModelCost, after: ModelCost) -> str:
    """Say what a model costs before and after.

    Args:
        before: Cost of the dense model.
        after: Cost of the result; the same cost for a model alone.

    Returns:
        Two lines.
    """

    def pair(old: int, new: int) -> str:
        return f"{old:,} -> {new:,}" if before != after else f"{new:,}"

    return (
        f"parameters of the whole model: {pair(before.stored, after.stored)} stored, {pair(before.active, after.active)} active per token\n"
        f"multiply-adds per token with {before.context} keys: {pair(before.multiply_adds, after.multiply_adds)}"
    )


def check_experts(experts: int, routing: FfnRouting) -> None:
    """Refuse fewer experts than a token uses.

    Args:
        experts: Number of experts.
        routing: How they are chosen.

    Raises:
        InvalidInput: There are too few; the message names the options of the command.
    """
    rule = rule_of(routing)
    active = 1 if rule is None else rule.k
    if experts < active:
        instead = ", or choose one expert per token (--ffn top1)" if active > 1 and experts == 1 else ""
        raise InvalidInput(
            f"--ffn {routing} needs {active} experts or more, found --experts {experts}; give --experts {max(2, active)} or more{instead}"
        )


def plan_bam(model: nn.Module, options: MixOptions, experts: int, *, key_values: KeyValues, context: int = 256) -> LanguagePlan:
    """Plan BAM.

    Args:
        model: The seed.
        options: How FFNs are mixed, and which parts.
        experts: Number of models, the seed included.
        key_values: Whether attention experts have key and value maps of their own.
        context: Number of keys that a query is counted to see.

    Returns:
        The plan.

    Raises:
        InvalidInput: A pattern fits nothing, or the model has no FFN or attention that can be mixed.
    """
    ffns = options.plan(model, experts)
    attentions = plan_attentions(model, experts=experts, key_values=key_values, only=options.only or None)
    before = model_cost(model, context=context)
    after = _with_experts(before, ffns)
    grown = attentions.parameters_after - attentions.parameters_before
    after = replace(
        after,
        stored=after.stored + grown,
        active=after.active + grown,
        multiply_adds=after.multiply_adds
        + attentions.multiply_adds(context, after=True)
        - attentions.multiply_adds(context, after=False),
    )
    return LanguagePlan(ffns=ffns, attentions=attentions, before=before, after=after)


def plan_baseline(
    method: BaselineMethod,
    model: nn.Module,
    options: MixOptions,
    experts: int,
    *,
    form: ModelFormat = "auto",
    context: int = 256,
) -> LanguagePlan:
    """Plan a baseline.

    Args:
        method: The baseline.
        model: The seed.
        options: How FFNs are mixed, and which parts.
        experts: Number of experts.
        form: Form of the result.
        context: Number of keys that a query is counted to see.

    Returns:
        The plan.

    Raises:
        InvalidInput: A pattern fits nothing, the model has no FFN, or the result cannot have the form.
    """
    before = model_cost(model, context=context)
    if method in ("soup", "continued"):
        return LanguagePlan(ffns=None, attentions=None, before=before, after=before)
    if method == "flexolmo":
        ffns = plan_replacement(model, experts=experts, active=2, only=options.only or None)
    else:
        ffns = options.plan(model, experts)
    if form == "mixtral":
        _require_mixtral(model, ffns)
    if method != "wide":
        return LanguagePlan(ffns=ffns, attentions=None, before=before, after=_with_experts(before, ffns))
    more = (ffns.active - 1) * sum(
        expert - (site.width_out if site.down.bias is not None else 0) for site, expert in zip(ffns.sites, ffns.expert_parameters)
    )
    adds = before.multiply_adds + (ffns.active - 1) * ffns.multiply_adds_before
    after = replace(before, stored=before.stored + more, active=before.active + more, multiply_adds=adds)
    return LanguagePlan(ffns=ffns, attentions=None, before=before, after=after, wider=True)


def _with_experts(before: ModelCost, ffns: ReplacementPlan) -> ModelCost:
    """Cost of the model with mixtures in the places of the FFNs."""
    routers = ffns.experts * sum(site.width_in for site in ffns.sites)
    dense, one = sum(ffns.site_parameters), sum(ffns.expert_parameters)
    return replace(
        before,
        stored=before.stored - dense + ffns.experts * one + routers,
        active=before.active - dense + ffns.active * one + routers,
        multiply_adds=before.multiply_adds - ffns.multiply_adds_before + ffns.multiply_adds_after,
    )


def _require_mixtral(model: nn.Module, ffns: ReplacementPlan) -> None:
    """Refuse, before anything is trained, a mixture that could not be written as a Mixtral."""
    instead = "write the result with --format mixture"
    try:
        require_mixtral_base(model)
    except InvalidInput as error:
        raise InvalidInput(f"the result cannot be a Mixtral: {error}; {instead}") from error
    places = {site.name: site for site in ffns.sites}
    blocks: Any = model.model
    for number in range(len(blocks.layers)):
        site = places.get(f"model.layers.{number}.mlp")
        if site is None:
            raise InvalidInput(
                f"model.layers.{number}.mlp stays dense, and a Mixtral has experts in every block; leave out --only, or {instead}"
            )
        if site.gate is None or site.up.bias is not None or site.down.bias is not None:
            raise InvalidInput(f"{site.name} has biases or no gate, and a Mixtral's experts have a gate and no biases; {instead}")
