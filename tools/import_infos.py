"""`upcycle3d import infos FILE`: labels of OpenPCDet or mmdetection3d as a folder for `prepare`. Read next: `perception/interchange/moving_data.py`."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from ..perception.interchange.moving_data import MovedLabels, labels_from_infos
from .console import console, print_table, run_command, write_json


@dataclass(frozen=True, kw_only=True)
class ImportInfos:
    """Turn an info file (.pkl) into labels that `prepare folder` reads. The file is read as data: nothing in it is run."""

    file: tyro.conf.Positional[Path]
    """Info file of OpenPCDet (KITTI or custom) or mmdetection3d 1.x."""
    out: Path
    """Folder to add labels and the list of the split to. Several splits may share it."""
    split: str
    """Name of the split, such as train."""
    points: Path | None = None
    """Folder of the scans (ID.bin or ID.npy), to which OUT/points becomes a link. Leave it out where OUT/points is there."""
    json: Path | None = None
    """Also write the counts to this file as JSON."""


def command(config: ImportInfos) -> None:
    """Turn an info file of OpenPCDet or mmdetection3d into a folder that `prepare` reads."""
    moved = labels_from_infos(config.file, config.out, split=config.split, points=config.points)
    say_moved(moved)
    console.print(moved.understood)
    write_json(config.json, counts(moved))
    console.print(f"next: upcycle3d prepare folder {config.out} --out DIR --classes {' '.join(moved.objects)}")


def say_moved(moved: MovedLabels) -> None:
    """Print how many boxes moved.

    Args:
        moved: what was read or written.
    """
    print_table("boxes", ("class", "number"), list(moved.objects.items()))
    console.print(
        f"{moved.frames} frames, {moved.unlabeled} of them without labels; objects left out (DontCare, ignored, no class): {moved.dropped}"
    )
    console.print(f"written: {', '.join(map(str, moved.files))}")


def counts(moved: MovedLabels) -> dict[str, object]:
    """The counts as JSON values.

    Args:
        moved: what was read or written.

    Returns:
        Numbers by name.
    """
    return {"frames": moved.frames, "objects": moved.objects, "left_out": moved.dropped, "unlabeled": moved.unlabeled}


if __name__ == "__main__":
    sys.exit(run_command(command))
