"""The attack on membership tells members of an overfitted detector, and nothing where members and others are the same frames."""

from dataclasses import replace

import pytest
import tiny
import torch

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.privacy.attacks.leak_row import LeakRow, balanced_accuracy, explained_share, ranking_auc
from upcycle3d.perception.privacy.attacks.membership import ReferenceDetector, attack_membership, membership_score
from upcycle3d.perception.training.loop import LoopConfig
from upcycle3d.perception.training.optim import OneCycle
from upcycle3d.perception.training.supervised import train_supervised

pytestmark = pytest.mark.usefixtures("one_thread")


def trained(frames, *, seed: int, steps: int = 60):
    detector = tiny.second_iou(tiny.second_iou_config(width=8), seed=seed)
    config = LoopConfig(seed=seed, optim=OneCycle(lr=0.01, total_steps=steps), log_every=1000, checkpoint_every=1000)
    train_supervised(
        detector, lambda step: (frames[step % len(frames)], frames[(step + 1) % len(frames)]), config, progress=False
    )
    return detector


@pytest.fixture(scope="module")
def frames():
    return [tiny.frame_with_car(seed) for seed in range(24)]


@pytest.fixture(scope="module")
def target(frames):
    return trained(frames[:6], seed=1)


@pytest.fixture(scope="module")
def reference(frames):
    return ReferenceDetector(detector=trained(frames[12:18], seed=2), members=frames[12:18], others=frames[18:24])


def test_members_of_an_overfitted_detector_are_found(target, reference, frames):
    found = attack_membership(target, frames[:6], frames[6:12], [reference])
    assert found.loss.auc > 0.8
    assert found.calibrated.auc > 0.8
    assert found.shadow.auc > 0.7
    assert (found.members, found.others, found.references) == (6, 6, 1)


def test_frames_that_are_both_member_and_not_give_exactly_chance(target, reference, frames):
    found = attack_membership(target, frames[:6], frames[:6], [reference])
    scores = (found.loss, found.confidence, found.calibrated, found.shadow, found.encoder, found.encoder_calibrated)
    assert [s.auc for s in scores] == [0.5] * 6
    assert all(s.tpr_at_1 == 0 for s in scores)


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
    assert found.encoder.auc == 1.0
    assert found.calibrated is None
    assert found.encoder_calibrated is None


def test_without_members_there_is_nothing_to_tell(target, frames):
    with pytest.raises(InvalidInput, match="members and others"):
        attack_membership(target, [], frames[:2])
    with pytest.raises(InvalidInput, match="no labels"):
        attack_membership(target, [replace(frames[0], labels=None)], frames[:1])


def test_scores_of_sorted_samples():
    score = membership_score(torch.arange(200.0) + 0.5, torch.arange(100.0))
    # Found at 1 %: members above the second highest other, 98: 98.5 to 199.5. At 5 %: above the sixth highest, 94.
    assert (score.tpr_at_1, score.tpr_at_5) == (102 / 200, 106 / 200)
    assert membership_score(torch.ones(5), torch.zeros(5)).auc == 1.0


def test_auc_counts_pairs():
    g = torch.Generator().manual_seed(0)
    a, b = torch.randint(5, (40,), generator=g).float(), torch.randint(6, (30,), generator=g).float()
    pairs = (a[:, None] > b).double() + 0.5 * (a[:, None] == b).double()
    assert ranking_auc(a, b) == pytest.approx(float(pairs.mean()), abs=1e-12)


def test_shares_and_accuracies_by_hand():
    assert LeakRow(nothing=0.2, coordinates=0.3, upload=0.4, raw=0.6).share == pytest.approx(0.5)
    assert explained_share(torch.tensor([1.0, 3.0]), torch.tensor([2.0, 2.0])) == 0.0
    assert balanced_accuracy(torch.tensor([0, 0, 0, 1]), torch.tensor([0, 0, 0, 0]), 3) == 0.5
