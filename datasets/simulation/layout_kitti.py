"""Writing a simulated dataset in KITTI's object layout, so that the KITTI reader, evaluation and everyone's tools open it.

    root/simulation.json                       what was simulated: domain, seed, view; a resumed run must agree
    root/training/velodyne[_reduced]/<id>.bin  the full turn, or what the virtual camera sees
    root/training/{calib,label_2}/<id>.txt
    root/ImageSets/<split>.txt

Frames are independent, so workers share nothing. The label is written last: a frame that has one is complete and is kept.
"""

from __future__ import annotations

import json
import multiprocessing
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from pathlib import Path

import torch

from ...perception.files import write_atomically
from ...perception.structures import Calibration, InvalidInput, UpcycleError
from ..kitti_text import write_objects
from ..point_files import write_bin
from .places import Domain
from .raycast import SIMULATOR_VERSION
from .simulate import SimulatedFrame, View, simulate_frame, virtual_camera

FOLDERS: Mapping[View, str] = {"camera": "velodyne_reduced", "full": "velodyne"}


def format_calibration(calibration: Calibration) -> str:
    """The text of a KITTI calibration file; all four cameras are the one camera, the rectification and the IMU are trivial."""

    def row(name: str, matrix: torch.Tensor) -> str:
        return f"{name}: " + " ".join(f"{v:.12e}" for v in matrix.flatten().tolist()) + "\n"

    rows = [row(f"P{i}", calibration.projection) for i in range(4)]
    rows += [
        row("R0_rect", torch.eye(3)),
        row("Tr_velo_to_cam", calibration.lidar_to_camera[:3]),
        row("Tr_imu_to_velo", torch.eye(4)[:3]),
    ]
    return "".join(rows)


def write_frame(root: Path, frame: SimulatedFrame, view: View) -> None:
    """Write one frame below ``root``; labels are those of the objects in the virtual camera's picture."""
    name, folder = frame.frame.id, root / "training"
    write_bin(folder / FOLDERS[view] / f"{name}.bin", frame.frame.points)
    write_atomically(folder / "calib" / f"{name}.txt", format_calibration(virtual_camera()).encode())
    write_objects(folder / "label_2" / f"{name}.txt", frame.objects.select(frame.in_picture()))


def _work(job: tuple[Path, Domain, int, int, View]) -> int:
    root, domain, seed, index, view = job
    write_frame(root, simulate_frame(domain, seed=seed, index=index, view=view), view)
    return index


def write_kitti_layout(
    root: Path | str,
    domain: Domain,
    *,
    num_frames: int,
    seed: int,
    workers: int = 2,
    view: View = "camera",
    splits: Mapping[str, int | Sequence[int]] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> int:
    """Simulate frames 0 to ``num_frames - 1`` into ``root``; return how many were made anew.

    Complete frames are kept, so an interrupted run continues, and more frames can be added later. The bytes do not depend on
    ``workers``, the number of processes.

    splits: name of an ImageSets file -> its frame numbers, or a count taken in order from those not yet taken by a count before it;
    None writes all frames as "train". progress: called with (frames done, frames in all) after each frame.
    Raises ``InvalidInput`` if the folder holds another simulation, or if a split asks for frames that are not made;
    ``UpcycleError`` if a worker dies.
    """
    root = Path(root)
    if num_frames < 1 or workers < 1:
        raise InvalidInput(f"need num_frames >= 1 and workers >= 1, found {num_frames} and {workers}")
    members = _split_members(num_frames, splits if splits is not None else {"train": num_frames})
    _claim(root, domain, seed, view)

    missing = [i for i in range(num_frames) if not _complete(root, i, view)]
    done = num_frames - len(missing)
    if progress is not None and done:
        progress(done, num_frames)
    for _ in _run([(root, domain, seed, i, view) for i in missing], workers):
        done += 1
        if progress is not None:
            progress(done, num_frames)
    for name, ids in members.items():
        write_atomically(root / "ImageSets" / f"{name}.txt", "".join(f"{i:06d}\n" for i in ids).encode())
    return len(missing)


def _run(jobs: list[tuple[Path, Domain, int, int, View]], workers: int) -> Iterator[int]:
    """The frames as they get done. The first is made here, so that the ray-caster is compiled once, before there are workers."""
    yield from map(_work, jobs[:1])
    rest = jobs[1:]
    if workers == 1 or len(rest) < 2:
        yield from map(_work, rest)
        return
    # Forked where that is safe, as torch's own DataLoader does, with one torch thread per worker: no start-up time, no import.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    chunk = max(1, min(16, len(rest) // (4 * workers)))
    try:
        with ProcessPoolExecutor(min(workers, len(rest)), context, torch.set_num_threads, (1,)) as pool:
            yield from pool.map(_work, rest, chunksize=chunk)
    except BrokenProcessPool as error:
        raise UpcycleError(
            "a simulation worker died (out of memory, or killed); the frames made so far are kept: run it again, "
            "with workers=1 if it happens again"
        ) from error


def _complete(root: Path, index: int, view: View) -> bool:
    files = (f"{FOLDERS[view]}/{index:06d}.bin", f"calib/{index:06d}.txt", f"label_2/{index:06d}.txt")
    return all((root / "training" / f).is_file() for f in files)


def _claim(root: Path, domain: Domain, seed: int, view: View) -> None:
    """Write what is simulated here, or refuse if something else already is."""
    path = root / "simulation.json"
    wanted = json.dumps({"version": SIMULATOR_VERSION, "seed": seed, "view": view, "domain": asdict(domain)}, indent=1) + "\n"
    if path.is_file():
        if path.read_text(encoding="utf-8") != wanted:
            raise InvalidInput(
                f"{path} describes another simulation than domain {domain.name!r}, seed {seed}, view {view!r}, version {SIMULATOR_VERSION}; "
                "use another folder, or remove that one"
            )
        return
    if (root / "training").exists():
        raise InvalidInput(f"{root / 'training'} exists but {path} does not: it is no simulated dataset; use another folder")
    write_atomically(path, wanted.encode())


def _split_members(num_frames: int, splits: Mapping[str, int | Sequence[int]]) -> dict[str, list[int]]:
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
