"""One damaged input at a time, under limits of time and memory, judged by what a reader promises.

A reader may refuse a damaged file with a sentence (an error of this project). It may read it where nothing protects the content,
as in a text file of labels. Where a checksum protects it, it must refuse the file or give the same value as before. Everything
else is a fault: another exception, another value in silence, more than `MEMORY_MB` for a refused file, more than `SECONDS`.
"""

from __future__ import annotations

import contextlib
import random
import resource
import signal
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from faults.mutations import mutate
from upcycle3d.core.errors import UpcycleError

MEMORY_MB = 500
"""What a refused file may take above what the process had before."""
SECONDS = 10.0
"""What one damaged file may take."""


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One kind of file, and what reads it."""

    name: str
    """What is read: "detector file"."""
    make: Callable[[Path], None]
    """Writes a valid input into a folder."""
    read: Callable[[Path], Any]
    """Reads it from that folder; gives a value that can be compared with `==`."""
    files: tuple[str, ...]
    """Patterns of the files to damage, relative to the folder."""
    protected: bool
    """Whether a checksum protects the content: a damaged file is refused or gives the same value."""
    writes: bool = False
    """Whether reading changes the folder; it is then made anew for each input."""


@dataclass(kw_only=True)
class Tally:
    """What became of the inputs of one reader."""

    inputs: int = 0
    """Damaged inputs that were read."""
    refused: int = 0
    """Refused with a sentence."""
    same: int = 0
    """Read, with the same value as the undamaged input."""
    other: int = 0
    """Read with another value, which only an unprotected file may give."""
    faults: list[str] = field(default_factory=list)
    """Descriptions of faults: kind, reader, seed, message."""
    peak_mb: float = 0.0
    """Largest memory above idle of a refused input."""
    slowest: float = 0.0
    """Seconds of the slowest input."""

    def merge(self, other: Tally) -> None:
        """Add the counts of another tally."""
        for name in ("inputs", "refused", "same", "other"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.faults += other.faults
        self.peak_mb, self.slowest = max(self.peak_mb, other.peak_mb), max(self.slowest, other.slowest)


class _TooSlow(BaseException):
    """Raised by the alarm; no `except Exception` of a reader may catch it."""


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    def stop(_signal: int, _frame: Any) -> None:
        raise _TooSlow

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def limit_memory(megabytes: int = 3000) -> None:
    """Make allocations of this process fail once it has taken this many megabytes more, so that the machine keeps its memory."""
    have = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (have + megabytes * 2**20,) * 2)


def _memory_mb(key: str) -> float:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(key):
            return int(line.split()[1]) / 1024
    return 0.0


def _reset_peak() -> float:
    """Start a new high-water mark; memory now, in MB."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return _memory_mb("VmRSS")


def fuzz(reader: Reader, folder: Path, seeds: Iterator[int], *, until: float, most: int) -> Tally:
    """Damage and read inputs of one reader.

    Args:
        reader: The reader.
        folder: An empty folder to work in.
        seeds: One seed per input.
        until: Moment of `time.monotonic` at which to stop.
        most: Largest number of inputs.

    Returns:
        The tally.
    """
    tally = Tally()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reader.make(folder)
        expected = reader.read(folder)
        if reader.writes:
            _empty(folder)
            reader.make(folder)
        files = sorted({p for pattern in reader.files for p in folder.glob(pattern) if p.is_file()})
        if not files:
            raise AssertionError(f"{reader.name}: no file matches {reader.files}")
        originals = {path: path.read_bytes() for path in files}
        while tally.inputs < most and time.monotonic() < until:
            seed = next(seeds)
            rng = random.Random(f"{reader.name} {seed}")
            path = rng.choice(files)
            damaged = mutate(originals[path], path.suffix, rng)
            if damaged == originals[path]:
                continue
            path.write_bytes(damaged)
            _one(reader, folder, expected, f"{reader.name}, {path.name}, seed {seed}", tally)
            if reader.writes:
                _empty(folder)
                reader.make(folder)
                files = sorted({p for pattern in reader.files for p in folder.glob(pattern) if p.is_file()})
                originals = {path: path.read_bytes() for path in files}
            else:
                path.write_bytes(originals[path])
    return tally


def _one(reader: Reader, folder: Path, expected: Any, what: str, tally: Tally) -> None:
    before, start = _reset_peak(), time.monotonic()
    tally.inputs += 1
    try:
        with _limited():
            value = reader.read(folder)
        if value == expected:
            tally.same += 1
        else:
            tally.other += 1
            if reader.protected:
                tally.faults.append(f"OTHER VALUE in silence: {what}")
    except UpcycleError as error:
        tally.refused += 1
        peak = _memory_mb("VmHWM") - before
        tally.peak_mb = max(tally.peak_mb, peak)
        if peak > MEMORY_MB:
            tally.faults.append(f"MEMORY {peak:.0f} MB: {what}: {str(error)[:100]}")
        if "\x1b" in str(error):
            tally.faults.append(f"ESCAPE SEQUENCE in the message: {what}: {str(error)[:100]!r}")
        if len(str(error)) > 4000:
            tally.faults.append(f"LONG MESSAGE of {len(str(error))} letters: {what}")
    except _TooSlow:
        tally.faults.append(f"SLOW, more than {SECONDS:g} s: {what}")
    except BaseException as error:  # every other exception is what the campaign looks for
        place = traceback.extract_tb(error.__traceback__)[-1]
        own = [f for f in traceback.extract_tb(error.__traceback__) if "upcycle3d" in f.filename and "tests" not in f.filename]
        where = own[-1] if own else place
        tally.faults.append(
            f"TRACEBACK {type(error).__name__} at {Path(where.filename).name}:{where.lineno} ({where.name}): {what}: {str(error)[:100]}"
        )
    tally.slowest = max(tally.slowest, time.monotonic() - start)


def _empty(folder: Path) -> None:
    import shutil

    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
