"""Losses as pure functions of predictions and targets, always in float32; `targets.py` makes the targets.

Sources: focal loss, Lin et al. 2017; smooth L1 with the sine form of the yaw error, Yan et al. SECOND 2018, section 3.2;
numbers from OpenPCDet `pcdet/utils/loss_utils.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def sigmoid_focal_loss(logits: Tensor, targets: Tensor, alpha: float = 0.25, gamma: float = 2.0) -> Tensor:
    """Compute the focal loss of each element.

    Args:
        logits: predictions of any shape and float type.
        targets: 0 or 1, of the same shape.
        alpha: weight of positive elements; negative ones have 1 - alpha.
        gamma: how strongly elements that are already right are discounted.

    Returns:
        Losses of the same shape, float32, without reduction.
    """
    logits = logits.float()
    probability = torch.sigmoid(logits)
    alpha_weight = targets * alpha + (1 - targets) * (1 - alpha)
    miss = targets * (1 - probability) + (1 - targets) * probability
    return alpha_weight * miss.pow(gamma) * F.binary_cross_entropy_with_logits(logits, targets, reduction="none")


def smooth_l1(difference: Tensor, beta: float = 1.0 / 9.0) -> Tensor:
    """Compute the smooth L1 loss of each element: quadratic below `beta`, linear above.

    Args:
        difference: prediction minus target, of any shape.
        beta: where the two parts meet.

    Returns:
        Losses of the same shape, float32, without reduction.
    """
    size = difference.float().abs()
    return torch.where(size < beta, 0.5 * size**2 / beta, size - 0.5 * beta)


def box_code_loss(codes: Tensor, targets: Tensor) -> Tensor:
    """Compare residual codes of boxes.

    The yaw enters as sin(difference), so opposite headings cost nothing here; the direction classifier tells them apart.

    Args:
        codes: (N, 7) predicted residuals.
        targets: (N, 7) true residuals of the same anchors.

    Returns:
        (N,) losses, summed over the 7 residuals.
    """
    difference = torch.cat([codes[:, :6] - targets[:, :6], torch.sin(codes[:, 6:] - targets[:, 6:])], 1)
    return smooth_l1(difference).sum(1)
