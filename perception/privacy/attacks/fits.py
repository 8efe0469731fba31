"""Small learners that many attacks share: ridge regression and a small network, the better of them on frames held out.

An attack on few objects wants a linear fit with a strong prior, an attack on many points wants a network. `fit_best` keeps what predicts
best on samples of the attacker's own that were held out, so that no attack is weak because of its learner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....core.errors import require
from ....core.tensor_value import shape_of

RIDGE = (1e-2, 1e-1, 1.0, 10.0, 100.0)
"""Penalties that are tried, for each sample and each unit of a standardized input."""
MANY_ROWS = 1500
"""From this number of rows a network is tried, and one fifth held out is enough to choose."""
HIDDEN = 64
BATCH_ROWS = 128


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A learned function of rows."""

    predict: Callable[[Tensor], Tensor]
    """(N, D) inputs to (N, K) values; for classes, scores of which the highest is the answer."""

    learners: tuple[str, ...]
    """Which learner won for each value: "mean", "ridge" or "network"."""

    held_error: Tensor
    """(K,) squared error of the winner on the held-out rows, in units of the variance; the same for all classes."""


@dataclass(frozen=True, kw_only=True)
class _Scale:
    mean: Tensor
    step: Tensor

    def __call__(self, inputs: Tensor) -> Tensor:
        return ((inputs - self.mean) / self.step).clamp(-10, 10)


def fit_best(
    inputs: Tensor, targets: Tensor, *, seed: int, groups: Tensor | None = None, classes: bool = False, steps: int = 400
) -> Fit:
    """Learn values or classes from rows.

    Args:
        inputs: (N, D) what the attacker sees.
        targets: (N, K) values, or one column per class with a single 1 in each row. Classes get the same weight, however rare.
        seed: Decides the held-out rows and the network's start; the result follows from it.
        groups: (N,) frame of each row. Whole frames are held out, because a learner that knows a frame by its features would look better
            than it is. None: every row is a frame of its own.
        classes: Whether the targets are classes.
        steps: Training steps of the network.

    Returns:
        For each value the learner with the lowest squared error on the held-out rows; the mean takes part too.

    Raises:
        InvalidInput: There are fewer than 10 rows, or inputs and targets do not fit.
    """
    require(
        inputs.ndim == 2 and targets.ndim == 2 and len(inputs) == len(targets) >= 10,
        f"a fit needs inputs (N, D) and targets (N, K) with at least 10 rows, found {shape_of(inputs)} and {shape_of(targets)}",
    )
    generator = torch.Generator().manual_seed(seed)
    folds = _folds(torch.arange(len(inputs)) if groups is None else groups, 1 if len(inputs) >= MANY_ROWS else 5, generator)
    step = inputs.std(0)
    scale = _Scale(mean=inputs.mean(0), step=torch.where(step > 1e-6, step, torch.inf))
    rows = scale(inputs)
    weight = _balanced(targets) if classes else targets.new_ones(len(targets))
    spread = targets.std(0).clamp_min(1e-6)
    mean = (weight[:, None] * targets).sum(0) / weight.sum()

    def errors(answer: Tensor, held: Tensor) -> Tensor:
        each = (weight[held, None] * ((answer - targets[held]) / spread).square()).mean(0)
        return each.mean().expand(len(each)) if classes else each

    tried = []
    for held, kept in folds:
        ridges = _ridges(rows[kept], targets[kept], weight[kept], RIDGE)
        guess = (weight[kept, None] * targets[kept]).sum(0) / weight[kept].sum()
        each = [errors(guess.expand(len(held), -1), held), *(errors(ridge(rows[held]), held) for ridge in ridges)]
        tried.append(torch.stack(each) * len(held) / sum(len(h) for h, _ in folds))
    learners: list[tuple[str, Callable[[Tensor], Tensor]]] = [("mean", lambda x: mean.expand(len(x), -1))]
    learners += [("ridge", ridge) for ridge in _ridges(rows, targets, weight, RIDGE)]
    found = list(torch.stack(tried).sum(0))
    if len(folds) == 1:
        held, kept = folds[0]
        network = _network(
            rows,
            targets,
            weight,
            kept,
            lambda answer: errors(answer, held),
            held,
            generator,
            classes,
            min(steps, 30 * len(kept) // BATCH_ROWS),
        )
        learners.append(("network", network))
        found.append(errors(network(rows[held]), held))
    lowest, which = torch.stack(found).min(0)
    winner = which.tolist()
    return Fit(
        predict=lambda x: torch.stack([learners[w][1](scale(x))[:, k] for k, w in enumerate(winner)], 1),
        learners=tuple(learners[w][0] for w in winner),
        held_error=lowest,
    )


def _folds(groups: Tensor, count: int, generator: torch.Generator) -> list[tuple[Tensor, Tensor]]:
    """Rows held out and rows kept, by groups: each fifth of the groups is held out once, or for a count of 1 only the first."""
    if len(groups.unique()) < 5:
        groups = torch.arange(len(groups))
    names = groups.unique()
    parts = names[torch.randperm(len(names), generator=generator)].tensor_split(5)
    masks = [torch.isin(groups, part) for part in parts[:count]]
    return [(mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]) for mask in masks]


