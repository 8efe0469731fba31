"""What a person at the terminal sees and does during training: a progress bar or plain lines, and Ctrl-C.

On a terminal, rich draws a bar on stderr; elsewhere (a log file, a cluster) one plain line is printed for every report.

Read next: `loop.py`, which uses both classes.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any, Self

from ...core.short_numbers import duration_text


class TrainingProgress:
    """Shows the progress of a training; a context manager.

    Args:
        start: Steps done before.
        total: Steps of the whole run.
        enabled: False shows nothing.
    """

    def __init__(self, start: int, total: int, *, enabled: bool) -> None:
        self._start, self._total, self._enabled = start, total, enabled
        self._began = time.perf_counter()
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> Self:
        if self._enabled and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
            from rich.progress import Progress as RichProgress

            columns = (
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
            )
            self._bar = RichProgress(*columns, console=Console(stderr=True))
            self._task = self._bar.add_task("", total=self._total, completed=self._start)
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()

    def advance(self) -> None:
        """Count one more step."""
        if self._bar is not None:
            self._bar.advance(self._task)

    def report(self, done: int, values: Mapping[str, float]) -> None:
        """Show metrics.

        Args:
            done: Steps done.
            values: Metrics by name; a bar shows only total_loss, grad_norm and lr.
        """
        brief = ("total_loss", "grad_norm", "lr")
        if self._bar is not None:
            self._bar.update(self._task, description="  ".join(f"{name} {values[name]:.4g}" for name in brief if name in values))
        elif self._enabled:
            rate = (done - self._start) / max(time.perf_counter() - self._began, 1e-9)
            left = (self._total - done) / rate
            text = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
            print(
                f"step {done}/{self._total}  {text}  {rate:.3g} steps/s  {duration_text(left)} left", file=sys.stderr, flush=True
            )

    def note(self, text: str) -> None:
        """Show a remark between the reports.

        Args:
            text: One line.
        """
        if self._bar is not None:
            self._bar.console.print(text, markup=False)
        elif self._enabled:
            print(text, file=sys.stderr, flush=True)


@contextmanager
def without_ctrl_c() -> Iterator[None]:
    """Ignore Ctrl-C in a block that must come to its end, such as the report about an earlier one. Only the main thread can.

    Yields:
        Nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.SIG_DFL if before is None else before)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM only sets `requested`; the second acts as usual (it aborts).

    An abort in the middle of an import can come out as any error, or as none until much later. So every error that leaves the block after a
    second Ctrl-C is a `KeyboardInterrupt`. Outside the main thread, signals cannot be caught, and Ctrl-C acts as usual.

    Attributes:
        requested: Whether a signal has come.
        signal: The first signal; 0 for none.
    """

    def __init__(self) -> None:
        self.requested = False
        self.signal = 0
        self._aborted = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            self._previous = {number: signal.signal(number, self._handle) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._restore()
        if self._aborted and isinstance(error, Exception):
            raise KeyboardInterrupt from error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.requested:
            previous = self._previous.get(number)
            self._restore()
            self._aborted = number == signal.SIGINT
            if callable(previous):
                previous(number, frame)
            elif previous != signal.SIG_IGN:
                signal.raise_signal(number)
            return
        self.requested, self.signal = True, number
        print("stopping after this step; once more to abort at once", file=sys.stderr, flush=True)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous = {}
