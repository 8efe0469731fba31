"""Time as a value that is handed over: the same runtime waits for real, or runs through a simulation in which nobody waits.

`SystemClock` is the clock of the machine. `ManualClock` stands still until somebody waits, and then fires its timers in order: arrivals,
cancellations and ends of transfers are timers, so they happen during a simulated computation as threads do during a real one.
Read next: `requests.py`.
"""

from __future__ import annotations

import heapq
import math
import time
from collections.abc import Callable
from threading import Condition
from typing import Protocol

from ....core.errors import require


class Clock(Protocol):
    """What the runtime knows of time."""

    def now(self) -> float:
        """Read the clock.

        Returns:
            Seconds since a fixed moment.
        """
        ...

    def wait(self, seconds: float) -> None:
        """Let time pass.

        Args:
            seconds: 0 or more.
        """
        ...

    def wait_for(self, ready: Callable[[], bool], changed: Condition, seconds: float | None = None) -> bool:
        """Let time pass until something is true.

        Args:
            ready: What must become true.
            changed: Is notified by whoever may have made it true.
            seconds: Longest wait; None waits without a limit.

        Returns:
            Whether it is true.
        """
        ...


class SystemClock:
    """The clock of the machine, which never goes backwards."""

    def now(self) -> float:
        """Read the clock.

        Returns:
            Seconds since a fixed moment.
        """
        return time.monotonic()

    def wait(self, seconds: float) -> None:
        """Sleep.

        Args:
            seconds: 0 or more.
        """
        time.sleep(seconds)

    def wait_for(self, ready: Callable[[], bool], changed: Condition, seconds: float | None = None) -> bool:
        """Sleep until something is true.

        Args:
            ready: What must become true. It is asked with `changed` locked.
            changed: Is notified by whoever may have made it true.
            seconds: Longest sleep; None sleeps without a limit.

        Returns:
            Whether it is true.
        """
        with changed:
            return changed.wait_for(ready, seconds)


class ManualClock:
    """A clock that moves only when somebody waits. One thread may use it.

    Example:
        clock = ManualClock()
        clock.at(2.0, lambda: print("two seconds"))
        clock.wait(3.0)  # prints, and `clock.now()` is 3.0
    """

    def __init__(self) -> None:
        self._now = 0.0
        self._timers: list[tuple[float, int, Callable[[], None]]] = []
        self._made = 0
        self._firing = False

    def now(self) -> float:
        """Read the clock.

        Returns:
            Seconds since the simulation began.
        """
        return self._now

    def at(self, moment: float, action: Callable[[], None]) -> None:
        """Set a timer.

        Args:
            moment: When it fires. A moment in the past fires at the next wait.
            action: What it does. It may set timers, but must not wait. Timers of one moment fire in the order in which they were set.

        Raises:
            InvalidInput: The moment is not a finite number.
        """
        require(math.isfinite(moment), f"a timer needs a finite moment, found {moment}")
        heapq.heappush(self._timers, (moment, self._made, action))
        self._made += 1

    def wait(self, seconds: float) -> None:
        """Move forward and fire all timers on the way.

        Args:
            seconds: 0 or more.

        Raises:
            InvalidInput: The time is negative or infinite, or a timer's action waits.
        """
        self._check_free()
        require(0 <= seconds < math.inf, f"a wait must take 0 seconds or more, found {seconds}")
        until = self._now + seconds
        while self._timers and self._timers[0][0] <= until:
            self._fire()
        self._now = max(self._now, until)

    def wait_for(self, ready: Callable[[], bool], changed: Condition, seconds: float | None = None) -> bool:
        """Move forward from timer to timer until something is true.

        Args:
            ready: What must become true.
            changed: Not needed here: nothing changes but by timers.
            seconds: Longest wait; None waits without a limit.

        Returns:
            Whether it is true.

        Raises:
            InvalidInput: It would wait forever, because no timer is left, or a timer's action waits.
        """
        self._check_free()
        until = math.inf if seconds is None else self._now + seconds
        while not ready():
            if not self._timers or self._timers[0][0] > until:
                require(
                    until < math.inf, "the simulation waits for something that no timer brings; set its timer or a longest wait"
                )
                self._now = max(self._now, until)
                return ready()
            self._fire()
        return True

    def _check_free(self) -> None:
        require(not self._firing, "the action of a timer must not wait: set another timer instead")

    def _fire(self) -> None:
        moment, _, action = heapq.heappop(self._timers)
        self._now = max(self._now, moment)
        self._firing = True
        try:
            action()
        finally:
            self._firing = False
