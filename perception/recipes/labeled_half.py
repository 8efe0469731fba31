"""The labeled half of the server's training: the labeled split, and a few labeled frames of the target where drivers gave some.

The frames of the target are few, so they get a share of the batch of their own. Their objects have the target's sizes already, so no size
shift touches them, and F-GT pastes them beside those of the labeled split.

Read next: `assembly.py` (batches and object databases of one split), `upcycling_job.py` and `method_run.py`, which train on this half.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from ...core.errors import InvalidInput, require_numbers
from ...core.frame import Frame
from ...datasets.batches import SharedBatches
from ...datasets.data_split import DataSplit
from ..models.detector import Detector
from ..server.feature_gt import JoinedObjects, ObjectDatabase
from ..server.methods import Method
from ..server.upcycle_config import UpcycleConfig
from .assembly import feature_object_database, labeled_batches
from .presets import Preset

NO_SHIFT = (0.0, 0.0, 0.0)


@dataclass(frozen=True, kw_only=True)
class TargetLabels:
    """A few labeled frames of the target, beside the labeled split."""

    data: DataSplit
    """The frames, prepared for the same classes."""
    share: float = 0.5
    """Share of the labeled frames of a training that are drawn from them, above 0. With 1 no frame of the labeled split is
    drawn; F-GT still pastes its objects."""

    def __post_init__(self) -> None:
        require_numbers("TargetLabels", least=1e-6, most=1.0, share=self.share)


@dataclass(frozen=True, kw_only=True)
class LabeledHalf:
    """Where the labels of a training come from."""

    data: DataSplit
    """The labeled split."""
    target: TargetLabels | None = None
    """A few labeled frames of the target; None without them."""

    @property
    def splits(self) -> tuple[DataSplit, ...]:
        """The labeled split, and that of the target where there is one."""
        return (self.data,) if self.target is None else (self.data, self.target.data)

    def ensure_gt_databases(self) -> None:
        """Build the databases of raw objects for GT sampling, where they are not there."""
        for split in self.splits:
            split.ensure_gt_database()

    def batches(self, preset: Preset, method: Method, config: UpcycleConfig, *, seed: int) -> Callable[[int], tuple[Frame, ...]]:
        """Make the batches of labeled frames for a method. GT databases are built if they are not there.

        Args:
            preset: Detector (classes and range) and augmentation.
            method: Its `labeled` decides about the size shift of F-GT: the oracles' labels come from the target and have its sizes already.
                A method that estimates sizes takes no random ones but those of F-GT.
            config: Frames per batch, and F-GT's size shift and random sizes, which labeled objects get too.
            seed: Decides the order of the frames and every random draw of the augmentation.

        Returns:
            The batches as a function of the step.

        Raises:
            InvalidInput: A dataset was prepared for other classes, or a database was built from another split.
        """
        if preset.train.gt_sampling:
            self.ensure_gt_databases()
        shift = config.f_gt.size_shift if method.labeled == "source" else NO_SHIFT
        if method.labeled == "source" and (config.f_gt.scales_objects or method.estimates_sizes):
            # A method that estimates sizes needs no random ones: those of the source model's preset end here.
            known = replace(preset.train.augmentation, object_scale=config.f_gt.object_scale, side_scale=config.f_gt.side_scale)
            preset = replace(preset, train=replace(preset.train, augmentation=known))
        if self.target is None:
            return labeled_batches(preset, self.data, batch_size=config.labeled_batch, seed=seed, size_shift=shift)
        return SharedBatches(
            first=labeled_batches(preset, self.data, batch_size=1, seed=seed, size_shift=shift),
            second=labeled_batches(preset, self.target.data, batch_size=1, seed=seed),
            batch_size=config.labeled_batch,
            share=self.target.share,
        )

    def objects_to_paste(self, folder: Path, detector: Detector, config: UpcycleConfig, *, codec: str) -> ObjectDatabase:
        """Open F-GT's databases, and build them first where they are not there.

        Args:
            folder: Folder of the database of the labeled split; that of the target lies beside it.
            detector: Its encoder computes the features.
            config: F-GT's settings.
            codec: Codec of the fleet's scenes.

        Returns:
            The objects of all splits.

        Raises:
            InvalidInput: No split has an object with enough points, or a folder holds a database of something else.
        """
        found: list[ObjectDatabase] = [feature_object_database(folder, self.data.open(), detector, config.f_gt, codec=codec)]
        if self.target is not None:
            beside = folder.with_name(f"{folder.name}_target")
            unshifted = replace(config.f_gt, size_shift=NO_SHIFT)
            found.append(feature_object_database(beside, self.target.data.open(), detector, unshifted, codec=codec))
        if not any(map(len, found)):
            raise InvalidInput(
                f"F-GT needs objects to paste, and {' and '.join(map(str, self.splits))} has none with {config.f_gt.min_points} or more "
                "points; lower --preset.upcycle.f-gt.min-points, or take a method without F-GT (--method hybrid)"
            )
        return found[0] if len(found) == 1 else JoinedObjects(found)
