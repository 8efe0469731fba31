"""The classifier of proposals that adaptation starts from: is this box one of the source's classes, or background?

    region feature, class and logit of the detector, size, range, point count ── Linear, batch norm ── weight-norm Linear ── C + 1 logits
                                                                               └── bottleneck ──┘   └── head ──┘

Background is a class of its own, the last one: most proposals lie on nothing, and without it everything that is no source class would
have to be called unknown. Trained on the source once, with label smoothing as GLC's source models are; then the source is not
needed again.
"""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from ....core.tensor_file import CorruptFile, TensorFileKind, fill_module, read_tensors, write_tensors
from ..glc.adapter import set_learning_rate
from .proposal_matching import BACKGROUND
from .proposals import DetectorProposals

BACKGROUND_NAME = "background"
_KIND = TensorFileKind(
    name="proposal classifier",
    format="upcycle3d proposal classifier 1",
    advice="give the classifier.safetensors that an adaptation wrote",
)


def proposal_inputs(proposals: DetectorProposals, *, points: bool) -> Tensor:
    """(N, D + C + 5 or 6) what the classifier reads of each proposal.

    The region feature; the detector's logit in the place of its class, the others at a low -10; log sizes; range and height of the
    lower face in units of 10 m and 1 m; with ``points``, log(1 + points inside). Raises InvalidInput if counts are asked for and missing.
    """
    logits = torch.full((len(proposals), len(proposals.class_names)), -10.0)
    logits.scatter_(1, proposals.classes[:, None], proposals.logits.clamp(-10, 10)[:, None])
    boxes = proposals.boxes
    bottom = boxes[:, 2] - boxes[:, 5] / 2
    columns = [proposals.features, logits, boxes[:, 3:6].clamp_min(1e-2).log(), proposals.ranges[:, None] / 10, bottom[:, None]]
    if points:
        require(
            proposals.points is not None,
            f"this classifier was trained with point counts, and the proposals of {proposals.data} have none (smashed scenes hold no "
            "points); train it without them",
        )
        assert proposals.points is not None
        columns.append(proposals.points[:, None].float().log1p())
    return torch.cat(columns, 1)


class Standardise(nn.Module):
    """Inputs by the source's mean and deviation; far outliers are clipped at 8 deviations."""

    mean: Tensor
    deviation: Tensor

    def __init__(self, width: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(width))
        self.register_buffer("deviation", torch.ones(width))

    def forward(self, inputs: Tensor) -> Tensor:
        return ((inputs - self.mean) / self.deviation).clamp(-8, 8)


class WeightNormLinear(nn.Module):
    """Linear with rows g * v / |v|, as GLC's classifier: (B, D) -> (B, C). ``weight`` is the effective one."""

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
        return self.length * F.normalize(self.direction, dim=1)

    def forward(self, features: Tensor) -> Tensor:
        return F.linear(features, self.weight, self.bias)


@dataclass(frozen=True, kw_only=True)
class ClassifierConfig:
    """width: of the bottleneck. background: background proposals kept for each on an object. balance: exponent of the class weights,
    0 every proposal counts the same, 1 every class does. points: read point counts (not for smashed scenes)."""

    width: int = 64
    epochs: int = 30
    batch_size: int = 64
    lr: float = 1e-2
    momentum: float = 0.9
    weight_decay: float = 1e-3
    smoothing: float = 0.1
    background: float = 2.0
    balance: float = 0.75
    points: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 2 or self.epochs < 1 or self.batch_size < 2 or not self.lr > 0:
            raise InvalidInput(f"the proposal classifier needs width >= 2, epochs >= 1, batch_size >= 2, lr > 0, found {self}")
        if not 0 <= self.smoothing < 1 or not self.background > 0 or not 0 <= self.balance <= 1:
            raise InvalidInput(f"it needs 0 <= smoothing < 1, background > 0 and 0 <= balance <= 1, found {self}")


@dataclass(frozen=True, kw_only=True)
class ProposalClassifier:
    """bottleneck: inputs of ``proposal_inputs`` to features (N, width). head: features to logits over ``classes``, background last.

    detector: digest of the detector whose proposals it reads. source: what data it was trained on, in words. counts: proposals of each
    class that it was trained on. Its modules are in evaluation mode.
    """

    bottleneck: nn.Module
    head: nn.Module
    classes: tuple[str, ...]
    config: ClassifierConfig
    detector: str
    source: str
    counts: tuple[int, ...]

    def inputs(self, proposals: DetectorProposals) -> Tensor:
        """(N, D'). Raises InvalidInput for proposals of another detector, and for missing point counts."""
        require(
            proposals.detector == self.detector,
            f"the proposal classifier reads proposals of the detector {self.detector[:12]}, those of {proposals.data} are of "
            f"{proposals.detector[:12]}; train it on proposals of the same detector",
        )
        return proposal_inputs(proposals, points=self.config.points)


def _modules(inputs: int, width: int, classes: int) -> tuple[nn.Sequential, WeightNormLinear]:
    linear = nn.Linear(inputs, width)
    nn.init.xavier_normal_(linear.weight)
    nn.init.zeros_(linear.bias)
    return nn.Sequential(Standardise(inputs), linear, nn.BatchNorm1d(width)), WeightNormLinear(width, classes)


