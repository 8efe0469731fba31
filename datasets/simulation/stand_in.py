"""A simulated place, prepared: what stands in for a real dataset in the demo and in the benchmark."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from ..kitti import KittiDataset, read_ids
from ..label_shares import label_share_splits
from ..prepared import prepare
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
    """Simulate what a front camera sees (``folder``/raw, KITTI's layout) and prepare it; returns the prepared dataset's folder.

    splits: name -> number of frames. label_shares: ``train`` is also split by these (``label_shares``). What is there is kept.
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
        notes={"root": str(raw.resolve()), "layout": "kitti", "z_shift": height},
        workers=workers,
    )
    return out
