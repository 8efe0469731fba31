"""GLC's training: a classifier that was trained on a source domain learns from an unlabelled target.

    every epoch    features and probabilities of the whole target, evaluation mode ── pseudo labels (``labelling``), memory bank
    every batch    loss = pseudo_weight * global + local_weight * local + affinity_weight * affinity        (``losses``)
                   learning rate lr * (1 + 10 t / T) ** -0.75, SGD with Nesterov momentum; then the batch's rows of the bank are rewritten

The classifier is frozen, the feature module learns. The weights of the last epoch count: choosing an epoch would take target labels.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from ....core.structures import TensorValue
from .labeling import (
    ClassNumber,
    ClassNumberConfig,
    OneVsAllConfig,
    TargetLabels,
    check_target,
    class_number_candidates,
    estimate_class_number,
    one_vs_all_labels,
)
from .lead import LeadConfig, lead_labels
from .losses import affinity_loss, hard_negatives, soft_cross_entropy
from .memory_bank import MemoryBank
from .unknown import UnknownRule, is_unknown, normalized_entropy


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What decides the result of an adaptation, apart from model and data. ``paper()`` has the released code's behaviour.

    The defaults were chosen on Gaussian sets only, before they met other data (docs/adapt.md).
    """

    epochs: int = 10
    batch_size: int = 64
    lr: float = 1e-2  # at the first step
    slow: tuple[
        str, ...
    ] = ()  # beginnings of parameter names of the feature module that learn at lr * slow_factor (the backbone)
    slow_factor: float = 0.1
    momentum: float = 0.9
    weight_decay: float = 1e-3
    pseudo_weight: float = 0.3
    local_weight: float = 1.0
    affinity_weight: float = 0.1  # GLC++'s term; GLC itself has none
    neighbors: int = 8  # that must agree; the paper has 4
    class_number: int | None = None  # of the target, if it is known; else it is estimated once, before the first epoch
    estimate: ClassNumberConfig = ClassNumberConfig()
    labeling: OneVsAllConfig | LeadConfig = OneVsAllConfig()
    unknown: UnknownRule = UnknownRule()
    refresh_batch_norm: bool = True  # batch-norm statistics of the target before the first labels (AdaBN, Li et al. 2016)
    epsilon: float = 0.0  # inside the losses' logarithm
    seed: int = 0

    def __post_init__(self) -> None:
        if self.epochs < 1 or self.batch_size < 2 or self.neighbors < 1 or not self.lr > 0:
            raise InvalidInput(f"adaptation needs epochs >= 1, batch_size >= 2, neighbours >= 1 and lr > 0, found {self}")
        if self.class_number is not None and self.class_number < 2:
            raise InvalidInput(f"class_number must be at least 2, or None to estimate it, found {self.class_number}")

    @staticmethod
    def paper() -> AdaptConfig:
        """GLC as published, with the digits' learning rate: uniform counts, entropy above 0.55 is unknown."""
        return AdaptConfig(
            estimate=ClassNumberConfig.paper(),
            labeling=OneVsAllConfig.paper(),
            unknown=UnknownRule(method="fixed", value=0.55),
            affinity_weight=0.0,
            neighbors=4,
            refresh_batch_norm=False,
            epsilon=1e-5,
            seed=2021,
        )


@dataclass(frozen=True, kw_only=True, repr=False)
class Prediction(TensorValue):
    """features: (N, D). probabilities: (N, C). unknown_scores: (N,) normalised entropy.

    nearest: (N,) int64, the most probable source class. classes: (N,) int64, the same, or C where the score exceeds the threshold.
    """

    features: Tensor
    probabilities: Tensor
    unknown_scores: Tensor
    nearest: Tensor
    classes: Tensor


@dataclass(frozen=True, kw_only=True)
class EpochReport:
    """Mean losses of an epoch (before their weights) and the share of the target that was labelled unknown in it."""

    pseudo: float
    local: float
    affinity: float
    unknown_share: float


@dataclass(frozen=True, kw_only=True)
class AdaptedModel:
    """What an adaptation leaves: modules in evaluation mode and the threshold. Nothing in it is a target sample."""

    feature_module: nn.Module
    classifier: nn.Module
    threshold: float
    class_number: int
    estimate: ClassNumber | None  # None where the class number was given
    history: tuple[EpochReport, ...] = field(repr=False)

    def predict(self, inputs: Tensor, *, batch_size: int = 1024) -> Prediction:
        """Classes, probabilities and unknown scores of inputs (N, ...)."""
        features, probabilities = extract(self.feature_module, self.classifier, inputs, batch_size=batch_size)
        scores = normalized_entropy(probabilities)
        nearest = probabilities.argmax(1)
        return Prediction(
            features=features,
            probabilities=probabilities,
            unknown_scores=scores,
            nearest=nearest,
            classes=torch.where(is_unknown(scores, self.threshold), probabilities.shape[1], nearest),
        )


