"""Mixtures of attentions without their weights: what a checkpoint stores to build them again. Read next: `checkpoint.py`."""

from __future__ import annotations

from dataclasses import dataclass, replace

from torch import nn

from ....core.errors import InvalidInput, require
from ..attention.attention_calls import mixed_attentions
from ..attention.attention_sites import AttentionPlan
from ..upcycling.bam import AttentionRouting, mixed_attention


@dataclass(frozen=True, kw_only=True)
class AttentionForms:
    """Where a model has mixtures of attentions, and how their experts are weighted."""

    plan: AttentionPlan
    """Which attentions were replaced, the number of experts, and whether keys and values are shared."""
    top_k: int | None = None
    """Weights that are kept per query; None for all."""
    renormalize: bool = False
    """Whether kept weights are divided by their sum."""

    @classmethod
    def of(cls, model: nn.Module, plan: AttentionPlan | None) -> AttentionForms | None:
        """Describe the mixtures of attentions of a model.

        Args:
            model: The model.
            plan: Which attentions were replaced; None for none.

        Returns:
            The description; None where there are none.

        Raises:
            InvalidInput: The model has mixtures of attentions that the plan does not name, or the other way round, or they differ in
                their options.
        """
        found = dict(mixed_attentions(model))
        names = {site.name for site in plan.sites} if plan is not None else set()
        if found.keys() != names:
            odd = sorted(found.keys() ^ names)[0]
            raise InvalidInput(
                f"the model {'has' if odd in found else 'lacks'} a mixture of attentions at {odd!r}, and the plan of attentions says "
                "otherwise; pass the plan that was used (Upcycled.attentions)"
            )
        if plan is None:
            return None
        options = {(layer.mixture.top_k, layer.mixture.renormalize) for layer in found.values()}
        require(len(options) == 1, f"the mixtures of attentions differ in top_k and renormalize: {sorted(map(str, options))}")
        top_k, renormalize = options.pop()
        return cls(plan=replace(plan, refused=()), top_k=top_k, renormalize=renormalize)

    def put_into(self, model: nn.Module) -> None:
        """Replace the attentions of a dense model by mixtures with any weights.

        Args:
            model: The model. It is changed.

        Raises:
            InvalidInput: An attention is missing or has another shape.
        """
        routing = AttentionRouting(top_k=self.top_k, renormalize=self.renormalize)
        for site in self.plan.sites:
            try:
                dense = site.read(model)
            except AttributeError as error:
                raise InvalidInput(f"the given dense model has no attention {site.name!r}") from error
            made = mixed_attention(model, site, self.plan, routing, [dense] * self.plan.experts)
            model.set_submodule(site.name, made, strict=True)

    def __str__(self) -> str:
        kept = "all weights" if self.top_k is None else f"the {self.top_k} largest weights"
        return (
            f"{len(self.plan.sites)} mixtures of {self.plan.experts} attentions, keys and values {self.plan.key_values}, {kept}"
            f"{', renormalized' if self.renormalize else ''}"
        )
