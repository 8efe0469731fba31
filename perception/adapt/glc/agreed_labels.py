"""Labels on which clusters, classifier and neighbors agree: the default, because neither clusters nor entropy are best everywhere.

    clusters      GLC's one-vs-all margin: is the sample nearer to the class than to the other clusters?         (`one_vs_all.py`)
    classifier    the entropy of the source's classifier: is it certain?                                         (`unknown_rule.py`)

Each of the two orders the samples from known to unknown, and calls a share of them unknown. The orders are averaged over neighbors, then
the two are averaged with weights, and so are the shares. The weight of each is how well the labels that it would give alone agree among
neighbors, with what is unknown counted apart (`certainty`): where clusters lie apart they decide, where classes overlap the classifier has
its say, and a classifier that calls nothing unknown (or everything) has none.

The class of a known sample is the one of the clusters, but a class that few samples have after a vote of neighbors needs a larger
similarity: a class that the target lacks draws some samples of every other class, and their neighbors outvote them.

Read next: `neighborhood.py`, the certainty, and `guard.py`, which compares these labels with those of no adaptation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from ....core.errors import InvalidInput
from .neighborhood import certainty, neighbors_of
from .one_vs_all import OneVsAllConfig, class_similarities, one_vs_all_labels, positive_counts
from .pseudo_labels import PseudoLabels, unadapted_labels
from .unknown_rule import UNADAPTED_ENTROPY

_LEAST_FREQUENCY = 0.01  # of N / C samples: a class without votes is improbable, not impossible


@dataclass(frozen=True, kw_only=True)
class AgreedConfig:
    """Settings of the labels on which clusters and classifier agree."""

    clusters: OneVsAllConfig = OneVsAllConfig(positives="uniform", negatives=(1.0,))
    """GLC's labels."""

    entropy: float = UNADAPTED_ENTROPY
    """Normalized entropy above which the classifier alone calls a sample unknown, 0 to 1."""

    neighbors: int = 5
    """Neighbors that a sample's place in each order is averaged over, together with its own place. 0 leaves the orders as they are."""

    agreement_neighbors: int = 10
    """Neighbors whose labels are compared for the weights, and who vote on the class."""

    rarity: float = 0.05
    """What a class loses in cosine for each factor of e that it has less than N / C samples in the vote of neighbors. 0: nothing."""

    most_rows: int = 4000
    """Samples among which neighbors are searched. Memory does not grow with the square of the number of samples."""

    def __post_init__(self) -> None:
        counts = (
            self.neighbors >= 0
            and self.agreement_neighbors >= 1
            and self.most_rows > max(self.neighbors, self.agreement_neighbors)
        )
        if not 0 <= self.entropy <= 1 or not 0 <= self.rarity < float("inf") or not counts:
            raise InvalidInput(
                "agreed labels need entropy in 0..1, a finite rarity >= 0, neighbors >= 0, agreement_neighbors >= 1 and more most_rows than "
                f"neighbors, found {self.entropy:g}, {self.rarity:g}, {self.neighbors}, {self.agreement_neighbors} and {self.most_rows}"
            )


def agreed_labels(features: Tensor, probabilities: Tensor, class_number: int, config: AgreedConfig) -> PseudoLabels:
    """Make labels on which clusters, classifier and neighbors agree.

    Args:
        features: (N, D) target features of any length.
        probabilities: (N, C) softmax over the source classes.
        class_number: Number of clusters of the negatives; N / class_number samples speak for each class.
        config: Settings of the labels.

    Returns:
        One label per sample. The margin is the distance from the boundary as a share of samples.

    Raises:
        InvalidInput: `check_target` refuses the input, or the class number is below 2.
    """
    classes = probabilities.shape[1]
    clusters = one_vs_all_labels(features, probabilities, class_number, config.clusters)
    classifier = unadapted_labels(probabilities, config.entropy)
    most = max(config.neighbors, config.agreement_neighbors)
    neighbors = neighbors_of(features, most, most_rows=config.most_rows)
    compared = neighbors[:, : config.agreement_neighbors]
    certain = [certainty(labels.hard, classes, compared) for labels in (clusters, classifier)]
    weight = certain[0] / sum(certain) if sum(certain) > 0 else 0.5
    smoothing = neighbors[:, : config.neighbors]
    order, share = torch.zeros_like(clusters.margin), 0.0
    for part, labels in ((weight, clusters), (1 - weight, classifier)):
        place = _places(-labels.margin)
        smooth = (place + place[smoothing].sum(1)) / (1 + smoothing.shape[1])
        order += part * _places(smooth)
        share += part * float((labels.hard == classes).double().mean())
    counts = positive_counts(probabilities, class_number, config.clusters)
    similarities, _ = class_similarities(F.normalize(features), probabilities, counts, stable=config.clusters.stable)
    nearest = (similarities - config.rarity * _rarity(clusters.nearest, compared, classes)).argmax(1)
    return PseudoLabels.make((1 - share) - _places(order), nearest, clusters.prior, class_number)


def _rarity(nearest: Tensor, neighbors: Tensor, classes: int) -> Tensor:
    """(C,) logarithm of how much less than N / C samples a class has when each sample and its neighbors vote; 0 for a frequent one."""
    votes = F.one_hot(nearest, classes)
    winners = (votes + votes[neighbors].sum(1)).argmax(1)
    frequency = torch.bincount(winners, minlength=classes) * classes / len(nearest)
    return -(frequency + _LEAST_FREQUENCY).log().clamp(max=0)


def _places(scores: Tensor) -> Tensor:
    """(N,) share of samples with a smaller score; equal ones count in their order."""
    place = torch.empty_like(scores)
    place[scores.argsort(stable=True)] = torch.arange(len(scores), dtype=scores.dtype, device=scores.device) / len(scores)
    return place
