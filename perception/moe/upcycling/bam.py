"""Branch-attend-mix (BAM; Zhang et al., 2024): models that were branched from one seed become one mixture, attentions included.

    FFN         top-1 of the N models' FFNs, weighted by its probability (`btx` with the rule k = 1, norm "none")
    attention   sum over the N models' attentions, weighted by a softmax: every expert runs
    the rest    the average of the models, or the seed's

The seed is one of the models. Blocks stay what they are: in a block with *parallel* attention both mixtures read the same tokens, as in
the paper; in a *sequential* block, as in Llama, the FFN reads what the attention left. Nothing here depends on it.

A top-1 weight is a probability, about 1 / N at first, so a fresh mixture computes much less in its FFNs than a dense model.
`expert_scale=N` corrects that, as NVIDIA's upcycling does; the paper does not, and both are worth an arm in a comparison.

Read next: `attention_sites.py` (which attentions), `attention_calls.py` (how they are called), `upcyclers.py` (the FFN side).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_numbers
from ..attention.attention_calls import HiddenStatesAttention, MixedAttention, MultiheadMixture, given_attention_weights
from ..attention.attention_sites import AttentionPlan, AttentionSite
from ..attention.dense_attention import DenseAttention
from ..attention.soft_attention import SoftAttention
from ..layers.control_routers import OracleRouter, given_domains
from ..layers.dense_ffn import DenseFfn
from ..layers.moe_ffn import MoeFfn
from ..surgery.common_seed import require_common_seed, require_same_structure
from ..surgery.ffn_sites import FfnSite
from ..surgery.replacement import ReplacementPlan
from ..surgery.tensor_account import TensorLedger
from .ffn_changes import scaled
from .upcyclers import Rest, RouterMaker, Upcycled, expert_layer, gather, generator_of


@dataclass(frozen=True, kw_only=True)
class AttentionRouting:
    """How the weights of attention experts begin and which of them count. The paper's is the default."""

    std: float | None = None
    """Standard deviation of the router's rows; None draws them like the weights of `nn.Linear`. 0 begins with the uniform average."""
    top_k: int | None = None
    """Keeps only this number of weights per query, the ablation of the paper; all experts still run. None keeps all."""
    renormalize: bool = False
    """Whether kept weights are divided by their sum."""
    seed: int = 0
    """Number that the rows depend on."""

    def __post_init__(self) -> None:
        if self.std is not None:
            require_numbers("AttentionRouting", least=0.0, most=100.0, std=self.std)


def bam(
    specialists: Sequence[nn.Module],
    plan: ReplacementPlan,
    attentions: AttentionPlan,
    routers: RouterMaker,
    *,
    seed: nn.Module,
    routing: AttentionRouting = AttentionRouting(),
    rest: Rest = "average",
    expert_scale: float = 1.0,
    allow_strangers: bool = False,
) -> Upcycled:
    """Mix a seed and its specialists. No model that is given is changed.

    Args:
        specialists: Models that were branched from the seed and trained on different data.
        plan: Which FFNs become mixtures; `plan_replacement(seed, experts=N, active=1)` with N = specialists + 1.
        attentions: Which attentions become mixtures; `plan_attentions(seed, experts=N)`.
        routers: Makes the routers of the FFNs: `RandomRouters(experts=N, rule=TopKRule(k=1, norm="none"))` in the paper; with
            `rule=None` the FFNs are mixed softly, too.
        seed: The model they all began as. It is expert 0.
        routing: How the weights of attention experts begin.
        rest: Where all other tensors come from.
        expert_scale: Factor of the FFN experts' outputs; N corrects the weight of a top-1 choice at the start.
        allow_strangers: Go on with models that do not come from one seed.

    Returns:
        The mixture, its FFN plan, and the account of every tensor.

    Raises:
        InvalidInput: The numbers of models and experts differ, a model has another structure, or one does not come from the seed.

    Example:
        plan = plan_replacement(seed, experts=4, active=1)
        attentions = plan_attentions(seed, experts=4)
        routers = RandomRouters(experts=4, rule=TopKRule(k=1, norm="none"))
        mixed = bam([code, law, math], plan, attentions, routers, seed=seed, expert_scale=4)
    """
    models = [seed, *specialists]
    require(
        attentions.experts == plan.experts == len(models),
        f"{len(models)} models (the seed and {len(specialists)} specialists) need plans for {len(models)} experts; the FFN plan has "
        f"{plan.experts} and the attention plan {attentions.experts}",
    )
    require_same_structure(models)
    inside = [name for site in plan.sites for name in site.tensors] + [n for site in attentions.sites for n in site.tensors]
    require_common_seed(models, inside, allow_strangers=allow_strangers)

    def mixture(site: FfnSite, dense: Sequence[DenseFfn]) -> MoeFfn:
        return expert_layer(plan, site, [scaled(ffn, expert_scale) for ffn in dense], routers)

    def mix_attentions(twin: nn.Module) -> Callable[[TensorLedger], None]:
        for site in attentions.sites:
            dense = [site.read(model) for model in models]
            twin.set_submodule(site.name, mixed_attention(models[0], site, attentions, routing, dense), strict=True)
        return lambda ledger: _record(ledger, twin, attentions)

    return replace(gather(models, plan, mixture, rest, mix_attentions), attentions=attentions)


