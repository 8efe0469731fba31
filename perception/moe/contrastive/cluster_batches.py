"""Batches that each come from one cluster, in turn over the clusters, so that every negative is a hard one.

The batch of every step is a function of the seed and the step. So a run resumes at any step, with no state to store. A cluster
whose size is no multiple of the batch size leaves a rest, another random one in every epoch; what is left out is counted.

Read next: `loss.py`, the loss of such a batch.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Sampler

from ....core.errors import InvalidInput, require
from ....core.tensor_value import shape_of


@dataclass(frozen=True, kw_only=True, eq=False)
class EpochBatches:
    """The batches of one epoch."""

    samples: Tensor
    """(M, B) int64 rows of the data set, one batch per row, in the order of training."""

    group: Tensor
    """(M,) int64 cluster of each batch."""

    left_out: Tensor
    """(R,) int64 rows of the data set that are in no batch of this epoch, in ascending order."""


@dataclass(frozen=True, kw_only=True)
class BatchAccount:
    """Where the samples of one epoch go: `in_batches` + `rest` + `unused` is the number of samples."""

    batches: int
    """Number of batches per epoch."""

    in_batches: int
    """Number of samples per epoch that are in a batch."""

    rest: int
    """Number of samples per epoch that did not fill another batch of their cluster; other epochs use them."""

    unused: int
    """Number of samples in clusters smaller than a batch: no epoch uses them. `merge_small` makes this 0."""

    def __str__(self) -> str:
        samples = self.in_batches + self.rest + self.unused
        return (
            f"{self.batches} batches per epoch use {self.in_batches} of {samples} samples; {self.rest} wait for another epoch, "
            f"{self.unused} lie in clusters smaller than a batch and are never used"
        )


def account_of(group: Tensor, batch_size: int) -> BatchAccount:
    """Count which samples find a batch, before anything is trained.

    Args:
        group: (N,) int64 cluster of each sample, 0 or more.
        batch_size: Samples per batch.

    Returns:
        The account of every epoch.

    Raises:
        InvalidInput: `group` is not (N,) int64 of 0 or more, or `batch_size` is below 1.
    """
    sizes = _sizes(group, batch_size)
    full = sizes // batch_size
    unused = int(sizes[full == 0].sum())
    batches = int(full.sum())
    return BatchAccount(
        batches=batches,
        in_batches=batches * batch_size,
        rest=len(group) - batches * batch_size - unused,
        unused=unused,
    )


def cluster_batches(group: Tensor, batch_size: int, *, seed: int, epoch: int = 0) -> EpochBatches:
    """Draw the batches of one epoch: each from one cluster, in rounds that give every cluster with samples left one batch.

    Args:
        group: (N,) int64 cluster of each sample, 0 or more. Zeros give ordinary random batches.
        batch_size: Samples per batch; with several processes, of all of them together.
        seed: Decides the batches together with `epoch`.
        epoch: Number of the epoch.

    Returns:
        The batches, and the samples that are in none of them.

    Raises:
        InvalidInput: As for `account_of`.
    """
    sizes = _sizes(group, batch_size)
    generator = np.random.default_rng([seed, epoch])
    labels = group.cpu().numpy()
    order = generator.permutation(len(labels))
    order = order[np.argsort(labels[order], kind="stable")]  # the clusters in turn, each one shuffled
    starts = np.cumsum(sizes) - sizes
    full = sizes // batch_size
    cluster = np.repeat(np.arange(len(sizes)), full)
    turn = np.arange(len(cluster)) - np.repeat(np.cumsum(full) - full, full)
    rank = generator.permutation(len(sizes))  # the order of the clusters within each round
    by_round = np.lexsort((rank[cluster], turn))
    first = (starts[cluster] + turn * batch_size)[by_round]
    samples = order[first[:, None] + np.arange(batch_size)]
    unused = np.ones(len(labels), dtype=bool)
    unused[samples.ravel()] = False
    return EpochBatches(
        samples=torch.from_numpy(samples),
        group=torch.from_numpy(cluster[by_round]),
        left_out=torch.from_numpy(np.flatnonzero(unused)),
    )


class ClusterBatchSampler(Sampler[list[int]]):
    """Gives the batches of a range of steps to a `DataLoader`, epoch after epoch.

    Example:
        >>> sampler = ClusterBatchSampler(torch.tensor([0, 1, 0, 1, 0]), 2, steps=4, seed=7)
        >>> [sorted(batch) in ([1, 3], [0, 2], [0, 4], [2, 4]) for batch in sampler]
        [True, True, True, True]
        >>> print(sampler.account)
        2 batches per epoch use 4 of 5 samples; 1 wait for another epoch, 0 lie in clusters smaller than a batch and are never used

    Attributes:
        account: Where the samples of one epoch go.
    """

    def __init__(self, group: Tensor, batch_size: int, *, steps: int, seed: int, first_step: int = 0) -> None:
        """Prepare the batches of the steps `first_step` to `steps` - 1.

        Args:
            group: (N,) int64 cluster of each sample.
            batch_size: Samples per batch.
            steps: Number of steps of the whole training, over all epochs.
            seed: Decides every batch together with its step.
            first_step: Where to begin; a resumed run passes the number of steps that are done.

        Raises:
            InvalidInput: No cluster fills a batch, or `first_step` is not in 0..steps.
        """
        self.account = account_of(group, batch_size)
        if not self.account.batches:
            largest = int(torch.bincount(group).max()) if len(group) else 0
            raise InvalidInput(
                f"no cluster fills a batch of {batch_size}: the largest of {len(group.unique())} has {largest} samples; use smaller "
                "batches, or merge the clusters with merge_small"
            )
        require(0 <= first_step <= steps, f"first_step must be in 0..steps = {steps}, found {first_step}")
        self._group, self._batch_size, self._seed = group, batch_size, seed
        self._steps = range(first_step, steps)

    def __len__(self) -> int:
        return len(self._steps)

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch, epoch = self.account.batches, -1
        batches: EpochBatches | None = None
        for step in self._steps:
            if batches is None or step // per_epoch != epoch:
                epoch = step // per_epoch
                batches = cluster_batches(self._group, self._batch_size, seed=self._seed, epoch=epoch)
            yield batches.samples[step % per_epoch].tolist()


def _sizes(group: Tensor, batch_size: int) -> np.ndarray:
    """Number of samples of each cluster."""
    if group.ndim != 1 or group.dtype != torch.int64 or (len(group) and int(group.min()) < 0):
        raise InvalidInput(f"clusters must be (N,) int64 numbers of 0 or more, found {shape_of(group)}")
    require(batch_size >= 1, f"a batch needs at least 1 sample, found a batch size of {batch_size}")
    if len(group) and int(group.max()) >= 2 * len(group) + 1_000_000:
        raise InvalidInput(
            f"cluster numbers go up to {int(group.max())} for {len(group)} samples; number them from 0 with merge_small first"
        )
    return torch.bincount(group.cpu()).numpy()
