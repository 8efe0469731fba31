"""Attack on membership: was a frame among those that a detector was trained on?

The attacker holds the weights of a detector, candidate frames with their labels, and reference detectors that it trained itself on other
frames of the same kind. A network fits its training frames better than others; how much better than a reference fits the same frame is
the calibrated score (Watson et al., 2022), with several references the likelihood ratio of Carlini et al. (LiRA, 2022). A shadow
classifier learns from a reference what members look like. The encoder file alone is attacked through its batch norms: the statistics of
a training frame lie nearer to those that the network kept.

Read next: `ranking_metrics.py` for the scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from ....core.errors import require
from ....core.frame import Frame, labels_of
from ....core.structures import Boxes3D
from ...models.detector import Detector
from ...models.encoders.encoder import Encoder
from ..ranking_metrics import MembershipScore, membership_score
from .fits import fit_best


@dataclass(frozen=True, kw_only=True)
class ReferenceDetector:
    """A detector that the attacker trained, so that it knows the members."""

    detector: Detector
    """The detector, in evaluation mode."""

    members: Sequence[Frame]
    """Frames that it was trained on; none of them is a candidate."""

    others: Sequence[Frame]
    """Frames of the same kind that neither it nor the detector under attack was trained on; none of them is a candidate."""


@dataclass(frozen=True, kw_only=True)
class MembershipLeak:
    """What weights tell about the frames that they were trained on. No information gives an AUC of 0.5, full knowledge gives 1."""

    loss: MembershipScore
    """The loss of each frame with its labels, no reference."""

    confidence: MembershipScore
    """How sure the detector is of what it finds in each frame; needs no labels and no reference."""

    calibrated: MembershipScore | None
    """The loss compared with the references'. None without references."""

    shadow: MembershipScore | None
    """A classifier of losses and scores, learned from the references. None without references, or where they know fewer than 10 frames."""

    encoder: MembershipScore
    """From the encoder file alone: distance of a frame's statistics from those of the batch norms, no reference."""

    encoder_calibrated: MembershipScore | None
    """The same compared with the references' encoders. None without references."""

    members: int
    """Members among the candidates."""

    others: int
    """Other candidates."""

    references: int
    """Reference detectors."""


def attack_membership(
    target: Detector,
    members: Sequence[Frame],
    others: Sequence[Frame],
    references: Sequence[ReferenceDetector] = (),
    *,
    seed: int = 0,
) -> MembershipLeak:
    """Score candidates whose membership is known to us and not to the attacker.

    Args:
        target: The detector under attack, in evaluation mode: as trained, or after upcycling.
        members: Labeled frames that it was trained on, without augmentation.
        others: Labeled frames of the same kind that it was not trained on.
        references: The attacker's own detectors. All of the same classes and cut as `target`.
        seed: Decides the shadow classifier.

    Returns:
        The scores of every variant.

    Raises:
        InvalidInput: A frame has no labels, or there are no members or no others.
    """
    require(len(members) > 0 and len(others) > 0, "an attack on membership needs members and others to tell apart")
    candidates = [*members, *others]
    count = len(members)
    own = _signals(target, candidates)
    drift = _drift(target.encoder, candidates)
    calibrated = shadow = encoder_calibrated = None
    if references:
        outside = torch.stack([_signals(r.detector, candidates) for r in references])
        spread = outside[:, :, 0].std(0) if len(references) > 2 else own.new_ones(len(own))
        calibrated = _score((outside[:, :, 0].mean(0) - own[:, 0]) / (spread + 0.1 * spread.mean()), count)
        if sum(len(r.members) + len(r.others) for r in references) >= 10:
            shadow = _score(_shadow(target, own, outside.mean(0), references, seed), count)
        away = torch.stack([_drift(r.detector.encoder, candidates) for r in references]).mean(0)
        encoder_calibrated = _score((away - drift).mean(1), count)
    return MembershipLeak(
        loss=_score(-own[:, 0], count),
        confidence=_score(own[:, -1], count),
        calibrated=calibrated,
        shadow=shadow,
        encoder=_score(-drift.mean(1), count),
        encoder_calibrated=encoder_calibrated,
        members=count,
        others=len(others),
        references=len(references),
    )


