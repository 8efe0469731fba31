"""GLC's training: a classifier that was trained on a source domain learns from an unlabeled target.

    every epoch    features and probabilities of the whole target in evaluation mode ── pseudo labels, memory bank
    every batch    loss = pseudo_weight * global + local_weight * local + affinity_weight * affinity        (`losses.py`)
                   learning rate lr * (1 + 10 t / T) ** -0.75, SGD with Nesterov momentum; then the batch's rows of the bank are
                   rewritten

The classifier is frozen, the feature module learns. The weights of the last epoch count: to choose an epoch would need target labels.

At last the threshold is chosen, and the guard compares the answers with those of the source model (`guard.py`).

Read next: `agreed_labels.py` for the labels, `losses.py` for the terms, `networks.py` for optimizer and batch norm.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from .adapted_model import AdaptedModel, EpochReport
from .agreed_labels import AgreedConfig, agreed_labels
from .class_number import ClassNumberConfig, occupied_classes, target_class_number
from .guard import compare_certainty, guard_neighbors
from .lead_labels import LeadConfig, lead_labels
from .losses import affinity_loss, hard_negatives, soft_cross_entropy
from .memory_bank import MemoryBank
from .neighborhood import most_certain_threshold
from .networks import features_and_probabilities, refresh_batch_norm, set_learning_rate, sgd_with_slow_part
from .one_vs_all import OneVsAllConfig, one_vs_all_labels
from .pseudo_labels import PseudoLabels, check_target, unadapted_labels
from .unknown_rule import UNADAPTED_ENTROPY, UnknownRule, is_unknown, normalized_entropy


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """What decides the result of an adaptation, apart from model and data. `paper()` behaves like the released code.

    The defaults were chosen on generated families of problems, before they met other data (docs/adapt.md).
    """

    epochs: int = 10
    """Passes over the target. Before each, the pseudo labels are made again."""

    steps_per_epoch: int | None = 15
    """Batches after which an epoch ends, a random part of a large target; None: when all samples were seen. Long trainings forget."""

    batch_size: int = 64
    """Samples per step. The rest of an epoch is dropped; fewer samples than this train as one batch."""

    lr: float = 1e-2
    """Learning rate at the first step. Lower it where losses become non-finite."""

    slow_prefixes: tuple[str, ...] = ()
    """Beginnings of parameter names of the feature module that learn at `lr * slow_factor`: a pretrained backbone."""

    slow_factor: float = 0.1
    """Factor on the learning rate of the parameters in `slow_prefixes`."""

    momentum: float = 0.9
    """Nesterov momentum of SGD."""

    weight_decay: float = 1e-3
    """Weight decay of SGD."""

    pseudo_weight: float = 0.3
    """Weight of the global loss: cross entropy with the pseudo labels."""

    local_weight: float = 1.0
    """Weight of the local loss: cross entropy with the mean prediction of the neighbors."""

    affinity_weight: float = 0.1
    """Weight of the affinity loss of GLC++; GLC itself has none. Lower it where classes overlap and the target has private ones."""

    neighbors: int = 8
    """Neighbors whose mean prediction is the target of the local loss. The paper uses 4."""

    class_number: int | None = None
    """Number of target classes that the labels are made with. None: `estimate` decides, once, before the first epoch."""

    estimate: ClassNumberConfig | None = None
    """How the number of target classes is estimated. None: as many source classes as labels with K = C use; see `occupied_classes`."""

    labeling: AgreedConfig | OneVsAllConfig | LeadConfig = AgreedConfig()
    """Which pseudo labels are made: those on which clusters and classifier agree, GLC's or LEAD's.

    LEAD needs a classifier with a `weight` (C, D).
    """

    unknown: UnknownRule | None = None
    """Which samples of the adapted model are unknown. None: those with which its answers are the most certain (`most_certain_threshold`)."""

    fall_back: bool = True
    """Whether the source model is kept where the labels of the adapted one are less certain than its own."""

    refresh_batch_norm: bool = True
    """Whether batch-norm statistics are replaced by those of the target before the first labels are made."""

    epsilon: float = 0.0
    """Constant inside the logarithm of the losses; the released code uses 1e-5."""

    seed: int = 0
    """Decides the order of the batches, the clustering and dropout."""

    def __post_init__(self) -> None:
        if self.steps_per_epoch is not None and self.steps_per_epoch < 1:
            raise InvalidInput(f"steps_per_epoch must be at least 1, or None for all samples, found {self.steps_per_epoch}")
        if self.epochs < 1 or self.batch_size < 2 or self.neighbors < 1 or not self.lr > 0:
            raise InvalidInput(
                "adaptation needs epochs >= 1, batch_size >= 2, neighbors >= 1 and lr > 0, found "
                f"{self.epochs}, {self.batch_size}, {self.neighbors} and {self.lr:g}"
            )
        if self.class_number is not None and self.class_number < 2:
            raise InvalidInput(f"class_number must be at least 2, or None to estimate it, found {self.class_number}")

    @staticmethod
    def paper() -> AdaptConfig:
        """Use the settings of the published GLC with the learning rate of its digits experiment.

        Every class has N / K positives, and a sample with an entropy above 0.55 is unknown.
        """
        return AdaptConfig(
            steps_per_epoch=None,
            estimate=ClassNumberConfig.paper(),
            labeling=OneVsAllConfig.paper(),
            unknown=UnknownRule(kind="fixed", value=0.55),
            affinity_weight=0.0,
            neighbors=4,
            fall_back=False,
            refresh_batch_norm=False,
            epsilon=1e-5,
            seed=2021,
        )


@dataclass(frozen=True, kw_only=True)
class GLCAdapter:
    """Adapts a classifier to an unlabeled target. Both modules stay as they are: `fit` works on copies.

    Example:
        adapter = GLCAdapter(feature_module=backbone, classifier=head, config=AdaptConfig(epochs=5))
        adapted = adapter.fit(target_inputs)
        found = adapted.predict(target_inputs)
        unknown = found.classes == found.probabilities.shape[1]
    """

    feature_module: nn.Module
    """Maps inputs (B, ...) to features (B, D). This part learns."""

    classifier: nn.Module
    """Maps features (B, D) to logits (B, C) over the source classes. This part is frozen."""

    config: AdaptConfig = AdaptConfig()
    """Settings of the adaptation."""

    def fit(self, inputs: Tensor, *, after_epoch: Callable[[int, EpochReport], None] | None = None) -> AdaptedModel:
        """Adapt to a target.

        The result depends on the seed of the configuration and not on the state of the global random generators.

        Args:
            inputs: (N, ...) unlabeled target inputs on the device of the modules.
            after_epoch: Called after each epoch with its number, from 0, and its report.

        Returns:
            The adapted model of the last epoch.

        Raises:
            InvalidInput: There are not more samples than neighbors, there is one source class, or features or losses become
                non-finite.
        """
        require(
            len(inputs) > self.config.neighbors,
            f"{self.config.neighbors} neighbors of each sample need at least {self.config.neighbors + 1} target samples, "
            f"found {len(inputs)}",
        )
        devices = [inputs.device] if inputs.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(self.config.seed)
            classifier = copy.deepcopy(self.classifier).requires_grad_(False).eval()
            return _fit(copy.deepcopy(self.feature_module), classifier, inputs, self.config, after_epoch)


def _fit(
    module: nn.Module,
    classifier: nn.Module,
    inputs: Tensor,
    config: AdaptConfig,
    after_epoch: Callable[[int, EpochReport], None] | None,
) -> AdaptedModel:
    source = copy.deepcopy(module)
    source_features, source_probabilities = _checked_answer(source, classifier, inputs)
    if config.refresh_batch_norm:
        refresh_batch_norm(module, inputs, batch_size=config.batch_size)
    optimizer = sgd_with_slow_part(
        module,
        lr=config.lr,
        slow_prefixes=config.slow_prefixes,
        slow_factor=config.slow_factor,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    shuffle = torch.Generator().manual_seed(config.seed)
    features, probabilities = _checked_answer(module, classifier, inputs)
    class_number, estimate = target_class_number(
        features, probabilities.shape[1], config.class_number, config.estimate, seed=config.seed
    )
    if config.class_number is None and config.estimate is None:
        first = _pseudo_labels(features, probabilities, class_number, classifier, config)
        class_number = occupied_classes(first.nearest, class_number)
    history = []
    for epoch in range(config.epochs):
        labels = _pseudo_labels(features, probabilities, class_number, classifier, config)
        bank = MemoryBank(features, probabilities)
        history.append(_train_epoch(epoch, module, classifier, inputs, labels, bank, optimizer, shuffle, config))
        features, probabilities = _checked_answer(module, classifier, inputs)
        if after_epoch is not None:
            after_epoch(epoch, history[-1])
    neighbors = guard_neighbors(source_features)
    scores, nearest = normalized_entropy(probabilities), probabilities.argmax(1)
    if config.unknown is None:
        threshold = most_certain_threshold(scores, nearest, probabilities.shape[1], neighbors)
    else:
        threshold = config.unknown.threshold(scores)
    answers = torch.where(is_unknown(scores, threshold), probabilities.shape[1], nearest)
    alone = unadapted_labels(source_probabilities).hard
    guard = compare_certainty(neighbors, answers, alone, unknown=probabilities.shape[1], acts=config.fall_back)
    return AdaptedModel(
        feature_module=(source if guard.fell_back else module).eval(),
        classifier=classifier.eval(),
        threshold=UNADAPTED_ENTROPY if guard.fell_back else threshold,
        guard=guard,
        class_number=class_number,
        estimate=estimate,
        history=tuple(history),
    )


def _checked_answer(module: nn.Module, classifier: nn.Module, inputs: Tensor) -> tuple[Tensor, Tensor]:
    features, probabilities = features_and_probabilities(module, classifier, inputs)
    check_target(features, probabilities)
    return features, probabilities


def _pseudo_labels(
    features: Tensor, probabilities: Tensor, class_number: int, classifier: nn.Module, config: AdaptConfig
) -> PseudoLabels:
    if isinstance(config.labeling, AgreedConfig):
        return agreed_labels(features, probabilities, class_number, config.labeling)
    if isinstance(config.labeling, OneVsAllConfig):
        return one_vs_all_labels(features, probabilities, class_number, config.labeling)
    weight = getattr(classifier, "weight", None)
    if not isinstance(weight, Tensor) or weight.shape != (probabilities.shape[1], features.shape[1]):
        raise InvalidInput(
            f"LEAD's labels need the weight ({probabilities.shape[1]}, {features.shape[1]}) of a linear classifier; "
            f"{type(classifier).__name__} has none"
        )
    return lead_labels(features, probabilities, weight, class_number, config.labeling)


def _train_epoch(
    epoch: int,
    module: nn.Module,
    classifier: nn.Module,
    inputs: Tensor,
    labels: PseudoLabels,
    bank: MemoryBank,
    optimizer: torch.optim.Optimizer,
    shuffle: torch.Generator,
    config: AdaptConfig,
) -> EpochReport:
    batch_size = min(config.batch_size, len(inputs))
    steps = len(inputs) // batch_size  # the rest of an epoch is dropped: batch norm needs full batches
    steps = min(steps, config.steps_per_epoch or steps)
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
        raise InvalidInput(f"losses became non-finite in epoch {epoch} (pseudo, local, affinity: {sums.tolist()}); lower lr")
    pseudo, local, affinity = (sums / steps).tolist()
    unknown_share = float((labels.hard == labels.soft.shape[1]).float().mean())
    return EpochReport(pseudo=pseudo, local=local, affinity=affinity, unknown_share=unknown_share)


def _losses(
    module: nn.Module,
    classifier: nn.Module,
    inputs: Tensor,
    index: Tensor,
    labels: PseudoLabels,
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
