"""The optimizer that LiDAR detectors are usually trained with: Adam with decoupled weight decay under a one-cycle schedule.

OpenPCDet, ST3D and 3DIoUMatch all train like this (`adam_onecycle` in OpenPCDet's `tools/train_utils/optimization`):

    learning rate   lr/10 -- cosine --> lr -- cosine --> lr/1e5       momentum (beta1)   0.95 -> 0.85 -> 0.95
                    |<---- first 40 % --->|<--- the rest --->|

The schedule is two pure functions of the step, so a resumed run needs no scheduler state. A run that is continued for more steps
begins a new cycle there (`OneCycle.continued`). Weight decay is decoupled and also
acts on batch-norm weights, as in OpenPCDet (`bn_wd=True`).

Read next: `step.py`, which sets the schedule before every step.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch
from torch import nn

from ...core.errors import InvalidInput

HIGHEST_LR = 10.0
"""Largest learning rate that is accepted; a larger one makes every weight useless within a few steps."""


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Learning-rate schedule with one warm-up and one cool-down (Smith, 2018). Defaults: every OpenPCDet configuration."""

    lr: float
    """Highest learning rate. Lower it first when the loss becomes NaN."""

    total_steps: int
    """Optimizer steps of the whole run."""

    weight_decay: float = 0.01
    """Decoupled weight decay: weights shrink by lr * weight_decay per step."""

    pct_start: float = 0.4
    """Fraction of the steps in which the learning rate rises."""

    div: float = 10.0
    """The first learning rate is lr / div. Raise it when the first steps diverge."""

    final_div: float = 1e4
    """The last learning rate is lr / div / final_div."""

    momentum: tuple[float, float] = (0.95, 0.85)
    """beta1 of Adam: its first and last value, then its value where the learning rate is highest."""

    beta2: float = 0.99
    """beta2 of Adam, constant."""

    cycles: tuple[tuple[int, int], ...] = ()
    """First step and planned end of each cycle, in a run whose number of steps was changed (`continued`). Empty for one cycle. Leave it
    empty: `--resume --steps N` fills it."""

    def __post_init__(self) -> None:
        if not self.lr > 0 or self.div < 1 or self.final_div < 1 or self.weight_decay < 0:
            found = f"{self.lr}, {self.div}, {self.final_div} and {self.weight_decay}"
            raise InvalidInput(f"OneCycle needs lr > 0, div >= 1, final_div >= 1 and weight_decay >= 0, found {found}")
        if self.lr > HIGHEST_LR:
            raise InvalidInput(
                f"a learning rate of {self.lr:g} is absurd: Adam moves every weight by about this much per step, and the presets use 0.0007 "
                f"to 0.01; give at most {HIGHEST_LR:g} (--preset.train.loop.optim.lr or --preset.upcycle.loop.optim.lr)"
            )
        if self.total_steps < 1 or not 0 <= self.pct_start < 1:
            found = f"{self.total_steps} and {self.pct_start}"
            raise InvalidInput(f"OneCycle needs total_steps >= 1 and 0 <= pct_start < 1, found {found}")
        starts = [start for start, _ in self.cycles]
        ordered = starts == sorted(set(starts)) and all(start < end for start, end in self.cycles)
        if self.cycles and not (ordered and starts[0] == 0 and self.cycles[-1][1] == self.total_steps):
            raise InvalidInput(
                f"OneCycle.cycles must start at step 0 and end at step {self.total_steps}, found {self.cycles}; leave it empty"
            )

    def cycle_of(self, step: int) -> tuple[int, int]:
        """Find the cycle that a step belongs to.

        Args:
            step: 0-based step.

        Returns:
            First step and planned end of the cycle.
        """
        started = [cycle for cycle in self.cycles if cycle[0] <= step]
        return started[-1] if started else (0, self.total_steps)

    def continued(self, done: int, total_steps: int) -> OneCycle:
        """Plan another number of steps for a run that has done some: the remaining steps are a new cycle with its own warm-up.

        Following one longer cycle instead would raise the learning rate of a finished run from its lowest value to nearly its highest
        without a warm-up.

        Args:
            done: Steps done.
            total_steps: Steps of the whole run from now on.

        Returns:
            The schedule, unchanged up to step `done`.

        Raises:
            InvalidInput: The run has done this number of steps already.
        """
        if total_steps <= done:
            raise InvalidInput(
                f"the run has done {done} steps, so it cannot end after {total_steps}; the number of steps counts from the start of the run"
            )
        if done == 0:
            return replace(self, total_steps=total_steps, cycles=())
        before = self.cycles or ((0, self.total_steps),)
        kept = tuple(cycle for cycle in before if cycle[0] < done)
        return replace(self, total_steps=total_steps, cycles=(*kept, (done, total_steps)))


def learning_rate(config: OneCycle, step: int) -> float:
    """Compute the learning rate of a step.

    Args:
        config: The schedule.
        step: 0-based step; `total_steps` itself gives the end value lr / div / final_div.

    Returns:
        The learning rate.

    Raises:
        InvalidInput: The step is outside the schedule.
    """
    low = config.lr / config.div
    return _one_cycle(config, step, low, config.lr, low / config.final_div)


def momentum(config: OneCycle, step: int) -> float:
    """Compute beta1 of a step: high where the learning rate is low, and low where it is high.

    Args:
        config: The schedule.
        step: 0-based step, up to and including `total_steps`.

    Returns:
        beta1.

    Raises:
        InvalidInput: The step is outside the schedule.
    """
    ends, peak = config.momentum
    return _one_cycle(config, step, ends, peak, ends)


def _one_cycle(config: OneCycle, step: int, start: float, peak: float, end: float) -> float:
    if not 0 <= step <= config.total_steps:
        raise InvalidInput(f"the schedule covers steps 0..{config.total_steps}, asked for {step}")
    first, last = config.cycle_of(step)
    peak_step = int((last - first) * config.pct_start)  # rounded down, like OpenPCDet
    done = step - first
    if done < peak_step:
        return _cosine(start, peak, done / peak_step)
    return _cosine(peak, end, (done - peak_step) / (last - first - peak_step))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def make_optimizer(parameters: Iterable[nn.Parameter], config: OneCycle) -> torch.optim.AdamW:
    """Make AdamW over parameters in one group, at step 0 of the schedule. The fused kernel needs one pass over memory.

    Args:
        parameters: The parameters to train.
        config: The schedule.

    Returns:
        The optimizer.

    Raises:
        InvalidInput: There is nothing to train, or a parameter is frozen.
    """
    chosen = list(parameters)
    if not chosen:
        raise InvalidInput("make_optimizer was given no parameter; is the whole model frozen?")
    frozen = sum(not p.requires_grad for p in chosen)
    if frozen:
        raise InvalidInput(f"{frozen} of {len(chosen)} parameters for the optimizer are frozen; pass only those that train")
    optimizer = torch.optim.AdamW(chosen, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    set_schedule(optimizer, config, 0)
    return optimizer


def set_schedule(optimizer: torch.optim.Optimizer, config: OneCycle, step: int) -> None:
    """Set learning rate and betas of every group; called before `optimizer.step()`.

    Args:
        optimizer: The optimizer to change.
        config: The schedule.
        step: 0-based step.

    Raises:
        InvalidInput: The step is outside the schedule.
    """
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
        group["betas"] = (momentum(config, step), config.beta2)
