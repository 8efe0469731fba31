"""A simulated place, prepared: it stands in for a real dataset in the demo and in comparisons over seeds."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..kitti import KittiDataset, read_ids
from ..label_shares import label_share_splits
from ..prepare import prepare
from .layout_kitti import write_kitti_layout
from .places import Domain


def prepared_stand_in(
    folder: Path,
    place: Domain,
    splits: Mapping[str, int],
    *,
    seed: int,
    classes: tuple[str, ...],
    label_shares: Iterable[float] = (),
    workers: int = 2,
) -> Path:
    """Simulate what a front camera sees in KITTI's layout (`folder`/raw) and prepare it. What is there is kept.

    Args:
        folder: Folder to write.
        place: Sensor and place.
        splits: Name of a split to its number of frames.
        seed: Everything follows from it.
        classes: Class names in label order.
        label_shares: `train` is also divided by these shares (see `label_shares.py`).
        workers: Processes.

    Returns:
        The folder of the prepared dataset.

    Raises:
        InvalidInput: The folder holds another simulation.
    """
    raw, out = folder / "raw", folder / "prepared"
    write_kitti_layout(raw, place, num_frames=sum(splits.values()), seed=seed, workers=workers, view="camera", splits=splits)
    ids = {split: read_ids(raw / "ImageSets" / f"{split}.txt") for split in splits}
    every = tuple(i for part in ids.values() for i in part)
    height = place.sensor.height
    prepare(
        KittiDataset(raw, every, classes=classes, z_shift=height),
        every,
        out,
        splits=ids | (label_share_splits(ids["train"], label_shares) if label_shares else {}),
        classes=classes,
        workers=workers,
    )
    return out
