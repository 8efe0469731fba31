"""Losses against loops and finite differences; the memory bank against brute force."""

import math

import pytest
import torch
from torch.nn import functional as F

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.adapt.glc.losses import affinity_loss, hard_negatives, soft_cross_entropy
from upcycle3d.perception.adapt.glc.memory_bank import MemoryBank


def rand(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("epsilon", [0.0, 1e-5])
def test_soft_cross_entropy_is_the_sum_it_says(epsilon):
    logits, targets, weight = rand(6, 4), rand(6, 4, seed=1).softmax(1), torch.tensor([1.0, 0, 2, 1, 1, 0.5], dtype=torch.float64)
    total = 0.0
    for i in range(6):
        e = [math.exp(float(x)) for x in logits[i]]
        total -= float(weight[i]) * sum(float(t) * math.log(x / sum(e) + epsilon) for t, x in zip(targets[i], e))
    assert float(soft_cross_entropy(logits, targets, weight, epsilon=epsilon)) == pytest.approx(total / 6)
    assert torch.autograd.gradcheck(lambda x: soft_cross_entropy(x, targets, weight, epsilon=epsilon), logits.requires_grad_())


def test_soft_cross_entropy_equals_torchs_on_one_hot_and_stays_finite_far_out():
    logits, classes = rand(5, 3), torch.tensor([0, 2, 1, 1, 0])
    torch.testing.assert_close(soft_cross_entropy(logits, F.one_hot(classes, 3).double()), F.cross_entropy(logits, classes))
    far = torch.tensor([[1e4, -1e4]], requires_grad=True)
    soft_cross_entropy(far, torch.tensor([[0.5, 0.5]])).backward()
    assert far.grad is not None
    assert far.grad.isfinite().all()
    assert float(soft_cross_entropy(torch.zeros(0, 3), torch.zeros(0, 3))) == 0


def test_affinity_is_the_sum_it_says_and_pulls_only_the_query():
    query, positives, negatives = (
        F.normalize(rand(5, 4)),
        F.normalize(rand(5, 3, 4), dim=2),
        F.normalize(rand(5, 2, 4, seed=3), dim=2),
    )
    loops = sum(sum(float(query[i] @ n) for n in negatives[i]) - sum(float(query[i] @ p) for p in positives[i]) for i in range(5))
    assert float(affinity_loss(query, positives, negatives)) == pytest.approx(loops / 5)
    positives.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: affinity_loss(x, positives, negatives), query.requires_grad_())
    affinity_loss(query, positives, negatives).backward()
    assert positives.grad is None
    assert affinity_loss(query, positives, negatives[:, :0]).isfinite()  # a batch too small for negatives
    with pytest.raises(InvalidInput, match="affinity_loss needs"):
        affinity_loss(query, positives[0], negatives)


def test_hard_negatives_pass_over_self_and_the_likely_same_class():
    features = F.normalize(rand(7, 3))
    rows = hard_negatives(features, 2, skip=3)
    for i in range(7):
        ranked = sorted((j for j in range(7) if j != i), key=lambda j: -float(features[i] @ features[j]))
        assert rows[i].tolist() == ranked[3:5]
    assert hard_negatives(features, 4, skip=6).shape == (7, 0)


def test_neighbors_are_those_of_brute_force_without_self_wherever_it_ranks():
    features, probabilities = rand(40, 6), rand(40, 3).softmax(1)
    bank = MemoryBank(features, probabilities)
    queries, index = rand(5, 6, seed=9), torch.tensor([3, 0, 39, 7, 8])
    found = bank.neighbors(queries, index, 4)
    for q, i, row in zip(queries, index.tolist(), found):
        cosine = {j: float(F.cosine_similarity(q, features[j], dim=0)) for j in range(40) if j != i}
        assert row.tolist() == sorted(cosine, key=lambda j: -cosine[j])[:4]
    torch.testing.assert_close(bank.consensus(found)[0], probabilities[found[0]].mean(0))


def test_the_bank_is_rewritten_row_by_row_and_keeps_no_gradient():
    features = rand(6, 3).requires_grad_()
    bank = MemoryBank(features, rand(6, 2).softmax(1))
    before = bank.features.clone()
    bank.update(torch.tensor([1, 4]), features[[0, 0]] * 7, torch.full((2, 2), 0.5, dtype=torch.float64))
    torch.testing.assert_close(bank.features[[1, 4]], before[[0, 0]])
    torch.testing.assert_close(bank.features[[0, 2, 3, 5]], before[[0, 2, 3, 5]])
    assert not bank.features.requires_grad
    with pytest.raises(InvalidInput, match="6 neighbors of each sample need at least 7 samples"):
        bank.neighbors(features, torch.arange(6), 6)
    with pytest.raises(InvalidInput, match="memory bank needs"):
        MemoryBank(rand(3, 2), rand(4, 2))
