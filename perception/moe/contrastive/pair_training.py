"""Contrastive training of two towers in which exactly the tensors of one stage move, and the retrieval that tells what it brought.

Read next: `dmu.py`, which joins stages; `pairs.py`, the towers and the data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ....core.errors import InvalidInput, NonFiniteValue, require, require_counts, require_numbers
from ....core.tensor_value import shape_of
from ..layers.descent import descend
from ..layers.losses import RouterLossConfig, router_losses
from ..layers.moe_ffn import take_routings
from ..layers.precision import Precision, products_in
from .cluster_batches import BatchAccount, ClusterBatchSampler
from .loss import contrastive_loss, equal_captions
from .pairs import PairData, PairTowers
from .stages import FrozenState, MixtureParts, Stage, freeze


@dataclass(frozen=True, kw_only=True)
class PairTraining:
    """One stage of contrastive training. The defaults are CLIP-MoE's for its contrastive stages on a pre-trained CLIP."""

    steps: int
    """Number of steps. CLIP-MoE uses one epoch."""
    batch_size: int
    """Pairs per step. More make more negatives; a cluster needs at least this many samples. CLIP-MoE uses 800."""
    lr: float = 1e-5
    """Highest learning rate. For a small model from scratch 1e-3 is usual; lower it first when the loss becomes NaN."""
    weight_decay: float = 0.2
    """Decay of the weights; biases and norms have none."""
    warmup: int = 200
    """Steps until the highest learning rate, at most the number of steps; then a cosine leads to 0."""
    label_smoothing: float = 0.1
    """Share of the target that is spread over all pairs of a batch."""
    mask_equal_captions: bool = True
    """Whether pairs with equal captions are left out of each other's negatives. Turn it off only to measure what it brings."""
    max_norm: float = 1.0
    """Largest norm of the gradient; a longer one is shortened to it."""
    precision: Precision = "float32"
    """Type of the matrix products. The losses and the routers always compute in float32."""

    def __post_init__(self) -> None:
        require_counts("PairTraining", most=2**31, steps=self.steps, batch_size=self.batch_size)
        require_counts("PairTraining", least=0, most=2**31, warmup=self.warmup)
        require_numbers("PairTraining", least=0.0, most=1e6, lr=self.lr, weight_decay=self.weight_decay)
        require_numbers("PairTraining", least=1e-6, most=1e6, max_norm=self.max_norm)
        require_numbers("PairTraining", least=0.0, most=0.999, label_smoothing=self.label_smoothing)
        require(self.precision in get_args(Precision), f"PairTraining.precision: unknown type {self.precision!r}")

    def lr_at(self, step: int) -> float:
        """Compute the learning rate of a step.

        Args:
            step: Number of the step, from 0.

        Returns:
            The rate.
        """
        warmup = min(self.warmup, self.steps)
        if step < warmup:
            return self.lr * (step + 1) / warmup
        return self.lr * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, self.steps - warmup)))


