"""A run folder: everything needed to say what a training run was, to watch it, and to resume it.

    config.json        the resolved configuration          status.json     running, finished, interrupted or failed, and where
    environment.json   versions, machine, git state, seed, command; one entry for the start and each resume
    metrics.jsonl      one JSON object per line: step (steps done), kind, values
    checkpoints/       see checkpoint.py                   tensorboard/    the same metrics as TensorBoard events (`trackers.py`)

A folder has one configuration (a frozen dataclass, see `core/config_json.py`) and one writer at a time, also after a `kill -9`.

Read next: `checkpoint.py` and `environment.py`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import math
import multiprocessing
import os
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any, Literal, Self

from ...core.config_json import Json, config_to_json, fill_defaults, first_difference
from ...core.errors import Interrupted, InvalidInput, UpcycleError
from ...core.files import write_atomically
from ...core.strict_json import strict_json
from .checkpoint import latest_checkpoint, remove_unfinished
from .environment import describe_environment
from .progress import without_ctrl_c
from .trackers import TrackerName, Tracking, require_tracker

State = Literal["running", "finished", "interrupted", "failed"]


class RunFolder:
    """A folder on disk with one writer. Made by `create` (to write; it locks the folder) or by `open` (to read).

    Use it as a context manager, or call `close`, to release the lock.

    Attributes:
        path: The folder.

    Example:
        ```python
        run = RunFolder.open("runs/source")
        print(run.status()["state"], run.metrics("train")[-1]["total_loss"])
        ```
    """

    def __init__(self, path: Path, *, lock: IO[bytes] | None, tracking: Tracking | None) -> None:
        self.path = path
        self._lock = lock
        self._tracking = tracking
        self._metrics: IO[str] | None = None

    @classmethod
    def create(
        cls,
        path: str | Path,
        config: Any,
        *,
        seed: int,
        resume: bool = False,
        may_differ: Sequence[str] = (),
        tracker: TrackerName = "tensorboard",
    ) -> Self:
        """Start a run, or continue one with the same configuration. The command line of this process is recorded.

        Args:
            path: The folder; it is made where needed.
            config: The resolved configuration, a frozen dataclass.
            seed: Seed of the run, for the record.
            resume: Whether a run that the folder holds is continued.
            may_differ: Fields, by their dotted names, that a resumed run may change; the stored configuration then takes them over.
            tracker: Where metrics are also shown.

        Returns:
            The folder, locked for this process.

        Raises:
            InvalidInput: The folder holds a run and `resume` is False, the stored configuration differs (the message names the
                first field), the folder holds other files, another process is writing to it, or the tracker's package is missing.
        """
        require_tracker(tracker)
        path = Path(path).resolve()
        resolved = config_to_json(config)
        stored = _read_json(path / "config.json") if (path / "config.json").exists() else None
        if stored is None and path.exists() and any(path.iterdir()) and not (path / ".lock").exists():
            raise InvalidInput(f"{path} is not empty and holds no run; choose a new folder")
        known = None if stored is None else fill_defaults(stored, config)
        difference = None if known is None else first_difference(_without(known, may_differ), _without(resolved, may_differ))
        if difference:
            raise InvalidInput(
                f"{path} holds a run with another configuration ({difference}); choose a new folder for the new one, "
                "or resume it with the options and the version of this program in its environment.json"
            )
        if stored is not None and not resume:
            raise InvalidInput(f"{path} already holds a run with this configuration; resume it, or choose a new folder")
        path.mkdir(parents=True, exist_ok=True)
        run = cls(path, lock=_lock(path), tracking=Tracking(tracker, path, resolved))
        run._remove_litter()
        environment = run.environment() if stored is not None else []
        # A spawned process was not called by what its own command line says, but by its parent's program and arguments.
        command = sys.orig_argv if multiprocessing.parent_process() is None else sys.argv
        environment.append({**describe_environment(command=command, seed=seed), "resume": resume})
        _write_json(path / "environment.json", environment)
        if stored != resolved:  # last: a folder with a configuration is a complete run folder
            _write_json(path / "config.json", resolved)
        return run

    @classmethod
    def open(cls, path: str | Path) -> Self:
        """Open an existing run folder for reading.

        Args:
            path: The folder.

        Returns:
            The folder; it writes nothing.

        Raises:
            InvalidInput: The path is not a run folder.
        """
        path = Path(path)
        if not (path / "config.json").is_file():
            raise InvalidInput(f"{path} is not a run folder: it has no config.json; is the path right?")
        return cls(path.resolve(), lock=None, tracking=None)

    def abandon(self) -> None:
        """Free the folder for another configuration: nothing was trained yet, and what was asked for cannot be done."""
        self._require_writable()
        if latest_checkpoint(self.checkpoints) is None:
            for name in ("config.json", "environment.json", "status.json"):
                (self.path / name).unlink(missing_ok=True)

    @property
    def writable(self) -> bool:
        """Whether this object holds the lock of the folder."""
        return self._lock is not None

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints; it may not exist yet."""
        return self.path / "checkpoints"

    @property
    def resume_command(self) -> str:
        """The last command again, with `--resume` unless it resumes without (`upcycle3d demo` always does).

        Paths in it are relative to the directory where the command was given.
        """
        last = (self.environment() or [{}])[-1]
        try:
            return shlex.join([*last["command"], *([] if last["resume"] else ["--resume"])])
        except (KeyError, TypeError) as error:
            raise InvalidInput(f"{self.path / 'environment.json'} has no command in its last entry; it was edited") from error

    def config_json(self) -> dict[str, Json]:
        """Read the configuration, as `core/config_json.py` wrote it."""
        return _read_dict(self.path / "config.json")

    def environment(self) -> list[dict[str, Json]]:
        """Read what the run was made with: one entry for the start and one for every resume."""
        path = self.path / "environment.json"
        entries = _read_json(path)
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise InvalidInput(f"{path} is not a list of starts; it was edited")
        return entries

    def status(self) -> dict[str, Json]:
        """Read state, step, total_steps, message, time and pid, and how often a tracker failed, if it did; empty before the first step."""
        path = self.path / "status.json"
        return _read_dict(path) if path.exists() else {}

    def set_status(self, state: State, *, step: int, total_steps: int, message: str = "") -> None:
        """Replace the status.

        Args:
            state: "running", "finished", "interrupted" or "failed".
            step: Steps done.
            total_steps: Steps of the whole run.
            message: Why the run failed.

        Raises:
            InvalidInput: The folder is open for reading only.
        """
        self._require_writable()
        now = time.strftime("%Y-%m-%dT%H:%M:%S%z")
        body = {"state": state, "step": step, "total_steps": total_steps, "message": message, "time": now, "pid": os.getpid()}
        if self._tracking is not None and self._tracking.failures:
            body["tracker_failures"] = self._tracking.failures
        path = self.path / "status.json"
        try:
            _write_json(path, body)
        except OSError:
            if state == "running":
                raise
            path.write_text(json.dumps(body) + "\n")  # a full disk: the old file's own place is enough for one line

    @contextmanager
    def reporting_failure(self, total_steps: int) -> Iterator[None]:
        """Write "failed" and the reason, or "interrupted" after Ctrl-C, into the status when the block raises, unless it says already why.

        Args:
            total_steps: Steps of the whole run.

        Yields:
            Nothing.

        Raises:
            UpcycleError: The disk is full; the message holds the command that resumes the run.
            Interrupted: Ctrl-C ended the block (`KeyboardInterrupt`); the message holds the command as well.
        """
        before = self.status()
        try:
            yield
        except BaseException as error:
            with without_ctrl_c():
                now = self.status()
                unsaid = now.get("state") in (None, "running", "finished") or now.get("pid") != os.getpid()
                given_up = not (self.path / "config.json").exists()  # `abandon`
                unfinished = unsaid and not given_up and not (now == before and now.get("state") == "finished")
                aborted = unfinished and _was_aborted(error)
                if self.writable and unfinished:
                    with suppress(OSError):
                        step = now.get("step", 0) if now.get("state") != "finished" else total_steps
                        state: State = "interrupted" if aborted else "failed"
                        why = "" if aborted else f"{type(error).__name__}: {error}"
                        self.set_status(state, step=step, total_steps=total_steps, message=why)
                if aborted:
                    newest = latest_checkpoint(self.checkpoints)
                    kept = (
                        "before its first checkpoint"
                        if newest is None
                        else f"and goes on from its newest checkpoint, {newest.name}"
                    )
                    raise Interrupted(f"the run was stopped at once, {kept}; resume with: {self.resume_command}") from error
                if isinstance(error, OSError) and error.errno == errno.ENOSPC:
                    raise UpcycleError(
                        f"the disk is full ({error.filename or self.path}); the checkpoints that were finished are kept. "
                        f"Make room, then resume with: {self.resume_command}"
                    ) from error
            raise

    def log(self, step: int, values: Mapping[str, float], kind: str = "train") -> None:
        """Append one line to metrics.jsonl, and show it in the tracker of the run.

        Args:
            step: Optimizer steps done for the kind "train", which `run_steps` writes; for every other kind ("pseudo_labels") the
                0-based step that wrote the line.
            values: Metrics by name. A value that is not finite is written as null.
            kind: What the line is about.

        Raises:
            InvalidInput: The folder is open for reading only, or a metric is called "step" or "kind".
        """
        self._require_writable()
        clash = values.keys() & {"step", "kind"}
        if clash:
            raise InvalidInput(f"a metric cannot be called {sorted(clash)}: the line has these names already")
        plain = {name: float(value) for name, value in values.items()}
        line = {"step": step, "kind": kind, **{name: v if math.isfinite(v) else None for name, v in plain.items()}}
        if self._metrics is None:
            self._metrics = (self.path / "metrics.jsonl").open("a", encoding="utf-8")
        self._metrics.write(json.dumps(line) + "\n")
        self._metrics.flush()
        if self._tracking is not None:
            self._tracking.log(step, {f"{kind}/{name}": value for name, value in plain.items()})

    def metrics(self, kind: str | None = None) -> list[dict[str, Json]]:
        """Read the lines of metrics.jsonl. A half-written last line, left by a killed process, is left out.

        Args:
            kind: Only lines of this kind; None reads all.

        Returns:
            The lines in the order of writing: step, kind and values.

        Raises:
            InvalidInput: A line in the middle is not JSON; the message names it.
        """
        return [line for line in self._metric_lines() if kind is None or line["kind"] == kind]

    def rewind(self, step: int) -> None:
        """Forget the metrics that a resumed run will write again.

        Args:
            step: Steps done at the checkpoint that the run resumes from. See `log` for what the step of a line means.

        Raises:
            InvalidInput: The folder is open for reading only.
        """
        self._require_writable()
        self._close_metrics()
        kept = [
            line for line in self._metric_lines() if line["step"] < step or (line["step"] == step and line["kind"] == "train")
        ]
        if (self.path / "metrics.jsonl").exists():
            write_atomically(self.path / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in kept).encode())

    def sync(self) -> None:
        """Flush the metrics to the disk; called before a checkpoint is written, so that no checkpoint is ahead of them."""
        if self._metrics is not None:
            os.fsync(self._metrics.fileno())
        if self._tracking is not None:
            self._tracking.flush()

    def close(self) -> None:
        """Close the files and release the lock; reading stays possible."""
        self._close_metrics()
        if self._lock is not None:
            self._lock.close()
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _metric_lines(self) -> list[dict[str, Json]]:
        path = self.path / "metrics.jsonl"
        if not path.exists():
            return []
        *complete, _half = path.read_text(encoding="utf-8", errors="replace").split("\n")
        lines = []
        for number, text in enumerate(complete, start=1):
            try:
                line = json.loads(text)
                good = isinstance(line, dict) and isinstance(line.get("step"), int) and isinstance(line.get("kind"), str)
            except (ValueError, RecursionError) as error:
                raise InvalidInput(f"{path}, line {number} is not JSON ({error}); repair or delete this line") from error
            if not good:
                raise InvalidInput(f"{path}, line {number} has no step and kind; repair or delete this line")
            lines.append(line)
        return lines

    def _close_metrics(self) -> None:
        if self._metrics is not None:
            self._metrics.close()
            self._metrics = None
        if self._tracking is not None:
            self._tracking.close()

    def _remove_litter(self) -> None:
        """Remove what a killed process left half written, here and among the checkpoints. This process holds the lock."""
        remove_unfinished(self.checkpoints)
        for folder in (self.path, self.path / "pseudo_labels"):
            for stale in folder.glob(".*.tmp"):
                if stale.is_dir():  # of F-GT's object database
                    shutil.rmtree(stale)
                else:
                    stale.unlink(missing_ok=True)

    def _require_writable(self) -> None:
        if not self.writable:
            raise InvalidInput(f"{self.path} is open for reading only; RunFolder.create(..., resume=True) continues it")