def mixed_attention(
    model: nn.Module, site: AttentionSite, plan: AttentionPlan, routing: AttentionRouting, experts: Sequence[DenseAttention]
) -> MixedAttention:
    """Make the module that takes the place of one attention.

    Args:
        model: The dense model, for how the attention is called.
        site: The attention.
        plan: The plan, for its key and value maps.
        routing: How the weights begin.
        experts: The dense attentions, as `AttentionSite.read` gives them.

    Returns:
        The module, with a copy of the weights.
    """
    draw = generator_of(routing.seed, site.name)
    made = SoftAttention.from_dense(
        experts,
        key_values=plan.key_values,
        top_k=routing.top_k,
        renormalize=routing.renormalize,
        dropout=site.dropout,
        generator=draw,
    )
    if routing.std is not None:
        rows = torch.randn(made.router.shape, generator=draw) * routing.std
        with torch.no_grad():
            made.router.copy_(rows)
    old = model.get_submodule(site.name)
    new: MixedAttention
    if site.call == "multihead":
        new = MultiheadMixture(made, batch_first=bool(old.batch_first))
    else:
        layer = getattr(old, "layer_idx", None)
        causal = bool(getattr(old, "is_causal", False))
        new = HiddenStatesAttention(made, is_causal=causal, layer_idx=layer if isinstance(layer, int) else None)
    return new.train(old.training)


def _record(ledger: TensorLedger, twin: nn.Module, plan: AttentionPlan) -> None:
    """Account for the tensors of the attentions, and compare each expert with its source bit by bit."""
    for site in plan.sites:
        for number in range(len(ledger.sources)):
            for name in site.tensors:
                ledger.read(number, name, "became attention experts")
        made = twin.get_submodule(site.name)
        for inner, value in made.state_dict().items():
            require(not bool(value.isnan().any()), f"the tensor {inner!r} of {site.name!r} was not written completely")
            how = "attention router" if inner.endswith("router") else "attention experts"
            ledger.mark_written(f"{site.name}.{inner}", how)


class Ensemble(nn.Module):
    """Averages the probabilities of several models (branch-train-merge without mixing): it trains nothing and costs them all."""

    def __init__(self, models: Sequence[nn.Module], weights: Tensor | None = None) -> None:
        super().__init__()
        if not models:
            raise InvalidInput("an ensemble needs at least one model, found none")
        self.models = nn.ModuleList(models)
        count = len(models)
        weights = torch.full((count,), 1 / count) if weights is None else weights
        require(
            weights.shape == (count,), f"an ensemble of {count} models needs ({count},) weights, found {tuple(weights.shape)}"
        )
        self.register_buffer("weights", weights)

    def log_probabilities(self, logits: Callable[[nn.Module], Tensor]) -> Tensor:
        """Compute the logarithm of the mean probability.

        Args:
            logits: Gives (..., V) logits of one model.

        Returns:
            (..., V) logarithms of probabilities that sum to 1.
        """
        weights: Tensor = self.weights  # type: ignore[assignment]
        parts = [logits(model).log_softmax(-1) + weight.log() for model, weight in zip(self.models, weights)]
        return torch.stack(parts).logsumexp(0)


def with_oracle(model: nn.Module) -> nn.Module:
    """Copy a mixture and let its FFN routers be told the domain: the upper bound of routing by domain. `oracle_domain` tells it.

    Args:
        model: The mixture, made with `expert_scale=1`: an oracle weighs its expert by 1. It is not changed.

    Returns:
        The copy.
    """
    twin = copy.deepcopy(model)
    for module in twin.modules():
        if isinstance(module, MoeFfn):
            module.router = OracleRouter(module.bank.shape.experts)
    return twin


@contextmanager
def oracle_domain(model: nn.Module, domain: int, experts: int) -> Iterator[None]:
    """Send everything to one expert inside a `with` block, in the FFNs and in the attentions.

    Args:
        model: A copy made by `with_oracle`.
        domain: The expert.
        experts: Number of experts.

    Yields:
        Nothing.
    """
    weights = torch.zeros(experts)
    weights[domain] = 1.0
    with ExitStack() as stack:
        stack.enter_context(given_domains(model, torch.tensor([domain])))
        stack.enter_context(given_attention_weights(model, weights))
        yield
