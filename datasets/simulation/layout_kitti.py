"""Writing a simulated dataset in KITTI's object layout, so that the KITTI reader, the evaluation and other tools can read it.

    root/simulation.json                       what was simulated: domain, seed, view; a resumed run must agree
    root/training/velodyne[_reduced]/<id>.bin  the full turn, or what the virtual camera sees
    root/training/{calib,label_2}/<id>.txt
    root/ImageSets/<split>.txt

Frames are independent, so workers share nothing. The label file is written last: a frame that has one is complete and is kept. Read next:
`simulate.py`, which makes a frame.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch

from ...core.errors import InvalidInput
from ...core.files import write_atomically
from ...core.frame import Calibration
from ...core.point_files import write_bin
from ..kitti_text import write_objects
from .places import Domain
from .simulate import SimulatedFrame, View, simulate_frame, virtual_camera
from .writing import claim_folder, run_jobs, split_members

FOLDERS: Mapping[View, str] = {"camera": "velodyne_reduced", "full": "velodyne"}


def format_calibration(calibration: Calibration) -> str:
    """Text of a KITTI calibration file. All four cameras are the one virtual camera; rectification and IMU are trivial.

    Args:
        calibration: The virtual camera.

    Returns:
        The text of the file.
    """

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
    """Write one frame: scan, calibration and the labels of the objects in the virtual camera's picture.

    Args:
        root: Root of the dataset.
        frame: The frame.
        view: Decides the folder of the scan.
    """
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
    """Simulate frames 0 to `num_frames - 1` in KITTI's layout.

    Complete frames are kept, so an interrupted run continues, and more frames can be added later.

    Args:
        root: Folder to write.
        domain: Sensor and place.
        num_frames: Number of frames, from 0.
        seed: Everything follows from it.
        workers: Processes. The bytes do not depend on their number.
        view: `camera`: what a front camera sees; `full`: the whole turn.
        splits: Name of a split to its frame numbers, or to a count that is taken in order from the frames not yet taken. By default
            all frames are `train`.
        progress: Called with (frames done, all frames) after each frame.

    Returns:
        How many frames were made in this run.

    Raises:
        InvalidInput: The folder holds another simulation, or a split asks for frames that are not made.
        UpcycleError: A worker died.

    Example:
        write_kitti_layout("data/sim", domain("waymo"), num_frames=120, seed=1, splits={"train": 100, "val": 20})
    """
    root = Path(root)
    if num_frames < 1 or workers < 1:
        raise InvalidInput(f"need num_frames >= 1 and workers >= 1, found {num_frames} and {workers}")
    members = split_members(num_frames, splits if splits is not None else {"train": num_frames})
    claim_folder(root, domain, seed, view)

    missing = [i for i in range(num_frames) if not _complete(root, i, view)]
    done = num_frames - len(missing)
    if progress is not None and done:
        progress(done, num_frames)
    for _ in run_jobs(_work, [(root, domain, seed, i, view) for i in missing], workers):
        done += 1
        if progress is not None:
            progress(done, num_frames)
    for name, ids in members.items():
        write_atomically(root / "ImageSets" / f"{name}.txt", "".join(f"{i:06d}\n" for i in ids).encode())
    return len(missing)


def _complete(root: Path, index: int, view: View) -> bool:
    files = (f"{FOLDERS[view]}/{index:06d}.bin", f"calib/{index:06d}.txt", f"label_2/{index:06d}.txt")
    return all((root / "training" / f).is_file() for f in files)
