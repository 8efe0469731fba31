"""The memory bank of local k-NN consensus: what the model last said about every target sample, searched by cosine similarity.

GLC drops the nearest row, which it takes for the query itself; here the query's own row is excluded by its index, which is right
also when an augmented query lies nearer to another sample. The bank holds target features: it stays where the target data are.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import require


class MemoryBank:
    """features: (N, D) of any length, kept normalised. probabilities: (N, C). The device is that of the features."""

    def __init__(self, features: Tensor, probabilities: Tensor) -> None:
        require(
            features.ndim == 2 and probabilities.ndim == 2 and len(features) == len(probabilities),
            f"a memory bank needs features (N, D) and probabilities (N, C), found {tuple(features.shape)}, {tuple(probabilities.shape)}",
        )
        self.features = F.normalize(features.detach())
        self.probabilities = probabilities.detach().clone()

    def __len__(self) -> int:
        return len(self.features)

    def neighbors(self, queries: Tensor, index: Tensor, k: int) -> Tensor:
        """(B, k) rows most similar to ``queries`` (B, D), best first, never the query's own row ``index`` (B,).

        Raises InvalidInput where the bank has fewer than k other samples.
        """
        require(
            1 <= k < len(self),
            f"{k} neighbours of each sample need at least {k + 1} samples in the bank, found {len(self)}; use fewer neighbours",
        )
        similarity = F.normalize(queries.detach()) @ self.features.T
        similarity.scatter_(1, index[:, None], -torch.inf)
        return similarity.topk(k, dim=1).indices

    def consensus(self, neighbors: Tensor) -> Tensor:
        """(B, C): the mean probabilities of ``neighbours`` (B, k), the soft label that a sample's surroundings agree on."""
        return self.probabilities[neighbors].mean(1)

    def update(self, index: Tensor, features: Tensor, probabilities: Tensor) -> None:
        """Overwrite the rows ``index`` (B,) with what the model says now; nothing else is kept and no gradient flows."""
        self.features[index] = F.normalize(features.detach())
        self.probabilities[index] = probabilities.detach()
