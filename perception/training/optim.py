"""The optimiser of the field's LiDAR detectors: Adam with decoupled weight decay under a one-cycle schedule.

OpenPCDet, ST3D and 3DIoUMatch all train like this (``adam_onecycle`` in OpenPCDet's ``tools/train_utils/optimization``):

    learning rate   lr/10 -- cosine --> lr -- cosine --> lr/1e5       momentum (beta1)   0.95 -> 0.85 -> 0.95
                    |<---- first 40 % --->|<--- the rest --->|

The schedule is two pure functions of the step, so a resumed run needs no scheduler state. Weight decay is decoupled and also
acts on batch-norm weights, as in OpenPCDet (``bn_wd=True``).
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from ...core.errors import InvalidInput


@dataclass(frozen=True, kw_only=True)
class OneCycle:
    """Numbers of the one-cycle schedule; the defaults are those of every OpenPCDet configuration."""

    lr: float  # the peak learning rate
    total_steps: int  # optimiser steps of the whole run
    weight_decay: float = 0.01  # decoupled: weights shrink by lr * weight_decay a step
    pct_start: float = 0.4  # fraction of the steps that climb to the peak
    div: float = 10.0  # the first learning rate is lr / div
    final_div: float = 1e4  # the last one is lr / div / final_div
    momentum: tuple[float, float] = (0.95, 0.85)  # beta1 at both ends, and at the peak
    beta2: float = 0.99

    def __post_init__(self) -> None:
        if self.lr <= 0 or self.div < 1 or self.final_div < 1 or self.weight_decay < 0:
            raise InvalidInput(f"OneCycle needs lr > 0, div >= 1, final_div >= 1 and weight_decay >= 0, found {self}")
        if self.total_steps < 1 or not 0 <= self.pct_start < 1:
            raise InvalidInput(f"OneCycle needs total_steps >= 1 and 0 <= pct_start < 1, found {self}")

    @property
    def peak_step(self) -> int:
        """The step that trains with the peak learning rate (rounded down, like OpenPCDet)."""
        return int(self.total_steps * self.pct_start)


def learning_rate(config: OneCycle, step: int) -> float:
    """Learning rate of ``step`` (0-based; ``total_steps`` itself gives the end value lr / div / final_div)."""
    low = config.lr / config.div
    return _one_cycle(config, step, low, config.lr, low / config.final_div)


def momentum(config: OneCycle, step: int) -> float:
    """beta1 of ``step``: high where the learning rate is low, and the other way round."""
    ends, peak = config.momentum
    return _one_cycle(config, step, ends, peak, ends)


def _one_cycle(config: OneCycle, step: int, start: float, peak: float, end: float) -> float:
    if not 0 <= step <= config.total_steps:
        raise InvalidInput(f"the schedule covers steps 0..{config.total_steps}, asked for {step}")
    if step < config.peak_step:
        return _cosine(start, peak, step / config.peak_step)
    return _cosine(peak, end, (step - config.peak_step) / (config.total_steps - config.peak_step))


def _cosine(start: float, end: float, fraction: float) -> float:
    return end + (start - end) / 2 * (1 + math.cos(math.pi * fraction))


def make_optimizer(parameters: Iterable[nn.Parameter], config: OneCycle) -> torch.optim.AdamW:
    """AdamW over ``parameters`` in one group, at step 0 of the schedule. The fused kernel is used: one pass over memory.

    Raises InvalidInput if there is nothing to train or a parameter is frozen.
    """
    chosen = list(parameters)
    if not chosen:
        raise InvalidInput("make_optimizer was given no parameter; is the whole model frozen?")
    frozen = sum(not p.requires_grad for p in chosen)
    if frozen:
        raise InvalidInput(f"{frozen} of {len(chosen)} parameters for the optimiser are frozen; pass only those that train")
    optimizer = torch.optim.AdamW(chosen, lr=config.lr, weight_decay=config.weight_decay, fused=True)
    set_schedule(optimizer, config, 0)
    return optimizer


def set_schedule(optimizer: torch.optim.Optimizer, config: OneCycle, step: int) -> None:
    """Set learning rate and betas of every group to those of ``step`` (0-based), before ``optimizer.step()``."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(config, step)
        group["betas"] = (momentum(config, step), config.beta2)
