"""One contrastive stage of diversified multiplet upcycling: cluster, and train the FFNs of the base on batches from one cluster each.

Read next: `dmu.py`, which joins stages and says where they come from; `clusters.py`; `pair_training.py`.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ..layers.losses import RouterLossConfig
from ..layers.routing import TopKRule
from ..surgery.ffn_sites import tensors_of
from ..surgery.replacement import ReplacementPlan
from ..upcycling.clusters import AccumulatedLabels, ClusterConfig, merge_small, stage_labels
from .cluster_batches import account_of
from .pair_training import PairTraining, PairTrainingReport, encode_pairs, train_pairs
from .pairs import PairData, PairTowers
from .stages import MixtureParts

SmallClusters = Literal["merge", "leave_out", "refuse"]


@dataclass(frozen=True, kw_only=True)
class DmuConfig:
    """How experts are made and mixed. The defaults of the method are those of CLIP-MoE."""

    expert: PairTraining
    """Training of one FFN set."""
    router: PairTraining
    """Training of the routers."""
    stages: int = 3
    """Number of FFN sets besides the base's; the mixture has one expert more."""
    clusters: ClusterConfig = ClusterConfig()
    """How features are clustered."""
    accumulate: bool = True
    """Whether the labels of all stages so far make the clusters. Without it only the last stage's do, a control."""
    pure_batches: bool = True
    """Whether batches come from one cluster. Without it every stage trains on ordinary batches, the most important control."""
    small_clusters: SmallClusters = "merge"
    """What happens to clusters that do not fill a batch: they are merged into their parents, left out as in CLIP-MoE's code, or
    refused."""
    rule: TopKRule = TopKRule(k=2, norm="renorm")
    """How many experts compute a token."""
    router_loss: RouterLossConfig = RouterLossConfig(balance=0.01)
    """Losses of the routers."""
    router_std: float = 0.02
    """Standard deviation of the routers' first rows."""
    only: tuple[str, ...] | None = None
    """Names or patterns of the FFNs that become mixtures; None for all. CLIP-MoE's code has an option for late vision blocks only."""
    seed: int = 0
    """Decides clusters, batches and the first routers."""

    def __post_init__(self) -> None:
        require_counts("DmuConfig", most=62, stages=self.stages)
        require_numbers("DmuConfig", least=1e-8, most=10.0, router_std=self.router_std)
        require(
            self.small_clusters in get_args(SmallClusters),
            f"DmuConfig.small_clusters must be one of {', '.join(get_args(SmallClusters))}, found {self.small_clusters!r}",
        )
        self.rule.check(self.stages + 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class ExpertStage:
    """The result of one contrastive stage."""

    ffns: Mapping[str, Tensor]
    """Tensors of all FFNs after the stage, by their names in the dense model."""
    labels: Tensor
    """(N,) int64 labels of this stage, before they are joined with earlier ones."""
    clusters: int
    """Number of different clusters after joining, before small ones were merged."""
    moved: int
    """Number of pairs in clusters that were merged."""
    report: PairTrainingReport
    """Losses, batches and cost."""

    def __str__(self) -> str:
        return f"{self.clusters} clusters, {self.moved} pairs merged into parents; {self.report}"


def labels_of_stage(model: PairTowers, data: PairData, config: DmuConfig, number: int) -> tuple[Tensor, float]:
    """Encode all pairs and cluster them.

    Args:
        model: The base model for the first stage, else the model of the stage before.
        data: The pairs.
        config: The method.
        number: Number of the stage, from 1.

    Returns:
        (N,) int64 labels, and the CPU seconds that they took. Without pure batches nothing is encoded, and all labels are 0.

    Raises:
        InvalidInput: There are fewer pairs than clusters, or features are NaN.
    """
    if not config.pure_batches:
        return torch.zeros(len(data), dtype=torch.int64), 0.0
    started = time.process_time()
    features = encode_pairs(model, data, precision=config.expert.precision)
    labels = stage_labels(features.image, features.text, config.clusters, seed=config.seed * 1000 + number)
    return labels, time.process_time() - started


def stage_groups(labels: Sequence[Tensor], config: DmuConfig) -> tuple[Tensor, int, int]:
    """Make the clusters that the batches of a stage come from.

    Args:
        labels: Labels of this stage and of all before, oldest first.
        config: The method.

    Returns:
        (N,) int64 cluster of each pair; the number of clusters before small ones were merged; and the number of pairs in merged ones.

    Raises:
        InvalidInput: A cluster does not fill a batch, and `small_clusters` says to refuse that; or none does.
    """
    used = list(labels) if config.accumulate else [labels[-1]]
    joined = AccumulatedLabels.first(used[0], config.clusters.labels)
    for more in used[1:]:
        joined = joined.then(more)
    size = config.expert.batch_size
    if not config.pure_batches:
        return torch.zeros_like(joined.code), joined.clusters(), 0
    if config.small_clusters == "merge":
        merged = merge_small(joined, size)
        require(
            int(merged.sizes().max()) >= size,
            f"all {len(joined.code)} pairs together do not fill a batch of {size}; use smaller batches or more pairs",
        )
        return merged.group, joined.clusters(), merged.moved
    group = joined.code.unique(return_inverse=True)[1]
    account = account_of(group, size)
    if account.unused and config.small_clusters == "refuse":
        small = int((torch.bincount(group) < size).sum())
        raise InvalidInput(
            f"{small} of {joined.clusters()} clusters are smaller than a batch of {size}, {account.unused} pairs in all; use smaller "
            "batches, fewer clusters or stages, or small_clusters='merge'"
        )
    return group, joined.clusters(), 0


def expert_stage(
    base: PairTowers,
    plan: ReplacementPlan,
    data: PairData,
    labels: Tensor,
    earlier: Sequence[Tensor],
    config: DmuConfig,
    number: int,
) -> ExpertStage:
    """Train the FFNs of one stage, from the base on.

    Args:
        base: The dense model. It is not changed.
        plan: Its FFNs.
        data: The pairs.
        labels: (N,) labels of this stage.
        earlier: Labels of the stages before, oldest first.
        config: The method.
        number: Number of the stage, from 1.

    Returns:
        The FFNs after the stage.

    Raises:
        InvalidInput: As for `stage_groups` and `train_pairs`.
    """
    group, clusters, moved = stage_groups([*earlier, labels], config)
    model = copy.deepcopy(base)
    parts = MixtureParts(ffn=plan.ffn_modules)
    report = train_pairs(model, data, group, config.expert, "ffn", parts, seed=config.seed * 1000 + number)
    return ExpertStage(ffns=ffn_tensors(model, plan), labels=labels, clusters=clusters, moved=moved, report=report)


def ffn_tensors(model: nn.Module, plan: ReplacementPlan) -> dict[str, Tensor]:
    """Copy the tensors of a model's FFNs.

    Args:
        model: A model with the structure of the planned one.
        plan: Its FFNs.

    Returns:
        Name to tensor.
    """
    tensors = tensors_of(model)
    return {name: tensors[name].clone() for site in plan.sites for name in site.tensors}


def with_ffns(base: PairTowers, ffns: Mapping[str, Tensor]) -> PairTowers:
    """Copy a model and give the copy other FFNs.

    Args:
        base: The dense model.
        ffns: Tensors by name, from `ffn_tensors`.

    Returns:
        The copy.

    Raises:
        InvalidInput: A tensor has no place in the model, or another shape.
    """
    model = copy.deepcopy(base)
    places = tensors_of(model)
    for name, tensor in ffns.items():
        if name not in places or places[name].shape != tensor.shape:
            found = tuple(places[name].shape) if name in places else "no tensor"
            raise InvalidInput(
                f"the FFN tensor {name!r} {tuple(tensor.shape)} does not fit the base model, which has {found} there"
            )
        places[name].copy_(tensor)
    return model
