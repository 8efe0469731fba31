"""Moving experts into memory: what it costs, where they come from, and one channel that moves them while something is computed.

The channel moves one expert at a time. Urgent ones, for which a computation waits, go before those that are fetched ahead; what has
begun is not interrupted. `SimulatedChannel` lets a `ManualClock` tell when a transfer ends, `ThreadedChannel` loads in a thread.
Read next: `expert_memory.py`, which uses cache and channel together.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from threading import Condition, Thread
from typing import Protocol

from ....core.errors import require, require_numbers
from .clock import Clock, ManualClock


@dataclass(frozen=True, kw_only=True)
class TransferCost:
    """Time that one transfer takes: latency + bytes / bandwidth."""

    latency: float = 1e-4
    """Seconds before the first byte."""
    bandwidth: float = 2e9
    """Bytes per second. Measure yours: a disk, a memory-mapped file that is cached, or the bus to a device."""

    def __post_init__(self) -> None:
        require_numbers("TransferCost", least=0, most=1e6, latency=self.latency)
        require_numbers("TransferCost", least=1e-6, most=1e18, bandwidth=self.bandwidth)

    def seconds(self, size: int) -> float:
        """Compute the time of one transfer.

        Args:
            size: Bytes.

        Returns:
            Seconds.
        """
        return self.latency + size / self.bandwidth


class ExpertStore(Protocol):
    """Where experts come from. It owns the memory into which it loads them."""

    def bytes_of(self, expert: int) -> int:
        """Get the size of an expert in memory.

        Args:
            expert: Number of the expert.

        Returns:
            Its bytes.
        """
        ...

    def load(self, expert: int) -> None:
        """Bring an expert into memory, and return when it can be used. A channel calls it from a thread of its own.

        Args:
            expert: Number of an expert that is not in memory.
        """
        ...

    def drop(self, expert: int) -> None:
        """Free the memory of an expert.

        Args:
            expert: Number of an expert in memory.
        """
        ...


class SizedStore:
    """A store of experts that have only a size: for simulations."""

    def __init__(self, sizes: Callable[[int], int]) -> None:
        """Make the store.

        Args:
            sizes: Bytes of an expert.
        """
        self._sizes = sizes

    def bytes_of(self, expert: int) -> int:
        """Get the size of an expert.

        Args:
            expert: Number of the expert.

        Returns:
            Its bytes.
        """
        return self._sizes(expert)

    def load(self, expert: int) -> None:
        """Do nothing: the channel counts the time.

        Args:
            expert: Number of the expert.
        """

    def drop(self, expert: int) -> None:
        """Do nothing.

        Args:
            expert: Number of the expert.
        """


class TransferChannel(Protocol):
    """Moves one expert at a time into memory."""

    def submit(self, expert: int, *, urgent: bool) -> None:
        """Queue a transfer.

        Args:
            expert: Number of an expert that is not in memory and not on its way.
            urgent: Whether it goes before those that are not.
        """
        ...

    def urge(self, expert: int) -> None:
        """Make a queued transfer urgent; nothing happens if it has begun.

        Args:
            expert: Number of an expert on its way.
        """
        ...

    def withdraw(self, expert: int) -> bool:
        """Take a queued transfer back.

        Args:
            expert: Number of an expert on its way.

        Returns:
            Whether it was taken back. False means that it has begun.
        """
        ...

    def wait(self, expert: int) -> None:
        """Wait until a transfer has ended, well or not.

        Args:
            expert: Number of an expert on its way.
        """
        ...

    def take_ended(self) -> Mapping[int, Exception | None]:
        """Hand over the transfers that ended since the last call.

        Returns:
            What went wrong with each expert; None if nothing did.
        """
        ...

    def close(self) -> None:
        """Take all queued transfers back, and end after the one that runs."""
        ...


class _Order:
    """Which transfers are queued, running and ended. Both channels share it; the threaded one locks it."""

    def __init__(self) -> None:
        self.changed = Condition()
        self._urgent: deque[int] = deque()
        self._later: deque[int] = deque()
        self._running: int | None = None
        self._ended: dict[int, Exception | None] = {}
        self._closed = False

    def submit(self, expert: int, *, urgent: bool) -> None:
        """Queue a transfer.

        Args:
            expert: Number of an expert that is not on its way.
            urgent: Whether it goes before those that are not.

        Raises:
            InvalidInput: It is on its way already, or the channel is closed.
        """
        with self.changed:
            require(not self._closed, f"expert {expert} cannot be moved: the channel is closed")
            known = expert in self._urgent or expert in self._later or expert == self._running or expert in self._ended
            require(not known, f"expert {expert} is on its way already")
            (self._urgent if urgent else self._later).append(expert)
            self.changed.notify_all()
        self._begin()

    def urge(self, expert: int) -> None:
        """Make a queued transfer urgent.

        Args:
            expert: Number of the expert.
        """
        with self.changed:
            if expert in self._later:
                self._later.remove(expert)
                self._urgent.append(expert)

    def withdraw(self, expert: int) -> bool:
        """Take a queued transfer back.

        Args:
            expert: Number of the expert.

        Returns:
            Whether it was taken back.
        """
        with self.changed:
            for queue in (self._later, self._urgent):
                if expert in queue:
                    queue.remove(expert)
                    return True
            return False

    def take_ended(self) -> Mapping[int, Exception | None]:
        """Hand over the transfers that ended since the last call.

        Returns:
            What went wrong with each expert; None if nothing did.
        """
        with self.changed:
            ended, self._ended = self._ended, {}
            return ended

    def take_next(self) -> int | None:
        """Begin a transfer if one is queued and none runs.

        Returns:
            Number of the expert.
        """
        with self.changed:
            queue = self._urgent or self._later
            if self._running is not None or not queue:
                return None
            self._running = queue.popleft()
            return self._running

    def end(self, expert: int, error: Exception | None) -> None:
        """Note the end of the transfer that runs.

        Args:
            expert: Number of the expert.
            error: What went wrong.
        """
        with self.changed:
            self._running = None
            self._ended[expert] = error
            self.changed.notify_all()

    def _under_way(self, expert: int) -> bool:
        return expert in self._urgent or expert in self._later or expert == self._running

    def _begin(self) -> None:
        """Begin the next transfer, where no thread does."""

    def _close(self) -> None:
        with self.changed:
            self._closed = True
            self._urgent.clear()
            self._later.clear()
            self.changed.notify_all()


def _load(store: ExpertStore, expert: int) -> Exception | None:
    try:
        store.load(expert)
    except Exception as error:
        return error
    return None


class SimulatedChannel(_Order):
    """A channel without a thread: a timer of the clock ends each transfer, so transfers overlap with simulated computation."""

    def __init__(self, store: ExpertStore, cost: TransferCost, clock: ManualClock) -> None:
        """Make an idle channel.

        Args:
            store: Where experts come from. Its `load` takes no simulated time.
            cost: Time of one transfer.
            clock: The simulation's clock.
        """
        super().__init__()
        self._store, self._cost, self._clock = store, cost, clock

    def wait(self, expert: int) -> None:
        """Move the clock forward to the end of a transfer.

        Args:
            expert: Number of the expert.
        """
        self._clock.wait_for(lambda: not self._under_way(expert), self.changed)

    def close(self) -> None:
        """Take all queued transfers back. The one that runs ends with its timer."""
        self._close()

    def _begin(self) -> None:
        expert = self.take_next()
        if expert is not None:
            seconds = self._cost.seconds(self._store.bytes_of(expert))
            self._clock.at(self._clock.now() + seconds, lambda: self._arrive(expert))

    def _arrive(self, expert: int) -> None:
        self.end(expert, _load(self._store, expert))
        self._begin()


class ThreadedChannel(_Order):
    """A channel with a thread that loads experts while the engine's thread computes.

    Example:
        channel = ThreadedChannel(store, SystemClock())
        channel.submit(3, urgent=False)  # returns at once
        channel.wait(3)
        channel.close()
    """

    def __init__(self, store: ExpertStore, clock: Clock) -> None:
        """Start the thread.

        Args:
            store: Where experts come from.
            clock: Waits for the thread.
        """
        super().__init__()
        self._store, self._clock = store, clock
        self._thread = Thread(target=self._run, name="expert transfers", daemon=True)
        self._thread.start()

    def wait(self, expert: int) -> None:
        """Wait until a transfer has ended.

        Args:
            expert: Number of the expert.
        """
        self._clock.wait_for(lambda: not self._under_way(expert), self.changed)

    def close(self) -> None:
        """Take all queued transfers back, and wait until the one that runs has ended."""
        self._close()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self._closed or bool(self._urgent or self._later))
                if self._closed:
                    return
            expert = self.take_next()
            if expert is not None:
                self.end(expert, _load(self._store, expert))
