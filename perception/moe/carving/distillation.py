"""What teaches a router which expert fits a token: the overlap of the token's own top units with each expert's units.

For each token, the dense model says which of its hidden units are largest. An expert fits the token if it holds many of them:

    overlap_i = sum over FFNs and thresholds of |top units of the token, and own units of expert i| / sum of the sizes of the top sets
    target    = softmax over i of sharpness * (overlap_i - mean over i)

Shared units are left out: all experts have them, so they cancel in the softmax.

Choices, and why (the paper and its program differ):

| | here | paper | program |
|---|---|---|---|
| top units by | size (`signed=False`) | size | signed value |
| thresholds | one, the ratio of the carving | one | five nested ones (`NESTED`) |
| sharpness | 10 | counts are not scaled, which is all but one-hot | 10 |
| loss | KL(target, router) | KL(router, target) | 0.75 hard + 0.25 KL(target, router) (`PROGRAM_LOSS`) |

With a small sharpness, and KL(target, router), whose minimum is the mean of the targets that look alike to the router, the router's argmax
is the expert with the largest *expected* overlap. A one-hot target would give the expert that is most often ahead, by however little.
Means over the FFNs of a deep model differ by hundredths, so a sharpness of 10 makes them all but uniform: `serving/language_carving.py`
takes 100.

Read next: `alternating.py`, which trains with it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_numbers
from ....core.tensor_value import shape_of
from .activity import watched_ffns
from .masked_ffn import MaskedFfn, layers_of_sites, run_dense
from .units import Carving, SiteUnits, units_of_ratio

NESTED = (1.0, 0.8, 0.6, 0.4, 0.2)
"""The five thresholds of the published program, as shares of the carving's ratio."""

Direction = Literal["target_to_router", "router_to_target"]


# ---- targets


@dataclass(frozen=True, kw_only=True)
class OverlapConfig:
    """How the overlap of a token with the experts is measured."""

    thresholds: tuple[float, ...] = (1.0,)
    """Sizes of the token's top sets as shares of the carving's ratio; with `NESTED` a unit of all five sets counts five times."""
    signed: bool = False
    """Whether top units are those with the largest signed value instead of the largest size."""
    sharpness: float = 10.0
    """Factor of the overlaps in the softmax. Large values make the targets one-hot."""

    def __post_init__(self) -> None:
        require(bool(self.thresholds), "OverlapConfig.thresholds needs at least one threshold")
        require_numbers("OverlapConfig", least=1e-6, most=1.0, thresholds=self.thresholds)
        require_numbers("OverlapConfig", least=0.0, most=1e9, sharpness=self.sharpness)


def token_overlaps(hidden: Tensor, units: SiteUnits, ratio: float, config: OverlapConfig) -> Tensor:
    """Measure the overlap of each token's top units with each expert's own units in one FFN.

    A unit that is exactly 0, as most are after a ReLU, never counts as one of the top.

    Args:
        hidden: (T, F) hidden units of the dense FFN.
        units: Which units belong to whom.
        ratio: Ratio of the carving.
        config: How to measure.

    Returns:
        (T, N) float32 overlaps in 0..1.
    """
    if hidden.ndim != 2 or hidden.shape[1] != units.width:
        raise InvalidInput(f"{units.site!r} has {units.width} units, and the hidden units are {shape_of(hidden)}")
    values = hidden.detach() if config.signed else hidden.detach().abs()
    counts = [units_of_ratio(units.width, ratio * threshold) for threshold in config.thresholds]
    top, order = values.float().topk(max(counts), dim=1)
    weight = torch.zeros(max(counts), device=hidden.device)
    for count in counts:
        weight[:count] += 1
    marks = torch.zeros(hidden.shape, device=hidden.device).scatter_(1, order, weight * (top != 0))
    return marks @ units.own.to(hidden.device).float().T / sum(counts)


@dataclass(frozen=True, kw_only=True, eq=False)
class Overlaps:
    """Overlap of tokens, or of scenes, with each expert."""

    sites: Tensor
    """(S, T, N) overlap in each of S FFNs, the target of layer-wise routers."""
    config: OverlapConfig
    """How it was measured."""

    @property
    def mean(self) -> Tensor:
        """(T, N) overlap over all FFNs, each with the same weight."""
        return self.sites.mean(0)

    @property
    def best(self) -> Tensor:
        """(T,) int64 expert with the largest overlap: the oracle of a decision per token."""
        return self.mean.argmax(1)

    def targets(self) -> Tensor:
        """Turn overlaps into the distribution that a pre-gate learns.

        Returns:
            (T, N) that sum to 1.
        """
        return _softened(self.mean, self.config.sharpness)

    def layer_targets(self) -> Tensor:
        """Turn overlaps into the distributions that layer-wise routers learn.

        Returns:
            (S, T, N) that sum to 1.
        """
        return _softened(self.sites, self.config.sharpness)


