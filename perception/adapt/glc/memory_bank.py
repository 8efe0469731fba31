"""The memory bank of the local consensus: the model's last answer for every target sample, searched by cosine similarity.

GLC drops the nearest row, which it takes for the query itself. Here the query's own row is excluded by its index, which is right
also where an augmented query lies nearer to another sample. The bank holds target features: it stays where the target data are.

Read next: `adapter.py`, which fills the bank once per epoch and rewrites the rows of every batch.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import require


class MemoryBank:
    """Features and probabilities of all N target samples, on the device of the features.

    Args:
        features: (N, D) of any length; they are kept normalized.
        probabilities: (N, C).

    Raises:
        InvalidInput: The two do not have the same number of rows.
    """

    def __init__(self, features: Tensor, probabilities: Tensor) -> None:
        require(
            features.ndim == 2 and probabilities.ndim == 2 and len(features) == len(probabilities),
            f"a memory bank needs features (N, D) and probabilities (N, C), found {tuple(features.shape)} and "
            f"{tuple(probabilities.shape)}",
        )
        self.features = F.normalize(features.detach())
        self.probabilities = probabilities.detach().clone()

    def __len__(self) -> int:
        return len(self.features)

    def neighbors(self, queries: Tensor, index: Tensor, k: int) -> Tensor:
        """Find the samples that are most similar to each query.

        Args:
            queries: (B, D) features of any length.
            index: (B,) int64 row of each query in the bank; this row is never its neighbor.
            k: Number of neighbors.

        Returns:
            (B, k) int64 rows, the most similar first.

        Raises:
            InvalidInput: The bank has fewer than k other samples.
        """
        require(
            1 <= k < len(self),
            f"{k} neighbors of each sample need at least {k + 1} samples in the bank, found {len(self)}; use fewer neighbors",
        )
        similarity = F.normalize(queries.detach()) @ self.features.T
        similarity.scatter_(1, index[:, None], -torch.inf)
        return similarity.topk(k, dim=1).indices

    def consensus(self, neighbors: Tensor) -> Tensor:
        """Average the probabilities of neighbors: the soft label that the surroundings of a sample agree on.

        Args:
            neighbors: (B, k) int64 rows.

        Returns:
            (B, C) distributions.
        """
        return self.probabilities[neighbors].mean(1)

    def update(self, index: Tensor, features: Tensor, probabilities: Tensor) -> None:
        """Overwrite rows with the model's present answer. No gradient flows.

        Args:
            index: (B,) int64 rows.
            features: (B, D) of any length.
            probabilities: (B, C).
        """
        self.features[index] = F.normalize(features.detach())
        self.probabilities[index] = probabilities.detach()
