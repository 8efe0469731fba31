"""Gaussian domains with shared, source-private and target-private classes: the earlier default options were chosen on these.

`gaussian_domains` draws a set. With the values of `SETS` it gives, bit for bit, the sets `gauss_n4000` and `gauss_lidar3_n6000` on which the
released GLC code was run, and a set of 20,000 samples. `train_source` trains the small network that the end-to-end runs adapt;
`train_linear` trains a linear classifier on fixed features. The other glc_*.py scripts import this file.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, kw_only=True)
class GaussianSet:
    """n target samples in d dimensions, 32 of them signal. near: how close a private class lies to a source class. imb: largest over
    smallest class. sep, shift, rot: distance of class means, offset and rotation between the domains."""

    n: int
    shared: int
    source_private: int
    target_private: int
    sep: float = 1.6
    shift: float = 1.2
    rot: float = 0.8
    near: float = 0.6
    imb: float = 1.0
    d: int = 256
    seed: int = 0

    @property
    def classes(self) -> int:
        return self.shared + self.source_private


SETS = {
    "n4000": GaussianSet(n=4000, shared=6, source_private=4, target_private=6),
    "n20000": GaussianSet(n=20000, shared=6, source_private=4, target_private=6),
    "lidar3": GaussianSet(n=6000, shared=2, source_private=1, target_private=3, shift=1.0, rot=0.7, near=0.7, imb=40.0),
}


@dataclass(frozen=True, kw_only=True)
class Domains:
    """source: (6000, d) and labels. target: (n, d), labels with private = C (`y`) and with each private class apart (`y_full`)."""

    x_source: np.ndarray
    y_source: np.ndarray
    x: np.ndarray
    y: np.ndarray
    y_full: np.ndarray


def gaussian_domains(spec: GaussianSet, *, k: int = 32, n_source: int = 6000) -> Domains:
    """Both domains, standardised by the source's mean and deviation, float32."""
    rng = np.random.default_rng(spec.seed)
    total = spec.classes + spec.target_private
    means = rng.normal(size=(total, k)) * spec.sep / np.sqrt(k)
    for i in range(spec.target_private):
        c = spec.classes + i
        means[c] = spec.near * means[i % spec.classes] + np.sqrt(1 - spec.near**2) * means[c]
    basis = np.linalg.qr(rng.normal(size=(spec.d, spec.d)))[0][:, :k]
    y_source = rng.integers(0, spec.classes, n_source)
    x_source = (means[y_source] + rng.normal(size=(n_source, k)) / np.sqrt(k)) @ basis.T * 8 + rng.normal(
        size=(n_source, spec.d)
    ) * 0.25
    names = np.r_[np.arange(spec.shared), np.arange(spec.classes, total)]
    share = spec.imb ** (-np.arange(len(names)) / (len(names) - 1)) if spec.imb > 1 else np.ones(len(names))
    share = share[rng.permutation(len(names))]
    y_full = names[rng.choice(len(names), spec.n, p=share / share.sum())]
    rotation = np.linalg.qr(rng.normal(size=(k, k)))[0]
    turn = np.array([[np.cos(spec.rot), -np.sin(spec.rot)], [np.sin(spec.rot), np.cos(spec.rot)]])
    rotation = rotation @ np.kron(np.eye(k // 2), turn) @ rotation.T
    offset = rng.normal(size=k)
    offset *= spec.shift / np.linalg.norm(offset)
    scale = np.exp(0.15 * rng.normal(size=k))
    z = ((means[y_full] + 1.25 * rng.normal(size=(spec.n, k)) / np.sqrt(k)) @ rotation.T) * scale + offset
    x = z @ basis.T * 8 + rng.normal(size=(spec.n, spec.d)) * 0.3
    mean, deviation = x_source.mean(0), x_source.std(0) + 1e-6
    return Domains(
        x_source=((x_source - mean) / deviation).astype(np.float32),
        y_source=y_source,
        x=((x - mean) / deviation).astype(np.float32),
        y=np.where(y_full >= spec.classes, spec.classes, y_full),
        y_full=y_full,
    )


def _train(model: nn.Module, domains: Domains, lr: float, *, epochs: int = 20) -> None:
    x, y = torch.from_numpy(domains.x_source), torch.from_numpy(domains.y_source)
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            F.cross_entropy(model(x[rows]), y[rows], label_smoothing=0.1).backward()
            optimizer.step()


def train_linear(domains: Domains, classes: int, *, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Features (n, d), softmax (n, C) of the target and the effective weight (C, d) of a weight-normalized linear classifier."""
    torch.manual_seed(seed)
    layer = nn.utils.parametrizations.weight_norm(nn.Linear(domains.x.shape[1], classes))
    _train(layer, domains, 0.05)
    features = torch.from_numpy(domains.x)
    with torch.no_grad():
        return features, layer(features).softmax(1), layer.weight.detach().clone()


def train_source(domains: Domains, classes: int, *, seed: int = 0) -> tuple[nn.Sequential, nn.Linear]:
    """The digits' network on Gaussian inputs: d-256-128 with ReLU (names "0.", "2."), bottleneck 64 with batch norm; classifier."""
    torch.manual_seed(seed)
    module = nn.Sequential(
        *(nn.Linear(domains.x.shape[1], 256), nn.ReLU(), nn.Linear(256, 128), nn.ReLU(), nn.Linear(128, 64), nn.BatchNorm1d(64))
    )
    classifier = nn.Linear(64, classes)
    _train(nn.Sequential(module, classifier), domains, 0.01)
    return module.eval(), classifier.eval()
