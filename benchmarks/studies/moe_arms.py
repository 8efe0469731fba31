"""Not a script: the arms of the comparisons of BAM with its baselines, which `moe_bam_tiny.py` and `moe_smollm.py` run in the cells of
`moe_cells.py`. An arm is a function that builds a model from a seed and its branches."""

from __future__ import annotations

import copy
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from upcycle3d.perception.moe.attention.attention_calls import mixed_attentions
from upcycle3d.perception.moe.attention.attention_sites import plan_attentions
from upcycle3d.perception.moe.language.text_training import mean_loss
from upcycle3d.perception.moe.layers.control_routers import FrozenRouter
from upcycle3d.perception.moe.layers.moe_ffn import moe_layers
from upcycle3d.perception.moe.layers.precision import Precision, products_in
from upcycle3d.perception.moe.layers.routers import Router
from upcycle3d.perception.moe.layers.routing import TopKRule
from upcycle3d.perception.moe.surgery.replacement import ReplacementPlan, plan_replacement
from upcycle3d.perception.moe.upcycling.bam import AttentionRouting, Ensemble, bam
from upcycle3d.perception.moe.upcycling.cluster_aware import cluster_aware, collect_inputs
from upcycle3d.perception.moe.upcycling.upcyclers import RandomRouters, btx, drop_upcycling, soup, sparse_copy, wider_dense

TOP1 = TopKRule(k=1, norm="none")
TOP2 = TopKRule(k=2, norm="renorm")


