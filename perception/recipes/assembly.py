"""From a preset and folders to what the trainers take: labelled batches, the feature database, the fleet's scenes.

The commands and the simulated main job both come through here, so that a check made for one holds for the other.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from ...core.errors import InvalidInput
from ...core.rig import RigSpec
from ...datasets.batches import LabeledBatches, UnlabeledBatches
from ...datasets.data_split import DataSplit
from ...datasets.gt_database import GtDatabase, GtSampler
from ...datasets.prepared import PreparedDataset
from ..models.detector import Detector
from ..models.encoders.fingerprint import encoder_fingerprint
from ..server.feature_gt import FeatureGtConfig, FeatureObjectDatabase, build_feature_object_database
from ..server.store import SmashedStore
from .presets import Preset


def labeled_batches(
    preset: Preset,
    data: DataSplit,
    *,
    batch_size: int,
    seed: int,
    size_shift: tuple[float, float, float] = (0.0, 0.0, 0.0),
) -> LabeledBatches:
    """The augmented labelled batches of a split, with GT sampling from that split's own database.

    size_shift: m added to the size of every labelled object instead of the preset's, where F-GT's objects are resized so.

    Raises InvalidInput if the dataset was prepared for other classes, or the database was built from another split.
    """
    names, frames = preset.detector.class_names, data.open()
    if frames.classes != names:
        raise InvalidInput(
            f"the dataset {frames.root} was prepared for the classes {frames.classes}, the preset detects {names}; prepare it again "
            f"with --classes {' '.join(names)}"
        )
    sampler = None
    if preset.train.gt_sampling:
        database = GtDatabase.open(data.gt_database, expected_fingerprint=frames.split_fingerprint())
        sampler = GtSampler(database, dict(zip(names, preset.train.gt_sampling, strict=True)))
    return LabeledBatches(
        frames=frames,
        batch_size=batch_size,
        seed=seed,
        augmentation=replace(preset.train.augmentation, size_shift=size_shift) if any(size_shift) else preset.train.augmentation,
        keep_range=preset.detector.encoder.grid.range,
        gt_sampler=sampler,
    )


def unlabeled_batches(preset: Preset, frames: PreparedDataset, *, batch_size: int, seed: int) -> UnlabeledBatches:
    """Raw unlabelled scans, moved for the student as labelled ones are, without GT sampling and without resizing objects."""
    ranges = replace(preset.train.augmentation, size_shift=(0.0, 0.0, 0.0), object_scale=(1.0, 1.0))
    return UnlabeledBatches(frames=frames, batch_size=batch_size, seed=seed, augmentation=ranges)


def feature_object_database(
    folder: Path, frames: PreparedDataset, detector: Detector, config: FeatureGtConfig, *, codec: str
) -> FeatureObjectDatabase:
    """F-GT's database of a labelled split in ``folder``, built if it is not there. It must be of this split and this encoder."""
    split, encoder = frames.split_fingerprint(), encoder_fingerprint(detector.encoder, RigSpec())
    if not folder.exists():
        build_feature_object_database(
            folder, frames, detector, codec=codec, config=config, split_fingerprint=split, encoder_fingerprint=encoder
        )
    return FeatureObjectDatabase.open(folder, config=config, split_fingerprint=split, encoder_fingerprint=encoder)


def fleet_store(folder: Path, detector: Detector, rig: RigSpec) -> SmashedStore:
    """The verified scenes in ``folder``, if this detector's encoder behind this rig made them.

    Raises InvalidInput otherwise: features of two encoders do not mix, nor do those of two mounting heights.
    """
    store, expected = SmashedStore(folder), encoder_fingerprint(detector.encoder, rig)
    if store.fingerprint != expected:
        raise InvalidInput(
            f"the store {folder} holds scenes of the encoder {store.fingerprint[:12]}, this detector's encoder behind the rig {rig} is "
            f"{expected[:12]}; start from the checkpoint whose encoder the fleet runs, and give its rig as in extract and ingest"
        )
    return store
