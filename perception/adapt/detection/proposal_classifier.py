"""The classifier of proposals that adaptation starts from: is this box one of the source's classes, or background?

    region feature, class and logit of the detector, size, range, point count ── Linear, batch norm ── weight-norm Linear ── C + 1 logits
                                                                               └── bottleneck ──┘   └── head ──┘

Background is a class of its own, the last one: most proposals lie on nothing, and without it everything that is no source class would
have to be called unknown. The classifier is trained on the source once, with label smoothing like GLC's source models; then the source
is not needed any more.

Read next: `classifier_training.py`, then `open_set.py`, which interprets the classifier's answer.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from .proposals import DetectorProposals

BACKGROUND_NAME = "background"


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """Settings of the proposal classifier and of its training."""

    width: int = 64
    """Features of the bottleneck."""

    epochs: int = 30
    """Passes over the source's proposals."""

    batch_size: int = 64
    """Proposals per step."""

    lr: float = 1e-2
    """Learning rate at the first step. Lower it where training diverges."""

    momentum: float = 0.9
    """Nesterov momentum of SGD."""

    weight_decay: float = 1e-3
    """Weight decay of SGD."""

    smoothing: float = 0.1
    """Label smoothing, 0 to below 1. GLC trains its source models with 0.1."""

    background: float = 2.0
    """Background proposals that are kept for each proposal on an object."""

    balance: float = 0.75
    """Exponent of the class weights: with 0 every proposal counts the same, with 1 every class does."""

    points: bool = True
    """Whether the classifier reads point counts. Switch it off where the target is a store of smashed scenes."""

    seed: int = 0
    """Decides initial weights, the background proposals that are kept, and the order of the batches."""

    def __post_init__(self) -> None:
        if self.width < 2 or self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            raise InvalidInput(
                "the proposal classifier needs width >= 2, epochs >= 1, batch_size >= 2 and lr > 0, found "
                f"{self.width}, {self.epochs}, {self.batch_size} and {self.lr:g}"
            )
        if not 0 <= self.smoothing < 1 or not self.background > 0 or not 0 <= self.balance <= 1:
            raise InvalidInput(
                "the proposal classifier needs 0 <= smoothing < 1, background > 0 and 0 <= balance <= 1, found "
                f"{self.smoothing:g}, {self.background:g} and {self.balance:g}"
            )


@dataclass(frozen=True, kw_only=True)
class ProposalClassifier:
    """A trained classifier of proposals. Its modules are in evaluation mode and take no gradient."""

    bottleneck: nn.Module
    """Maps inputs of `proposal_inputs` to features (N, width). This part adapts."""

    head: nn.Module
    """Maps features to logits over `classes`. This part is frozen."""

    classes: tuple[str, ...]
    """The detector's classes, then background."""

    config: ClassifierConfig
    """How it was trained."""

    detector: str
    """SHA-256 of the detector whose proposals it reads."""

    source: str
    """What data it was trained on, in words."""

    counts: tuple[int, ...]
    """Number of proposals of each class that it was trained on."""

    def inputs(self, proposals: DetectorProposals) -> Tensor:
        """Compute what the bottleneck reads of proposals.

        Args:
            proposals: N proposals of the same detector.

        Returns:
            (N, D') float32.

        Raises:
            InvalidInput: The proposals are of another detector, or they lack point counts that the classifier needs.
        """
        require(
            proposals.detector == self.detector,
            f"the proposal classifier reads proposals of the detector {self.detector[:12]}; those of {proposals.data} are of "
            f"{proposals.detector[:12]}. Train it on proposals of the same detector",
        )
        return proposal_inputs(proposals, points=self.config.points)


def proposal_inputs(proposals: DetectorProposals, *, points: bool) -> Tensor:
    """Collect the numbers that the classifier reads of each proposal.

    An anchor learns the logit of its own class only, so the detector's logit stands in the column of its class and the other classes
    get a low -10.

    Args:
        proposals: N proposals with region features (N, D) of a detector of C classes.
        points: Whether point counts are read.

    Returns:
        (N, D + C + 5 or 6) float32: region feature; logits of the classes; log of length, width and height; range in units of 10 m;
        z of the lower face in m; with `points`, log(1 + points in the box).

    Raises:
        InvalidInput: Point counts are asked for and missing.
    """
    logits = torch.full((len(proposals), len(proposals.class_names)), -10.0)
    logits.scatter_(1, proposals.classes[:, None], proposals.logits.clamp(-10, 10)[:, None])
    boxes = proposals.boxes
    bottom = boxes[:, 2] - boxes[:, 5] / 2
    columns = [proposals.features, logits, boxes[:, 3:6].clamp_min(1e-2).log(), proposals.ranges[:, None] / 10, bottom[:, None]]
    if points:
        if proposals.points is None:
            raise InvalidInput(
                f"this classifier was trained with point counts, and the proposals of {proposals.data} have none (smashed scenes hold "
                "no points); train it without them"
            )
        columns.append(proposals.points[:, None].float().log1p())
    return torch.cat(columns, 1)


class Standardize(nn.Module):
    """Scales inputs by the source's mean and standard deviation; outliers are clipped at 8 deviations.

    Args:
        width: Number of columns.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, inputs: Tensor) -> Tensor:
        """Scale and clip.

        Args:
            inputs: (B, width).

        Returns:
            (B, width).
        """
        return ((inputs - self.mean) / self.deviation).clamp(-8, 8)


class WeightNormLinear(nn.Module):
    """Linear layer whose rows are g * v / |v|, the form of GLC's classifiers.

    Args:
        inputs: Number of features.
        outputs: Number of logits.
    """

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(outputs, inputs))
        self.length = nn.Parameter(torch.empty(outputs, 1))
        self.bias = nn.Parameter(torch.zeros(outputs))
        nn.init.kaiming_uniform_(self.direction, a=5**0.5)
        with torch.no_grad():
            self.length.copy_(self.direction.norm(dim=1, keepdim=True))

    @property
    def weight(self) -> Tensor:
        """(outputs, inputs) effective weight."""
        return self.length * F.normalize(self.direction, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        """Apply the layer.

        Args:
            features: (B, inputs).

        Returns:
            (B, outputs).
        """
        return F.linear(features, self.weight, self.bias)


def new_modules(inputs: int, width: int, classes: int) -> tuple[nn.Sequential, WeightNormLinear]:
    """Make an untrained bottleneck and head; the global random generator decides the weights.

    Args:
        inputs: Columns of `proposal_inputs`.
        width: Features of the bottleneck.
        classes: Classes with background.

    Returns:
        Bottleneck and head.
    """
    linear = nn.Linear(inputs, width)
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(Standardize(inputs), linear, nn.BatchNorm1d(width)), WeightNormLinear(width, classes)
