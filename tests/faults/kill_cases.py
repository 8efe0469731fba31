"""The jobs that a kill must not hurt, each with tiny inputs. `killing.py` kills them.

A new case joins `CASES`: `inputs` makes what the job reads, `begin` runs it, `go_on` runs it again as a user would after a kill,
and `result` must be equal to that of a run that nobody killed (leave out what is random, such as scene ids).
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from functools import cache
from pathlib import Path

from faults.fleet_kills import FLEET_CASES
from faults.killing import KillCase
from faults.kills_training import TRAIN, UPCYCLE
from upcycle3d.core.frame import Frame
from upcycle3d.datasets.gt_database import build_gt_database
from upcycle3d.datasets.prepare import prepare
from upcycle3d.datasets.prepared import PreparedDataset
from upcycle3d.datasets.simulation.places import KITTI
from upcycle3d.datasets.simulation.simulate import SimulatedDataset

CLASSES = ("Car", "Pedestrian")
SMALL = replace(KITTI, sensor=replace(KITTI.sensor, elevations=KITTI.sensor.elevations[::8], azimuths=360))
FRAMES = 6


def digests(root: Path) -> dict[str, str]:
    """SHA-256 of every file below a folder, hidden ones left out, by relative name."""
    files = (p for p in sorted(root.rglob("*")) if p.is_file() and not any(x.startswith(".") for x in p.relative_to(root).parts))
    return {str(p.relative_to(root)): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


@cache
def frames() -> list[Frame]:
    """Simulated frames, made once: a kill must not wait for the simulator."""
    source = SimulatedDataset(domain=SMALL, num_frames=FRAMES, seed=0, classes=CLASSES)
    return [source[i] for i in range(FRAMES)]


def _simulate_frames(_root: Path) -> None:
    frames()


def _prepare(root: Path, workers: int) -> None:
    source = frames()
    ids = [frame.id for frame in source]
    prepare(
        source, ids, root / "data", splits={"train": ids[:4], "val": ids[4:]}, classes=CLASSES, workers=workers, chunk_frames=2
    )
    train = PreparedDataset(root / "data", "train")
    fingerprint = train.split_fingerprint()
    build_gt_database(train, root / "data" / "gt_database" / "train", class_names=CLASSES, fingerprint=fingerprint)


def _prepared(root: Path) -> dict[str, str]:
    if PreparedDataset(root / "data").verify():
        return {"damaged": "frames"}
    return digests(root / "data")


PREPARE = KillCase(
    name="prepare",
    inputs=_simulate_frames,
    begin=lambda root: _prepare(root, 0),
    go_on=lambda root: _prepare(root, 0),
    result=_prepared,
)
PREPARE_WITH_WORKERS = replace(
    PREPARE, name="prepare with workers", begin=lambda root: _prepare(root, 2), go_on=lambda root: _prepare(root, 2)
)

CASES: tuple[KillCase, ...] = (PREPARE, PREPARE_WITH_WORKERS, *FLEET_CASES, TRAIN, UPCYCLE)
