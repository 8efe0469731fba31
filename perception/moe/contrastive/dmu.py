"""Diversified multiplet upcycling (CLIP-MoE; Zhang et al., 2024): experts that learned to tell apart what the model before them could not.

    stage j = 1..S   encode all pairs with the model of stage j - 1 (the base model for j = 1)
                     cluster images and texts, and join the labels with those of the stages before
                     start from the *base* again, train only its FFNs, on batches from one cluster each
    at the end       the FFNs of base and stages are the experts of one mixture; everything else is the base's
                     train only the routers, with a balance loss, on ordinary batches

Equal captions in a batch are no negatives of each other; in batches from one cluster there are many. Stages are siblings, not a chain:
only the clusters accumulate. What is not from the paper: small clusters are merged into their parents, so no pair is lost.

The base may be any `PairTowers`: a Hugging Face CLIP (`hugging_face_clip.py`), two pre-trained encoders, a detector's region head.
Read next: `expert_stages.py` (one stage), `dmu_files.py` (stages on disk).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ....core.errors import InvalidInput, require
from ....core.files import locked_folder
from ....core.tensor_file import not_finite
from ..layers.losses import describe_router_losses
from ..layers.moe_ffn import moe_layers
from ..surgery.ffn_sites import tensors_of
from ..surgery.replacement import ReplacementPlan, plan_replacement
from ..upcycling.upcyclers import RandomRouters, Upcycled, btx
from .dmu_files import StageFolder
from .expert_stages import DmuConfig, ExpertStage, expert_stage, labels_of_stage, with_ffns
from .pair_training import PairTrainingReport, train_pairs
from .pairs import PairData, PairTowers
from .stages import MixtureParts

Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True, eq=False)
class DmuResult:
    """A mixture and how it was made."""

    upcycled: Upcycled
    """The mixture, a `PairTowers` like the base, with its plan and the account of every tensor."""
    stages: tuple[ExpertStage, ...]
    """The contrastive stages."""
    router: PairTrainingReport
    """The router stage."""
    encoding_cpu_seconds: float
    """CPU time of encoding and clustering, which belongs to the cost of the method."""

    @property
    def cpu_seconds(self) -> float:
        """CPU time of everything: encoding, clustering, stages and routers."""
        return self.encoding_cpu_seconds + sum(stage.report.cpu_seconds for stage in self.stages) + self.router.cpu_seconds


def plan_dmu(base: PairTowers, config: DmuConfig) -> ReplacementPlan:
    """Say what the method will replace, and what it costs; print the plan before a long job. Nothing is changed.

    Args:
        base: The dense model.
        config: The method.

    Returns:
        The plan.

    Raises:
        InvalidInput: The model has no FFN that can be replaced, or its weights are NaN or infinite.
    """
    bad = not_finite(tensors_of(base))
    if bad:
        raise InvalidInput(f"the base model's tensor {bad[0]!r} holds NaN or inf; use weights that were loaded completely")
    return plan_replacement(base, experts=config.stages + 1, active=config.rule.k, only=config.only)


def dmu(
    base: PairTowers, data: PairData, config: DmuConfig, *, folder: str | Path | None = None, say: Say | None = None
) -> DmuResult:
    """Upcycle two towers by diversified multiplet upcycling.

    Args:
        base: The dense model, trained already. It is not changed.
        data: Pairs to learn from.
        config: The method.
        folder: Where finished stages are kept, so that a stopped job goes on at the stage it had reached; None keeps nothing.
        say: Gets one line about each stage.

    Returns:
        The mixture, with every stage's losses and cost.

    Raises:
        InvalidInput: There is no FFN, the clusters are smaller than a batch, weights or features are NaN, or the folder holds stages of
            another base, other data or another configuration.
        NonFiniteValue: A loss became NaN.

    Example:
        config = DmuConfig(expert=PairTraining(steps=1500, batch_size=256), router=PairTraining(steps=1500, batch_size=256, lr=1e-6))
        result = dmu(load_clip("clip-vit-base-patch16").towers, pairs, config, folder="job", say=print)
        print(result.upcycled.plan, result.cpu_seconds)
    """
    said: Say = say if say is not None else lambda _: None
    plan = plan_dmu(base, config)
    with ExitStack() as stack:
        if folder is not None:
            stack.enter_context(locked_folder(folder, f"another process works on the job in {folder}"))
        files = None if folder is None else StageFolder.open(folder, base, data, config, plan)
        stages: list[ExpertStage] = []
        spent = 0.0
        for number in range(1, config.stages + 1):
            found = None if files is None else files.stage(number)
            if found is None:
                labels, cost = labels_of_stage(with_ffns(base, stages[-1].ffns) if stages else base, data, config, number)
                spent += cost
                found = expert_stage(base, plan, data, labels, [stage.labels for stage in stages], config, number)
                if files is not None:
                    files.keep(number, found, cost)
            elif files is not None:
                spent += files.encoding_seconds(number)
            said(f"stage {number} of {config.stages}: {found}")
            stages.append(found)
        made = gather_experts(base, [stage.ffns for stage in stages], plan, config)
        report = None if files is None else files.routers(made)
        if report is None:
            report = train_routers(made, data, config, say=said)
            if files is not None:
                files.keep_routers(made, report)
        said(f"routers: {report}")
    return DmuResult(upcycled=made, stages=tuple(stages), router=report, encoding_cpu_seconds=spent)


def gather_experts(base: PairTowers, ffns: Sequence[Mapping[str, Tensor]], plan: ReplacementPlan, config: DmuConfig) -> Upcycled:
    """Make one mixture: expert 0 is the base's FFN, the others are the stages' in order, everything else is the base's.

    Args:
        base: The dense model.
        ffns: FFNs of each stage.
        plan: The plan, with one expert more than stages.
        config: Rule and first rows of the routers.

    Returns:
        The mixture, whose routers are untrained.

    Raises:
        InvalidInput: The numbers of stages and experts differ, or a tensor does not fit.
    """
    require(
        plan.experts == len(ffns) + 1,
        f"{len(ffns)} stages and the base make {len(ffns) + 1} experts, and the plan has {plan.experts}",
    )
    routers = RandomRouters(experts=plan.experts, rule=config.rule, seed=config.seed, std=config.router_std)
    # Stages without steps or data leave the base as it is; that is no reason to refuse.
    return btx([with_ffns(base, each) for each in ffns], plan, routers, seed=base, rest="seed", allow_strangers=True)


def train_routers(made: Upcycled, data: PairData, config: DmuConfig, *, say: Say | None = None) -> PairTrainingReport:
    """Train only the routers of a mixture, on ordinary batches.

    Args:
        made: The mixture; its routers change.
        data: The pairs.
        config: The method.
        say: Gets a line about the router losses and one about the first use of the experts.

    Returns:
        Losses and cost.

    Raises:
        InvalidInput: A tensor other than a router's changed, or the balance loss could have no effect.
    """
    towers = made.model
    assert isinstance(towers, PairTowers)
    layers = moe_layers(towers)
    parts = MixtureParts(router=tuple(f"{name}.router" for name, _ in layers))
    if say is not None:
        say(describe_router_losses(config.router_loss, [True] * len(layers)))
    for _, layer in layers:
        layer.usage.reset()

    def first_use(step: int, _: float) -> None:
        if step == 0 and say is not None:
            entropies = [layer.usage.value.entropy for _, layer in layers]
            dead = sum(len(layer.usage.value.dead) for _, layer in layers)
            say(
                f"first batch: entropy of the experts' use {min(entropies):.2f} to {max(entropies):.2f} over {len(layers)} layers "
                f"(1 is even), {dead} experts without a token"
            )

    group = torch.zeros(len(data), dtype=torch.int64)
    return train_pairs(
        towers,
        data,
        group,
        config.router,
        "router",
        parts,
        router_loss=config.router_loss,
        seed=config.seed * 1000 + 999,
        on_step=first_use,
    )