def _softened(overlap: Tensor, sharpness: float) -> Tensor:
    return (sharpness * (overlap - overlap.mean(-1, keepdim=True))).softmax(-1)


def measure_overlaps(
    model: nn.Module,
    carving: Carving,
    run: Callable[[nn.Module], object],
    config: OverlapConfig = OverlapConfig(),
    *,
    scenes: int | None = None,
) -> Overlaps:
    """Run a teacher on one batch and measure how its tokens overlap with the experts.

    Args:
        model: The dense model (the paper's teacher), or a model from `mask_ffns`, which runs with all its units (the program's teacher:
            it follows the training). It stays as it is.
        carving: The experts.
        run: Runs the model on the batch, once.
        config: How to measure.
        scenes: Number of scenes with one decision each: overlaps are averaged over the tokens of a scene, which stand in a row. None
            for one decision per token.

    Returns:
        The overlaps.

    Raises:
        InvalidInput: An FFN was not reached, or FFNs have different numbers of tokens.
    """
    found: dict[int, Tensor] = {}

    def see(site: int, x: Tensor, hidden: Tensor) -> None:
        overlap = token_overlaps(hidden.reshape(-1, hidden.shape[-1]), carving.units[site], carving.ratio, config)
        if scenes is not None:
            if scenes < 1 or len(overlap) % scenes:
                raise InvalidInput(
                    f"{len(overlap)} tokens at {carving.units[site].site!r} cannot be divided into {scenes} scenes"
                )
            overlap = overlap.view(scenes, -1, overlap.shape[1]).mean(1)
        found[site] = overlap

    if any(isinstance(module, MaskedFfn) for module in model.modules()):
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            with run_dense(model, carving, see), torch.no_grad():
                run(model)
        finally:
            for module, training in modes:
                module.training = training
    else:
        with watched_ffns(model, carving.plan, see):
            run(model)
    missing = [units.site for number, units in enumerate(carving.units) if number not in found]
    require(not missing, f"the batch did not reach the FFNs {missing[:3]}; run the whole model")
    lengths = {len(overlap) for overlap in found.values()}
    require(
        len(lengths) == 1,
        f"the FFNs have different numbers of tokens, {sorted(lengths)}, so one decision per token cannot serve all; give `scenes`",
    )
    return Overlaps(sites=torch.stack([found[number] for number in range(len(found))]), config=config)


# ---- losses


@dataclass(frozen=True, kw_only=True)
class DistillLoss:
    """What is minimized between a router's logits and its targets."""

    direction: Direction = "target_to_router"
    """`target_to_router` is KL(target, router), whose minimum is the mean target; `router_to_target` is the paper's KL(router, target)."""
    hard: float = 0.0
    """Weight of the cross-entropy with the target's best expert; the rest is the weight of the KL divergence."""
    label_smoothing: float = 0.0
    """Smoothing of the best expert's label."""

    def __post_init__(self) -> None:
        require(self.direction in get_args(Direction), f"DistillLoss.direction: unknown direction {self.direction!r}")
        require_numbers("DistillLoss", least=0.0, most=1.0, hard=self.hard, label_smoothing=self.label_smoothing)

    def __call__(self, logits: Tensor, target: Tensor, padding: Tensor | None = None) -> Tensor:
        """Compute the mean loss per token.

        Args:
            logits: (..., N) logits of the router.
            target: (..., N) distributions.
            padding: (...) bool, True for tokens that do not count.

        Returns:
            Scalar in nats; 0 if no token counts.

        Raises:
            InvalidInput: Shapes that do not fit.
        """
        if logits.shape != target.shape or (padding is not None and padding.shape != logits.shape[:-1]):
            raise InvalidInput(
                f"logits and targets must have one shape (..., N) and padding (...), found {shape_of(logits)}, {shape_of(target)} and "
                f"{shape_of(padding)}"
            )
        logits, target = logits.flatten(0, -2).float(), target.flatten(0, -2).float()
        if padding is not None:
            logits, target = logits[~padding.flatten()], target[~padding.flatten()]
        if not len(logits):
            return logits.sum()
        log_target = target.clamp_min(torch.finfo(target.dtype).tiny).log()
        log_router = logits.log_softmax(1)
        if self.direction == "target_to_router":
            soft = F.kl_div(log_router, log_target, reduction="batchmean", log_target=True)
        else:
            soft = F.kl_div(log_target, log_router, reduction="batchmean", log_target=True)
        if not self.hard:
            return soft
        best = F.cross_entropy(logits, target.argmax(1), label_smoothing=self.label_smoothing)
        return self.hard * best + (1 - self.hard) * soft


