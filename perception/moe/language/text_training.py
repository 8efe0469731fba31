"""Train and measure models on several domains of tokens: the phases of BAM and of its baselines, with all compute counted.

The batch of a step is a function of seed and step, so a phase that is run again sees the same tokens. Nothing here knows what a model is:
the caller says how a batch becomes a loss. Read next: `bam.py`, what happens between the phases.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ....core.errors import InvalidInput, require, require_counts, require_numbers
from ....core.short_numbers import seconds_text
from ....core.tensor_value import shape_of
from ..layers.descent import descend
from ..layers.losses import RouterLossConfig, describe_router_losses, router_losses
from ..layers.moe_ffn import moe_layers, take_routings
from ..layers.precision import Precision, products_in
from .phase_file import PhaseFile

_Batch = TypeVar("_Batch")


@dataclass(frozen=True, kw_only=True)
class TextTraining:
    """One phase of training: AdamW with a linear warm-up and then a constant rate, so that any step may be its last."""

    steps: int
    """Number of steps."""
    lr: float = 3e-4
    """Learning rate after the warm-up."""
    warmup: int = 10
    """Steps over which the rate rises from 0."""
    weight_decay: float = 0.1
    """Decay of AdamW."""
    clip: float = 1.0
    """Largest norm of the gradient."""
    router: RouterLossConfig = RouterLossConfig()
    """Losses of routers that choose. Soft and frozen routers have none."""
    precision: Precision = "float32"
    """Type of the matrix products."""

    def __post_init__(self) -> None:
        require_counts("TextTraining", least=0, most=10**9, steps=self.steps, warmup=self.warmup)
        require_numbers("TextTraining", least=0.0, most=1e6, lr=self.lr, weight_decay=self.weight_decay, clip=self.clip)


@dataclass(frozen=True, kw_only=True)
class PhaseRecord:
    """What a phase of training did."""

    losses: tuple[float, ...]
    """Loss of each step, without the routers' losses."""
    cpu_seconds: float
    """CPU time of the process in training steps; evaluations at marks are left out."""

    def __str__(self) -> str:
        went = f"loss {self.losses[0]:.3f} -> {self.losses[-1]:.3f}" if self.losses else "no step"
        return f"{went} in {seconds_text(self.cpu_seconds)} CPU seconds"


class TokenDomains:
    """Tokens of several domains to train on.

    Example:
        domains = TokenDomains({"code": code_ids, "law": law_ids})
        batch = domains.batch({"code": 0.9, "law": 0.1}, count=8, length=128, seed=0, step=0)  # (8, 128)
    """

    def __init__(self, tokens: Mapping[str, Tensor]) -> None:
        for name, stream in tokens.items():
            if stream.ndim != 1 or stream.is_floating_point() or len(stream) < 2:
                raise InvalidInput(f"the tokens of {name!r} must be one long row of integers, found {shape_of(stream)}")
        self.tokens = dict(tokens)

    def batch(self, shares: Mapping[str, float], *, count: int, length: int, seed: int, step: int) -> Tensor:
        """Draw a batch.

        Args:
            shares: Share of each domain; a domain's number of rows is drawn, so small shares work with small batches.
            count: Number of rows.
            length: Tokens per row.
            seed: Number of the run.
            step: Number of the step.

        Returns:
            (count, length) int64 tokens.

        Raises:
            InvalidInput: A domain is unknown or has fewer tokens than one row.
        """
        names = list(shares)
        for name in names:
            require(
                name in self.tokens and len(self.tokens[name]) >= length,
                f"the domain {name!r} needs at least {length} tokens, found {len(self.tokens.get(name, []))}; shorten the rows or add text",
            )
        draw = torch.Generator().manual_seed(seed * 1_000_003 + step)
        chosen = draw_rows(shares, count, draw)
        rows = []
        for domain in chosen:
            stream = self.tokens[names[domain]]
            start = int(torch.randint(0, len(stream) - length + 1, (1,), generator=draw))
            rows.append(stream[start : start + length])
        return torch.stack(rows)


