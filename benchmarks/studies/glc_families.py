"""Families of adaptation problems on features: DEVELOPMENT chose the default options, UNSEEN was run after they were frozen.

A family fixes the numbers of classes and samples, the overlap of the classes, the shift between the domains and what a class looks like.
`draw` makes a problem of it: two source models that were trained on labeled source samples, and a target with labels that only serve to
measure. One model is a linear head on the features as they are, for labels without training. The other has a linear bottleneck with batch
norm below its head, and can be trained on the target. The overlap is the error of ten nearest neighbors among source samples: the
distance between classes is searched until it has the wanted value, so that overlaps of different worlds can be compared.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from glc_worlds import (
    K,
    Mechanism,
    World,
    drifting_classes,
    flat_classes,
    heavy_tails,
    rectified_classes,
    ring_classes,
    round_classes,
    sparse_classes,
    split_classes,
    stretched_classes,
    tree_classes,
)
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH = 64  # dimensions of the inputs and of the bottleneck


@dataclass(frozen=True, kw_only=True)
class Shift:
    """How the target differs from the source."""

    rotation: float = 0.5
    """Angle in radians by which sixteen random planes turn."""

    translation: float = 0.8
    """Length of the offset; the samples of a class lie 1 from its center."""

    scaling: float = 0.15
    """Standard deviation of the logarithm of the factor on each axis."""

    noise: float = 1.15
    """Factor on the distance of samples from their center."""


@dataclass(frozen=True, kw_only=True)
class Family:
    """Problems that differ in nothing but their draw."""

    name: str
    """Name in tables."""

    shared: int
    """Classes of both domains."""

    source_private: int
    """Classes of the source alone."""

    target_private: int
    """Classes of the target alone, which are unknown to the source model."""

    n: int
    """Samples of the target."""

    overlap: float
    """Error of nearest neighbors among source samples, 0 to 1."""

    world: Mechanism
    """What a class looks like."""

    shift: Shift = Shift()
    """How the target differs from the source."""

    unknown_share: float | None = None
    """Share of the unknown among the target's samples. None: every class has the same share."""

    imbalance: float = 1.0
    """Samples of the largest over those of the smallest class of the target."""

    near: float = 0.6
    """How close a private class lies to a source class: 0 anywhere, 1 at the same place."""

    temperature: float = 1.0
    """Divisor of the source models' logits: below 1 they are certain of everything, above 1 of nothing."""

    @property
    def classes(self) -> int:
        """Number of source classes C."""
        return self.shared + self.source_private

    @property
    def scenario(self) -> str:
        """OPDA, OSDA, PDA or CLDA."""
        if self.target_private:
            return "OPDA" if self.source_private else "OSDA"
        return "PDA" if self.source_private else "CLDA"


@dataclass(frozen=True, kw_only=True)
class Problem:
    """Two source models and a target."""

    probabilities: Tensor
    """(n, C) softmax of the linear head on the target's features."""

    module: nn.Sequential
    """The bottleneck of the other model, in evaluation mode."""

    classifier: nn.Linear
    """The head of the other model."""

    inputs: Tensor
    """(n, WIDTH) float32 features of the target."""

    truth: np.ndarray
    """(n,) int64 true classes; C is unknown. Only for measurement."""