def _was_aborted(error: BaseException) -> bool:
    """Whether Ctrl-C ended a block: an abort in the middle of an import or of a cleanup may come out as another error."""
    seen: set[int] = set()
    link: BaseException | None = error
    while link is not None and id(link) not in seen:
        if isinstance(link, KeyboardInterrupt):
            return True
        seen.add(id(link))
        link = link.__cause__ or link.__context__
    return False


def _lock(path: Path) -> IO[bytes]:
    """The folder's lock file, locked for this process until it is closed or the process dies (also by `kill -9`)."""
    file = (path / ".lock").open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        file.close()
        raise InvalidInput(f"another process is writing to {path}; wait for it, or choose a new folder") from error
    return file


def _without(config: Json, names: Sequence[str]) -> Json:
    """A configuration without some fields, given by dotted names."""
    if not isinstance(config, dict):
        return config
    here = {name for name in names if "." not in name}
    inner = {key: [name.partition(".")[2] for name in names if name.startswith(f"{key}.")] for key in config}
    return {key: _without(value, inner[key]) for key, value in config.items() if key not in here}


def check_unused(path: Path, tracker: TrackerName = "tensorboard") -> None:
    """Refuse a folder that `RunFolder.create` would refuse for a new run, before any work is done for the run.

    Args:
        path: The folder; it may not exist.
        tracker: Where metrics will also be shown.

    Raises:
        InvalidInput: The folder holds a run, or other files; or the tracker's package is missing.
    """
    require_tracker(tracker)
    if (path / "config.json").exists():
        raise InvalidInput(
            f"{path} already holds a run; resume it with the options that it was begun with (--resume), or choose a new folder"
        )
    if path.exists() and not (path.is_dir() and ((path / ".lock").exists() or not any(path.iterdir()))):
        raise InvalidInput(f"{path} is not empty and holds no run; choose a new folder")


