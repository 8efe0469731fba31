"""Batches ahead of time: worker processes compute `batch_at(step)` for the coming steps, in order.

A batch is a pure function of its step, so the same batches come out for any number of workers and from any start. The workers
are forked (nothing is pickled except the finished batch) and compute with one thread each.

Read next: `datasets/batches.py`, which makes the batches.
"""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TypeVar

from torch.utils.data import DataLoader, Dataset

from ...core.errors import InvalidInput, UpcycleError

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
        UpcycleError: What a worker raised, with the same class and message; or a worker died.
        OSError: A worker could not read a file.
    """
    if workers < 0:
        raise InvalidInput(f"the number of processes that make batches (--workers) must be 0 or more, found {workers}")
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
    items = iter(loader)
    for _ in range(start, stop):
        try:
            item = next(items)
        except RuntimeError as error:
            if "DataLoader worker" not in str(error):
                raise
            raise UpcycleError(f"a process that makes batches died: {_reason(error)}. {_shared_memory()}") from error
        if isinstance(item, _Failure):
            raise item.error
        yield item


def _reason(error: Exception) -> str:
    """The line of torch's message that says what happened, without the worker's traceback."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if len(lines) > 1 and "Caught" in lines[0] else lines[0].split(". It is possible")[0]


def _shared_memory() -> str:
    """What to do about it: most often the shared memory of a container is too small, or all memory is used."""
    try:
        megabytes = shutil.disk_usage("/dev/shm").total >> 20
    except OSError:
        return "Use fewer workers (--workers 0)"
    return (
        f"Batches travel through the shared memory, /dev/shm, which has {megabytes} MB here; give a container more of it "
        "(docker run --shm-size 2g), or make the batches in this process (--workers 0)"
    )


@dataclass(frozen=True)
class _Failure:
    error: UpcycleError | OSError


class _Steps(Dataset[T]):
    """Step indices as a map-style dataset."""

    def __init__(self, batch_at: Callable[[int], T], stop: int) -> None:
        self._batch_at, self._stop = batch_at, stop

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, step: int) -> T | _Failure:  # type: ignore[override]
        try:
            return self._batch_at(step)
        except (UpcycleError, OSError) as error:
            return _Failure(error)


def _as_it_is(item: T) -> T:
    return item


def _leave_interrupts_to_parent(_worker: int) -> None:
    # Ctrl-C reaches every process of the terminal; the parent finishes its step and then ends the workers.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