class Task(ABC):
    """What a study trains on."""

    domains: tuple[str, ...]
    """Names of the domains that are tested; the first is the seed's."""
    specialties: tuple[str, ...]
    """Domains of the branches."""
    precision: Precision
    """Type of the matrix products in training and tests."""

    @abstractmethod
    def seed_model(self, seed: int) -> nn.Module:
        """Give the dense model that everything starts from."""

    @abstractmethod
    def batch(self, shares: Mapping[str, float], seed: int, step: int) -> Any:
        """Give the batch of a step."""

    @abstractmethod
    def loss(self, model: nn.Module, batch: Any) -> Tensor:
        """Give the loss of a batch."""

    @abstractmethod
    def log_probabilities(self, model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
        """Give (N, V) logits of the tokens that are predicted, and (N,) the tokens."""

    @abstractmethod
    def tests(self, domain: str) -> Sequence[Any]:
        """Give the test batches of a domain, all of one size."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Steps of the phases."""

    branch_steps: int
    """Steps of each branch."""
    mix_steps: int
    """Steps of the mixing phase at the mark `data`, T."""
    branch_lr: float
    """Learning rate of the branches."""
    mix_lr: float
    """Learning rate of the mixing phase."""
    seed_share: float = 0.1
    """Share of the seed's domain in each branch."""
    longest: float = 4.0
    """Most steps at the mark `seconds`, in units of T."""


@dataclass(frozen=True, kw_only=True)
class Branches:
    """The models that arms are built from."""

    seed: nn.Module
    """The dense model."""
    specialists: tuple[nn.Module, ...]
    """Its branches."""
    number: int
    """Number of the run."""

    @property
    def models(self) -> tuple[nn.Module, ...]:
        """The seed, then the branches."""
        return (self.seed, *self.specialists)

    def plan(self, active: int) -> ReplacementPlan:
        """Plan mixtures with one expert per model."""
        return plan_replacement(self.seed, experts=len(self.models), active=active)

    def routers(self, rule: TopKRule | None) -> RandomRouters:
        """Make routers."""
        return RandomRouters(experts=len(self.models), rule=rule, seed=self.number)


def _bam(
    branches: Branches, *, kv: str = "expert", rule: TopKRule | None = TOP1, scale: float = 1.0, top_k: int | None = None
) -> nn.Module:
    experts = len(branches.models)
    return bam(
        branches.specialists,
        branches.plan(experts if rule is None else rule.k),
        plan_attentions(branches.seed, experts=experts, key_values=kv),  # type: ignore[arg-type]
        branches.routers(rule),
        seed=branches.seed,
        routing=AttentionRouting(std=0.02, top_k=top_k, seed=branches.number),
        expert_scale=scale,
    ).model


def _btx(branches: Branches, rule: TopKRule | None, scale: float = 1.0) -> nn.Module:
    active = len(branches.models) if rule is None else rule.k
    return btx(branches.specialists, branches.plan(active), branches.routers(rule), seed=branches.seed, expert_scale=scale).model


def _random_router(branches: Branches) -> nn.Module:
    def frozen(site: Any, like: Tensor) -> Router:
        return FrozenRouter(site.width_in, len(branches.models), TOP2, seed=branches.number).to(like)

    return btx(branches.specialists, branches.plan(2), frozen, seed=branches.seed).model


def _clusters(task: Task, branches: Branches) -> nn.Module:
    plan = branches.plan(2)
    everything = {name: 1.0 for name in task.domains}

    def run(model: nn.Module) -> None:
        for step in range(4):
            task.loss(model, task.batch(everything, branches.number + 77_000, step))

    inputs = collect_inputs(branches.seed, plan, run, most=2048, seed=branches.number)
    return cluster_aware(branches.seed, plan, inputs, TOP2, draw=branches.number).model


Builder = Callable[[Task, Branches], nn.Module]
ARMS: dict[str, Builder] = {
    # dense
    "dense": lambda _, b: copy.deepcopy(b.seed),
    "dense_all_compute": lambda _, b: copy.deepcopy(b.seed),
    "wide_dense": lambda _, b: wider_dense(b.seed, b.plan(2), draw=b.number).model,
    # one model, several experts
    "sparse_top2": lambda _, b: sparse_copy(b.seed, b.plan(2), b.routers(TOP2)).model,
    "drop_top2": lambda _, b: drop_upcycling(b.seed, b.plan(2), b.routers(TOP2), draw=b.number).model,
    "cluster_top2": _clusters,
    # branches, FFNs mixed
    "btx_top1": lambda _, b: _btx(b, TOP1),
    "btx_top1_scaled": lambda _, b: _btx(b, TOP1, len(b.models)),
    "btx_top2": lambda _, b: _btx(b, TOP2),
    "btx_soft": lambda _, b: _btx(b, None),
    "btx_random_router": lambda _, b: _random_router(b),
    # branches, attentions mixed too
    "bam": lambda _, b: _bam(b),
    "bam_scaled": lambda _, b: _bam(b, scale=len(b.models)),
    "bam_shared_kv": lambda _, b: _bam(b, kv="shared", scale=len(b.models)),
    "bam_soft_ffn": lambda _, b: _bam(b, rule=None),
    "bam_attention_top1": lambda _, b: _bam(b, scale=len(b.models), top_k=1),
    "bam_attention_top2": lambda _, b: _bam(b, scale=len(b.models), top_k=2),
}
"""Arms that are trained on the equal mixture of all domains."""
UNTRAINED = ("seed", "specialist_oracle", "specialist_mean", "soup", "ensemble", "flexolmo")
"""Arms without a joint phase. `flexolmo` trains its experts apart, against the frozen seed."""
REFERENCE = "btx_top1_scaled"
"""The arm whose T steps set the seconds: the cheapest mixture, as in the paper's comparison at equal compute."""


def untrained_losses(task: Task, branches: Branches, name: str) -> tuple[dict[str, float], int]:
    """Losses per domain and the number of parameters."""
    size = sum(p.numel() for p in branches.seed.parameters())
    if name == "seed":
        return evaluate(task, branches.seed), size
    if name == "soup":
        return evaluate(task, soup(branches.models).model), size
    own = dict(zip(task.specialties, branches.specialists))
    if name == "specialist_oracle":
        return {d: evaluate(task, own.get(d, branches.seed), (d,))[d] for d in task.domains}, size * len(branches.models)
    if name == "specialist_mean":
        every = [evaluate(task, model) for model in branches.specialists]
        return {d: statistics.fmean(e[d] for e in every) for d in task.domains}, size
    members = Ensemble(branches.models).eval()
    losses = {}
    with torch.no_grad(), products_in(task.precision, "cpu"):
        for domain in task.domains:
            found = []
            for batch in task.tests(domain):
                _, wanted = task.log_probabilities(branches.seed, batch)
                logp = members.log_probabilities(lambda m, b=batch: task.log_probabilities(m, b)[0].float())
                found.append(float(nn.functional.nll_loss(logp, wanted)))
            losses[domain] = statistics.fmean(found)
    return losses, size * len(branches.models)


def evaluate(task: Task, model: nn.Module, domains: Iterable[str] | None = None, *, share: float = 1.0) -> dict[str, float]:
    """Mean loss per domain, on the first share of its test batches."""
    found = {}
    for domain in domains or task.domains:
        batches = task.tests(domain)
        found[domain] = mean_loss(model, batches[: max(1, round(share * len(batches)))], task.loss, precision=task.precision)
    return found


@torch.no_grad()
def usage_of(task: Task, model: nn.Module) -> dict[str, list[float]]:
    """Mean share of each FFN expert and of each attention expert, per domain."""
    found: dict[str, list[float]] = {}
    for domain in task.domains:
        for _, layer in moe_layers(model):
            layer.usage.reset()
        for _, attention in mixed_attentions(model):
            attention.take_use()
        mean_loss(model, task.tests(domain)[:1], task.loss, precision=task.precision)
        ffn = [layer.usage.value.shares for _, layer in moe_layers(model)]
        attend = [attention.take_use() for _, attention in mixed_attentions(model)]
        for kind, parts in (("ffn", ffn), ("attention", attend)):
            if parts:
                found[f"{domain} {kind}"] = [statistics.fmean(share) for share in zip(*parts)]
    return found
