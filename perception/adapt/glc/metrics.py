"""How good an open-set classifier is. For measurement only: nothing here may reach adaptation.

Classes count from 0 to C - 1, every target-private sample has the label C ("unknown"), -1 is ignored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch.nn import functional as F

from ....core.errors import InvalidInput
from .kmeans import KMeansConfig, kmeans


@dataclass(frozen=True, kw_only=True)
class OpenSetScores:
    """os_star: mean accuracy over the shared classes. unk: share of unknown samples recognised. h: their harmonic mean."""

    os_star: float
    unk: float
    h: float


def class_accuracy(predicted: np.ndarray, truth: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """(len(classes),) share of each class's samples predicted as it; 0 for a class without a sample (as GLC counts)."""
    _same_length(predicted, truth)
    return np.array([float((predicted[truth == c] == c).mean()) if (truth == c).any() else 0.0 for c in classes])


def open_set_scores(predicted: np.ndarray, truth: np.ndarray, shared: Sequence[int], unknown: int) -> OpenSetScores:
    """OS*, UNK and H of predictions (N,) in 0..unknown. shared: the classes that source and target have in common."""
    if not len(shared):
        raise InvalidInput("the H-score is a mean over shared classes; none was given")
    os_star = float(class_accuracy(predicted, truth, shared).mean())
    unk = float(class_accuracy(predicted, truth, [unknown])[0])
    return OpenSetScores(os_star=os_star, unk=unk, h=2 * os_star * unk / (os_star + unk + 1e-5))


def accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Share of right predictions among the samples that are not ignored (PDA and CLDA: no sample is unknown)."""
    _same_length(predicted, truth)
    counted = truth >= 0
    if not counted.any():
        raise InvalidInput("accuracy of no sample: every label is ignored, or there is none")
    return float((predicted == truth)[counted].mean())


def auroc(scores: np.ndarray, unknown: np.ndarray) -> float:
    """Probability that an unknown sample scores above a known one, ties counting half. scores: (N,), unknown: (N,) bool.

    Raises InvalidInput unless both kinds are there.
    """
    _both_kinds(scores, unknown)
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    mid_rank = (np.cumsum(count) - (count - 1) / 2)[rank]
    positives, negatives = int(unknown.sum()), int((~unknown).sum())
    return float((mid_rank[unknown].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def fpr_at_tpr(scores: np.ndarray, unknown: np.ndarray, *, tpr: float = 0.95) -> float:
    """FPR95: share of unknown samples taken for known where at least ``tpr`` of the known ones (the positives) are accepted.

    A low score means known. Raises InvalidInput unless both kinds are there.
    """
    _both_kinds(scores, unknown)
    known = np.sort(scores[~unknown])
    threshold = known[int(np.ceil(tpr * len(known))) - 1]
    return float((scores[unknown] <= threshold).mean())


def novel_category_accuracy(features: np.ndarray, classes: np.ndarray, *, seed: int = 0) -> float:
    """How well clusters of truly unknown samples match their true categories (GLC++): best one-to-one matching, Hungarian.

    features: (N, D), normalised here. classes: (N,) true categories, any integers; their number is the number of clusters.
    """
    _same_length(features, classes)
    if not len(classes):
        raise InvalidInput("novel-category accuracy needs at least one unknown sample")
    names, index = np.unique(classes, return_inverse=True)
    config = KMeansConfig(init="plusplus", restarts=10, points_per_centroid=0)
    clusters = kmeans(F.normalize(torch.from_numpy(features).float()), len(names), config, seed=seed).assignment.numpy()
    table = np.zeros((len(names), len(names)), dtype=np.int64)
    np.add.at(table, (clusters, index), 1)
    rows, columns = linear_sum_assignment(-table)
    return float(table[rows, columns].sum() / len(classes))


def _same_length(a: np.ndarray, b: np.ndarray) -> None:
    if len(a) != len(b):
        raise InvalidInput(f"a metric compares arrays of one length, found {len(a)} and {len(b)}")


def _both_kinds(scores: np.ndarray, unknown: np.ndarray) -> None:
    _same_length(scores, unknown)
    if unknown.dtype != np.bool_ or unknown.all() or not unknown.any():
        raise InvalidInput(f"this metric needs known and unknown samples, found {int(unknown.sum())} unknown of {len(unknown)}")
    if not np.isfinite(scores).all():
        raise InvalidInput(f"unknown scores must be finite, found {int((~np.isfinite(scores)).sum())} that are not")
