"""Batch norms after surgery: measure their running statistics again.

Averages of running statistics over domains fit no domain, and an upcycled head feeds its later layers with other values than the dense
one did. `recalibrate_batch_norm` measures them on data; nothing else changes.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ....core.errors import InvalidInput


def recalibrate_batch_norm(model: nn.Module, run: Callable[[nn.Module], None]) -> int:
    """Replace the running statistics of all batch norms by their averages over some batches.

    Args:
        model: The model. Only running statistics change; weights and modes stay.
        run: Runs the model on as many batches as shall count, equally weighted, of all domains.

    Returns:
        Number of batch norms.

    Raises:
        InvalidInput: The model has no batch norm with running statistics, or `run` did not reach one.
    """
    norms = [(n, m) for n, m in model.named_modules() if isinstance(m, _BatchNorm) and m.running_mean is not None]
    if not norms:
        raise InvalidInput("the model has no batch norm with running statistics, so there is nothing to recalibrate")
    modes = [(module, module.training) for module in model.modules()]
    before = [(norm, norm.momentum) for _, norm in norms]
    model.eval()
    for _, norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
        norm.train()
    try:
        with torch.no_grad():
            run(model)
    finally:
        for module, training in modes:
            module.training = training
        for norm, momentum in before:
            norm.momentum = momentum
    for name, norm in norms:
        if norm.num_batches_tracked is None or int(norm.num_batches_tracked) == 0:
            raise InvalidInput(f"the batches never reached the batch norm {name!r}, which has no statistics now; run other data")
    return len(norms)
