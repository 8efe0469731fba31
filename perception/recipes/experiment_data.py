"""The frames of an experiment with one seed: simulated places, or prepared datasets.

Read next: `upcycling_experiment.py`, which compares methods on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ...datasets.data_split import DataSplit
from ...datasets.label_shares import DRAWS, labeled_split
from ...datasets.simulation.places import domain
from ...datasets.simulation.stand_in import prepared_stand_in

DatasetName = Literal["waymo", "lyft", "kitti", "compact", "large"]
"""Datasets, and two simulated places that stand in for none."""


@dataclass(frozen=True, kw_only=True)
class ExperimentData:
    """Prepared frames of one seed."""

    labeled: DataSplit
    """Frames with labels to learn from."""
    fleet: DataSplit
    """Frames of the fleet, which are smashed."""
    validation: DataSplit
    """Frames to score on."""


@dataclass(frozen=True, kw_only=True)
class SimulationSize:
    """Numbers of frames of a simulated scenario.

    With partial labels, `labeled` and `fleet` together are the training frames, of which a share has labels.
    """

    labeled: int = 100
    """Labeled frames of the source domain."""
    fleet: int = 200
    """Unlabeled frames of the target domain."""
    validation: int = 100
    """Frames of the target domain to score on. With fewer, AP depends on single cars."""


def simulated_adaptation(
    folder: Path,
    source: DatasetName,
    target: DatasetName,
    *,
    size: SimulationSize,
    seed: int,
    classes: tuple[str, ...],
    workers: int = 2,
) -> ExperimentData:
    """Simulate and prepare a source and a target domain. What is there is kept.

    Args:
        folder: Folder for both.
        source: The domain with labels.
        target: The domain where the fleet drives.
        size: Numbers of frames.
        seed: Decides the streets. The two domains and other seeds have no street in common.
        classes: Classes of the labels.
        workers: Processes that simulate and prepare.

    Returns:
        The frames.
    """
    labeled, streets = {"train": size.labeled}, (1000 + 2 * seed, 1001 + 2 * seed)
    unlabeled = {"train": size.fleet, "val": size.validation}
    roots = [
        prepared_stand_in(folder / role, domain(place), splits, seed=street, classes=classes, workers=workers)
        for role, place, splits, street in zip(("source", "target"), (source, target), (labeled, unlabeled), streets, strict=True)
    ]
    return adaptation_data(*roots)


def simulated_partial(
    folder: Path,
    place: DatasetName,
    *,
    size: SimulationSize,
    share: float,
    seed: int,
    classes: tuple[str, ...],
    workers: int = 2,
) -> ExperimentData:
    """Simulate and prepare one domain, of which a share of the training frames has labels. What is there is kept.

    Args:
        folder: Folder of the domain.
        place: The domain.
        size: Numbers of frames.
        share: Share of the training frames that have labels, between 0 and 1.
        seed: Decides the streets and which frames have labels.
        classes: Classes of the labels.
        workers: Processes that simulate and prepare.

    Returns:
        The frames.
    """
    splits = {"train": size.labeled + size.fleet, "val": size.validation}
    street = 1000 + 2 * seed
    root = prepared_stand_in(folder, domain(place), splits, seed=street, classes=classes, label_shares=(share,), workers=workers)
    return partial_data(root, share=share, seed=seed)


def adaptation_data(source: Path, target: Path) -> ExperimentData:
    """Use two prepared datasets: `train` of the source has labels, `train` of the target is the fleet, `val` of the target is scored.

    Args:
        source: Prepared dataset of the source domain.
        target: Prepared dataset of the target domain.

    Returns:
        The frames.
    """
    return ExperimentData(
        labeled=DataSplit(root=source, name="train"),
        fleet=DataSplit(root=target, name="train"),
        validation=DataSplit(root=target, name="val"),
    )


def partial_data(root: Path, *, share: float, seed: int) -> ExperimentData:
    """Use one prepared dataset, made with `prepare --label-shares`.

    Args:
        root: The prepared dataset.
        share: Share of the training frames that have labels.
        seed: Modulo three it picks one of the three draws of labeled frames.

    Returns:
        The frames.
    """
    name = labeled_split(share, DRAWS[seed % len(DRAWS)])
    return ExperimentData(
        labeled=DataSplit(root=root, name=name),
        fleet=DataSplit(root=root, name=f"{name}-rest"),
        validation=DataSplit(root=root, name="val"),
    )
