"""How good an open-set classifier is. For measurement only: nothing here may reach adaptation.

Classes count from 0 to C - 1, every target-private sample has the label C ("unknown"), -1 is ignored.

Read next: `feature_report.py`, and `../detection/proposal_metrics.py` for detectors.
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
    """Scores of an open-set classifier, each 0 to 1."""

    os_star: float
    """OS*, the mean accuracy over the shared classes."""

    unk: float
    """UNK, the share of the unknown samples that are called unknown."""

    h: float
    """H, the harmonic mean of the two."""


def class_accuracy(predicted: np.ndarray, truth: np.ndarray, classes: Sequence[int]) -> np.ndarray:
    """Compute the accuracy of each class.

    Args:
        predicted: (N,) int.
        truth: (N,) int.
        classes: The classes to compute it for.

    Returns:
        (len(classes),) share of each class's samples that are predicted as it; 0 for a class without a sample, as in GLC.

    Raises:
        InvalidInput: The two arrays have different lengths.
    """
    _same_length(predicted, truth)
    return np.array([float((predicted[truth == c] == c).mean()) if (truth == c).any() else 0.0 for c in classes])


def open_set_scores(predicted: np.ndarray, truth: np.ndarray, shared: Sequence[int], unknown: int) -> OpenSetScores:
    """Compute OS*, UNK and H.

    Args:
        predicted: (N,) int in 0..unknown.
        truth: (N,) int in 0..unknown; -1 is counted nowhere.
        shared: The classes that source and target have in common.
        unknown: The number that means unknown.

    Returns:
        The scores. As in the released code, H has 1e-5 in its denominator.

    Raises:
        InvalidInput: No class is shared, or the arrays have different lengths.
    """
    if not len(shared):
        raise InvalidInput("the H-score is a mean over shared classes, and none was given")
    os_star = float(class_accuracy(predicted, truth, shared).mean())
    unk = float(class_accuracy(predicted, truth, [unknown])[0])
    return OpenSetScores(os_star=os_star, unk=unk, h=2 * os_star * unk / (os_star + unk + 1e-5))


def accuracy(predicted: np.ndarray, truth: np.ndarray) -> float:
    """Compute the share of correct predictions among the samples that are not ignored.

    This is the score of the scenarios without unknown samples, PDA and CLDA.

    Args:
        predicted: (N,) int.
        truth: (N,) int; negative is ignored.

    Returns:
        0 to 1.

    Raises:
        InvalidInput: Every sample is ignored, or the arrays have different lengths.
    """
    _same_length(predicted, truth)
    counted = truth >= 0
    if not counted.any():
        raise InvalidInput("accuracy needs at least one sample whose label is not ignored, and there is no sample of this kind")
    return float((predicted == truth)[counted].mean())


def auroc(scores: np.ndarray, unknown: np.ndarray) -> float:
    """Compute the probability that an unknown sample has a larger score than a known one; ties count half.

    Args:
        scores: (N,) unknown scores, finite.
        unknown: (N,) bool, which samples are truly unknown.

    Returns:
        0 to 1; 0.5 is chance.

    Raises:
        InvalidInput: There are not both known and unknown samples, or a score is not finite.
    """
    _both_kinds(scores, unknown)
    _, rank, count = np.unique(scores, return_inverse=True, return_counts=True)
    mid_rank = (np.cumsum(count) - (count - 1) / 2)[rank]
    positives, negatives = int(unknown.sum()), int((~unknown).sum())
    return float((mid_rank[unknown].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def fpr_at_tpr(scores: np.ndarray, unknown: np.ndarray, *, tpr: float = 0.95) -> float:
    """Compute FPR95: the share of unknown samples that are accepted where at least 95 % of the known ones are accepted.

    Args:
        scores: (N,) unknown scores, finite; a low score means known.
        unknown: (N,) bool, which samples are truly unknown.
        tpr: Share of known samples (the positives) that must be accepted.

    Returns:
        0 to 1.

    Raises:
        InvalidInput: There are not both known and unknown samples, or a score is not finite.
    """
    _both_kinds(scores, unknown)
    known = np.sort(scores[~unknown])
    threshold = known[int(np.ceil(tpr * len(known))) - 1]
    return float((scores[unknown] <= threshold).mean())


def novel_category_accuracy(features: np.ndarray, classes: np.ndarray, *, seed: int = 0) -> float:
    """Measure how well clusters of truly unknown samples match their true categories (GLC++).

    The clusters are matched one to one with the categories by the Hungarian algorithm.

    Args:
        features: (N, D) of any length.
        classes: (N,) true categories, any integers. Their number is the number of clusters.
        seed: Seed of the clustering.

    Returns:
        Share of samples in the cluster that is matched with their category, 0 to 1.

    Raises:
        InvalidInput: There is no sample, or the arrays have different lengths.
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
