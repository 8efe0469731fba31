"""How a job starts: what is said before its first step, and how it takes its run folder.

Read next: `jobs.py` and `upcycling_job.py`, which start jobs.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.ledger import Ledger
from ...core.ledger_rules import judge, stop_if_absurd
from ...datasets.data_split import DataSplit
from ...datasets.prepared import PreparedDataset
from ..training.checkpoint import latest_checkpoint
from ..training.detector_files import DETECTOR_FILE, TEACHER_FILE
from ..training.distributed import DistributedContext
from ..training.loop import LoopConfig, create_run
from ..training.run_folder import RunFolder
from ..training.starting_weights import StartingWeights
from ..training.trackers import TrackerName
from ..wire.encoder_file import ENCODER_FILE
from .fleet_stores import StoreShare
from .job_records import TrainingRecord, UpcyclingRecord, what_may_differ
from .training_frames import shared_with
from .validation import BEST_FILE, Validator


@dataclass(frozen=True, kw_only=True)
class JobStart:
    """What is known before the first step of a job; nothing is written yet."""

    ledger: Ledger
    """What was read of the data, and how much of it the detector sees."""
    weights: StartingWeights | None = None
    """Which weights the training starts from; None for random ones, and for `upcycle`, which takes all of the source model."""
    notes: tuple[str, ...] = ()
    """Sentences that a reader should see."""
    stores: tuple[StoreShare, ...] = ()
    """What each of several stores brings to the unlabeled scenes of the training; empty for a single store."""


OnStart = Callable[[JobStart], None]
"""Is given what is known before the first step, and may raise to stop the job. It leaves the run folder free then."""


def warn_or_stop(start: JobStart) -> None:
    """Warn about the data, as Python warns, and stop where nothing of it could be learned.

    Args:
        start: What is known before the first step.

    Raises:
        UpcycleError: A rule of `core/ledger_rules.py` stops the job.
    """
    findings = judge(start.ledger)
    stop_if_absurd(findings)
    for text in (*start.notes, *(finding.text for finding in findings)):
        warnings.warn(text, stacklevel=3)


def validation_note(split: DataSplit, frames: PreparedDataset, watch: Validator | None) -> tuple[str, ...]:
    """Tell where validation scores frames that the training learns from.

    Args:
        split: A split that the training learns from.
        frames: Its frames.
        watch: What scores on the way; None where nothing does.

    Returns:
        One sentence, or none.
    """
    shared = 0 if watch is None else shared_with(frames, watch.frames)
    if watch is None or not shared:
        return ()
    return (
        f"{shared} of {len(watch.frames)} frames of {watch.data} (--validate) are also in the training split {split}: scores on them say "
        "nothing about new frames",
    )


def announce(on_start: OnStart, start: JobStart, context: DistributedContext) -> None:
    """Say what is known before the first step, once; every process stops for the same reason.

    Args:
        on_start: Is given what is known, in the first process.
        start: What is known.
        context: This process among the others.

    Raises:
        UpcycleError: The data cannot be learned from, or `on_start` stops the job.
    """
    if context.is_main:
        on_start(start)
    else:
        stop_if_absurd(judge(start.ledger))


def write_ledger(folder: Path, ledger: Ledger) -> None:
    """Write what a job read into its run folder.

    Args:
        folder: The run folder.
        ledger: The counts.
    """
    write_atomically(folder / "ledger.json", (json.dumps(ledger.to_json(), indent=1) + "\n").encode())


@contextmanager
def started_run(
    out: Path,
    record: TrainingRecord | UpcyclingRecord,
    loop: LoopConfig,
    planned: tuple[str, ...],
    ledger: Ledger,
    *,
    context: DistributedContext,
    resume: bool,
    tracker: TrackerName = "tensorboard",
) -> Iterator[RunFolder]:
    """Take the run folder of a job, which then says how the job ended, and write the ledger into it.

    Args:
        out: The run folder.
        record: What decides the result.
        loop: Its number of steps is recorded with a failure.
        planned: Fields that differ from the stored record because the number of steps was changed.
        ledger: What the job read.
        context: This process among the others.
        resume: Whether a run of the same record is continued.
        tracker: Where metrics are also shown.

    Yields:
        The folder, writable in the first process only.

    Raises:
        InvalidInput: The folder holds another run.
    """
    may_differ = (*planned, *what_may_differ(out, record, resume=resume))
    with (
        create_run(out, record, seed=record.seed, context=context, resume=resume, may_differ=may_differ, tracker=tracker) as run,
        run.reporting_failure(loop.total_steps),
    ):
        if context.is_main:
            _set_result_aside(out, planned)
            write_ledger(out, ledger)
        yield run


def _set_result_aside(out: Path, planned: tuple[str, ...]) -> None:
    """Give the files of a result another name when the run goes on for more steps: until then the run has none."""
    if not planned:
        return
    newest = latest_checkpoint(out / "checkpoints")
    for name in (DETECTOR_FILE, TEACHER_FILE, ENCODER_FILE):
        path = out / name
        if newest is not None and path.exists():
            path.rename(out / f"{path.stem}_{newest.name}{path.suffix}")


def best_of(out: Path, watch: Validator | None) -> Path | None:
    """Find the detector that scored best on the way.

    Args:
        out: The run folder.
        watch: What scored on the way; None where nothing did.

    Returns:
        Its file, or None.
    """
    best = out / BEST_FILE
    return best if watch is not None and best.exists() else None


def on_main(action: Callable[[], object], context: DistributedContext) -> None:
    """Let the first process do something while the others wait; an error reaches all of them.

    Args:
        action: What is done once.
        context: This process among the others.

    Raises:
        InvalidInput: The action raised it.
    """
    message = ""
    if context.is_main:
        try:
            action()
        except InvalidInput as error:
            if context.world_size == 1:
                raise
            message = str(error)
    failed = [m for m in context.gather(message) if m]
    if failed:
        raise InvalidInput(failed[0])
