"""Keep an optimizer from changing experts that no token chose.

AdamW shrinks every weight by its decay and goes on with its momentum, also where the gradient is 0. In a long phase in which a domain
does not occur, its expert would fade. A dense layer has no such weights, so no optimizer looks for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .bank import ExpertBank


@dataclass(kw_only=True, eq=False)
class UnusedExpertGuard:
    """Restores, after each step of an optimizer, the experts whose gradients are all 0, with their moments.

    An expert counts as unused by its gradients and not by counts, so accumulated and distributed gradients are right. Attach it with
    `keep_unused_experts`.
    """

    banks: Sequence[ExpertBank]
    """The expert banks that are watched."""
    _saved: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    _handles: list[Any] = field(default_factory=list)

    @torch.no_grad()
    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Copy the unused experts.

        Args:
            optimizer: The optimizer that is about to step.
        """
        self._saved.clear()
        for bank in self.banks:
            moved = [p for p in bank.parameters() if p.grad is not None]
            if not moved:
                continue
            largest = [p.grad.detach().flatten(1).abs().amax(1) for p in moved if p.grad is not None]
            unused = torch.stack(largest).amax(0).eq(0).nonzero()[:, 0]
            for parameter in moved if len(unused) else ():
                for tensor in (parameter.data, *_moments(optimizer, parameter)):
                    self._saved.append((tensor, unused, tensor.index_select(0, unused)))

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Put the unused experts back.

        Args:
            optimizer: The optimizer that has stepped.
        """
        for tensor, unused, values in self._saved:
            tensor.index_copy_(0, unused, values)
        self._saved.clear()

    def remove(self) -> None:
        """Let the optimizer change all experts again."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()


def keep_unused_experts(optimizer: torch.optim.Optimizer, model: nn.Module) -> UnusedExpertGuard:
    """Keep an optimizer from changing experts without a gradient, by decay or by momentum, from its next step on.

    Args:
        optimizer: The optimizer of the model.
        model: The model with expert banks.

    Returns:
        The guard; its `remove` ends it.

    Example:
        optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
        keep_unused_experts(optimizer, model)
    """
    guard = UnusedExpertGuard(banks=[module for module in model.modules() if isinstance(module, ExpertBank)])
    guard._handles = [
        optimizer.register_step_pre_hook(lambda chosen, args, kwargs: guard.before_step(chosen)),
        optimizer.register_step_post_hook(lambda chosen, args, kwargs: guard.after_step(chosen)),
    ]
    return guard


def _moments(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> list[Tensor]:
    state = optimizer.state.get(parameter, {})
    return [value for value in state.values() if isinstance(value, Tensor) and value.shape == parameter.shape]
