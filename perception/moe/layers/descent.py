"""One step of an optimizer, the same for all trainings of mixtures: gradient, its largest norm, and a stop where it is not finite."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from ....core.errors import NonFiniteValue


def descend(loss: Tensor, optimizer: torch.optim.Optimizer, *, clip: float, step: int) -> None:
    """Take one step down the gradient of a loss.

    A gradient with NaN or inf would make every weight NaN, and a loss shows that only in the step after it.

    Args:
        loss: Scalar with a graph.
        optimizer: Optimizer of what trains.
        clip: Largest norm of the gradient of everything that it trains.
        step: Number of the step, for the message.

    Raises:
        NonFiniteValue: The gradient is NaN or infinite; the weights stay as they were.
    """
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    norm = float(nn.utils.clip_grad_norm_(trained, clip))
    if not math.isfinite(norm):
        rate = optimizer.param_groups[0]["lr"]
        raise NonFiniteValue(f"the norm of the gradient is {norm} at step {step}; lower the learning rate (now {rate:g})")
    optimizer.step()
