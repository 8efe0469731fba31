"""Ways to draw classes of features: what a class looks like, before any domain moves it. `glc_families.py` uses them.

A world has the centers of its classes and draws the samples around them. The first three functions serve the families on which options were
chosen, the others serve the unseen families alone.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

K = 32  # dimensions of a world

Draw = Callable[[np.ndarray, np.random.Generator], np.ndarray]


def same(points: np.ndarray) -> np.ndarray:
    """Leave points as they are."""
    return points


@dataclass(frozen=True, kw_only=True)
class World:
    """Classes in K dimensions."""

    centers: np.ndarray
    """(classes, parts, K) centers of the parts of each class, of length 1 on average. The family decides how far apart they lie."""

    spread: Draw
    """Offsets (n, K) of samples from their centers, for labels (n,); of length 1 on average."""

    embed: Callable[[np.ndarray], np.ndarray] = same
    """What happens to all points of both domains at last."""

    drift: float = 0.0
    """Length by which each class of the target moves on its own."""


Mechanism = Callable[[int, np.random.Generator], World]


def _normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Normal vectors of K dimensions and of length 1 on average."""
    return rng.normal(size=(*shape, K)) / np.sqrt(K)


# ---- for the families that options were chosen on


def round_classes(classes: int, rng: np.random.Generator) -> World:
    """Every class is the same round Gaussian."""
    return World(centers=_normal(rng, classes, 1), spread=lambda labels, r: _normal(r, len(labels)))


def stretched_classes(classes: int, rng: np.random.Generator) -> World:
    """Every class is a Gaussian that is long in directions of its own."""
    axes = np.exp(0.6 * rng.normal(size=(classes, K)))
    axes /= np.sqrt((axes**2).mean(1, keepdims=True))
    return World(centers=_normal(rng, classes, 1), spread=lambda labels, r: _normal(r, len(labels)) * axes[labels])


def split_classes(classes: int, rng: np.random.Generator) -> World:
    """Every class has two parts, which lie closer to each other than to other classes."""
    centers = _normal(rng, classes, 1) + 0.5 * _normal(rng, classes, 2)
    return World(centers=centers, spread=lambda labels, r: _normal(r, len(labels)))


# ---- for the unseen families


def tree_classes(classes: int, rng: np.random.Generator) -> World:
    """Classes are leaves of a tree: four of them share a branch and are similar."""
    branches = _normal(rng, -(-classes // 4), 1)[rng.permutation(classes) // 4]
    return World(centers=0.8 * branches + 0.6 * _normal(rng, classes, 1), spread=lambda labels, r: _normal(r, len(labels)))


def heavy_tails(classes: int, rng: np.random.Generator) -> World:
    """Student's t with three degrees of freedom: some samples of each class lie far away."""

    def spread(labels: np.ndarray, r: np.random.Generator) -> np.ndarray:
        return _normal(r, len(labels)) * np.sqrt(1 / r.chisquare(3, size=(len(labels), 1)))

    return World(centers=_normal(rng, classes, 1), spread=spread)


def ring_classes(classes: int, rng: np.random.Generator) -> World:
    """Every class is an arc of a circle in a plane of its own, with a little noise."""
    planes = _normal(rng, classes, 2)

    def spread(labels: np.ndarray, r: np.random.Generator) -> np.ndarray:
        angle = r.uniform(0, 1.5 * np.pi, size=(len(labels), 1))
        return np.cos(angle) * planes[labels, 0] + np.sin(angle) * planes[labels, 1] + 0.5 * _normal(r, len(labels))

    return World(centers=_normal(rng, classes, 1), spread=spread)


def drifting_classes(classes: int, rng: np.random.Generator) -> World:
    """Round classes, each of which moves in a direction of its own between the domains."""
    return World(centers=_normal(rng, classes, 1), spread=lambda labels, r: _normal(r, len(labels)), drift=0.8)


def rectified_classes(classes: int, rng: np.random.Generator) -> World:
    """Round classes behind a random layer with ReLU, as pooled features of a network are."""
    weight = rng.normal(size=(K, 2 * K)) / np.sqrt(K)

    def embed(points: np.ndarray) -> np.ndarray:
        return np.maximum(points @ weight * np.sqrt(K) - 0.5, 0) / np.sqrt(K)

    return World(centers=_normal(rng, classes, 1), spread=lambda labels, r: _normal(r, len(labels)), embed=embed)


def flat_classes(classes: int, rng: np.random.Generator) -> World:
    """Every class fills a box in a subspace of six dimensions of its own, evenly."""
    bases = _normal(rng, classes, 6) * np.sqrt(3 / 6)

    def spread(labels: np.ndarray, r: np.random.Generator) -> np.ndarray:
        inside = np.einsum("nj,njk->nk", r.uniform(-1.6, 1.6, size=(len(labels), 6)), bases[labels])
        return inside + 0.3 * _normal(r, len(labels))

    return World(centers=_normal(rng, classes, 1), spread=spread)


def sparse_classes(classes: int, rng: np.random.Generator) -> World:
    """Centers differ in five of the dimensions only, and the noise has the long tails of Laplace's distribution."""
    chosen = np.argsort(rng.random((classes, 1, K)), axis=-1) < 5

    def spread(labels: np.ndarray, r: np.random.Generator) -> np.ndarray:
        return r.laplace(size=(len(labels), K)) / np.sqrt(2 * K)

    return World(centers=chosen * rng.normal(size=(classes, 1, K)) / np.sqrt(5), spread=spread)