DEVELOPMENT = (
    Family(name="few clear classes", shared=3, source_private=2, target_private=2, n=1000, overlap=0.01, world=round_classes),
    Family(
        name="ten overlapping",
        shared=6,
        source_private=4,
        target_private=6,
        n=20000,
        overlap=0.1,
        shift=Shift(rotation=0.8, translation=1.2, noise=1.25),
        world=round_classes,
    ),
    Family(
        name="half unknown",
        shared=10,
        source_private=0,
        target_private=5,
        n=2000,
        overlap=0.2,
        unknown_share=0.5,
        world=round_classes,
    ),
    Family(
        name="unequal classes",
        shared=15,
        source_private=5,
        target_private=10,
        n=6000,
        overlap=0.1,
        imbalance=10,
        world=round_classes,
    ),
    Family(name="sixty classes", shared=40, source_private=20, target_private=20, n=12000, overlap=0.05, world=round_classes),
    Family(name="stretched open", shared=25, source_private=0, target_private=25, n=5000, overlap=0.2, world=stretched_classes),
    Family(
        name="few unknown",
        shared=4,
        source_private=3,
        target_private=1,
        n=1500,
        overlap=0.15,
        unknown_share=0.1,
        world=round_classes,
    ),
    Family(name="partial", shared=8, source_private=12, target_private=0, n=3000, overlap=0.1, world=stretched_classes),
    Family(name="closed", shared=12, source_private=0, target_private=0, n=2000, overlap=0.25, world=round_classes),
    Family(
        name="classes in two parts",
        shared=6,
        source_private=3,
        target_private=4,
        n=4000,
        overlap=0.1,
        near=0.3,
        world=split_classes,
    ),
    Family(
        name="mostly unknown",
        shared=5,
        source_private=0,
        target_private=8,
        n=8000,
        overlap=0.05,
        unknown_share=0.7,
        shift=Shift(scaling=0.5),
        world=split_classes,
    ),
    Family(
        name="noisy target",
        shared=20,
        source_private=10,
        target_private=10,
        n=10000,
        overlap=0.3,
        imbalance=5,
        shift=Shift(noise=1.6, rotation=0.5),
        world=stretched_classes,
    ),
    Family(
        name="little shift",
        shared=10,
        source_private=2,
        target_private=3,
        n=3000,
        overlap=0.05,
        shift=Shift(rotation=0.2, translation=0.4, noise=1.0),
        world=round_classes,
    ),
    Family(
        name="strong shift",
        shared=5,
        source_private=2,
        target_private=3,
        n=1500,
        overlap=0.02,
        shift=Shift(rotation=0.9, translation=2.0),
        world=round_classes,
    ),
    Family(
        name="open, four of twelve", shared=4, source_private=8, target_private=4, n=2000, overlap=0.1, world=stretched_classes
    ),
    Family(
        name="certain of everything",
        shared=15,
        source_private=5,
        target_private=10,
        n=2000,
        overlap=0.1,
        temperature=0.3,
        world=round_classes,
    ),
    Family(
        name="certain of nothing",
        shared=6,
        source_private=3,
        target_private=4,
        n=2000,
        overlap=0.1,
        near=0.3,
        temperature=3,
        world=split_classes,
    ),
    Family(name="partial, few left", shared=5, source_private=20, target_private=0, n=2000, overlap=0.1, world=round_classes),
    Family(
        name="partial, in two parts", shared=10, source_private=8, target_private=0, n=2000, overlap=0.15, world=split_classes
    ),
    Family(name="partial, one missing", shared=9, source_private=3, target_private=0, n=2000, overlap=0.2, world=round_classes),
    Family(
        name="closed, stretched",
        shared=20,
        source_private=0,
        target_private=0,
        n=2000,
        overlap=0.1,
        imbalance=5,
        world=stretched_classes,
    ),
    Family(name="closed, few", shared=4, source_private=0, target_private=0, n=1000, overlap=0.15, world=split_classes),
)

UNSEEN = (
    Family(name="tree", shared=8, source_private=4, target_private=6, n=3000, overlap=0.15, near=0, world=tree_classes),
    Family(name="heavy tails", shared=10, source_private=0, target_private=6, n=4000, overlap=0.2, near=0.4, world=heavy_tails),
    Family(
        name="arcs", shared=5, source_private=2, target_private=4, n=1200, overlap=0.05, unknown_share=0.3, world=ring_classes
    ),
    Family(
        name="each class moves",
        shared=20,
        source_private=8,
        target_private=8,
        n=4000,
        overlap=0.1,
        shift=Shift(rotation=0.4, translation=0.8),
        world=drifting_classes,
    ),
    Family(
        name="rectified",
        shared=12,
        source_private=6,
        target_private=6,
        n=20000,
        overlap=0.1,
        imbalance=8,
        world=rectified_classes,
    ),
    Family(
        name="flat",
        shared=45,
        source_private=15,
        target_private=12,
        n=4000,
        overlap=0.08,
        near=0.5,
        shift=Shift(rotation=0.6),
        world=flat_classes,
    ),
    Family(
        name="sparse",
        shared=7,
        source_private=3,
        target_private=3,
        n=2500,
        overlap=0.3,
        unknown_share=0.2,
        shift=Shift(rotation=0.3, translation=1.6, scaling=0.4, noise=1.1),
        world=sparse_classes,
    ),
    Family(name="tree, partial", shared=10, source_private=15, target_private=0, n=2000, overlap=0.15, world=tree_classes),
    Family(name="heavy tails, closed", shared=20, source_private=0, target_private=0, n=4000, overlap=0.2, world=heavy_tails),
)