@dataclass(frozen=True, kw_only=True)
class PairTrainingReport:
    """What happened in one stage."""

    losses: tuple[float, ...]
    """Contrastive loss of every step."""
    balances: tuple[float, ...]
    """Balance loss of every step, 1 for a uniform router; empty without a router loss."""
    account: BatchAccount
    """Where the samples of an epoch went."""
    trained: int
    """Number of values that were trained."""
    cpu_seconds: float
    """CPU time of this process, of all its threads."""

    @property
    def first(self) -> float:
        """Mean loss of the first steps, a tenth of all."""
        return _mean(self.losses[: max(1, len(self.losses) // 10)])

    @property
    def last(self) -> float:
        """Mean loss of the last steps, a tenth of all."""
        return _mean(self.losses[-max(1, len(self.losses) // 10) :])

    def __str__(self) -> str:
        return (
            f"{len(self.losses)} steps, loss {self.first:.3f} -> {self.last:.3f}, {self.trained:,} values trained, "
            f"{self.cpu_seconds:.0f} CPU seconds; {self.account}"
        )


def train_pairs(
    towers: PairTowers,
    data: PairData,
    group: Tensor,
    training: PairTraining,
    stage: Stage,
    parts: MixtureParts,
    *,
    router_loss: RouterLossConfig | None = None,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> PairTrainingReport:
    """Train the tensors of one stage, in place, and prove that all others stayed as they were.

    Args:
        towers: The model, on any device.
        data: Pairs to learn from.
        group: (N,) int64 cluster of each pair, from which every batch is pure; zeros give ordinary batches.
        training: Steps, batches and rates.
        stage: Which tensors train.
        parts: Where FFNs and routers are.
        router_loss: Losses of the routers; None where no router is trained.
        seed: Decides the batches, and dropout.
        on_step: Called after each step with its number and its loss.

    Returns:
        The losses, the batches and the cost.

    Raises:
        InvalidInput: No cluster fills a batch, the stage has nothing to train, or a frozen tensor changed.
        NonFiniteValue: The loss became NaN or infinite.
    """
    require(len(group) == len(data), f"every pair needs a cluster, found {len(group)} clusters for {len(data)} pairs")
    sampler = ClusterBatchSampler(group, training.batch_size, steps=training.steps, seed=seed)
    tensors = freeze(towers, stage, parts)
    before = FrozenState.of(towers, tensors)
    optimizer = _optimizer(towers, training)
    device = next(towers.parameters()).device
    modes = [(module, module.training) for module in towers.modules()]
    _training_mode(towers, tensors.trained)
    losses: list[float] = []
    balances: list[float] = []
    started = time.process_time()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            for step, rows in enumerate(sampler):
                for settings in optimizer.param_groups:
                    settings["lr"] = training.lr_at(step)
                loss, balance = _step(towers, data, torch.tensor(rows), training, router_loss, optimizer, device, step)
                losses.append(loss)
                balances += [] if balance is None else [balance]
                if on_step is not None:
                    on_step(step, loss)
    finally:
        for module, mode in modes:
            module.training = mode
    before.check(towers)
    return PairTrainingReport(
        losses=tuple(losses),
        balances=tuple(balances),
        account=sampler.account,
        trained=tensors.elements,
        cpu_seconds=time.process_time() - started,
    )


def _step(
    towers: PairTowers,
    data: PairData,
    rows: Tensor,
    training: PairTraining,
    router_loss: RouterLossConfig | None,
    optimizer: torch.optim.Optimizer,
    device: torch.device,
    step: int,
) -> tuple[float, float | None]:
    """One step: loss and balance loss."""
    with products_in(training.precision, device):
        image, text = towers(data.batch(rows).to(device))
    ignore = equal_captions(data.caption[rows].to(device)) if training.mask_equal_captions else None
    loss = contrastive_loss(image, text, towers.scale(), ignore=ignore, label_smoothing=training.label_smoothing)
    routings = take_routings(towers)
    extra = None if router_loss is None else router_losses(routings, router_loss)
    value = float(loss.detach())
    if not math.isfinite(value):
        raise NonFiniteValue(
            f"the contrastive loss became {value} at step {step}; lower the learning rate (now {training.lr_at(step):g}), or look for NaN "
            "in the base model and in the images"
        )
    descend(loss if extra is None else loss + extra.total, optimizer, clip=training.max_norm, step=step)
    return value, None if extra is None else float(extra.balance.detach())


def _optimizer(towers: nn.Module, training: PairTraining) -> torch.optim.Optimizer:
    """AdamW on what trains; biases, norms and single numbers have no decay, in a bank of experts too."""
    kept: list[Tensor] = []
    shrunk: list[Tensor] = []
    for name, parameter in towers.named_parameters():
        if parameter.requires_grad:
            (kept if parameter.ndim < 2 or name.rpartition(".")[2].endswith("bias") else shrunk).append(parameter)
    settings = [{"params": shrunk, "weight_decay": training.weight_decay}, {"params": kept, "weight_decay": 0.0}]
    return torch.optim.AdamW([s for s in settings if s["params"]], lr=training.lr, fused=True)


def _training_mode(towers: nn.Module, trained: Sequence[str]) -> None:
    """Training mode everywhere but in batch norms that are frozen: their statistics would move."""
    towers.train()
    owners = {name.rpartition(".")[0] for name in trained}
    for name, module in towers.named_modules():
        if isinstance(module, _BatchNorm) and name not in owners:
            module.eval()


@dataclass(frozen=True, kw_only=True, eq=False)
class PairEmbeddings:
    """Normalized embeddings of a whole data set, float32 on the CPU."""

    image: Tensor
    """(N, D) image embeddings."""
    text: Tensor
    """(N, D) text embeddings."""


@torch.no_grad()
def encode_pairs(
    towers: PairTowers, data: PairData, *, batch_size: int = 256, precision: Precision = "float32"
) -> PairEmbeddings:
    """Embed a whole data set in evaluation mode.

    Args:
        towers: The model. Its mode is the same afterwards.
        data: The pairs.
        batch_size: Pairs at a time.
        precision: Type of the matrix products.

    Returns:
        The embeddings in the order of the data.

    Raises:
        NonFiniteValue: An embedding is NaN or infinite.
    """
    device = next(towers.parameters()).device
    modes = [(module, module.training) for module in towers.modules()]
    towers.eval()
    images, texts = [], []
    try:
        for rows in torch.arange(len(data)).split(batch_size):
            with products_in(precision, device):
                image, text = towers(data.batch(rows).to(device))
            images.append(F.normalize(image.float(), dim=1).cpu())
            texts.append(F.normalize(text.float(), dim=1).cpu())
    finally:
        for module, mode in modes:
            module.training = mode
    found = PairEmbeddings(image=torch.cat(images), text=torch.cat(texts))
    for what, values in (("image", found.image), ("text", found.text)):
        bad = (~values.isfinite().all(1)).nonzero()[:, 0]
        if len(bad):
            raise NonFiniteValue(
                f"the {what} embeddings of {len(bad)} of {len(data)} pairs are NaN or infinite, first that of pair {int(bad[0])}; the "
                "model is damaged or its input is"
            )
    return found


@dataclass(frozen=True, kw_only=True)
class Recall:
    """Share of queries whose answer is among the first k."""

    image_to_text: dict[int, float]
    """By k: an image finds its caption among the different captions."""
    text_to_image: dict[int, float]
    """By k: a caption finds one of its images."""

    def __str__(self) -> str:
        return "; ".join(
            f"{way}: {', '.join(f'R@{k} {100 * share:.1f} %' for k, share in shares.items())}"
            for way, shares in (("image to text", self.image_to_text), ("text to image", self.text_to_image))
        )


def recall(found: PairEmbeddings, caption: Tensor, ks: Sequence[int] = (1, 5)) -> Recall:
    """Measure retrieval in both directions. Captions that several images share count once.

    Args:
        found: Embeddings of the pairs.
        caption: (N,) int64 number of each pair's caption.
        ks: Lengths of the answer.

    Returns:
        Recall at each k; an answer that ties with others counts as ranked behind them.

    Raises:
        InvalidInput: The numbers of embeddings and captions differ, or there are none.
    """
    if not len(caption) or not len(caption) == len(found.image) == len(found.text):
        raise InvalidInput(
            f"recall needs embeddings and captions of the same pairs, found {shape_of(found.image)} and {shape_of(caption)}"
        )
    different, which = caption.unique(return_inverse=True)
    first = torch.full((len(different),), len(caption), dtype=torch.int64)
    first.scatter_reduce_(0, which, torch.arange(len(caption)), "amin")
    scores = found.image @ found.text[first].T
    own = scores.gather(1, which[:, None])
    image_rank = (scores >= own).sum(1) - 1
    mine = torch.zeros_like(scores, dtype=torch.bool).scatter_(1, which[:, None], True)
    best = scores.masked_fill(~mine, -torch.inf).amax(0)
    text_rank = ((scores >= best) & ~mine).sum(0)
    return Recall(
        image_to_text={k: _mean((image_rank < k).double().tolist()) for k in ks},
        text_to_image={k: _mean((text_rank < k).double().tolist()) for k in ks},
    )


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else math.nan
