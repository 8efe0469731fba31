"""Runs a foreign exporter on every case, one process per scan, with a time limit; then compares what it wrote.

Read next: `comparison.py`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from ...core.errors import InvalidInput
from ...core.foreign_text import shown
from .comparison import ARITHMETIC, CaseResult, compare_output
from .golden import ConformanceCase, GoldenFolder

PLACEHOLDERS = ("{scan}", "{out}", "{encoder}")
"""Words of the command that stand for the scan file, the folder to write shards into, and the encoder file."""
_KEPT_OUTPUT = 4096


@dataclass(frozen=True, kw_only=True)
class _Ended:
    """How a process ended."""

    code: int | None
    """Its exit code; None where the time was over."""
    tail: str
    """The end of what it printed."""


def run_conformance(
    golden: GoldenFolder, command: Sequence[str], *, timeout: float = 300.0, arithmetic: float = ARITHMETIC
) -> Iterator[CaseResult]:
    """Run a command on every case and compare.

    Args:
        golden: The conformance folder.
        command: Words of the command, without a shell. `{scan}`, `{out}` and `{encoder}` are replaced in every word.
        timeout: Seconds for one case; then the process and all that it started are killed.
        arithmetic: As for `compare_output`.

    Yields:
        How each case went, in their order.

    Raises:
        InvalidInput: The command names no `{scan}` or no `{out}`, or there is no such program.
    """
    for placeholder in PLACEHOLDERS[:2]:
        if not any(placeholder in word for word in command):
            raise InvalidInput(
                f"the command must name {placeholder} in one of its words, found {shown(' '.join(command), most=300)}"
            )
    if not 0 < timeout < 1e6:
        raise InvalidInput(f"the time limit must be a positive number of seconds, found {timeout:g}")
    for case in golden.spec.cases:
        with tempfile.TemporaryDirectory(prefix="upcycle3d_conformance_") as folder:
            output = Path(folder) / "shards"
            values = (str(golden.scan(case).resolve()), str(output), str(golden.encoder.resolve()))
            words = list(command)
            for placeholder, value in zip(PLACEHOLDERS, values, strict=True):
                words = [word.replace(placeholder, value) for word in words]
            ended = _run(words, timeout)
            yield _judge(golden, case, output, ended, timeout, arithmetic)


def _judge(
    golden: GoldenFolder, case: ConformanceCase, output: Path, ended: _Ended, timeout: float, arithmetic: float
) -> CaseResult:
    said = f"; its last words: {ended.tail}" if ended.tail else "; it printed nothing"
    if ended.code is None:
        return CaseResult(case=case, problems=(f"the command did not end within {timeout:g} s and was killed{said}",))
    result = compare_output(golden, case, output, arithmetic=arithmetic)
    # A scan that gives no scene may be an error of the exporter, as it is one of ours.
    refused = (not case.scene or case.may_refuse) and result.passed
    if ended.code < 0:
        return CaseResult(case=case, problems=(f"the command was ended by signal {-ended.code}{said}", *result.problems))
    if ended.code and not refused:
        return CaseResult(case=case, problems=(f"the command ended with exit code {ended.code}{said}", *result.problems))
    return result


def _run(words: Sequence[str], timeout: float) -> _Ended:
    """Run a command in a process group of its own, and keep the end of its output, whatever its length is."""
    try:
        process = subprocess.Popen(
            words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
    except (OSError, ValueError) as error:
        raise InvalidInput(f"the command {shown(words[0], most=200)} cannot be started: {error}") from error
    tail = bytearray()
    assert process.stdout is not None
    reader = threading.Thread(target=_keep_tail, args=(process.stdout, tail), daemon=True)
    reader.start()
    try:
        code: int | None = process.wait(timeout)
    except subprocess.TimeoutExpired:
        code = None
    finally:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # also what a finished command left running
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        reader.join(5)
    lines = bytes(tail).decode("utf-8", "replace").strip().splitlines()
    return _Ended(code=code, tail=shown(" / ".join(lines[-2:]), most=400))


def _keep_tail(stream: IO[bytes], tail: bytearray) -> None:
    with contextlib.suppress(ValueError, OSError):
        while part := stream.read1(_KEPT_OUTPUT):  # type: ignore[attr-defined]
            tail += part
            del tail[:-_KEPT_OUTPUT]