def draw(family: Family, seed: int) -> Problem:
    """Draw a problem.

    Args:
        family: What is drawn.
        seed: Decides everything, the source model included.

    Returns:
        The source model, the target and its labels.
    """
    rng = np.random.default_rng(seed)
    total = family.classes + family.target_private
    world = family.world(total, rng)
    for i in range(family.target_private):
        c, model = family.classes + i, i % family.classes
        world.centers[c] = family.near * world.centers[model] + np.sqrt(1 - family.near**2) * world.centers[c]
    source_labels = rng.integers(0, family.classes, max(3000, 100 * family.classes))
    distance = _distance(world, family, rng)
    source = world.embed(_points(world, source_labels, distance, 1.0, rng))
    target_labels = _target_labels(family, rng)
    target = world.embed(
        _move(world, _points(world, target_labels, distance, family.shift.noise, rng), target_labels, family.shift, rng)
    )
    basis = np.linalg.qr(rng.normal(size=(WIDTH, WIDTH)))[0][:, : source.shape[1]]
    both = [points @ basis.T * 8 + 0.25 * rng.normal(size=(len(points), WIDTH)) for points in (source, target)]
    mean, deviation = both[0].mean(0), both[0].std(0) + 1e-6
    x_source, x_target = (torch.from_numpy(((x - mean) / deviation).astype(np.float32)) for x in both)
    labels = torch.from_numpy(source_labels)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        head = nn.Linear(WIDTH, family.classes)
        module, classifier = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)), nn.Linear(WIDTH, family.classes)
        _train(head, x_source, labels, lr=0.05)
        _train(nn.Sequential(module, classifier), x_source, labels, lr=0.02)
    with torch.no_grad():
        for parameter in (*head.parameters(), *classifier.parameters()):
            parameter /= family.temperature
        probabilities = head(x_target).softmax(1)
    truth = np.minimum(target_labels, family.classes)
    return Problem(probabilities=probabilities, module=module.eval(), classifier=classifier.eval(), inputs=x_target, truth=truth)


def _points(world: World, labels: np.ndarray, distance: float, noise: float, rng: np.random.Generator) -> np.ndarray:
    part = rng.integers(0, world.centers.shape[1], len(labels))
    return distance * world.centers[labels, part] + noise * world.spread(labels, rng)


def _distance(world: World, family: Family, rng: np.random.Generator) -> float:
    """The factor on the centers with which ten nearest neighbors among source samples have the family's error."""
    labels = rng.integers(0, family.classes, max(1200, 30 * family.classes))
    low, high = 0.1, 20.0
    for _ in range(9):
        middle = float(np.sqrt(low * high))
        points = torch.from_numpy(world.embed(_points(world, labels, middle, 1.0, rng))).float()
        nearest = torch.cdist(points, points).fill_diagonal_(torch.inf).topk(10, largest=False).indices
        votes = F.one_hot(torch.from_numpy(labels)[nearest], family.classes).sum(1)
        error = float((votes.argmax(1).numpy() != labels).mean())
        low, high = (middle, high) if error > family.overlap else (low, middle)
    return float(np.sqrt(low * high))


def _target_labels(family: Family, rng: np.random.Generator) -> np.ndarray:
    """(n,) classes of the target, each private class apart."""
    total = family.classes + family.target_private
    names = np.r_[np.arange(family.shared), np.arange(family.classes, total)]
    share = family.imbalance ** (-rng.permutation(len(names)) / (len(names) - 1))
    private = names >= family.classes
    if family.unknown_share is not None:
        share[private] *= family.unknown_share / share[private].sum()
        share[~private] *= (1 - family.unknown_share) / share[~private].sum()
    return names[rng.choice(len(names), family.n, p=share / share.sum())]


def _move(world: World, points: np.ndarray, labels: np.ndarray, shift: Shift, rng: np.random.Generator) -> np.ndarray:
    axes = np.linalg.qr(rng.normal(size=(K, K)))[0]
    cos, sin = np.cos(shift.rotation), np.sin(shift.rotation)
    rotation = axes @ np.kron(np.eye(K // 2), [[cos, -sin], [sin, cos]]) @ axes.T
    offset = rng.normal(size=K)
    offset *= shift.translation / np.linalg.norm(offset)
    own = world.drift * rng.normal(size=(len(world.centers), K)) / np.sqrt(K)
    return (points + own[labels]) @ rotation.T * np.exp(shift.scaling * rng.normal(size=K)) + offset


def _train(model: nn.Module, x: Tensor, y: Tensor, *, lr: float) -> None:
    """Train as GLC's source models are: label smoothing, SGD with Nesterov momentum."""
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for _ in range(10):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1).backward()
            optimizer.step()
