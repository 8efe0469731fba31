"""Training of the proposal classifier on the source's proposals.

Read next: `classifier_file.py`, which trains only where there is no file, and `adaptation.py`.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ....core.errors import InvalidInput, require
from ..glc.networks import set_learning_rate, sgd_with_slow_part
from .proposal_classifier import BACKGROUND_NAME, ClassifierConfig, ProposalClassifier, Standardize, new_modules, proposal_inputs
from .proposal_matching import BACKGROUND
from .proposals import DetectorProposals


def train_proposal_classifier(proposals: DetectorProposals, ids: Tensor, config: ClassifierConfig) -> ProposalClassifier:
    """Train a classifier on the source's proposals. The seed decides the result.

    Args:
        proposals: N proposals on source frames.
        ids: (N,) int64 of `Matches.ids`: classes of the detector, background, or ignored.
        config: Settings.

    Returns:
        The classifier.

    Raises:
        InvalidInput: No proposal is of one of the classes or of background, an id is no source class, or training diverges.
    """
    names = proposals.class_names
    require(len(ids) == len(proposals), f"one id per proposal is needed, found {len(ids)} for {len(proposals)} proposals")
    require(
        bool((ids < len(names)).all()),
        f"source proposals must be of {', '.join(names)}, background or ignored; found id {int(ids.max()) if len(ids) else -1}",
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
    rows = _rows_to_learn(targets, len(names), config, rng)
    inputs, targets = proposal_inputs(proposals, points=config.points)[rows], targets[rows]
    counts = torch.bincount(targets, minlength=len(names) + 1)
    weight = counts.float().pow(-config.balance)
    weight = weight / (weight * counts).sum() * len(rows)  # mean 1 over the proposals
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        bottleneck, head = new_modules(inputs.shape[1], config.width, len(names) + 1)
    for module in bottleneck:
        if isinstance(module, Standardize):
            module.mean.copy_(inputs.mean(0))
            module.deviation.copy_(inputs.std(0).clamp_min(1e-3))
    _fit(nn.Sequential(bottleneck, head), inputs, targets, weight, config, rng)
    return ProposalClassifier(
        bottleneck=bottleneck.eval().requires_grad_(False),
        head=head.eval().requires_grad_(False),
        classes=(*names, BACKGROUND_NAME),
        config=config,
        detector=proposals.detector,
        source=proposals.data,
        counts=tuple(counts.tolist()),
    )


def _rows_to_learn(targets: Tensor, background: int, config: ClassifierConfig, rng: np.random.Generator) -> Tensor:
    """All proposals on objects, and `config.background` times as many on background, ascending."""
    objects = ((targets >= 0) & (targets < background)).nonzero()[:, 0].numpy()
    others = (targets == background).nonzero()[:, 0].numpy()
    rng.shuffle(others)
    rows = np.sort(np.concatenate([objects, others[: max(1, round(config.background * len(objects)))]]))
    require(len(rows) >= 2, f"a batch norm needs at least 2 proposals, found {len(rows)}; give more source frames")
    return torch.from_numpy(rows)


def _fit(
    network: nn.Module, inputs: Tensor, targets: Tensor, weight: Tensor, config: ClassifierConfig, rng: np.random.Generator
) -> None:
    optimizer = sgd_with_slow_part(
        network, lr=config.lr, slow_prefixes=(), slow_factor=1.0, momentum=config.momentum, weight_decay=config.weight_decay
    )
    size = min(config.batch_size, len(inputs))
    steps = len(inputs) // size  # the rest of an epoch is dropped: batch norm needs full batches
    for epoch in range(config.epochs):
        order = torch.from_numpy(rng.permutation(len(inputs)))
        for step, rows in enumerate(order[: steps * size].split(size)):
            set_learning_rate(optimizer, (epoch * steps + step) / (config.epochs * steps))
            logits = network(inputs[rows])
            each = F.cross_entropy(logits, targets[rows], label_smoothing=config.smoothing, reduction="none")
            loss = (each * weight[targets[rows]]).mean()
            optimizer.zero_grad(set_to_none=True)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    if not all(bool(torch.isfinite(p).all()) for p in network.parameters()):
        raise InvalidInput("training the proposal classifier diverged; lower its lr")
