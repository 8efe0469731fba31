"""Kill a job at any moment with SIGKILL, go on with it, and compare with what an undisturbed run gives.

A job runs in a fork of this process, which has loaded everything already, so a kill costs no start of Python. It dies either
after a random time, or just before or after one of its system calls that change files. Forks must not use threads of the parent:
the campaign and the tests run with one thread.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from upcycle3d.core.errors import UpcycleError

_CALLS = ("replace", "rename", "fsync", "write", "unlink", "open", "mkdir", "link", "rmdir", "truncate", "ftruncate")
LONGEST_JOB_SECONDS = 120.0
SENTENCE = 2
"""Exit code of a job that ended with a sentence, as that of a command."""


@dataclass(frozen=True, kw_only=True)
class KillCase:
    """One kind of job that a kill must not hurt."""

    name: str
    """What is killed: "prepare"."""
    begin: Callable[[Path], None]
    """Runs the job in a folder from the start."""
    go_on: Callable[[Path], None]
    """Runs it after a kill, as a user would: it must finish the job."""
    result: Callable[[Path], Any]
    """What the finished job left, to compare: equal after any number of kills."""
    inputs: Callable[[Path], None] | None = None
    """Makes the inputs in the folder before the job begins."""


@dataclass(frozen=True, kw_only=True)
class Undisturbed:
    """What a job does that nobody kills."""

    result: Any
    """Its result."""
    calls: int
    """System calls of `_CALLS` that it makes."""
    seconds: float
    """How long it runs."""


@dataclass(frozen=True, kw_only=True)
class KillOutcome:
    """What became of one killed job."""

    killed: int
    """How many times it died before it could finish."""
    fault: str
    """What is wrong afterwards; empty where all is well."""


def measure(case: KillCase) -> Undisturbed:
    """Run a case once without a kill.

    Args:
        case: The case.

    Returns:
        Its result, calls and time.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if case.inputs:
            case.inputs(root)
        counted = root / "calls"
        start = time.monotonic()
        code = _fork(lambda: case.begin(root), _Counting(counted))
        seconds = time.monotonic() - start
        if code != 0:
            raise AssertionError(f"{case.name} fails without a kill; run it alone to see why")
        return Undisturbed(result=case.result(root), calls=int(counted.read_text()), seconds=seconds)


def kill_once(case: KillCase, undisturbed: Undisturbed, seed: int) -> KillOutcome:
    """Kill a job one to three times, go on, and compare.

    Args:
        case: The case.
        undisturbed: From `measure`.
        seed: Decides the moments.

    Returns:
        How often the job died, and what is wrong afterwards.
    """
    rng, killed = random.Random(seed), 0
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        if case.inputs:
            case.inputs(root)
        job = case.begin
        for _ in range(rng.choice((1, 1, 2, 3))):
            if rng.random() < 0.6 and undisturbed.calls:
                code = _fork(lambda job=job: job(root), _Dying(rng.randrange(undisturbed.calls), rng.random() < 0.5))
            else:
                code = _fork(lambda job=job: job(root), None, kill_after=rng.uniform(0, undisturbed.seconds))
            if code == -signal.SIGKILL or code == SENTENCE:
                killed += 1
            elif code != 0:
                return KillOutcome(killed=killed, fault=f"start {killed + 1} ended with code {code}: {_last_error(root)}")
            job = case.go_on
        code = _fork(lambda: case.go_on(root), None)
        if code != 0:
            return KillOutcome(killed=killed, fault=f"it cannot go on: code {code}: {_last_error(root)}")
        found = case.result(root)
        fault = (
            "" if found == undisturbed.result else f"another result than without a kill: {_difference(undisturbed.result, found)}"
        )
        return KillOutcome(killed=killed, fault=fault)


def _difference(expected: Any, found: Any) -> str:
    if isinstance(expected, dict) and isinstance(found, dict):
        keys = [k for k in [*expected, *(k for k in found if k not in expected)] if expected.get(k) != found.get(k)]
        return ", ".join(f"{k}: {str(expected.get(k))[:80]} -> {str(found.get(k))[:80]}" for k in keys[:3])
    return f"{str(expected)[:150]} -> {str(found)[:150]}"


def _last_error(root: Path) -> str:
    path = root / ".error"
    return path.read_text()[-1500:] if path.exists() else "no error was written"


def _fork(job: Callable[[], None], watch: _Counting | _Dying | None, *, kill_after: float = LONGEST_JOB_SECONDS) -> int:
    """Run a job in a fork; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        os.setsid()  # a kill takes its workers along, as a killed container does
        code = 1
        try:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, 1)
            os.dup2(null, 2)
            if watch is not None:
                watch.install()
            job()
            if watch is not None:
                watch.finish()
            code = 0
        except BaseException as error:
            code = SENTENCE if isinstance(error, UpcycleError) else 1
            Path(_error_file(job)).write_text(traceback.format_exc())
        finally:
            os._exit(code)
    end = time.monotonic() + kill_after
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if time.monotonic() > end:
            with contextlib.suppress(ProcessLookupError):  # it has not called setsid yet, and has no workers then
                os.killpg(pid, signal.SIGKILL)
            os.kill(pid, signal.SIGKILL)
            _, status = os.waitpid(pid, 0)
            break
        time.sleep(0.0005)
    with contextlib.suppress(ProcessLookupError):  # workers of a killed job
        os.killpg(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(status)


def _error_file(job: Callable[[], None]) -> str:
    """The file for a traceback: in the folder that the job's closure holds."""
    for cell in job.__closure__ or ():
        if isinstance(cell.cell_contents, Path):
            return str(cell.cell_contents / ".error")
    return os.devnull


class _Counting:
    """Counts the system calls that change files."""

    def __init__(self, path: Path) -> None:
        self.path, self.count = path, 0

    def install(self) -> None:
        for name in _CALLS:
            setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.count += 1
            return function(*args, **kwargs)

        return call

    def finish(self) -> None:
        self.path.write_text(str(self.count))


class _Dying:
    """Kills the process at one of the calls that `_Counting` counts."""

    def __init__(self, at: int, before: bool) -> None:
        self.left, self.before = at, before

    def install(self) -> None:
        for name in _CALLS:
            setattr(os, name, self._wrapped(getattr(os, name)))

    def _wrapped(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == -1 and self.before:
                os.kill(os.getpid(), signal.SIGKILL)
            result = function(*args, **kwargs)
            if self.left == -1:
                os.kill(os.getpid(), signal.SIGKILL)
            return result

        return call

    def finish(self) -> None:
        return None


def copied(source: Path, target: Path) -> Path:
    """Copy a folder of inputs; what a case's `inputs` usually does."""
    return Path(shutil.copytree(source, target, dirs_exist_ok=True))