def _balanced(targets: Tensor) -> Tensor:
    """(N,) weights with mean 1 that give every class the same sum."""
    count = targets.sum(0).clamp_min(1)
    weight = (targets / count).sum(1)
    return weight / weight.mean()


def _ridges(x: Tensor, y: Tensor, weight: Tensor, penalties: Sequence[float]) -> list[Callable[[Tensor], Tensor]]:
    """Weighted ridge regressions in float64, in the smaller of the two ways to solve them."""
    w = weight.double() / weight.double().sum()
    center, mean = (w[:, None] * x.double()).sum(0), (w[:, None] * y.double()).sum(0)
    a, b = w.sqrt()[:, None] * (x.double() - center), w.sqrt()[:, None] * (y.double() - mean)
    tall = x.shape[1] <= len(x)
    square = a.T @ a if tall else a @ a.T
    unit = torch.eye(len(square), dtype=square.dtype)

    def learn(penalty: float) -> Callable[[Tensor], Tensor]:
        solved = torch.linalg.solve(square + penalty * unit, a.T @ b if tall else b)
        slope = solved if tall else a.T @ solved
        return lambda rows: ((rows.double() - center) @ slope + mean).float()

    return [learn(penalty) for penalty in penalties]


def _network(
    rows: Tensor,
    targets: Tensor,
    weight: Tensor,
    kept: Tensor,
    errors: Callable[[Tensor], Tensor],
    held: Tensor,
    generator: torch.Generator,
    classes: bool,
    steps: int,
) -> Callable[[Tensor], Tensor]:
    """Two hidden layers; the weights of the step that is best on the held-out rows."""
    mean, spread = targets[kept].mean(0), targets[kept].std(0).clamp_min(1e-6)
    layers = [nn.Linear(rows.shape[1], HIDDEN), nn.Linear(HIDDEN, HIDDEN), nn.Linear(HIDDEN, targets.shape[1])]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(0, (2 / max(1, layer.in_features)) ** 0.5, generator=generator)
            layer.bias.zero_()
    net = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU(), layers[2])
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=1e-2)

    def answer(x: Tensor) -> Tensor:
        out = net(x)
        return out.softmax(1) if classes else out * spread + mean

    best, state = float("inf"), {k: v.clone() for k, v in net.state_dict().items()}
    for step in range(steps):
        batch = kept[torch.randint(len(kept), (min(BATCH_ROWS, len(kept)),), generator=generator)]
        out = net(rows[batch])
        if classes:
            each = nn.functional.cross_entropy(out, targets[batch].argmax(1), reduction="none")
        else:
            each = (out - (targets[batch] - mean) / spread).square().mean(1)
        optimizer.zero_grad()
        (weight[batch] * each).mean().backward()
        optimizer.step()
        if step % 50 == 49 or step == steps - 1:
            with torch.no_grad():
                now = float(errors(answer(rows[held])).sum())
            if now < best:
                best, state = now, {k: v.clone() for k, v in net.state_dict().items()}
    net.load_state_dict(state)
    net.requires_grad_(False)
    return answer
