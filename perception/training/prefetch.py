"""Batches ahead of time: worker processes compute `batch_at(step)` for the coming steps, in order.

A batch is a pure function of its step, so the same batches come out for any number of workers and from any start. The workers
are forked (nothing is pickled except the finished batch) and compute with one thread each.

Read next: `datasets/batches.py`, which makes the batches.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from ...core.errors import UpcycleError

T = TypeVar("T")


def prefetch(batch_at: Callable[[int], T], start: int, stop: int, workers: int) -> Generator[T, None, None]:
    """Compute batches ahead of time.

    Args:
        batch_at: `batch_at(step)` gives the batch of a 0-based step. It must draw from generators of its own, seeded from the
            step, never from a global one.
        start: First step.
        stop: The step after the last one.
        workers: Processes. 0 computes each batch here, when it is asked for.

    Yields:
        The batches of the steps in order, as they are: tensors, arrays, dataclasses.

    Raises:
        UpcycleError: What a worker raised, with the same class and message.
    """
    if workers == 0 or start >= stop:
        yield from map(batch_at, range(start, stop))
        return
    loader = DataLoader(
        _Steps(batch_at, stop),
        batch_size=None,
        sampler=range(start, stop),
        num_workers=min(workers, stop - start),
        collate_fn=_as_it_is,
        worker_init_fn=_leave_interrupts_to_parent,
        multiprocessing_context="fork",
    )
    for item in loader:
        if isinstance(item, _Failure):
            raise item.error
        yield item


@dataclass(frozen=True)
class _Failure:
    error: UpcycleError


class _Steps(Dataset[T]):
    """Step indices as a map-style dataset."""

    def __init__(self, batch_at: Callable[[int], T], stop: int) -> None:
        self._batch_at, self._stop = batch_at, stop

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, step: int) -> T | _Failure:  # type: ignore[override]
        try:
            return self._batch_at(step)
        except UpcycleError as error:
            return _Failure(error)


def _as_it_is(item: T) -> T:
    return item


def _leave_interrupts_to_parent(_worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent finishes its step and then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
