"""Small learners that many attacks share: ridge regression and a small network, the better of them on frames held out.

An attack on few objects wants a linear fit with a strong prior, an attack on many points wants a network. `fit_best` tries both and keeps
what predicts best on a fifth of the attacker's own samples, so that no attack is weak because of its learner.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ....core.errors import require
from ....core.tensor_value import shape_of

RIDGE = (1e-3, 1e-2, 1e-1, 1.0, 10.0)
"""Penalties that are tried, for each sample and each unit of a standardized input."""
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
    held, kept = _divided(torch.arange(len(inputs)) if groups is None else groups, generator)
    step = inputs[kept].std(0)
    scale = _Scale(mean=inputs[kept].mean(0), step=torch.where(step > 1e-6, step, torch.inf))
    rows = scale(inputs)
    weight = _balanced(targets) if classes else targets.new_ones(len(targets))
    spread = targets.std(0).clamp_min(1e-6)

    def errors(answer: Tensor) -> Tensor:
        each = (weight[held, None] * ((answer - targets[held]) / spread).square()).mean(0)
        return each.mean().expand(len(each)) if classes else each

    mean = (weight[kept, None] * targets[kept]).sum(0) / weight[kept].sum()
    found: list[tuple[str, Tensor, Callable[[Tensor], Tensor]]] = [
        ("mean", errors(mean.expand(len(held), -1)), lambda x: mean.expand(len(x), -1))
    ]
    tried = [errors(ridge(rows[held])) for ridge in _ridges(rows[kept], targets[kept], weight[kept], RIDGE)]
    for error, ridge in zip(tried, _ridges(rows, targets, weight, RIDGE), strict=True):
        found.append(("ridge", error, ridge))
    epochs = max(50, 30 * len(kept) // BATCH_ROWS)
    network = _network(rows, targets, weight, kept, errors, held, generator, classes, min(steps, epochs))
    found.append(("network", errors(network(rows[held])), network))
    lowest, which = torch.stack([error for _, error, _ in found]).min(0)
    winner = which.tolist()
    return Fit(
        predict=lambda x: torch.stack([found[w][2](scale(x))[:, k] for k, w in enumerate(winner)], 1),
        learners=tuple(found[w][0] for w in winner),
        held_error=lowest,
    )


def _divided(groups: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Rows of a fifth of the groups, and rows of the others."""
    names = groups.unique()
    if len(names) < 2:
        groups = torch.arange(len(groups))
        names = groups
    out = names[torch.randperm(len(names), generator=generator)[: max(1, len(names) // 5)]]
    mask = torch.isin(groups, out)
    return mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]


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
