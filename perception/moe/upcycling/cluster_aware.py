"""Cluster-aware upcycling (Chu et al., 2026): experts and routers that follow clusters of the tokens at each FFN.

The inputs of an FFN are clustered by direction (spherical k-means). The expert of a cluster keeps, of each linear map, only the part that
acts on that cluster: the outputs W X of the cluster's tokens X have leading directions U, and the expert's map is U U^T W, the best map of
that rank for these tokens. The router's rows are the centers of the clusters.

Two choices are ours, because the paper's abstract leaves them open: the rank keeps a share `energy` of the squared outputs, and the router's
logits are divided by their standard deviation. The paper's self-distillation loss is not part of this file.
Read next: `upcyclers.py`, the upcyclers that look at no data.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.tensor_value import shape_of
from ..layers.dense_ffn import DenseFfn
from ..layers.moe_ffn import MoeFfn
from ..layers.routers import Router, TopKRouter
from ..layers.routing import TopKRule
from ..surgery.ffn_sites import FfnSite, tensors_of
from ..surgery.replacement import ReplacementPlan
from .clusters import ClusterConfig, FeatureClusters, cluster_features
from .upcyclers import Upcycled, expert_layer, gather


class _Recorder(nn.Module):
    """Computes an FFN and keeps a sample of its inputs."""

    def __init__(self, ffn: DenseFfn, most: int, seed: int) -> None:
        super().__init__()
        self.ffn, self.most = ffn, most
        self.weight = nn.Parameter(ffn.up, requires_grad=False)  # some models ask their first layer for its type
        self.kept = ffn.up.new_zeros(0, ffn.width_in, dtype=torch.float32)
        self.draw = torch.Generator().manual_seed(seed)
        self.seen = 0

    def forward(self, x: Tensor) -> Tensor:
        rows = x.detach().reshape(-1, x.shape[-1]).float()
        joined = torch.cat([self.kept, rows])
        self.seen += len(rows)
        if len(joined) > self.most:  # old rows stand for many, so they stay with the probability most / seen
            rank = torch.rand(len(joined), generator=self.draw)
            rank[: len(self.kept)] *= self.most / self.seen
            joined = joined[rank.argsort()[: self.most].to(joined.device)]
        self.kept = joined
        return self.ffn.apply(x)


def collect_inputs(
    model: nn.Module, plan: ReplacementPlan, run: Callable[[nn.Module], object], *, most: int = 4096, seed: int = 0
) -> dict[str, Tensor]:
    """Collect tokens that arrive at each FFN of a plan. The model is the same afterwards.

    Args:
        model: The dense model.
        plan: Its FFNs.
        run: Runs the model on some data, in evaluation mode and without gradients; it may run it several times.
        most: Number of tokens that are kept per FFN.
        seed: Which ones.

    Returns:
        (T, D) tokens in float32 for each FFN, by the name of its site.

    Raises:
        InvalidInput: An FFN got no token.
    """
    require_counts("collect_inputs", most=most)
    tensors = tensors_of(model)
    recorders = {site.name: _Recorder(site.read(tensors), most, seed) for site in plan.sites}
    modes = [(module, module.training) for module in model.modules()]
    applied = plan.apply(model, recorders)
    try:
        model.eval()
        with torch.no_grad():
            run(model)
    finally:
        applied.reverse()
        for module, training in modes:
            module.training = training
    for name, recorder in recorders.items():
        require(recorder.seen > 0, f"no token arrived at the FFN {name!r}; run the model on data that reaches it")
    return {name: recorder.kept for name, recorder in recorders.items()}


def cluster_aware(
    seed: nn.Module,
    plan: ReplacementPlan,
    inputs: Mapping[str, Tensor],
    rule: TopKRule,
    *,
    energy: float = 0.99,
    clusters: ClusterConfig = ClusterConfig(),  # noqa: B008 (a frozen value)
    draw: int = 0,
) -> Upcycled:
    """Make experts that keep what a cluster of tokens needs, and routers that send each token to its cluster.

    Args:
        seed: The dense model.
        plan: What is replaced.
        inputs: Tokens of each FFN, from `collect_inputs`; several hundred for each expert.
        rule: How logits become choices.
        energy: Share of the squared outputs that an expert keeps of its own cluster. 1 makes copies of the dense FFN.
        clusters: Seeds and iterations of k-means.
        draw: Number that the clusters depend on.

    Returns:
        The mixture. It computes something else than the dense model unless `energy` is 1 and the weights are renormalized.

    Raises:
        InvalidInput: An FFN has no tokens, or fewer than experts.
    """
    require_numbers("cluster_aware", least=0.0, most=1.0, energy=energy)

    def mixture(site: FfnSite, dense: Sequence[DenseFfn]) -> MoeFfn:
        tokens = inputs.get(site.name)
        if tokens is None or tokens.ndim != 2 or tokens.shape[1] != site.width_in:
            raise InvalidInput(f"the FFN {site.name!r} needs tokens (T, {site.width_in}) of its inputs, found {shape_of(tokens)}")
        found = cluster_features(tokens, plan.experts, clusters, seed=draw)
        experts = [_of_cluster(dense[0], tokens[found.assignment == c], energy) for c in range(plan.experts)]
        return expert_layer(plan, site, experts, lambda _, like: _router(found, tokens, rule).to(like))

    return gather([seed], plan, mixture)


def _router(found: FeatureClusters, tokens: Tensor, rule: TopKRule) -> Router:
    rows = F.normalize(found.centroids.float(), dim=1)
    temperature = float((tokens @ rows.T).std().clamp_min(1e-6))
    return TopKRouter.from_centroids(rows, rule, match="inner", temperature=temperature)


def _of_cluster(ffn: DenseFfn, tokens: Tensor, energy: float) -> DenseFfn:
    """The part of an FFN that acts on some tokens."""
    if energy >= 1:
        return ffn.clone()
    x = tokens.to(ffn.up.dtype)
    hidden = ffn.hidden(x)
    return replace(
        ffn.clone(),
        up=_kept(ffn.up, x, energy),
        gate=None if ffn.gate is None else _kept(ffn.gate, x, energy),
        down=_kept(ffn.down, hidden, energy),
    )


def _kept(weight: Tensor, x: Tensor, energy: float) -> Tensor:
    """Project a map onto the leading directions of its outputs for some tokens."""
    out = x.double() @ weight.double().T
    values, vectors = torch.linalg.eigh(out.T @ out)
    share = values.clamp_min(0).flip(0).cumsum(0)
    rank = int((share < energy * share[-1]).sum()) + 1
    lead = vectors[:, -rank:]
    return (lead @ (lead.T @ weight.double())).to(weight.dtype)
