"""What the writers of the layouts share: whose folder it is, which frames are in which split, and the worker processes."""

from __future__ import annotations

import json
import multiprocessing
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

import torch

from ...core.errors import InvalidInput, UpcycleError
from ...core.files import write_atomically
from .places import Domain
from .raycast import SIMULATOR_VERSION
from .simulate import View

Job = TypeVar("Job")
Done = TypeVar("Done")


def claim_folder(root: Path, domain: Domain, seed: int, view: View, *, layout: str | None = None) -> None:
    """Record what is simulated in a folder, in simulation.json, before anything else is written there.

    Args:
        root: The folder.
        domain: Sensor and place.
        seed: Seed of the dataset.
        view: `camera` or `full`.
        layout: Recorded too; None for KITTI's layout, which came first.

    Raises:
        InvalidInput: The folder holds another simulation, or anything that is not simulated.
    """
    path = root / "simulation.json"
    settings = {"version": SIMULATOR_VERSION, "seed": seed, "view": view, "domain": asdict(domain)}
    wanted = json.dumps({"layout": layout, **settings} if layout else settings, indent=1) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != wanted:
            raise InvalidInput(
                f"{path} describes another simulation than {layout or 'kitti'} layout, domain {domain.name!r}, seed {seed}, view {view!r}, "
                f"version {SIMULATOR_VERSION}; use another folder, or remove that one"
            )
        return
    if root.exists() and not root.is_dir():
        raise InvalidInput(f"{root} is a file; give a folder to simulate into")
    # A process that was killed while it wrote simulation.json leaves a temporary file (see `core/files.py`).
    others = sorted(p.name for p in root.iterdir() if not re.fullmatch(r"\..*\.tmp", p.name)) if root.exists() else []
    if others:
        raise InvalidInput(
            f"{root} is not empty ({others[0]}{' and more' if len(others) > 1 else ''}) and holds no simulation.json: it is no "
            "simulated dataset; use another folder"
        )
    write_atomically(path, wanted.encode())


def run_jobs(work: Callable[[Job], Done], jobs: Sequence[Job], workers: int, *, chunk: int = 16) -> Iterator[Done]:
    """Run jobs in worker processes. The first job runs here, so that the ray caster is compiled once, before there are workers.

    Args:
        work: Called with each job.
        jobs: The jobs.
        workers: Number of processes.
        chunk: Highest number of jobs that are handed over at a time.

    Returns:
        The results, in order, as they are done.

    Raises:
        UpcycleError: A worker died.
    """
    yield from map(work, jobs[:1])
    rest = jobs[1:]
    if workers == 1 or len(rest) < 2:
        yield from map(work, rest)
        return
    # Forked where that is safe, as torch's own DataLoader does, with one torch thread per worker: no start-up time, no import.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    try:
        with ProcessPoolExecutor(min(workers, len(rest)), context, torch.set_num_threads, (1,)) as pool:
            yield from pool.map(work, rest, chunksize=max(1, min(chunk, len(rest) // (4 * workers))))
    except BrokenProcessPool as error:
        raise UpcycleError(
            "a simulation worker died (out of memory, or killed); the frames made so far are kept: run it again, "
            "with workers=1 if it happens again"
        ) from error


def split_members(num_frames: int, splits: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
    """Find the frame numbers of every split.

    Args:
        num_frames: Number of frames.
        splits: Name of a split to its frame numbers, or to a count that is taken in order.

    Returns:
        Frame numbers by split.

    Raises:
        InvalidInput: A split asks for frames that are not there, for none, or for one twice.
    """
    members: dict[str, list[int]] = {}
    indices, start = range(num_frames), 0
    for name, wanted in splits.items():
        ids = list(indices[start : start + wanted]) if isinstance(wanted, int) else list(wanted)
        if isinstance(wanted, int):
            start += wanted
        strangers = [i for i in ids if i not in indices]
        if strangers or not ids or (isinstance(wanted, int) and len(ids) < wanted) or len(set(ids)) < len(ids):
            raise InvalidInput(
                f"split {name!r} asks for {wanted}, but the frames are 0 to {num_frames - 1}"
                + (f", {start - wanted} of them taken" if isinstance(wanted, int) else "")
                + "; give every split at least one frame, none twice, and make enough of them"
            )
        members[name] = ids
    return members