def train_proposal_classifier(proposals: DetectorProposals, ids: Tensor, config: ClassifierConfig) -> ProposalClassifier:
    """Train on source proposals with ``Matches.ids`` (N,): classes of the detector, background, or ignored. Deterministic by seed.

    Raises InvalidInput for a class without a proposal (the classifier could not learn it), and for ids that are not source classes.
    """
    names = proposals.class_names
    require(len(ids) == len(proposals), f"one id per proposal expected, found {len(ids)} for {len(proposals)}")
    require(
        bool((ids < len(names)).all()), f"source proposals must be of {names}, background or ignored; found id {_highest(ids)}"
    )
    targets = torch.where(ids == BACKGROUND, len(names), ids)
    counts = torch.bincount(targets[targets >= 0], minlength=len(names) + 1)
    empty = [n for n, c in zip((*names, BACKGROUND_NAME), counts.tolist()) if c == 0]
    require(
        not empty,
        f"no source proposal of {proposals.data} is {' or '.join(empty)}, so the classifier cannot learn it: give more source frames, "
        "or lower the score from which proposals are kept",
    )
    rng = np.random.default_rng(config.seed)
    objects = ((targets >= 0) & (targets < len(names))).nonzero()[:, 0].numpy()
    background = (targets == len(names)).nonzero()[:, 0].numpy()
    rng.shuffle(background)
    rows = torch.from_numpy(np.sort(np.concatenate([objects, background[: max(1, round(config.background * len(objects)))]])))
    require(len(rows) >= 2, f"a batch norm needs at least 2 proposals, found {len(rows)}")
    inputs, targets = proposal_inputs(proposals, points=config.points)[rows], targets[rows]
    counts = torch.bincount(targets, minlength=len(names) + 1)
    weight = counts.float().pow(-config.balance)
    weight = weight / (weight * counts).sum() * len(rows)  # mean 1 over the proposals
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        bottleneck, head = _modules(inputs.shape[1], config.width, len(names) + 1)
    standardise = bottleneck[0]
    assert isinstance(standardise, Standardise)
    standardise.mean.copy_(inputs.mean(0))
    standardise.deviation.copy_(inputs.std(0).clamp_min(1e-3))
    _fit(bottleneck, head, inputs, targets, weight, config, rng)
    return ProposalClassifier(
        bottleneck=bottleneck.eval().requires_grad_(False),
        head=head.eval().requires_grad_(False),
        classes=(*names, BACKGROUND_NAME),
        config=config,
        detector=proposals.detector,
        source=proposals.data,
        counts=tuple(counts.tolist()),
    )


def _highest(ids: Tensor) -> int:
    return int(ids.max()) if len(ids) else -1


def _fit(
    bottleneck: nn.Module,
    head: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    weight: Tensor,
    config: ClassifierConfig,
    rng: np.random.Generator,
) -> None:
    parameters = [*bottleneck.parameters(), *head.parameters()]
    optimizer = torch.optim.SGD(
        [{"params": parameters, "base_lr": config.lr}],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )
    size = min(config.batch_size, len(inputs))
    steps = len(inputs) // size  # the rest of an epoch is dropped: batch norm needs full batches
    for epoch in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(inputs)))
        for step, rows in enumerate(order[: steps * size].split(size)):
            set_learning_rate(optimizer, (epoch * steps + step) / (config.epochs * steps))
            logits = head(bottleneck(inputs[rows]))
            each = F.cross_entropy(logits, targets[rows], label_smoothing=config.smoothing, reduction="none")
            loss = (each * weight[targets[rows]]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    if not all(bool(torch.isfinite(p).all()) for p in parameters):
        raise InvalidInput("training the proposal classifier diverged; lower its lr")


def save_classifier(path: Path, classifier: ProposalClassifier) -> None:
    """One safetensors file with what ``load_classifier`` needs, atomically."""
    plain = {name: getattr(classifier, name) for name in ("classes", "detector", "source", "counts")}
    both = nn.ModuleDict({"bottleneck": classifier.bottleneck, "head": classifier.head})
    write_tensors(path, both.state_dict(), {"classifier": json.dumps(plain | {"config": asdict(classifier.config)})}, _KIND)


def load_classifier(path: Path) -> ProposalClassifier:
    """Raises InvalidInput for another kind of file, CorruptFile for a damaged one."""
    file = read_tensors(path, _KIND)
    plain, (mean,) = file.described("classifier"), file.named("bottleneck.0.mean")
    try:
        config, classes = ClassifierConfig(**plain["config"]), tuple(plain["classes"])
        bottleneck, head = _modules(len(mean), config.width, len(classes))
        detector, source, counts = plain["detector"], plain["source"], tuple(plain["counts"])
    except (KeyError, TypeError, ValueError) as error:
        raise CorruptFile(f"{path} is damaged: {error}; {_KIND.advice}") from error
    both = nn.ModuleDict({"bottleneck": bottleneck, "head": head})
    fill_module(both, file.tensors, path)
    both.eval().requires_grad_(False)
    return ProposalClassifier(
        bottleneck=bottleneck, head=head, classes=classes, config=config, detector=detector, source=source, counts=counts
    )


def trainable_bottleneck(classifier: ProposalClassifier) -> nn.Module:
    """A copy of the bottleneck that can learn; the classifier itself stays as it is."""
    return copy.deepcopy(classifier.bottleneck).requires_grad_(True)
