"""The losses of GLC and GLC++, as functions of tensors.

    global     cross entropy with the pseudo labels (uniform for unknown samples, which raises their entropy)
    local      cross entropy with the mean prediction of the nearest neighbours
    affinity   GLC++: towards the nearest neighbours in the data set, away from the hard negatives in the batch

``epsilon`` adds a constant inside the logarithm, as the released code does (1e-5); 0 is the exact cross entropy.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ....core.errors import require


def soft_cross_entropy(logits: Tensor, targets: Tensor, weight: Tensor | None = None, *, epsilon: float = 0.0) -> Tensor:
    """Mean over B of -weight * sum_c targets * log softmax(logits): GLC's global and local loss. () scalar, 0 for no sample.

    logits, targets: (B, C); rows of the targets are distributions and get no gradient. weight: (B,), 1 where None.
    """
    logs = (logits.softmax(1) + epsilon).log() if epsilon > 0 else logits.log_softmax(1)
    each = -(targets.detach() * logs).sum(1)
    if weight is not None:
        each = each * weight.detach()
    return each.sum() / max(1, len(each))


def hard_negatives(features: Tensor, k: int, *, skip: int) -> Tensor:
    """(B, k') batch rows that are similar to each sample but probably of another class, for the affinity loss; k' <= k.

    features: (B, D), normalised. skip: how many of the most similar others are passed over, the number of samples of the same class
    to expect in the batch. Empty where the batch is too small.
    """
    similarity = (features @ features.T).detach().fill_diagonal_(torch.inf)
    return similarity.argsort(dim=1, descending=True)[:, 1 + skip : 1 + skip + k]


def affinity_loss(features: Tensor, positives: Tensor, negatives: Tensor) -> Tensor:
    """Mean over B of (sum of similarities to the negatives - sum of similarities to the positives). () scalar.

    features: (B, D), normalised; only they get a gradient. positives: (B, k, D), negatives: (B, k', D), normalised.
    """
    require(
        features.ndim == 2 and positives.ndim == 3 and negatives.ndim == 3,
        f"affinity_loss needs (B, D), (B, k, D) and (B, k', D), found {tuple(features.shape)}, {tuple(positives.shape)}, "
        f"{tuple(negatives.shape)}",
    )
    towards = torch.einsum("bd,bkd->b", features, positives.detach())
    away = torch.einsum("bd,bkd->b", features, negatives.detach())
    return (away - towards).sum() / max(1, len(features))
