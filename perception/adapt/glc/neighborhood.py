"""Neighbors of samples in feature space, and how well labels agree with them: a measure of certainty that needs no true label.

Samples that lie next to each other mostly have one class. Labels of which neighbors hold different ones are therefore uncertain, whatever
they are based on, so that labels of clusters and of a classifier can be compared.

Read next: `agreed_labels.py` and `guard.py`, which use it.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import require
from .unknown_rule import is_unknown

_CHUNK = 1024  # samples whose similarities are held at once


def neighbors_of(features: Tensor, count: int, *, most_rows: int) -> Tensor:
    """Find the samples with the most similar directions. A sample is never its own neighbor.

    Args:
        features: (N, D) of any length.
        count: Neighbors of each sample; fewer where there are fewer other samples.
        most_rows: Where there are more samples, neighbors are searched among this number of rows, taken evenly.

    Returns:
        (N, min(count, rows - 1)) int64 rows of `features`, the most similar first.
    """
    require(count >= 1 and most_rows > count, f"{count} neighbors are searched among more rows, found most_rows = {most_rows}")
    n = len(features)
    directions = F.normalize(features)
    rows = torch.arange(min(n, most_rows), device=features.device) * max(n, 1) // max(1, min(n, most_rows))
    found = [features.new_zeros(0, min(count, max(0, len(rows) - 1)), dtype=torch.int64)]
    for start in range(0, n, _CHUNK):
        similarity = directions[start : start + _CHUNK] @ directions[rows].T
        own = torch.arange(start, min(n, start + _CHUNK), device=features.device)
        similarity.masked_fill_(own[:, None] == rows, -torch.inf)
        found.append(rows[similarity.topk(found[0].shape[1], dim=1).indices])
    return torch.cat(found)


def neighbor_agreement(labels: Tensor, neighbors: Tensor) -> float:
    """Compute how much the label of a sample tells about the labels of its neighbors: their mutual information.

    Unlike the share of equal neighbors, it is small for labels that hold few classes, however well these lie apart.

    Args:
        labels: (N,) int64, not negative.
        neighbors: (N, k) int64 rows.

    Returns:
        In nats: 0 for one label only and about 0 for labels without connection to the features, at most the logarithm of the number
        of labels.
    """
    if not neighbors.numel():
        return 0.0
    kinds, compact = labels.unique(return_inverse=True)
    pairs = compact[:, None] * len(kinds) + compact[neighbors]
    joint = torch.bincount(pairs.flatten(), minlength=len(kinds) ** 2).double().view(len(kinds), len(kinds))
    joint = (joint + joint.T) / (2 * joint.sum())
    share = joint.sum(0)
    met = joint > 0
    return max(0.0, float((joint[met] * (joint / (share[:, None] * share))[met].log()).sum()))


def certainty(labels: Tensor, unknown: int, neighbors: Tensor) -> float:
    """Measure how certain labels are: the agreement of neighbors, times the cube root of their agreement in "known or unknown" alone.

    The first factor alone would prefer a classifier that calls nothing unknown; the second one alone, a classifier that knows one class.

    Args:
        labels: (N,) int64, not negative.
        unknown: The label that means unknown.
        neighbors: (N, k) int64 rows.

    Returns:
        0 or more; 0 where no sample is unknown, and where all are.
    """
    return float(neighbor_agreement(labels, neighbors) * np.cbrt(neighbor_agreement((labels == unknown).long(), neighbors)))


def most_certain_threshold(scores: Tensor, nearest: Tensor, unknown: int, neighbors: Tensor) -> float:
    """Find the threshold on unknown scores with which labels are the most certain.

    Args:
        scores: (N,) from 0, certain, to 1, undecided.
        nearest: (N,) int64 class of each sample if it is known.
        unknown: The label that means unknown.
        neighbors: (N, k) int64 rows.

    Returns:
        One of 0.02, 0.04, ... 0.98; the smallest of equally certain ones.
    """
    candidates = [step / 50 for step in range(1, 50)]
    found = [certainty(torch.where(is_unknown(scores, t), unknown, nearest), unknown, neighbors) for t in candidates]
    return candidates[int(np.argmax(found))]