def _score(scores: Tensor, members: int) -> MembershipScore:
    return membership_score(scores[:members], scores[members:])


def _shadow(target: Detector, own: Tensor, outside: Tensor, references: Sequence[ReferenceDetector], seed: int) -> Tensor:
    """(N,) scores of a classifier that learned from the references, each calibrated with the detector under attack."""
    inputs, truth = [], []
    for reference in references:
        frames = [*reference.members, *reference.others]
        inputs.append(_compared(_signals(reference.detector, frames), _signals(target, frames)))
        truth.append(torch.arange(len(frames)) < len(reference.members))
    member = torch.cat(truth).float()
    fit = fit_best(torch.cat(inputs), torch.stack([1 - member, member], 1), seed=seed, classes=True)
    answer = fit.predict(_compared(own, outside))
    return answer[:, 1] - answer[:, 0]


def _compared(own: Tensor, outside: Tensor) -> Tensor:
    """The signals of a detector, and their difference to those of one that has not seen the frames."""
    return torch.cat([own, own - outside], 1)


@torch.no_grad()
def _signals(detector: Detector, frames: Sequence[Frame]) -> Tensor:
    """(N, D) total loss, loss terms, and confidence of each frame; the mean of the frame and its mirror image, both seen in training."""
    rows = []
    for frame in frames:
        row = []
        for turned in (frame, _mirrored(frame)):
            labels = labels_of([turned])
            outputs = detector.decode(detector.encode([turned.points]))
            terms = detector.loss(outputs, labels)
            found = detector.predict(outputs)[0]
            sure = found.scores[:10].clamp(1e-4, 1 - 1e-4)
            confidence = -(sure * sure.log() + (1 - sure) * (1 - sure).log()).sum() / max(1, len(sure))
            values = torch.stack([terms.terms[name] for name in sorted(terms.terms)])
            row.append(torch.cat([terms.total()[None], values, found.scores[:10].sum()[None], -confidence[None]]))
        rows.append(torch.stack(row).mean(0))
    return torch.stack(rows)


def _mirrored(frame: Frame) -> Frame:
    """The frame with left and right exchanged."""
    xyz = frame.points.xyz * frame.points.xyz.new_tensor([1.0, -1.0, 1.0])
    labels = frame.labels
    if labels is not None:
        labels = replace(labels, boxes=Boxes3D(data=labels.boxes.data * labels.boxes.data.new_tensor([1, -1, 1, 1, 1, 1, -1])))
    return replace(frame, points=replace(frame.points, xyz=xyz), labels=labels)


@torch.no_grad()
def _drift(encoder: Encoder, frames: Sequence[Frame]) -> Tensor:
    """(N, L) for every batch norm, how far mean and variance of a frame lie from what the network kept (KL divergence of normals)."""
    norms = [m for m in encoder.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_mean is not None]
    require(len(norms) > 0, "this encoder has no batch norm whose statistics could tell a member")
    seen: dict[int, Tensor] = {}

    def watch(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(module, nn.modules.batchnorm._BatchNorm)
        if module.running_mean is None or module.running_var is None:
            return
        rows = inputs[0].transpose(0, 1).flatten(1).T
        if len(rows) < 2:
            seen[id(module)] = rows.new_zeros(())
            return
        var, kept = rows.var(0, correction=0) + module.eps, module.running_var + module.eps
        gap = (rows.mean(0) - module.running_mean).square() / kept
        seen[id(module)] = 0.5 * (gap + var / kept - 1 - (var / kept).log()).mean()

    hooks = [norm.register_forward_pre_hook(watch) for norm in norms]
    try:
        table = []
        for frame in frames:
            seen.clear()
            encoder([frame.points])
            table.append(torch.stack([seen.get(id(norm), torch.zeros(())) for norm in norms]))
        return torch.stack(table).log1p()
    finally:
        for hook in hooks:
            hook.remove()