def why_unfinished(path: str | Path) -> str:
    """Say why a run folder holds no detector yet, and what to do.

    Args:
        path: A folder.

    Returns:
        A sentence such as "this run stopped at step 200 of 400: ..."; empty where the folder is not a run.
    """
    path = Path(path)
    if not (path / "config.json").is_file() or not (path / "environment.json").is_file():
        return ""
    run = RunFolder.open(path)
    status, newest = run.status(), latest_checkpoint(run.checkpoints)
    state, step, total = status.get("state"), status.get("step", 0), status.get("total_steps", "?")
    if state == "running" and _alive(status.get("pid")):
        return f"this run is in training, at step {newest.name[5:].lstrip('0') if newest else 0} of {total} or later; wait until it ends"
    how = {"interrupted": "was interrupted", "failed": "failed", "running": "was killed"}.get(str(state), "stopped")
    reason = f" ({status['message']})" if state == "failed" and status.get("message") else ""
    if newest is None:
        return (
            f"this run {how} at step {step} of {total}{reason}, before its first checkpoint; start it again: {run.resume_command}"
        )
    return (
        f"this run {how} at step {max(step, int(newest.name[5:]))} of {total}{reason}: resume it with: {run.resume_command} -- or take its "
        f"newest checkpoint as it is: {newest}"
    )


def _alive(pid: Json) -> bool:
    """Whether a process of this machine has this number."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, TypeError, OverflowError):
        return True
    return True


def _read_dict(path: Path) -> dict[str, Json]:
    value = _read_json(path)
    if not isinstance(value, dict):
        raise InvalidInput(f"{path} holds no table of names and values; it was edited")
    return value


def _read_json(path: Path) -> Any:
    try:
        return strict_json(path.read_bytes(), str(path))
    except FileNotFoundError as error:
        raise InvalidInput(f"there is no {path}; is this a run folder?") from error
    except InvalidInput as error:
        raise InvalidInput(f"{error}; the file was damaged or edited: restore it, or choose a new folder") from error


def _write_json(path: Path, value: Json) -> None:
    write_atomically(path, (json.dumps(value, indent=2) + "\n").encode())