def draw_rows(shares: Mapping[str, float], count: int, draw: torch.Generator) -> list[int]:
    """Draw the domain of each row of a batch: whole shares are exact, and what is left over is drawn.

    Args:
        shares: Share of each domain.
        count: Number of rows.
        draw: Source of the numbers.

    Returns:
        Number of a domain for each row.

    Raises:
        InvalidInput: No share is positive.
    """
    weights = torch.tensor(list(shares.values()), dtype=torch.float64)
    require(bool((weights >= 0).all()) and float(weights.sum()) > 0, f"shares of domains must be 0 or more, found {dict(shares)}")
    wanted = weights / weights.sum() * count
    whole = wanted.floor().to(torch.int64)
    rows = torch.repeat_interleave(torch.arange(len(weights)), whole)
    left = count - len(rows)
    if left:
        rest = (wanted - whole).clamp_min(0)
        rest = rest if float(rest.sum()) > 0 else weights
        rows = torch.cat([rows, torch.multinomial(rest, left, replacement=True, generator=draw)])
    return [int(row) for row in rows]


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Compute the mean loss of the next token.

    Args:
        logits: (B, L, V).
        ids: (B, L) tokens.

    Returns:
        Scalar, in nats.
    """
    return F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten())


def train_phase(
    model: nn.Module,
    batch_of: Callable[[int], _Batch],
    loss_of: Callable[[nn.Module, _Batch], Tensor],
    config: TextTraining,
    *,
    marks: Sequence[int] = (),
    at_mark: Callable[[int, float], None] | None = None,
    say: Callable[[str], None] | None = None,
    file: PhaseFile | None = None,
) -> PhaseRecord:
    """Train a model. What needs no gradient stays as it is.

    Args:
        model: The model.
        batch_of: Gives the batch of a step.
        loss_of: Gives the loss of a batch.
        config: The phase.
        marks: Numbers of steps after which `at_mark` is called.
        at_mark: Gets the number of steps and the CPU seconds until then.
        say: Gets a line after every tenth of the steps: step, loss, CPU seconds.
        file: Where the phase is kept while it runs. A phase that was stopped goes on there, and gives the same result bit for bit.

    Returns:
        Losses and CPU time.

    Raises:
        InvalidInput: The loss is no longer finite, nothing is left to train, or the file belongs to another phase.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not config.steps:
        return PhaseRecord(losses=(), cpu_seconds=0.0)
    require(bool(trained), "no parameter of the model needs a gradient, so there is nothing to train")
    optimizer = torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay, betas=(0.9, 0.95), fused=True)
    done = None if file is None else file.restore(model, optimizer)
    losses, seconds = (list(done.losses), done.cpu_seconds) if done is not None else ([], 0.0)
    if done is not None and file is not None and say is not None:
        say(f"goes on after step {len(losses)} of {config.steps}, which {file.path} holds")
    take_step = _stepper(model, trained, optimizer, loss_of, config)
    for step in range(len(losses), config.steps):
        start = time.process_time()
        losses.append(take_step(step, batch_of(step)))
        seconds += time.process_time() - start
        if say is not None and 10 * (step + 1) // config.steps > 10 * step // config.steps:
            say(f"step {step + 1} of {config.steps}: loss {losses[-1]:.3f}, {seconds_text(seconds)} CPU seconds")
        if at_mark is not None and step + 1 in marks:
            at_mark(step + 1, seconds)
        if file is not None:
            file.keep(model, optimizer, losses, seconds)
    return PhaseRecord(losses=tuple(losses), cpu_seconds=seconds)


def _stepper(
    model: nn.Module,
    trained: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    loss_of: Callable[[nn.Module, _Batch], Tensor],
    config: TextTraining,
) -> Callable[[int, _Batch], float]:
    """What takes one step and returns its loss."""
    balanced = any(_choosing(model)) and (config.router.balance > 0 or config.router.z > 0)
    device = trained[0].device.type

    def take(step: int, batch: _Batch) -> float:
        model.train()
        for group in optimizer.param_groups:
            group["lr"] = config.lr * min(1.0, (step + 1) / max(1, config.warmup))
        with products_in(config.precision, device):
            loss = loss_of(model, batch)
            routings = take_routings(model)
            total = loss + router_losses(routings, config.router).total if balanced else loss
        value = float(loss.detach())
        if not math.isfinite(value):
            raise InvalidInput(f"the loss is {value} at step {step}; lower the learning rate ({config.lr:g})")
        descend(total, optimizer, clip=config.clip, step=step)
        return value

    return take


def router_loss_text(model: nn.Module, config: TextTraining) -> str:
    """Say what the router losses of a phase will do; print it before the phase.

    Args:
        model: The model.
        config: The phase.

    Returns:
        One sentence.
    """
    return describe_router_losses(config.router, _choosing(model))


def _choosing(model: nn.Module) -> list[bool]:
    """For each mixture, whether a trained router chooses experts: only then does a balance loss have a meaning."""
    found = []
    for _, layer in moe_layers(model):
        rule = getattr(layer.router, "rule", None)
        found.append(rule is not None and any(p.requires_grad for p in layer.router.parameters()))
    return found


@torch.no_grad()
def mean_loss(
    model: nn.Module,
    batches: Sequence[_Batch],
    loss_of: Callable[[nn.Module, _Batch], Tensor],
    *,
    precision: Precision = "float32",
) -> float:
    """Compute the mean loss of batches of equal size in evaluation mode.

    Args:
        model: The model; its mode is restored.
        batches: The batches.
        loss_of: Gives the loss of a batch.
        precision: Type of the matrix products.

    Returns:
        Mean loss in nats; its exponential is the perplexity.
    """
    require(bool(batches), "a mean over no batch has no value")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        device = next((p.device.type for p in model.parameters()), "cpu")
        with products_in(precision, device):
            return sum(float(loss_of(model, batch)) for batch in batches) / len(batches)
    finally:
        for module, training in modes:
            module.training = training