@torch.no_grad()
def extract(feature_module: nn.Module, classifier: nn.Module, inputs: Tensor, *, batch_size: int = 1024) -> tuple[Tensor, Tensor]:
    """Features (N, D) and softmax (N, C) of inputs (N, ...) in evaluation mode; the modules' modes are put back."""
    modes = feature_module.training, classifier.training
    feature_module.eval(), classifier.eval()
    parts = inputs.split(batch_size)  # one part, empty, for no input
    features = torch.cat([feature_module(part) for part in parts])
    probabilities = torch.cat([classifier(part).softmax(1) for part in features.split(batch_size)])
    feature_module.train(modes[0]), classifier.train(modes[1])
    return features, probabilities


@dataclass(frozen=True, kw_only=True)
class GLCAdapter:
    """feature_module: inputs (B, ...) to features (B, D). classifier: features to logits (B, C) over the source classes.

    Both stay as they are: ``fit`` works on copies. Inputs lie on the modules' device.
    """

    feature_module: nn.Module
    classifier: nn.Module
    config: AdaptConfig = AdaptConfig()

    def fit(self, inputs: Tensor, *, after_epoch: Callable[[int, EpochReport], None] | None = None) -> AdaptedModel:
        """Adapt to unlabelled target inputs (N, ...). Deterministic by the config's seed, whatever the global generators hold.

        Raises InvalidInput for fewer samples than neighbours, for one source class, and where features or losses become non-finite.
        """
        require(
            len(inputs) > self.config.neighbors,
            f"{self.config.neighbors} neighbours of each sample need at least {self.config.neighbors + 1} target samples, "
            f"found {len(inputs)}",
        )
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.random.fork_rng(devices=devices), _frozen(copy.deepcopy(self.classifier)) as classifier:
            torch.manual_seed(self.config.seed)
            return self._fit(copy.deepcopy(self.feature_module), classifier, inputs, after_epoch)

    def _fit(
        self,
        module: nn.Module,
        classifier: nn.Module,
        inputs: Tensor,
        after_epoch: Callable[[int, EpochReport], None] | None,
    ) -> AdaptedModel:
        config = self.config
        if config.refresh_batch_norm:
            refresh_batch_norm(module, inputs, batch_size=config.batch_size)
        batch_size = min(config.batch_size, len(inputs))
        steps = len(inputs) // batch_size  # the rest of an epoch is dropped: batch norm needs full batches
        optimizer = _optimizer(module, config)
        shuffle = torch.Generator().manual_seed(config.seed)
        class_number, estimate = config.class_number, None
        history = []
        for epoch in range(config.epochs):
            features, probabilities = extract(module, classifier, inputs)
            check_target(features, probabilities)
            if class_number is None:
                candidates = class_number_candidates(probabilities.shape[1], config.estimate.candidates)
                estimate = estimate_class_number(features, candidates, config.estimate, seed=config.seed)
                class_number = estimate.value
            labels = self._labels(features, probabilities, class_number, classifier)
            bank = MemoryBank(features, probabilities)
            sums = torch.zeros(3, device=inputs.device)
            module.train()
            order = torch.randperm(len(inputs), generator=shuffle).to(inputs.device)
            for step, index in enumerate(order[: steps * batch_size].split(batch_size)):
                set_learning_rate(optimizer, (epoch * steps + step) / (config.epochs * steps))
                terms = _losses(module, classifier, inputs[index], index, labels, bank, config)
                loss = config.pseudo_weight * terms[0] + config.local_weight * terms[1] + config.affinity_weight * terms[2]
                optimizer.zero_grad(set_to_none=True)
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                sums += terms.detach()
            if not sums.isfinite().all():
                raise InvalidInput(
                    f"losses became non-finite in epoch {epoch} (pseudo, local, affinity: {sums.tolist()}); lower lr"
                )
            pseudo, local, affinity = (sums / steps).tolist()
            unknown_share = float((labels.hard == probabilities.shape[1]).float().mean())
            history.append(EpochReport(pseudo=pseudo, local=local, affinity=affinity, unknown_share=unknown_share))
            if after_epoch is not None:
                after_epoch(epoch, history[-1])
        assert class_number is not None
        _, probabilities = extract(module, classifier, inputs)
        return AdaptedModel(
            feature_module=module.eval(),
            classifier=classifier.eval(),
            threshold=config.unknown.threshold(normalized_entropy(probabilities)),
            class_number=class_number,
            estimate=estimate,
            history=tuple(history),
        )

    def _labels(self, features: Tensor, probabilities: Tensor, class_number: int, classifier: nn.Module) -> TargetLabels:
        labeling = self.config.labeling
        if isinstance(labeling, OneVsAllConfig):
            return one_vs_all_labels(features, probabilities, class_number, labeling)
        weight = getattr(classifier, "weight", None)
        require(
            isinstance(weight, Tensor) and weight.shape == (probabilities.shape[1], features.shape[1]),
            f"LEAD's labeller reads the weight ({probabilities.shape[1]}, {features.shape[1]}) of a linear classifier; "
            f"{type(classifier).__name__} has none",
        )
        return lead_labels(features, probabilities, weight, class_number, labeling)  # type: ignore[arg-type]


