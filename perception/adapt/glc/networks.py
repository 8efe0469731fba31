"""What adaptation does with its two modules apart from the losses: inference, batch-norm statistics, optimizer, learning rate.

Read next: `adapter.py`.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ....core.errors import require


@torch.no_grad()
def features_and_probabilities(
    feature_module: nn.Module, classifier: nn.Module, inputs: Tensor, *, batch_size: int = 1024
) -> tuple[Tensor, Tensor]:
    """Run both modules in evaluation mode, without gradients. Their modes are restored.

    Args:
        feature_module: Maps inputs (B, ...) to features (B, D).
        classifier: Maps features to logits (B, C).
        inputs: (N, ...).
        batch_size: Samples per call of a module.

    Returns:
        Features (N, D) and probabilities (N, C).
    """
    modes = feature_module.training, classifier.training
    feature_module.eval(), classifier.eval()
    parts = inputs.split(batch_size)  # one part, empty, where there is no input
    features = torch.cat([feature_module(part) for part in parts])
    probabilities = torch.cat([classifier(part).softmax(1) for part in features.split(batch_size)])
    feature_module.train(modes[0]), classifier.train(modes[1])
    return features, probabilities


@torch.no_grad()
def refresh_batch_norm(module: nn.Module, inputs: Tensor, *, batch_size: int = 64) -> None:
    """Replace the running statistics of every batch norm by their mean over batches of the target (AdaBN, Li et al. 2016).

    Args:
        module: Changed in place, and in training mode afterwards.
        inputs: (N, ...) target inputs.
        batch_size: Samples per batch, approximately: batches are of nearly equal size, because a batch of 1 has no variance.
    """
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    for part in inputs.chunk(max(1, len(inputs) // batch_size)):
        module(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.train()


def sgd_with_slow_part(
    module: nn.Module, *, lr: float, slow_prefixes: Sequence[str], slow_factor: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """Make SGD with Nesterov momentum and up to two groups of parameters, the slow ones first.

    Args:
        module: Only its parameters that require a gradient learn.
        lr: Learning rate at the first step.
        slow_prefixes: Beginnings of the names of parameters that learn at `lr * slow_factor`.
        slow_factor: See `slow_prefixes`.
        momentum: Momentum of SGD.
        weight_decay: Weight decay of SGD.

    Returns:
        The optimizer. Each group holds its initial rate as `base_lr`, for `set_learning_rate`.

    Raises:
        InvalidInput: No parameter can learn, or a prefix begins no parameter's name.
    """
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    require(bool(named), "the feature module has no trainable parameter; there is nothing to adapt")
    strangers = [s for s in slow_prefixes if not any(name.startswith(s) for name, _ in named)]
    require(
        not strangers,
        f"slow_prefixes: {strangers} begin no parameter of the feature module; its parameters begin with {[n for n, _ in named][:8]}",
    )
    prefixes = tuple(slow_prefixes)
    slow = [p for name, p in named if name.startswith(prefixes)]
    fast = [p for name, p in named if not name.startswith(prefixes)]
    groups = [{"params": slow, "base_lr": lr * slow_factor}, {"params": fast, "base_lr": lr}]
    return torch.optim.SGD([g for g in groups if g["params"]], lr=lr, momentum=momentum, weight_decay=weight_decay, nesterov=True)


def set_learning_rate(optimizer: torch.optim.Optimizer, done: float) -> None:
    """Apply the learning-rate schedule of GLC and of its source models: `base_lr * (1 + 10 * done) ** -0.75`.

    Args:
        optimizer: Each group must hold its initial rate as `base_lr`.
        done: Share of all steps that are done, 0 to 1.
    """
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * (1 + 10 * done) ** -0.75