PROGRAM_LOSS = DistillLoss(hard=0.75, label_smoothing=0.5)
"""The loss of the published program. Its cross-entropy with the target distribution has the gradient of KL(target, router)."""


def layer_distill_loss(
    model: nn.Module, carving: Carving, overlaps: Overlaps, loss: DistillLoss, padding: Tensor | None = None
) -> Tensor:
    """Compute the mean loss of layer-wise routers after a forward pass of the masked model, and forget the decisions.

    Args:
        model: A model from `mask_ffns` with a `LayerRouter` in each FFN, after a forward pass on the batch.
        carving: Its carving.
        overlaps: The teacher's overlaps on the same batch.
        loss: The loss.
        padding: Bool mask of the batch's tokens, True for tokens that do not count.

    Returns:
        Scalar.

    Raises:
        InvalidInput: A layer made no decision, or its decision has no logits.
    """
    layers = layers_of_sites(model, carving)
    routings = [layer.take_routing() for layer in layers]
    logits = [None if routing is None else routing.logits for routing in routings]
    missing = [layer.site for layer, own in zip(layers, logits) if own is None]
    require(not missing, f"no logits of the layers {missing[:3]}: run the masked model with layer-wise routers first")
    return loss(
        torch.stack([own for own in logits if own is not None]), overlaps.layer_targets(), _repeated(padding, len(layers))
    )


def _repeated(padding: Tensor | None, times: int) -> Tensor | None:
    return None if padding is None else padding.flatten().expand(times, -1)


# ---- how good a router is


@dataclass(frozen=True, kw_only=True)
class PositionAccuracy:
    """How often a router chooses the right expert, by the position of the token in its text. `print(accuracy)` shows a table."""

    bounds: tuple[int, ...]
    """Position i of a bin lies in bounds[i] .. bounds[i + 1] - 1."""
    hits: tuple[int, ...]
    """Number of right decisions in each bin."""
    tokens: tuple[int, ...]
    """Number of tokens in each bin."""

    @property
    def total(self) -> float:
        """Share of right decisions over all tokens; NaN without tokens."""
        return sum(self.hits) / sum(self.tokens) if sum(self.tokens) else float("nan")

    @property
    def shares(self) -> tuple[float, ...]:
        """Share of right decisions in each bin; NaN where no token is."""
        return tuple(hits / tokens if tokens else float("nan") for hits, tokens in zip(self.hits, self.tokens))

    def __str__(self) -> str:
        rows = zip(pairwise(self.bounds), self.shares, self.tokens)
        lines = [f"{low:>6}..{high - 1:<6} {share:6.1%} of {tokens:,} tokens" for (low, high), share, tokens in rows]
        return "\n".join([f"right expert for {self.total:.1%} of {sum(self.tokens):,} tokens, by position:", *lines])


def accuracy_by_position(
    chosen: Tensor, truth: Tensor, *, bounds: Sequence[int] = (0, 1, 4, 16, 64, 256, 1024), padding: Tensor | None = None
) -> PositionAccuracy:
    """Compare decisions with an oracle's.

    Args:
        chosen: (B, L) int64 chosen experts.
        truth: (B, L) int64 best experts, or (B,) the domain of each text.
        bounds: Ascending positions where bins begin, from 0; later positions belong to the last bin.
        padding: (B, L) bool, True for padding.

    Returns:
        Hits and tokens by position. Positions are counted without padding.

    Raises:
        InvalidInput: Shapes that do not fit.
    """
    truth = truth[:, None].expand_as(chosen) if truth.ndim == 1 and chosen.ndim == 2 and len(truth) == len(chosen) else truth
    if chosen.ndim != 2 or truth.shape != chosen.shape or (padding is not None and padding.shape != chosen.shape):
        raise InvalidInput(f"decisions (B, L) need a truth (B, L) or (B,), found {shape_of(chosen)} and {shape_of(truth)}")
    require(
        len(bounds) > 0 and bounds[0] == 0 and list(bounds) == sorted(set(bounds)), f"bounds must ascend from 0, found {bounds}"
    )
    counted = torch.ones_like(chosen, dtype=torch.bool) if padding is None else ~padding
    position = (counted.cumsum(1) - 1)[counted]
    right = (chosen == truth)[counted]
    bins = torch.bucketize(position, torch.tensor(bounds[1:], device=position.device), right=True)
    tokens = torch.bincount(bins, minlength=len(bounds))
    hits = torch.bincount(bins[right], minlength=len(bounds))
    end = max(bounds[-1] + 1, int(position.max()) + 1 if len(position) else 0)
    return PositionAccuracy(bounds=(*bounds, end), hits=tuple(hits.tolist()), tokens=tuple(tokens.tolist()))
