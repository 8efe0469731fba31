"""Makes the inputs of the trainers from a preset and folders: batches, the feature object database, the fleet's scenes.

The commands and the pipeline both use these functions, so that a check made for one holds for the other.

Read next: `pipeline.py`, which runs all stages in order.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.rig import RigSpec
from ...datasets.batches import LabeledBatches, UnlabeledBatches
from ...datasets.data_split import DataSplit
from ...datasets.gt_database import GtDatabase
from ...datasets.gt_sampling import GtSampler
from ...datasets.prepared import PreparedDataset
from ..models.detector import Detector
from ..models.encoders.fingerprint import encoder_fingerprint
from ..server.feature_object_database import FeatureObjectDatabase, build_feature_object_database
from ..server.store import SmashedStore
from ..server.upcycle_config import FeatureGtConfig
from .own_classes import classes_with_objects
from .presets import Preset


def labeled_batches(
    preset: Preset,
    data: DataSplit,
    *,
    batch_size: int,
    seed: int,
    size_shift: tuple[float, ...] = (0.0, 0.0, 0.0),
) -> LabeledBatches:
    """Augmented batches of labeled frames, with GT sampling from the split's own database.

    Args:
        preset: Detector (classes and range) and augmentation.
        data: The labeled split. Its GT database must exist if the preset samples objects.
        batch_size: Frames per batch.
        seed: Decides the order of the frames and every random draw of the augmentation.
        size_shift: Meters added to length, width and height of every labeled object, or three numbers for each class. (0, 0, 0) keeps the
            preset's shift. `upcycle` passes the shift of F-GT's pasted objects, so that both have the same size (`labeled_half.py`).

    Returns:
        The batches as a function of the step.

    Raises:
        InvalidInput: The dataset was prepared for other classes, or the database was built from another split.
    """
    frames = data.open()
    check_classes(preset, frames)
    sampler = None
    if preset.train.gt_sampling:
        database = GtDatabase.open(data.gt_database, expected_fingerprint=frames.split_fingerprint())
        sampler = GtSampler(database, dict(zip(frames.classes, preset.train.gt_sampling, strict=True)))
    return LabeledBatches(
        frames=frames,
        batch_size=batch_size,
        seed=seed,
        augmentation=replace(preset.train.augmentation, size_shift=size_shift) if any(size_shift) else preset.train.augmentation,
        keep_range=preset.detector.encoder.grid.range,
        gt_sampler=sampler,
    )


def check_classes(preset: Preset, frames: PreparedDataset) -> None:
    """Refuse a dataset that was prepared for other classes than a preset's. Case does not matter.

    Args:
        preset: Its detector has the classes.
        frames: The dataset.

    Raises:
        InvalidInput: Names or order differ.
    """
    names = preset.detector.class_names
    if [name.casefold() for name in frames.classes] != [name.casefold() for name in names]:
        usable = classes_with_objects(frames)
        other = f", or train a detector for these classes with `train … --classes {' '.join(frames.classes)}`"
        if usable != frames.classes:
            few = ", ".join(name for name in frames.classes if name not in usable)
            other = f". A detector for its own classes cannot be trained either, because it has too few objects of {few}"
        raise InvalidInput(
            f"the dataset {frames.root} was prepared for the classes {', '.join(frames.classes)}, and the preset detects "
            f"{', '.join(names)}; prepare it again into another folder with --classes {' '.join(names)}{other}"
        )


def unlabeled_batches(preset: Preset, frames: PreparedDataset, *, batch_size: int, seed: int) -> UnlabeledBatches:
    """Batches of raw unlabeled scans, for the baselines that train on raw scans.

    The student sees them with the preset's flips, rotation and scale. Pasting and resizing objects would take labels, so these are off.

    Args:
        preset: Its augmentation is applied.
        frames: The scans. Their labels, if any, are removed.
        batch_size: Scans per batch.
        seed: Decides the order of the scans and every random draw of the augmentation.

    Returns:
        The batches as a function of the step.
    """
    ranges = replace(preset.train.augmentation, size_shift=(0.0, 0.0, 0.0), object_scale=(1.0, 1.0), side_scale=(1.0, 1.0))
    return UnlabeledBatches(frames=frames, batch_size=batch_size, seed=seed, augmentation=ranges)


def feature_object_database(
    folder: Path, frames: PreparedDataset, detector: Detector, config: FeatureGtConfig, *, codec: str
) -> FeatureObjectDatabase:
    """F-GT's object database of a labeled split. It is built if the folder does not exist.

    Args:
        folder: Folder of the database.
        frames: The labeled split, whose objects are cut out.
        detector: Its encoder computes the objects' features.
        config: F-GT's settings.
        codec: `fp16` or `int8`: the objects' features take the same round trip as the fleet's scenes.

    Returns:
        The opened database.

    Raises:
        InvalidInput: The folder holds a database of another split, another encoder or other settings.
    """
    split, encoder = frames.split_fingerprint(), encoder_fingerprint(detector.encoder, RigSpec())
    if not folder.exists():
        build_feature_object_database(
            folder, frames, detector, codec=codec, config=config, split_fingerprint=split, encoder_fingerprint=encoder
        )
    return FeatureObjectDatabase.open(folder, config=config, split_fingerprint=split, encoder_fingerprint=encoder)


def fleet_store(folder: Path, detector: Detector, rig: RigSpec) -> SmashedStore:
    """Open a store of verified scenes and check that the detector's encoder made them.

    Args:
        folder: Folder of the store.
        detector: Its encoder must be the one that the fleet runs.
        rig: The fleet's rig. It is part of the encoder fingerprint, because features of two mounting heights do not mix either.

    Returns:
        The opened store.

    Raises:
        InvalidInput: The scenes come from another encoder, or from another rig, or none of them has a cell.
    """
    store, expected = SmashedStore(folder), encoder_fingerprint(detector.encoder, rig)
    if store.fingerprint != expected:
        raise InvalidInput(
            f"the store {folder} holds scenes with the encoder fingerprint {store.fingerprint[:12]}…, and this detector with the rig given "
            f"({rig}) has {expected[:12]}…; start from the detector whose encoder the fleet runs, with the rig given to extract and ingest"
        )
    if len(store) and not int(store.voxels.max()):
        raise InvalidInput(
            f"none of the {len(store)} scenes of the store {folder} has a cell, so nothing can be learned from them: the scans had no point in "
            "the detector's range. Look at the rig and the crop of `extract`, and extract them again"
        )
    return store
