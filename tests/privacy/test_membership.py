"""The attack on membership tells frames that a detector learned by heart, and nothing where members and others are the same frames."""

from dataclasses import replace

import pytest
import torch

import tiny
from upcycle3d.core.errors import InvalidInput
from upcycle3d.core.structures import Labels
from upcycle3d.perception.privacy.attacks.leak_row import LeakRow, balanced_accuracy, explained_share
from upcycle3d.perception.privacy.attacks.membership import ReferenceDetector, attack_membership
from upcycle3d.perception.training.loop import LoopConfig
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.training.supervised import train_supervised

pytestmark = pytest.mark.usefixtures("one_thread")


def memory(seed: int):
    """A frame whose label lies somewhere else than its car: a detector can only learn it by heart."""
    frame = tiny.frame_with_car(seed)
    g = torch.Generator().manual_seed(1000 + seed)
    box = frame.labels.boxes.data.clone()
    box[:, :2] = torch.rand(2, generator=g) * torch.tensor([8.0, 8.0]) + torch.tensor([2.0, -4.0])
    return replace(frame, labels=Labels.make(box, torch.zeros(1)))


def trained(frames, *, seed: int, steps: int = 50):
    detector = tiny.second_iou(tiny.second_iou_config(width=8), seed=seed)
    for module in detector.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 0.3  # so that a few steps suffice
    config = LoopConfig(seed=seed, optim=OneCycle(lr=0.01, total_steps=steps), log_every=1000, checkpoint_every=1000)
    train_supervised(
        detector, lambda step: (frames[step % len(frames)], frames[(step + 1) % len(frames)]), config, progress=False
    )
    return detector


@pytest.fixture(scope="module")
def frames():
    return [memory(seed) for seed in range(22)]


@pytest.fixture(scope="module")
def target(frames):
    return trained(frames[:4], seed=1)


@pytest.fixture(scope="module")
def reference(frames):
    return ReferenceDetector(detector=trained(frames[12:16], seed=2), members=frames[12:16], others=frames[16:22])


def test_members_that_were_learned_by_heart_are_found(target, reference, frames):
    found = attack_membership(target, frames[:4], frames[4:12], [reference])
    assert found.loss.auc.value > 0.8
    assert found.calibrated.auc.value > 0.8
    assert found.shadow.auc.value > 0.7
    assert (found.members, found.others, found.references) == (4, 8, 1)


def test_frames_that_are_both_member_and_not_give_exactly_chance(target, reference, frames):
    found = attack_membership(target, frames[:4], frames[:4], [reference])
    scores = (found.loss, found.confidence, found.calibrated, found.shadow, found.encoder, found.encoder_calibrated)
    assert [s.auc.value for s in scores] == [0.5] * 6


def test_the_same_seed_gives_the_same_leak(target, reference, frames):
    first, again = (attack_membership(target, frames[:4], frames[6:10], [reference]) for _ in range(2))
    assert first == again


def test_batch_norms_that_kept_one_frame_tell_it(frames):
    """With momentum 1 the encoder keeps the statistics of the last frame that it saw: that frame must be the surest member."""
    detector = tiny.second_iou(seed=3)
    for module in detector.encoder.modules():
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    detector.train()
    with torch.no_grad():
        detector.encode([frames[0].points])
    found = attack_membership(detector.eval(), frames[:1], frames[6:12])
    assert found.encoder.auc.value == 1.0
    assert found.calibrated is None
    assert found.encoder_calibrated is None


def test_without_members_there_is_nothing_to_tell(target, frames):
    with pytest.raises(InvalidInput, match="members and others"):
        attack_membership(target, [], frames[:2])
    with pytest.raises(InvalidInput, match="no labels"):
        attack_membership(target, [replace(frames[0], labels=None)], frames[:1])


def test_shares_and_accuracies_by_hand():
    assert LeakRow(nothing=0.2, coordinates=0.3, upload=0.4, raw=0.6).share == pytest.approx(0.5)
    assert explained_share(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])) == 0.0
    assert balanced_accuracy(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]), 3) == 0.5