def _losses(
    module: nn.Module,
    classifier: nn.Module,
    inputs: Tensor,
    index: Tensor,
    labels: TargetLabels,
    bank: MemoryBank,
    config: AdaptConfig,
) -> Tensor:
    """(3,): global, local and affinity loss of one batch. Rewrites the batch's rows of the bank."""
    features = module(inputs)
    logits = classifier(features)
    neighbors = bank.neighbors(features, index, config.neighbors)
    consensus = bank.consensus(neighbors)
    bank.update(index, features, logits.softmax(1))
    affinity = logits.new_zeros(())
    if config.affinity_weight > 0:
        directions = F.normalize(features)
        skip = -(-len(index) // labels.class_number)
        negatives = directions.detach()[hard_negatives(directions, config.neighbors, skip=skip)]
        affinity = affinity_loss(directions, bank.features[neighbors], negatives)
    pseudo = soft_cross_entropy(logits, labels.soft[index], labels.weight[index], epsilon=config.epsilon)
    return torch.stack([pseudo, soft_cross_entropy(logits, consensus, epsilon=config.epsilon), affinity])


@torch.no_grad()
def refresh_batch_norm(module: nn.Module, inputs: Tensor, *, batch_size: int = 64) -> None:
    """Replace the running statistics of every batch norm in ``module`` by their mean over batches of ``inputs``; in place."""
    norms = [m for m in module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.track_running_stats]
    if not norms:
        return
    momenta = [m.momentum for m in norms]
    module.eval()
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain mean over batches
        norm.train()
    for part in inputs.chunk(max(1, len(inputs) // batch_size)):  # of nearly equal size: a batch of 1 has no variance
        module(part)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    module.train()


def _optimizer(module: nn.Module, config: AdaptConfig) -> torch.optim.SGD:
    """Two groups: parameters named in ``config.slow``, and the others. Raises InvalidInput for a name that begins no parameter."""
    named = [(name, p) for name, p in module.named_parameters() if p.requires_grad]
    require(bool(named), "the feature module has no trainable parameter; there is nothing to adapt")
    strangers = [s for s in config.slow if not any(name.startswith(s) for name, _ in named)]
    require(not strangers, f"slow names {strangers} begin no parameter of the feature module; it has {[n for n, _ in named][:8]}")
    slow = [p for name, p in named if name.startswith(config.slow or ("\0",))]
    fast = [p for name, p in named if not name.startswith(config.slow or ("\0",))]
    groups = [{"params": slow, "base_lr": config.lr * config.slow_factor}, {"params": fast, "base_lr": config.lr}]
    return torch.optim.SGD(
        [g for g in groups if g["params"]],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
        nesterov=True,
    )


def set_learning_rate(optimizer: torch.optim.Optimizer, done: float) -> None:
    """GLC's schedule, also of its source models: each group's ``base_lr`` * (1 + 10 done) ** -0.75; done: share of all steps, 0..1."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * (1 + 10 * done) ** -0.75


@contextmanager
def _frozen(classifier: nn.Module) -> Iterator[nn.Module]:
    """The classifier (a copy) without gradients, in evaluation mode."""
    yield classifier.requires_grad_(False).eval()
