"""Batches from one cluster each: pure, in turn, decided by seed and step, with every sample accounted for."""

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from upcycle3d.core.errors import InvalidInput
from upcycle3d.perception.moe.contrastive.cluster_batches import ClusterBatchSampler, account_of, cluster_batches

SIZES = [17, 4, 3, 0, 30]
GROUP = torch.tensor([g for g, size in enumerate(SIZES) for _ in range(size)])[
    torch.randperm(sum(SIZES), generator=torch.Generator().manual_seed(0))
]


def test_every_batch_is_pure_and_every_sample_is_used_or_left_out_once():
    for epoch in range(4):
        batches = cluster_batches(GROUP, 4, seed=1, epoch=epoch)
        for rows, group in zip(batches.samples, batches.group):
            assert set(GROUP[rows].tolist()) == {int(group)}
        assert sorted([*batches.samples.flatten().tolist(), *batches.left_out.tolist()]) == list(range(len(GROUP)))
        assert torch.bincount(batches.group, minlength=5).tolist() == [4, 1, 0, 0, 7]


def test_clusters_take_turns():
    """In each round every cluster that has a batch left gives one, so no cluster comes late in the epoch because it is small."""
    order = cluster_batches(GROUP, 4, seed=3).group.tolist()
    left = {0: 4, 1: 1, 4: 7}
    while left:
        now, order = order[: len(left)], order[len(left) :]
        assert set(now) == set(left)
        left = {group: count - 1 for group, count in left.items() if count > 1}
    assert order == []


def test_the_account_counts_what_no_batch_takes():
    account = account_of(GROUP, 4)
    assert (account.batches, account.in_batches, account.rest, account.unused) == (12, 48, 3, 3)
    assert account.in_batches + account.rest + account.unused == len(GROUP)
    assert "never used" in str(account)
    assert len(cluster_batches(GROUP, 4, seed=0).left_out) == account.rest + account.unused


def test_the_rest_differs_between_epochs_so_that_others_are_used():
    left = [set(cluster_batches(GROUP, 4, seed=0, epoch=e).left_out.tolist()) for e in range(12)]
    always = set.intersection(*left)
    assert always == set((GROUP == 2).nonzero()[:, 0].tolist())  # only the cluster that is smaller than a batch


def test_the_sampler_resumes_at_any_step():
    """A run of 30 steps, over three epochs, is the same whether it is resumed at step 7, 12 or 29, or not at all."""
    whole = list(ClusterBatchSampler(GROUP, 4, steps=30, seed=5))
    assert len(whole) == 30
    for step in (0, 7, 12, 29, 30):
        resumed = ClusterBatchSampler(GROUP, 4, steps=30, seed=5, first_step=step)
        assert len(resumed) == 30 - step
        assert list(resumed) == whole[step:]
    assert list(ClusterBatchSampler(GROUP, 4, steps=30, seed=6)) != whole
    assert whole[:12] != whole[12:24]  # another epoch, another order


def test_it_serves_a_data_loader_and_random_batches_are_one_cluster():
    data = TensorDataset(torch.arange(len(GROUP)), GROUP)
    for _, groups in DataLoader(data, batch_sampler=ClusterBatchSampler(GROUP, 4, steps=5, seed=0)):
        assert len(groups) == 4
        assert len(groups.unique()) == 1
    plain = ClusterBatchSampler(torch.zeros_like(GROUP), 9, steps=6, seed=0)
    assert sorted(i for batch in plain for i in batch) == list(range(54))


def test_bad_input_is_refused():
    with pytest.raises(InvalidInput, match="largest of 4 has 30"):
        ClusterBatchSampler(GROUP, 31, steps=1, seed=0)
    with pytest.raises(InvalidInput, match="largest of 0 has 0"):
        ClusterBatchSampler(GROUP[:0], 4, steps=1, seed=0)
    assert cluster_batches(GROUP[:0], 4, seed=0).samples.shape == (0, 4)
    with pytest.raises(InvalidInput, match="first_step"):
        ClusterBatchSampler(GROUP, 4, steps=3, seed=0, first_step=4)
    with pytest.raises(InvalidInput, match="0 or more"):
        account_of(GROUP - 1, 4)
    with pytest.raises(InvalidInput, match="number them from 0"):
        account_of(GROUP * 10**9, 4)
    with pytest.raises(InvalidInput, match="batch size of 0"):
        account_of(GROUP, 0)
