"""The losses of GLC and GLC++, as functions of tensors.

    global     cross entropy with the pseudo labels (uniform for unknown samples, which raises their entropy)
    local      cross entropy with the mean prediction of the nearest neighbors
    affinity   GLC++: towards the nearest neighbors in the data set, away from the hard negatives in the batch

Read next: `memory_bank.py`, which finds the neighbors, and `adapter.py`, which weighs the three terms.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.errors import require


def soft_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None, *, epsilon: float = 0.0) -> Tensor:
    """Mean over the batch of -weight * sum_c targets * log softmax(logits): GLC's global and local loss.

    Args:
        logits: (B, C).
        targets: (B, C) distributions; they get no gradient.
        weight: (B,) factor of each sample, or None for 1.
        epsilon: Constant inside the logarithm. The released code uses 1e-5; 0 gives the exact cross entropy.

    Returns:
        Scalar, 0 for an empty batch.
    """
    logs = (logits.softmax(1) + epsilon).log() if epsilon > 0 else logits.log_softmax(1)
    each = -(targets.detach() * logs).sum(1)
    if weight is not None:
        each = each * weight.detach()
    return each.sum() / max(1, len(each))


def hard_negatives(features: Tensor, k: int, *, skip: int) -> Tensor:
    """Find samples of the batch that are similar to each sample but probably of another class, for the affinity loss.

    Args:
        features: (B, D) normalized features.
        k: Number of hard negatives per sample.
        skip: How many of the most similar other samples are passed over: the number of samples of the same class to expect in
            the batch.

    Returns:
        (B, k') int64 rows, k' <= k. k' is 0 where the batch is too small.
    """
    similarity = (features @ features.T).detach().fill_diagonal_(torch.inf)
    return similarity.argsort(dim=1, descending=True)[:, 1 + skip : 1 + skip + k]


def affinity_loss(features: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Mean over the batch of the sum of similarities to the negatives minus the sum of similarities to the positives.

    Args:
        features: (B, D) normalized; only they get a gradient.
        positives: (B, k, D) normalized.
        negatives: (B, k', D) normalized; k' may be 0.

    Returns:
        Scalar.

    Raises:
        InvalidInput: A tensor has another number of dimensions.
    """
    require(
        features.ndim == 2 and positives.ndim == 3 and negatives.ndim == 3,
        f"affinity_loss needs (B, D), (B, k, D) and (B, k', D), found {tuple(features.shape)}, {tuple(positives.shape)} and "
        f"{tuple(negatives.shape)}",
    )
    towards = torch.einsum("bd,bkd->b", features, positives.detach())
    away = torch.einsum("bd,bkd->b", features, negatives.detach())
    return (away - towards).sum() / max(1, len(features))
